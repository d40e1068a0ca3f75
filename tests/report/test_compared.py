"""`python -m ltjax.compare RUN... --html=FILE`: runs side by side, seeds of a config together."""

import json
import re

import numpy as np
import pytest

from ltjax import compare
from ltjax.report import compared
from tests.report import made_up
from tests.test_compare import config


def write(folder, seed=0, *, stages=("ce",), attacked=None, numbers=True, **settings):
    """Write a workdir, as training leaves it."""
    (folder / "report").mkdir(parents=True)
    results = made_up.results(stages=stages, seed=seed)
    if attacked is not None:
        results["robustness"] = made_up.robustness(seed, stages[-1], attacked)
    groups = {name: np.flatnonzero(m).tolist() for name, m in made_up.groups_of(made_up.class_counts(10)).items()}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.json").write_text(json.dumps(config(seed, "made-up", stages=stages, **settings)))
    (folder / "split.json").write_text(json.dumps({"sha256": "5a", "groups": groups}))
    if numbers:
        (folder / "report" / "numbers.json").write_text(json.dumps(made_up.numbers(stages=stages, seed=seed)))
    return folder


def page(tmp_path, *arguments):
    file = tmp_path / "compared.html"
    assert compare.main([*map(str, arguments), f"--html={file}"]) == 0
    return file.read_text()


def test_seeds_of_a_config_share_a_panel(tmp_path, capsys):
    runs = [write(tmp_path / "a", 0), write(tmp_path / "b", 1), write(tmp_path / "c", 0, lr=0.5)]
    html = page(tmp_path, *runs)
    assert html.count('id="accuracy0-t"') == html.count('id="accuracy1-t"') == 1
    assert 'id="accuracy2-t"' not in html
    values = [json.loads((run / "results.json").read_text())["accuracy"]["all"] for run in runs[:2]]
    assert f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}" in html


def test_each_stage_is_a_panel_with_the_flag(tmp_path, capsys):
    html = page(tmp_path, write(tmp_path / "a", stages=("ce", "classifier")), "--stages")
    titles = re.findall(r'<title id="accuracy\d-t">([^<]*)', html)
    assert [title.split(":")[0] for title in titles] == ["made-up / Stage ce", "made-up / Stage classifier"]


def test_figures_by_class_are_means_over_seeds(tmp_path):
    row = compare.rows([write(tmp_path / "a", 0), write(tmp_path / "b", 1)])[0]
    each = [compared.load(run, None, "") for run in row.runs]
    html = compared.panels.pooled("both", [one.panel for one in each], [1, 1], row.figures)
    expected = np.mean([one.panel.own for one in each], axis=0)
    np.testing.assert_allclose(html.own, expected)
    assert html.accuracy["few"] == row.figures["few"]
    assert html.bins["counts"].sum() == 2 * sum(range(15))


def test_a_run_is_weighted_by_its_replicas(tmp_path):
    panels = [compared.load(write(tmp_path / str(seed), seed), None, "").panel for seed in (0, 1)]
    html = compared.panels.pooled("both", panels, [3, 1], {})
    np.testing.assert_allclose(html.own, (3 * panels[0].own + panels[1].own) / 4)


def test_attacked_runs_have_means_and_spread(tmp_path, capsys):
    runs = [write(tmp_path / "a", 0, attacked=0.5), write(tmp_path / "b", 1, attacked=0.3)]
    html = page(tmp_path, *runs)
    assert f"{100 * 0.2:.1f} ± {100 * np.std([0.25, 0.15], ddof=1):.1f}" in html  # PGD-20
    assert 'id="robust0-curve-t"' in html


def test_a_run_attacked_at_another_radius_is_not_averaged(tmp_path, capsys):
    runs = [write(tmp_path / "a", 0, attacked=0.5), write(tmp_path / "b", 1, attacked=0.3)]
    results = json.loads((runs[1] / "results.json").read_text())
    results["robustness"]["epsilon"] = 4 / 255
    (runs[1] / "results.json").write_text(json.dumps(results))
    html = page(tmp_path, *runs)
    assert f"warning: made-up: {runs[1]} left out below, Under attack" in html
    assert "<td>25.0</td>" in html.partition('id="robust"')[2]  # PGD-20 of the first alone


def test_the_page_says_how_each_run_was_trained(tmp_path, capsys):
    runs = [write(tmp_path / "a", 0), write(tmp_path / "b", 1)]
    html = page(tmp_path, *runs)
    for seed, run in enumerate(runs):
        facts = f"seed {seed}; commit 0123456789; device 2 x cpu: cpu; command: python run.py"
        assert f"<dt>{run}</dt><dd>{facts}" in html


def test_only_the_page_has_a_column_and_a_caution_of_the_legacy_best(tmp_path, capsys):
    html = page(tmp_path, write(tmp_path / "a"))
    assert ">legacy best</th>" in html and "which no fair comparison may use" in html
    assert "legacy best" not in capsys.readouterr().out


def test_confused_pairs_are_those_of_the_first_run_of_each_row(tmp_path, capsys):
    runs = [write(tmp_path / "a", 0), write(tmp_path / "b", 1), write(tmp_path / "c", 0, lr=0.5)]
    html = page(tmp_path, *runs)
    assert re.findall(r"<h3>(made-up[^<]*): Most confused", html) == [
        "made-up, first run",
        "made-up (ce.lr 0.1 -&gt; 0.5)",
    ]
    assert html.count('<img class="small"') == 4  # two images of one pair of each


def test_runs_without_a_report_show_their_results(tmp_path, capsys):
    html = page(tmp_path, write(tmp_path / "a", numbers=False))
    assert 'id="accuracy0-t"' in html and 'id="geometry0-t"' not in html


def test_curves_are_shown_if_the_first_run_has_no_test_lines(tmp_path, capsys):
    runs = [write(tmp_path / "a", 0), write(tmp_path / "b", 1)]
    train = {"stage": "ce", "epoch": 1, "step": 1, "split": "train", "values": {"loss": 2.0, "lr": 0.1}}
    test = {**train, "split": "test", "values": {"accuracy": {"all": 0.4321}}}
    for run, lines in zip(runs, ([train], [train, test]), strict=True):
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = page(tmp_path, *runs)
    assert "test accuracy by epoch" in html and "43.2" in html


def test_names_outside_utf8_are_written_with_question_marks(tmp_path, capsys):
    run = write(tmp_path / "a")
    results = json.loads((run / "results.json").read_text())
    results["class_names"][0] = "caf\udce9 au lait"
    (run / "results.json").write_text(json.dumps(results))
    assert "caf? au lait" in page(tmp_path, run)


def test_a_file_that_cannot_be_written_is_one_line(tmp_path, capsys):
    run = write(tmp_path / "a")
    assert compare.main([str(run), f"--html={tmp_path / 'no' / 'where.html'}"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("missing", ["per_class_accuracy", "calibration_bins"])
def test_results_that_cannot_be_drawn_are_named(tmp_path, capsys, missing):
    run = write(tmp_path / "a")
    results = json.loads((run / "results.json").read_text())
    del results["stages"]["ce"][missing]
    (run / "results.json").write_text(json.dumps(results))
    assert compare.main([str(run), f"--html={tmp_path / 'x.html'}"]) == 2
    assert str(run / "results.json") in capsys.readouterr().err
