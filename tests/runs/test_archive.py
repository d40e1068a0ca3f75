"""Archives of finished runs, which work in every mode except training."""

import json
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

import ltjax
from ltjax import compare, config, train
from ltjax.interop import export
from ltjax.modes import attack, report
from ltjax.modes.evaluate import evaluate_workdir
from ltjax.runs import archive
from ltjax.runs.weights import load_weights
from ltjax.types import UserError
from tests.test_run import final_arrays, run, tiny_config

pytestmark = pytest.mark.usefixtures("one_device")

STAGES = {"stages": ("features", "classifier"), "epochs": 2, "classifier.epochs": 1}
ATTACK = {"attack.num_images": 16, "attack.batch_size": 16, "attack.tests": ("pgd-2",), "attack.radii": ()}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Return the workdir of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train.train(tiny_config(**STAGES), folder)
    return folder


@pytest.fixture
def archived(workdir, tmp_path):
    folder = tmp_path / "archive"
    archive.archive(workdir, folder)
    return folder


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_an_archive_is_four_files(archived):
    assert sorted(path.name for path in archived.iterdir()) == [
        "config.json",
        "results.json",
        "split.json",
        "weights.safetensors",
    ]
    assert archive.is_archive(archived)


def test_a_workdir_is_not_an_archive(workdir):
    assert not archive.is_archive(workdir)


def test_results_have_the_figures_of_every_evaluated_epoch(workdir):
    stages = results(workdir)["stages"]
    assert [evaluation["epoch"] for evaluation in stages["features"]["evaluations"]] == [1, 2]
    last = stages["classifier"]["evaluations"][-1]
    assert (last["accuracy"], last["ece"]) == (stages["classifier"]["accuracy"], stages["classifier"]["ece"])


def test_eval_mode_reproduces_the_figures_exactly(archived, workdir):
    actual = evaluate_workdir(tiny_config(**STAGES), archived)
    assert list(actual["stages"]) == ["classifier"]
    for key in ("accuracy", "ece", "loss", "per_class_accuracy"):
        assert actual[key] == results(workdir)[key], key
    assert not (archived / "checkpoints").exists()


def test_averaged_weights_are_the_archived_ones(tmp_path):
    config = tiny_config(**STAGES | {"stages": ("features",), "epochs": 3, "features.ema": {"decay": 0.9}})
    train.train(config, tmp_path / "run")
    archive.archive(tmp_path / "run", tmp_path / "archive")
    expected, actual = results(tmp_path / "run"), evaluate_workdir(config, tmp_path / "archive")
    for key in ("accuracy", "ece", "loss", "per_class_accuracy"):
        assert actual[key] == expected[key]
    np.testing.assert_array_equal(
        ltjax.load(tmp_path / "archive").logits(np.full((2, 28, 28, 1), 0.3, np.float32)),
        ltjax.load(tmp_path / "run").logits(np.full((2, 28, 28, 1), 0.3, np.float32)),
    )


def test_the_command_line_evaluates_an_archive_without_a_config(archived):
    code, out, error = run("--mode=eval", f"--workdir={archived}")
    assert code == 0, error
    assert f"{100 * results(archived)['accuracy']['all']:.1f}" in out


def test_a_loaded_archive_equals_the_loaded_run(archived, workdir):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), np.uint8)
    ours, theirs = ltjax.load(archived), ltjax.load(workdir)
    np.testing.assert_array_equal(ours.logits(images), theirs.logits(images))
    assert (ours.class_names, ours.image_size, ours.about) == (theirs.class_names, theirs.image_size, theirs.about)


def test_report_and_attack_mode_accept_an_archive(archived):
    values = tiny_config(**STAGES, **ATTACK)
    report.report_workdir(values, archived)
    assert "<svg" in (archived / "report" / "index.html").read_text()
    actual = attack.attack_workdir(values, archived)
    assert actual["tests"]["clean"]["num_images"] == 16
    assert results(archived)["robustness"]["stage"] == "classifier"


