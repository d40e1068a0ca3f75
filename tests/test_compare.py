"""`python -m ltjax.compare` on made-up runs: rows and figures, the three formats, notes and errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ltjax import compare
from ltjax.compare import Cell, MeanStd, Row
from ltjax.types import UserError

ROOT = Path(__file__).parents[1]


def measured(value, **also):
    """Return figures of one seed, each a function of `value`."""
    accuracy = {"all": value, "many": value + 0.1, "medium": value + 0.05, "few": value / 2}
    best = {"accuracy": value + 0.01, "epoch": 3}
    return {"accuracy": accuracy, "ece": value / 4, "num_images": 1000, "best_on_test": best, **also}


def stage(value, title="Cross-entropy", seconds=60.0, **also):
    return {"title": title, "epochs": 4, **measured(value), "seconds": seconds, **also}


def replicated(values, title="Cross-entropy", seconds=60.0):
    """Return a stage with replicas; its own means are wrong, to notice if they are read."""
    replicas = [measured(value, seed=seed) for seed, value in values.items()]
    return stage(-1.0, title, seconds, replicas=replicas, std={"accuracy": {"all": -1.0}, "ece": -1.0})


def results(stages, seed=0, name="ce", **also):
    final = list(stages)[-1]
    return {
        "name": name,
        "final_stage": final,
        **{key: value for key, value in stages[final].items() if key not in ("title", "epochs")},
        "seconds": sum(stage["seconds"] for stage in stages.values()),
        "stages": stages,
        "seed": seed,
        "group_sizes": {"all": 10, "many": 3, "medium": 3, "few": 4},
        **also,
    }


def config(seed=0, name="ce", lr=0.1, stages=("train",), data=None, **also):
    settings = {"method": {"name": "erm"}, "epochs": 4, "lr": lr, "groups": {"all": {"match": ".*", "rate": 1.0}}}
    data = {"name": "fashion_mnist_lt", **(data or {})}
    model = {"name": "resnet_cifar"}
    stages = {"stages": list(stages), **{stage: settings for stage in stages}}
    return {"name": name, "seed": seed, "data": data, "model": model, **stages, **also}


def write(folder, results, config=None, sha256="5a"):
    """Write a workdir, as training leaves it."""
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "split.json").write_text(json.dumps({"sha256": sha256}))
    return folder


def single(folder, value=0.5, seed=0, name="ce", sha256="5a", seconds=60.0, **settings):
    """Write the workdir of a run with one seed."""
    made = results({"train": stage(value, seconds=seconds)}, seed, name)
    return write(folder, made, config(seed, name, **settings), sha256)


def two_stages(folder, first=0.3, second=0.6, **settings):
    stages = {"features": stage(first, "Stage 1", 3600.0), "classifier": stage(second, "Stage 2", 90.0)}
    return write(folder, results(stages, name="mislas"), config(name="mislas", stages=tuple(stages), **settings))


def test_seeds_of_a_config_are_one_row_with_mean_and_sample_deviation(tmp_path):
    values = np.array([0.5, 0.53, 0.58])
    paths = [single(tmp_path / str(seed), value, seed) for seed, value in enumerate(values)]
    (row,) = compare.rows(paths)
    assert row.seeds == (0, 1, 2) and row.runs == tuple(paths)
    expected = {"all": values, "many": values + 0.1, "few": values / 2, "ece": values / 4, "best": values + 0.01}
    for key, seeds in expected.items():
        np.testing.assert_allclose(row.figures[key], (seeds.mean(), seeds.std(ddof=1)), rtol=1e-12)


def test_one_seed_has_no_deviation(tmp_path):
    (row,) = compare.rows([single(tmp_path / "run", 0.5)])
    assert row.figures["all"] == MeanStd(0.5, None)


def test_replicas_of_a_run_and_seeds_of_others_are_pooled(tmp_path):
    values = {0: 0.4, 1: 0.5, 2: 0.7}
    made = results({"train": replicated(values, seconds=100.0)}, seeds=[0, 1, 2])
    replicas = write(tmp_path / "replicas", made, config(replicas=3))
    (row,) = compare.rows([replicas, single(tmp_path / "single", 0.9, seed=7, seconds=50.0)])
    pooled = np.array([*values.values(), 0.9])
    assert row.seeds == (0, 1, 2, 7)
    np.testing.assert_allclose(row.figures["all"], (pooled.mean(), pooled.std(ddof=1)), rtol=1e-12)
    assert row.seconds == (100.0 / 3 + 50.0) / 2  # a seed, mean over runs


def test_a_seed_given_twice_counts_once_and_is_noted(tmp_path):
    made = results({"train": replicated({0: 0.4, 1: 0.5}, seconds=100.0)})
    replicas = write(tmp_path / "replicas", made, config(replicas=2))
    again = single(tmp_path / "again", 0.9, seed=1)
    (row,), notes = compare.compare([replicas, again])
    assert row.seeds == (0, 1) and row.runs == (replicas,) and row.seconds == 50.0
    assert row.figures["all"].mean == pytest.approx(0.45)
    assert notes == [f"note: seed 1 of ce in {again} as in {replicas}: counted once, from {replicas}"]


def test_the_same_run_by_two_paths_counts_once(tmp_path):
    run = single(tmp_path / "run")
    comparison = compare.compare([run, run / "results.json", tmp_path])
    assert [row.seeds for row in comparison.rows] == [(0,)] and not comparison.notes


@pytest.mark.parametrize("key", ["eval_batch_size", "checkpoint_seconds", "dispatch_steps", "replicate", "eval_every"])
def test_settings_that_change_no_figure_do_not_split_a_row(tmp_path, key):
    paths = [single(tmp_path / "a", seed=0), single(tmp_path / "b", seed=1, **{key: 7})]
    assert len(compare.rows(paths)) == 1


def test_runs_on_other_folders_of_images_are_other_rows(tmp_path):
    folders = [single(tmp_path / name, seed=0, data={"name": "image_folder", "root": name}) for name in "ab"]
    assert len(compare.rows(folders)) == 2


def test_a_config_saved_before_a_setting_existed_has_its_default(tmp_path):
    now = {"nesterov": False, "momentum": 0.9, "weight_decay": 0.0}
    spelt = single(tmp_path / "b", seed=1, data={"groups": "counts", "ranges": []}, eval_every=0, optimizer=now)
    assert len(compare.rows([single(tmp_path / "a", seed=0), spelt])) == 1


def test_a_config_without_a_stages_optimizer_has_that_of_the_run(tmp_path):
    paths = [single(tmp_path / str(seed), seed=seed, optimizer={"momentum": 0.8}) for seed in (0, 1)]
    spelt = json.loads((paths[1] / "config.json").read_text())
    spelt["train"] |= {"optimizer": {"momentum": 0.8}, "schedule": {"kind": "constant"}, "drop_last": False}
    (paths[1] / "config.json").write_text(json.dumps(spelt))
    assert len(compare.rows(paths)) == 1


def test_rows_of_one_name_show_differences_from_the_first(tmp_path):
    paths = [
        single(tmp_path / "a"),
        single(tmp_path / "b", lr=0.05),
        single(tmp_path / "c", batch_size=64, epochs=2, lr=0.2, model={"name": "resnet"}),
    ]
    assert [row.name for row in compare.rows(paths)] == [
        "ce",
        "ce (train.lr 0.1 -> 0.05)",
        "ce (model.name 'resnet_cifar' -> 'resnet', batch_size 128 -> 64, epochs 0 -> 2, and 1 more)",
    ]


def test_a_stages_key_that_one_side_lacks_is_not_named(tmp_path):
    other = config(name="ce", stages=("train", "head"))
    other["train"] = {**other["train"], "lr": 0.2, "augment": {"cutout": 4}}
    stages = {"train": stage(0.3), "head": stage(0.5)}
    paths = [single(tmp_path / "a"), write(tmp_path / "b", results(stages), other)]
    assert compare.rows(paths)[1].name == "ce (stages ['train'] -> ['train', 'head'], train.lr 0.1 -> 0.2)"


def test_rows_stay_in_the_order_given(tmp_path):
    paths = [single(tmp_path / name, name=name) for name in ("c", "a", "b")]
    assert [row.name for row in compare.rows(paths)] == ["c", "a", "b"]


def test_a_row_is_the_final_stage_or_with_stages_each(tmp_path):
    run = two_stages(tmp_path / "run")
    (row,) = compare.rows([run])
    assert (row.name, row.figures["all"].mean, row.seconds) == ("mislas", 0.6, 3690.0)
    both = compare.rows([run], stages=True)
    assert [(row.name, row.figures["all"].mean, row.seconds) for row in both] == [
        ("mislas / Stage 1", 0.3, 3600.0),
        ("mislas / Stage 2", 0.6, 90.0),
    ]


def test_a_figure_that_one_seed_lacks_is_absent(tmp_path):
    without = stage(0.5)
    del without["accuracy"]["medium"], without["best_on_test"]
    paths = [single(tmp_path / "a", seed=0), write(tmp_path / "b", results({"train": without}, 1), config(1))]
    (row,) = compare.rows(paths)
    assert list(row.figures) == ["all", "many", "few", "ece"]
    assert [cell.text for cell in compare.cells([row])[1]][3] == "-"


def test_a_folder_of_runs_means_the_finished_ones(tmp_path):
    paths = [single(tmp_path / name, name=name) for name in ("a", "b")]
    single(tmp_path / "unfinished")
    (tmp_path / "unfinished" / "results.json").unlink()
    rows, notes = compare.compare([tmp_path])
    assert [row.runs for row in rows] == [(path,) for path in paths]
    assert notes == [f"note: {tmp_path / 'unfinished'} is left out: no results.json, not trained to the end"]


def test_results_without_a_config_are_a_separate_row(tmp_path):
    lone = tmp_path / "lone.json"
    lone.write_text(json.dumps(results({"train": stage(0.5)})))
    rows, notes = compare.compare([single(tmp_path / "run", seed=1), lone])
    assert [row.name for row in rows] == ["ce", f"ce ({lone})"]
    assert notes == [f"note: {lone} has no config.json beside it: a row of its own"]


def test_a_warning_names_rows_with_other_training_images(tmp_path):
    paths = [single(tmp_path / "a", name="a"), single(tmp_path / "b", name="b", sha256="6b")]
    paths.append(single(tmp_path / "c", name="c"))
    assert compare.compare(paths).notes == ["warning: not comparable, different training images: a, c | b"]


def test_a_warning_joins_the_facts_that_split_the_rows_alike(tmp_path):
    other = results({"train": stage(0.5, num_images=99)}, name="b", group_sizes={"all": 10, "many": 10})
    paths = [single(tmp_path / "a", name="a")]
    paths.append(write(tmp_path / "b", other, config(name="b", data={"name": "cifar10"}), "6b"))
    facts = "data set, training images, number of test images, group sizes"
    assert compare.compare(paths).notes == [f"warning: not comparable, different {facts}: a | b"]


def test_a_warning_names_runs_of_one_row_by_path(tmp_path):
    paths = [single(tmp_path / "a", seed=0), single(tmp_path / "b", seed=1, sha256="6b")]
    assert compare.compare(paths).notes == [
        f"warning: not comparable, different training images: {paths[0]} | {paths[1]}"
    ]


def test_replicas_and_single_runs_are_comparable(tmp_path):
    replicas = {**replicated({0: 0.4, 1: 0.5}), "num_images": 1000.0}  # a mean
    paths = [write(tmp_path / "a", results({"train": replicas}), config()), single(tmp_path / "b", seed=5)]
    assert not compare.compare(paths).notes


ROWS = [
    Row("a_1 & b", {"all": MeanStd(0.5), "many": MeanStd(0.7), "ece": MeanStd(0.1)}, 3725.4, (0,), (Path("a"),)),
    Row("b (lr 1 -> 2)", {"all": MeanStd(0.6, 0.012), "ece": MeanStd(0.2, 0.03)}, 59.6, (0, 1), (Path("b"),)),
]


def test_cells_mark_the_best_as_shown_and_leave_gaps():
    assert compare.cells(ROWS) == [
        [Cell(text) for text in ("last epoch, %", "all", "many", "medium", "few", "ECE 15 bins", "time", "seeds")],
        [
            *(Cell("a_1 & b"), Cell("50.0"), Cell("70.0"), Cell("-"), Cell("-"), Cell("10.0", best=True)),
            *(Cell("1:02:05"), Cell("1")),
        ],
        [
            *(Cell("b (lr 1 -> 2)"), Cell("60.0 ± 1.2", best=True), Cell("-"), Cell("-"), Cell("-")),
            *(Cell("20.0 ± 3.0"), Cell("0:01:00"), Cell("2")),
        ],
    ]


def best_of(means):
    """Return which rows are marked in the column "all"."""
    rows = [Row(str(i), {"all": MeanStd(mean)}, 1.0, (0,), ()) for i, mean in enumerate(means)]
    return [row[1].best for row in compare.cells(rows)[1:]]


def test_equal_rounded_figures_are_equally_best():
    assert best_of([0.5001, 0.5004, 0.4]) == [True, True, False]


def test_nan_is_never_best():
    assert best_of([float("nan"), 0.2, 0.3]) == [False, False, True]


def test_a_single_row_has_no_best():
    assert best_of([0.5]) == [False]


def test_rows_that_are_not_comparable_have_no_best():
    cells = compare.cells(ROWS, comparable=False)
    assert not any(cell.best for row in cells for cell in row)


def test_ncm_and_the_legacy_best_have_columns_on_demand(tmp_path):
    with_ncm = stage(0.5, nearest_mean={"accuracy": {"all": 0.4321}})
    paths = [write(tmp_path / "a", results({"train": with_ncm}, name="a"), config(name="a")), single(tmp_path / "b")]
    header, first, second = compare.cells(compare.rows(paths), legacy_best=True)
    assert [cell.text for cell in header][5:8] == ["ECE 15 bins", "nearest mean", "legacy best"]
    assert [cell.text for cell in first][6:8] == ["43.2", "51.0"]
    assert [cell.text for cell in second][6:8] == ["-", "51.0"]


def test_the_legacy_best_is_only_shown_on_demand(tmp_path):
    header, row = compare.cells(compare.rows([single(tmp_path / "a")]))
    assert "legacy best" not in [cell.text for cell in header]
    assert "51.0" not in [cell.text for cell in row]


@pytest.mark.parametrize("test_counts, shown", [([5, 5, 0], False), ([5, 6, 0], True)])
def test_means_over_classes_have_columns_if_the_test_classes_are_unequal(tmp_path, test_counts, shown):
    made = results({"train": stage(0.5, balanced_accuracy=0.4, macro_f1=0.3)}, test_class_counts=test_counts)
    header, row = compare.cells(compare.rows([write(tmp_path / "a", made, config())]))
    actual = {name.text: cell.text for name, cell in zip(header, row, strict=True)}
    expected = {"balanced": "40.0", "macro F1": "30.0"} if shown else {}
    assert {name: text for name, text in actual.items() if name in ("balanced", "macro F1")} == expected


TABLE = [[Cell("run"), Cell("all")], [Cell("a_1 & b|c"), Cell("5.0")], [Cell("d -> [e]"), Cell("6.0 ± 0.1", best=True)]]


def test_markdown():
    assert compare.markdown(TABLE) == (
        "| run | all |\n| --- | ---: |\n| a_1 & b\\|c | 5.0 |\n| d -> \\[e\\] | **6.0 ± 0.1** |\n"
    )


def test_latex():
    assert compare.latex(TABLE) == (
        "\\begin{tabular}{lr}\n\\toprule\nrun & all \\\\\n\\midrule\n"
        "a\\_1 \\& b\\textbar{}c & 5.0 \\\\\n"
        "d $\\to$ [e] & \\textbf{6.0 $\\pm$ 0.1} \\\\\n"
        "\\bottomrule\n\\end{tabular}\n"
    )


def test_latex_escapes_its_special_characters():
    header, row = [Cell("run"), Cell("all")], [Cell("\\&%$#_{}~^<>"), Cell("1")]
    escaped = r"\textbackslash{}\&\%\$\#\_\{\}\textasciitilde{}\textasciicircum{}\textless{}\textgreater{} & 1"
    assert escaped in compare.latex([header, row])


def test_plain():
    console = Console(width=80, color_system=None)
    with console.capture() as captured:
        console.print(compare.plain(TABLE))
    assert captured.get() == (
        "┏━━━━━━━━━━━┳━━━━━━━━━━━┓\n"
        "┃ run       ┃       all ┃\n"
        "┡━━━━━━━━━━━╇━━━━━━━━━━━┩\n"
        "│ a_1 & b|c │       5.0 │\n"
        "│ d -> [e]  │ 6.0 ± 0.1 │\n"
        "└───────────┴───────────┘\n"
    )


def run_main(capsys, *arguments):
    """Return exit code, stdout and stderr."""
    code = compare.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_piped_table_is_whole_and_says_which_epoch(tmp_path, capsys):
    name = "a run with a name that is far longer than the eighty columns of a terminal which is not even there"
    code, out, err = run_main(capsys, single(tmp_path / "run", name=name))
    assert (code, err) == (0, "") and name in out and "Last epoch;" in out
    assert "\x1b" not in out and "…" not in out and "Legacy" not in out
    assert "Legacy best:" in run_main(capsys, tmp_path / "run", "--best")[1]


@pytest.mark.parametrize("format", ["markdown", "latex"])
def test_stdout_has_only_the_table(tmp_path, capsys, format):
    paths = [single(tmp_path / "a", name="a"), single(tmp_path / "b", name="b", sha256="6b")]
    code, out, err = run_main(capsys, *paths, f"--format={format}")
    assert code == 0 and out == getattr(compare, format)(compare.cells(compare.rows(paths), comparable=False))
    assert err == "warning: not comparable, different training images: a | b\n"


@pytest.mark.parametrize("format", ["plain", "markdown"])
def test_a_closed_pipe_is_no_failure(tmp_path, format):
    run = single(tmp_path / "run")
    command = [sys.executable, "-m", "ltjax.compare", str(run), f"--format={format}"]
    read, written = os.pipe()
    os.close(read)  # as after `| head -0`
    ran = subprocess.run(command, cwd=ROOT, stdout=written, stderr=subprocess.PIPE, text=True)
    os.close(written)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_an_unfinished_run_is_refused(tmp_path, capsys):
    run = single(tmp_path / "run")
    (run / "results.json").unlink()
    expected = f"error: {run} has no results.json: train it to the end first (the same command resumes)\n"
    assert run_main(capsys, run) == (2, "", expected)


def test_an_unfinished_run_among_finished_ones_is_left_out_with_a_note(tmp_path, capsys):
    done, begun, empty = single(tmp_path / "done"), single(tmp_path / "begun"), tmp_path / "empty"
    (begun / "results.json").unlink()
    empty.mkdir()
    code, out, err = run_main(capsys, begun, empty, done, "--format=markdown")
    assert (code, out) == (0, compare.markdown(compare.cells(compare.rows([done]))))
    assert [line.partition(": train")[0].partition(": name")[0] for line in err.splitlines()] == [
        f"note: left out: {begun} has no results.json",
        f"note: left out: {empty} holds no finished run",
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: RUN (see"),
        (["{here}/none"], "no {here}/none: name a run's workdir or its results.json"),
        (["{here}/empty"], "{here}/empty holds no finished run: name a workdir"),
        (["{here}/run", "--format=pdf"], "argument --format: invalid choice: 'pdf'"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(tmp_path, capsys, arguments, message):
    single(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    code, out, err = run_main(capsys, *(argument.format(here=tmp_path) for argument in arguments))
    assert (code, out) == (2, "") and err.startswith("error: " + message.format(here=tmp_path))
    assert err.count("\n") == 1


CUT, LIST, EMPTY, OTHER = '{"name": "ce", "sta', "[1]", "{}", '{"stages": {"train": {}}, "data": 3}'


@pytest.mark.parametrize(
    "name, text",
    [
        *(("results.json", text) for text in (CUT, LIST, EMPTY, OTHER)),
        *(("config.json", text) for text in (CUT, LIST, EMPTY, OTHER)),
        *(("split.json", text) for text in (CUT, LIST)),
    ],
)
def test_a_broken_file_is_named_with_what_to_do(tmp_path, capsys, name, text):
    run = single(tmp_path / "run")
    (run / name).write_text(text)
    code, out, err = run_main(capsys, run)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert str(run / name) in err and ("move it away" in err or "repair it" in err)


def test_stages_with_different_seeds_are_refused(tmp_path):
    stages = {"features": replicated({0: 0.3, 1: 0.4}), "classifier": stage(0.5)}
    run = write(tmp_path / "run", results(stages), config(stages=tuple(stages)))
    with pytest.raises(UserError, match="its stages have different seeds"):
        compare.rows([run])


def test_a_replica_without_its_seed_is_refused(tmp_path):
    made = replicated({0: 0.3, 1: 0.4})
    del made["replicas"][1]["seed"]
    with pytest.raises(UserError, match="no 'seed'"):
        compare.rows([write(tmp_path / "run", results({"train": made}), config())])


def test_the_command_runs_without_the_training_stack(tmp_path):
    run = single(tmp_path / "run")
    code = (
        "import sys; from ltjax import compare; done = compare.main(sys.argv[1:])\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr); sys.exit(done)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(run), "--format=markdown"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0 and ran.stdout.startswith("| last epoch, % | all |"), ran.stderr
    heavy = {"jax", "numpy", "flax", "optax", "orbax", "tensorflow_datasets", "tensorboardX", "cv2"}
    assert not set(ran.stderr.split()) & heavy


def attacked(value, **also):
    """Return what --mode=attack adds to results.json."""
    tests = {"clean": measured(value + 0.1), "pgd-20": measured(value), "autoattack": measured(value - 0.1)}
    return {"stage": "train", "norm": "linf", "epsilon": 0.031, "num_images": 500, "tests": tests, **also}


def attacked_run(folder, value, **also):
    path = single(folder, 0.5, name=folder.name)
    made = json.loads((path / "results.json").read_text())
    (path / "results.json").write_text(json.dumps({**made, "robustness": attacked(value, **also)}))
    return path


def test_robust_accuracies_are_columns_if_a_run_was_attacked(tmp_path):
    one, other = attacked_run(tmp_path / "robust", 0.4), single(tmp_path / "natural", 0.6, name="natural")
    header, first, second = compare.cells(compare.rows([one, other]))
    shown = dict(zip((cell.text for cell in header), first, strict=True))
    assert [shown[column].text for column in ("PGD-20", "AutoAttack", "AutoAttack few")] == ["40.0", "30.0", "15.0"]
    assert "CW-20" not in shown
    assert [cell.text for cell in second[-5:-2]] == ["-", "-", "-"]


def test_attacks_of_other_radii_are_not_comparable(tmp_path):
    runs = attacked_run(tmp_path / "near", 0.4), attacked_run(tmp_path / "far", 0.4, epsilon=0.062)
    _, notes = compare.compare(runs)
    assert [note for note in notes if "different attack" in note]


def test_seeds_with_different_attacks_have_no_robust_mean(tmp_path):
    made = [single(tmp_path / str(seed), 0.5, seed=seed) for seed in (0, 1)]
    for path, epsilon in zip(made, (0.031, 0.062), strict=True):
        actual = json.loads((path / "results.json").read_text())
        (path / "results.json").write_text(json.dumps({**actual, "robustness": attacked(0.4, epsilon=epsilon)}))
    (row,) = compare.rows(made)
    assert row.seeds == (0, 1) and "all" in row.figures
    assert not set(row.figures) & set(compare.ATTACKED)
