"""The report of a trained run: its numbers agree with the network, and --mode=report writes it again."""

import csv
import json

import jax
import numpy as np
import pytest
from scipy.special import softmax

from ltjax import config, methods, metrics, train
from ltjax.engine import experiment as experiments
from ltjax.engine import feed, observe, restore
from ltjax.engine.stage import make_apply
from ltjax.modes import report
from ltjax.system import parallel
from ltjax.system.files import read_json
from ltjax.types import UserError
from tests.test_run import tiny_config


def quick(**changes):
    """Return one epoch of each stage of MiSLAS with a small network on long-tailed Fashion-MNIST."""
    made = tiny_config(**{"stages": ("features", "classifier"), "epochs": 1, **changes})
    model = dict(name="vit", depth=1, width=8, heads=2, patch=7, grid=4, features="mean")  # little to trace and compile
    return {**made, "model": {**model, "logit_scale": True}}


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    make_mesh = parallel.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        two = jax.devices()[:2]
        patch.setattr(parallel, "make_mesh", lambda devices=None, replicas=1: make_mesh(two, replicas))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    return workdir, train.train(quick(), workdir)


@pytest.fixture(scope="module")
def numbers(trained):
    return read_json(trained[0] / "report" / "numbers.json")


@pytest.fixture(scope="module")
def experiment():
    return experiments.set_up(config.parse(quick()), None)


@pytest.fixture(scope="module")
def checkpoints(experiment, trained):
    """Return {stage: its newest checkpoint}."""
    return {name: restore.restore(experiment, stage, trained[0]) for name, stage in experiment.config.stages.items()}


@pytest.fixture(scope="module")
def restored(experiment, checkpoints):
    """Return the experiment, and the config and variables of its last stage."""
    return experiment, experiment.config.stages["classifier"], checkpoints["classifier"].state.variables


@pytest.fixture(scope="module")
def outputs(experiment):
    """Return a function (variables, uint8 images) -> outputs of the network."""
    apply = jax.jit(lambda variables, images: make_apply(experiment.nets, "eval")(variables, images / 255)[0])
    return lambda variables, images: apply(variables, images.astype(np.float32))


def test_every_run_ends_with_a_page(trained):
    page = (trained[0] / "report" / "index.html").read_text()
    for text in ("MiSLAS, stage 1", "MiSLAS, stage 2", "Ankle boot", "Label smoothing", "data:image/png"):
        assert text in page


def test_shares_of_correct_predictions_are_the_tables_accuracies(trained, numbers):
    for name, measured in numbers["stages"].items():
        accuracy = trained[1]["stages"][name]["accuracy"]
        for group, shares in measured["errors"].items():
            assert shares["right"] == pytest.approx(accuracy[group], abs=1e-9)
            assert sum(shares.values()) == pytest.approx(1)


def test_distances_equal_those_from_features_to_class_means(restored, outputs, numbers):
    experiment, _, variables = restored
    data, split = experiment.data, experiment.split
    train_features = np.asarray(outputs(variables, data.train_images[split.train]).features)
    own = data.train_labels[split.train]
    means = np.stack([train_features[own == c].mean(0) for c in range(10)])
    features = np.asarray(outputs(variables, data.test_images).features)
    distances = np.linalg.norm(features[:, None] - means, axis=-1)  # [N, C]
    at_own = distances[np.arange(len(features)), data.test_labels]
    distances[np.arange(len(features)), data.test_labels] = np.inf
    for key, values in (("own", at_own), ("wrong", distances.min(1))):
        expected = [values[data.test_labels == c].mean() for c in range(10)]
        np.testing.assert_allclose(numbers["stages"]["classifier"]["distances"][key], expected, rtol=2e-3)


def test_classwise_ece_equals_that_of_all_probabilities(restored, outputs, numbers):
    experiment, _, variables = restored
    probabilities = softmax(np.asarray(outputs(variables, experiment.data.test_images).logits), -1)
    gaps = metrics.classwise_gaps(probabilities, experiment.data.test_labels)
    expected = metrics.classwise_ece(gaps, len(experiment.data.test_labels))
    assert numbers["stages"]["classifier"]["classwise_ece"] == pytest.approx(expected, rel=1e-3)


