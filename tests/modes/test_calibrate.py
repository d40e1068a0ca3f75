"""`--calibrate` on a network that is known: nearest mean of pixels, far too sure of itself."""

import json
import subprocess
import sys

import numpy as np
import pytest

from ltjax import data, metrics
from ltjax.calibration import fit_temperature
from ltjax.interop.weights import ARRAYS
from ltjax.modes import calibrate
from ltjax.runs.checkpoint import write_json
from ltjax.types import UserError
from tests.test_run import ROOT, environment, tiny_config

HELD_OUT = {"data.holdout": 2, "data.max_count": 18, "data.imbalance": 3.0, "stages": ("ce",)}


class NearestMean:
    """Minus the squared distance to the mean image of each class, [N, 10]."""

    def __init__(self, scale):
        images = data.load("fashion_mnist_lt")
        pixels = images.train_images.reshape(len(images.train_labels), -1) / np.float32(255)
        self.scale = np.float32(scale)
        self.means = np.stack([pixels[images.train_labels == c].mean(0) for c in range(10)])

    def logits(self, images):
        pixels = images.reshape(len(images), -1) / np.float32(255)
        return -self.scale * np.square(pixels[:, None] - self.means).sum(-1)


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A run's folder, and `use(*scales)`: the network of each replica."""
    (tmp_path / "checkpoints" / "ce" / "7").mkdir(parents=True)

    def use(*scales, **changes):
        config = tiny_config(**{**HELD_OUT, "replicas": len(scales), **changes})
        write_json(tmp_path / "config.json", config)
        load = lambda config, workdir, temperature, replica: NearestMean(scales[replica])  # noqa: E731
        monkeypatch.setattr(calibrate, "load_as_configured", load)
        return config, tmp_path

    return use


def test_the_temperature_is_that_of_the_holdout_and_its_figures_those_of_both_sets(workdir):
    kept = calibrate.calibrate_workdir(*workdir(1.0))
    (one,) = kept["replicas"]
    images = data.load("fashion_mnist_lt")
    logits = NearestMean(1.0).logits(images.test_images)
    right = logits.argmax(1) == images.test_labels
    assert one["test"]["accuracy"] == pytest.approx(right.mean())
    for when, scale in (("before", 1.0), ("after", one["temperature"])):
        z = logits.astype(np.float64) / scale
        losses = (
            np.log(np.exp(z - z.max(1, keepdims=True)).sum(1)) + z.max(1) - z[np.arange(len(z)), images.test_labels]
        )
        confidences = 1 / np.exp(z - z.max(1, keepdims=True)).sum(1)
        assert one["test"][when]["ece"] == pytest.approx(float(metrics.calibration(confidences, right).ece), abs=1e-4)
        assert one["test"][when]["nll"] == pytest.approx(losses.mean(), rel=1e-4)
    assert one["holdout"]["after"]["nll"] < one["holdout"]["before"]["nll"]
    assert one["test"]["after"]["ece"] < one["test"]["before"]["ece"] / 2
    assert (kept["stage"], kept["step"], kept["num_holdout"]) == ("ce", 7, 20)


def test_the_holdout_alone_decides(workdir, monkeypatch):
    seen = {}

    def fit(logits, labels):
        seen.update(logits=logits, labels=labels)
        return fit_temperature(logits, labels)

    monkeypatch.setattr(calibrate, "fit_temperature", fit)
    kept = calibrate.calibrate_workdir(*workdir(1.0))
    assert np.bincount(seen["labels"], minlength=10).tolist() == [2] * 10 and seen["logits"].shape == (20, 10)
    assert kept["replicas"][0]["holdout"]["accuracy"] == (seen["logits"].argmax(1) == seen["labels"]).mean()


@pytest.mark.parametrize(("found", "said"), [(1.0, True), (None, False)])
def test_where_the_test_images_gain_nothing_it_says_so(workdir, monkeypatch, capsys, found, said):
    if found is not None:
        monkeypatch.setattr(calibrate, "fit_temperature", lambda logits, labels: found)
    calibrate.calibrate_workdir(*workdir(1.0))
    assert ("20 held-out images are few" in " ".join(capsys.readouterr().out.split())) == said


def test_each_replica_has_its_own(workdir, capsys):
    config, folder = workdir(1.0, 2.0)
    calibrate.calibrate_workdir(config, folder)
    replicas = json.loads((folder / "temperature.json").read_text())["replicas"]
    assert [one["seed"] for one in replicas] == [0, 1]
    assert replicas[1]["temperature"] == pytest.approx(2 * replicas[0]["temperature"], rel=1e-4)
    assert "±" in capsys.readouterr().out


def test_without_a_holdout_it_says_how_to_get_one(workdir):
    with pytest.raises(UserError, match=r"config\.data\.holdout = 0: .*--config=FILE:holdout=5"):
        calibrate.calibrate_workdir(*workdir(1.0, **{"data.holdout": 0}))


def test_without_a_holdout_nothing_is_trained_first(tmp_path):
    told = ("--config.data.holdout=0", "--config.epochs=1", "--calibrate", f"--workdir={tmp_path / 'run'}")
    command = [sys.executable, "run.py", "--config=configs/quickstart.py", *told]
    ran = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert ran.returncode == 2 and ran.stderr.startswith("error: config.data.holdout = 0"), ran.stderr
    assert not (tmp_path / "run").exists()


def test_where_no_temperature_is_the_best_nothing_is_kept(workdir):
    config, folder = workdir(-1.0)  # the farthest mean: worse than guessing
    with pytest.raises(UserError, match=r"no temperature is the best for 20 held-out images of which \d+% are right"):
        calibrate.calibrate_workdir(config, folder)
    assert not (folder / "temperature.json").exists()


def test_of_imported_weights_it_says_who_uses_it(workdir, capsys):
    _, folder = workdir(1.0)
    (folder / "config.json").unlink()
    (folder / "w").mkdir()
    (folder / "w" / ARRAYS).write_bytes(b"arrays")
    config = tiny_config(**HELD_OUT, weights=str(folder / "w"))
    (one,) = calibrate.calibrate_workdir(config, folder)["replicas"]
    said = " ".join(capsys.readouterr().out.split())
    assert f"temperature={one['temperature']:.6g})." in said
    assert "ltjax.load divide" not in said


def test_the_run_of_another_config_is_not_calibrated(workdir):
    config, folder = workdir(1.0)
    with pytest.raises(UserError, match=r"another config .*seed: 0 -> 3"):
        calibrate.calibrate_workdir({**config, "seed": 3}, folder)