def test_an_archive_predicts(archived, tmp_path):
    Image.new("L", (28, 28), 90).save(tmp_path / "a.png")
    (actual,) = ltjax.load(archived).predict(tmp_path)
    assert actual.classes[0] in results(archived)["class_names"]


def test_compare_shows_the_same_row_for_archive_and_run(archived, workdir):
    ours, theirs = (compare.rows([folder])[0] for folder in (archived, workdir))
    assert ours._replace(runs=()) == theirs._replace(runs=())


def test_training_in_an_archive_prints_that_the_run_is_finished(archived, capsys):
    train.train(tiny_config(**STAGES), archived)
    assert "holds a finished run of this config" in " ".join(capsys.readouterr().out.split())
    assert archive.is_archive(archived)


def test_a_stage_can_start_from_the_weights_of_an_archive(archived, tmp_path, capsys):
    """The later stage of a chain starts from the weights of an earlier run."""
    values = tiny_config(stages=("classifier",), **{"classifier.epochs": 1, "classifier.start_from": "scratch"})
    values |= {"weights": str(archived), "weights_parts": ("backbone", "classifier")}
    config.parse(values)
    train.train(values, tmp_path / "next")
    assert "backbone, classifier alone: images of 28 pixels" in " ".join(capsys.readouterr().out.split())
    folders = archived, _archived(tmp_path / "next")
    before, after = (load_weights(folder).variables.params["net"] for folder in folders)
    np.testing.assert_array_equal(before["backbone"]["conv"]["kernel"], after["backbone"]["conv"]["kernel"])
    assert (before["classifier"]["kernel"] != after["classifier"]["kernel"]).any()


def _archived(workdir):
    archive.archive(workdir, workdir / "archive")
    return workdir / "archive"


def test_an_unfinished_run_is_refused(workdir, tmp_path, capsys):
    shutil.copytree(workdir, tmp_path / "run", ignore=shutil.ignore_patterns("results.json"))
    assert archive.main([str(tmp_path / "run"), str(tmp_path / "archive")]) == 2
    assert "holds no finished run (results.json is missing): train it to the end first" in capsys.readouterr().err
    assert not (tmp_path / "archive").exists()


def test_a_single_changed_bit_of_a_checkpoint_is_noticed(workdir, tmp_path):
    """Change a bit that Orbax does not notice."""
    shutil.copytree(workdir, tmp_path / "run")
    step, state = final_arrays(tmp_path / "run")
    counters = state["opt_state"]["inner_states"]["classifier"]["inner_state"][1][1]
    counters["count"] = counters["count"] ^ 1
    path = tmp_path / "run" / "checkpoints" / "classifier" / str(step) / "state"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state, force=True)
    for read in (ltjax.load, export.read, lambda run: archive.archive(run, tmp_path / "archive")):
        with pytest.raises(UserError, match=r"cannot read the checkpoint .*fingerprint"):
            read(tmp_path / "run")


def test_another_run_is_not_overwritten(workdir):
    with pytest.raises(UserError, match=r"holds something else than an archive"):
        archive.archive(workdir, workdir)


def test_an_archive_is_not_written_over_itself(archived):
    before = {path.name: path.read_bytes() for path in archived.iterdir()}
    with pytest.raises(UserError, match=r"holds something else than an archive|name another folder"):
        archive.archive(archived, archived)
    assert {path.name: path.read_bytes() for path in archived.iterdir()} == before


def test_results_of_an_older_version_are_refused(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    old = results(workdir)
    del old["stages"]["classifier"]["evaluations"]
    (tmp_path / "run" / "results.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match="lacks the figures of each epoch"):
        archive.archive(tmp_path / "run", tmp_path / "archive")


def test_damaged_results_are_named(archived):
    broken = results(archived)
    broken["stages"]["classifier"]["evaluations"] = []
    (archived / "results.json").write_text(json.dumps(broken))
    with pytest.raises(UserError, match=r"results\.json does not hold what ltjax writes there"):
        archive.read_archive(archived)