def test_class_values_are_collected(restored):
    experiment, stage, variables = restored
    learned = observe.class_values(stage, experiments.make_method(experiment, stage), variables, 10)
    np.testing.assert_array_equal(learned["Logit scale"], variables.params["net"]["logit_scale"])
    assert learned["Label smoothing"][0] == pytest.approx(0.1) and learned["Label smoothing"][-1] == pytest.approx(0)
    kernel = np.asarray(variables.params["net"]["classifier"]["kernel"])
    np.testing.assert_allclose(learned["Length of the classifier's weights"], np.sqrt((kernel**2).sum(0)), rtol=1e-5)


def test_class_values_are_means_over_replicas(restored):
    experiment, stage, variables = restored
    margins = np.stack([np.linspace(-1, 1, 10), np.ones(10)])[:, None]  # [replicas, layers, C]
    both = variables._replace(params={"net": {}, "method": {"margins": margins.astype(np.float32)}})
    drolt = methods.create("drolt", experiment.split.class_counts)
    margin = observe.class_values(stage, drolt, both, 10)["DRO-LT's margin"]
    np.testing.assert_allclose(margin, np.maximum(margins, 0).mean((0, 1)), rtol=1e-6)


def test_values_that_are_equal_for_all_classes_are_left_out(restored):
    _, stage, variables = restored
    balanced = methods.create("mislas", np.full(10, 7), head=0.3, tail=0.1)
    assert "Label smoothing" not in observe.class_values(stage, balanced, variables, 10)


def test_confused_pairs_have_images(numbers):
    tail, others = numbers["pairs"]
    assert "few" in tail["title"] and 1 <= len(tail["pairs"]) <= 6 and others["pairs"]
    for pair in tail["pairs"]:
        assert 0 < pair["shares"]["classifier"] <= 1
        *mistaken, beside = pair["images"]
        assert all(image["confidence"] > 0 for image in mistaken) and beside["confidence"] is None


def test_the_table_of_classes_has_the_figures_of_the_results(trained):
    """balanced accuracy is the mean of the recalls, macro F1 that of the F1 scores."""
    folder, results = trained[0] / "report", trained[1]
    with open(folder / "classes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == results["class_names"]
    assert [int(row["training_images"]) for row in rows] == results["class_counts"]
    assert [int(row["test_images"]) for row in rows] == results["test_class_counts"]
    for column, key in (("recall", "balanced_accuracy"), ("f1", "macro_f1")):
        assert np.mean([float(row[column]) for row in rows]) == pytest.approx(results[key], abs=1e-5)
    written = read_json(folder / "classes.json")
    assert written["stage"] == "MiSLAS, stage 2"
    for row, again in zip(rows, written["classes"], strict=True):
        assert list(row) == list(again) and float(row["precision"]) == pytest.approx(again["precision"], abs=1e-5)


def test_the_table_of_confusions_counts_every_test_image(trained):
    with open(trained[0] / "report" / "confusion.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    results = trained[1]
    assert sum(int(row["images"]) for row in rows) == results["num_images"]
    right = sum(int(row["images"]) for row in rows if row["true"] == row["predicted"])
    assert right == pytest.approx(results["accuracy"]["all"] * results["num_images"])


def test_mistakes_are_all_wrong_images_the_surest_first(trained, numbers, restored, outputs):
    experiment, _, variables = restored
    with open(trained[0] / "report" / "mistakes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    probabilities = softmax(np.asarray(outputs(variables, experiment.data.test_images).logits), -1)
    predictions, labels, names = probabilities.argmax(-1), experiment.data.test_labels, experiment.class_names
    assert len(rows) == numbers["mistakes"]["wrong"] == (predictions != labels).sum()
    confidences = [float(row["confidence"]) for row in rows]
    assert confidences == sorted(confidences, reverse=True)
    for row in rows[:100]:
        index = int(row["image"].removeprefix("test image "))
        assert row["true"] == names[labels[index]] and row["predicted"] == names[predictions[index]] != row["true"]
        assert float(row["confidence"]) == pytest.approx(float(probabilities[index].max()), rel=1e-3)
    shown = [(each["name"], names[each["true"]], names[each["predicted"]]) for each in numbers["mistakes"]["shown"]]
    assert shown == [(row["image"], row["true"], row["predicted"]) for row in rows[: len(shown)]] and len(shown) == 24


def test_report_mode_writes_the_same_report_again(trained):
    workdir, before = trained[0], {}
    for name in ("index.html", "numbers.json", "classes.csv", "classes.json", "confusion.csv", "mistakes.csv"):
        path = workdir / "report" / name
        before[name] = path.read_text()
        path.unlink()
    assert report.report_workdir(quick(), workdir)["accuracy"] == trained[1]["accuracy"]
    assert {name: (workdir / "report" / name).read_text() for name in before} == before


def only_the_first_stage(experiment, restored, monkeypatch):
    """Remove all checkpoints except those of stage `features`."""
    stage = experiment.config.stages["features"]
    monkeypatch.setattr(report, "restored_stages", lambda *_: iter([(stage, restored)]))


def test_the_report_of_a_stopped_run_has_its_stages_so_far(trained, experiment, checkpoints, tmp_path, monkeypatch):
    for path in ("config.json", "split.json", "metrics.jsonl"):
        (tmp_path / path).symlink_to(trained[0] / path)
    monkeypatch.setattr(report, "set_up", lambda *_: experiment)
    only_the_first_stage(experiment, checkpoints["features"], monkeypatch)
    summary = report.report_workdir(quick(), tmp_path)
    assert summary["accuracy"] == trained[1]["stages"]["features"]["accuracy"]
    page = (tmp_path / "report" / "index.html").read_text()
    assert "not trained to its end: MiSLAS, stage 1 (stage 1 of 2) is at epoch 1 of 1." in page
    assert "MiSLAS, stage 2" not in page and 'aria-label="Command"' not in page
    assert not (tmp_path / "results.json").exists()


def test_the_report_of_a_stopped_run_evaluates_its_newest_checkpoint(
    trained, experiment, checkpoints, tmp_path, monkeypatch
):
    for path in ("config.json", "split.json"):
        (tmp_path / path).symlink_to(trained[0] / path)
    early = {"epoch": 0, "step": 1, "test": {"accuracy": {"all": 0.0}}}
    stopped = checkpoints["features"]._replace(record={**checkpoints["features"].record, "evaluations": [early]})
    monkeypatch.setattr(report, "set_up", lambda *_: experiment)
    only_the_first_stage(experiment, stopped, monkeypatch)
    summary = report.report_workdir(quick(), tmp_path)
    assert summary["accuracy"] == pytest.approx(trained[1]["stages"]["features"]["accuracy"])


def test_a_workdir_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run: train first"):
        report.report_workdir(quick(), tmp_path)


def test_each_replica_is_observed(trained, restored):
    experiment, stage, variables = restored
    run = config.parse(quick(replicas=2))
    both = experiments.set_up(run, None)
    variables = jax.device_get(variables)
    other = jax.tree.map(lambda x: np.float32(0.5) * x if np.issubdtype(x.dtype, np.floating) else x, variables)
    together = jax.tree.map(lambda a, b: np.stack([a, b]), variables._replace(arrays={}), other._replace(arrays={}))
    observed = observe.Observer(both).observe(stage, together)
    single = observe.Observer(experiment)
    for replica, of_replica in enumerate((variables, other)):
        (alone,) = single.observe(stage, of_replica)
        np.testing.assert_allclose(observed[replica]["own"], alone["own"], rtol=1e-3)
        np.testing.assert_allclose(observed[replica]["gaps"], alone["gaps"], atol=1e-2)


def test_a_failing_report_does_not_fail_the_run(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no pictures today")

    monkeypatch.setattr(report, "make_report", fail)
    train.write_report(None, {}, {}, None, train.logs.make_console(), None)
    assert "no pictures today" in capsys.readouterr().out


@pytest.mark.parametrize("side, most", [(report.SIDE, 8000), (report.LARGER_SIDE, 15_000)])
def test_a_sample_image_is_shrunk_to_a_few_kilobytes(restored, monkeypatch, side, most):
    experiment, _, _ = restored
    large = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)
    monkeypatch.setattr(feed, "picture", lambda *_: large)
    sample = report.sample(experiment, 0, side)
    assert sample["uri"].startswith("data:image/jpeg;base64,") and len(sample["uri"]) < most and not sample["small"]
    assert json.dumps(sample)
