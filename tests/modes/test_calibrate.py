"""`--calibrate` on a simple network, the nearest mean of pixels, which is far too confident."""

import json
import subprocess
import sys

import numpy as np
import pytest

from ltjax import data, metrics
from ltjax.calibration import fit_temperature
from ltjax.modes import calibrate
from ltjax.runs.weights import ARRAYS
from ltjax.system.files import write_json
from ltjax.types import UserError
from tests.test_run import ROOT, environment, tiny_config

HELD_OUT = {"data.holdout": 2, "data.max_count": 18, "data.imbalance": 3.0, "stages": ("ce",)}


class NearestMean:
    """Logits [N, 10]: minus the squared distance to the mean image of each class."""

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
    """Return `workdir(*scales)`: the config and folder of a run whose replicas are `NearestMean(scale)`."""
    (tmp_path / "checkpoints" / "ce" / "7").mkdir(parents=True)

    def use(*scales, **changes):
        config = tiny_config(**{**HELD_OUT, "replicas": len(scales), **changes})
        write_json(tmp_path / "config.json", config)
        load = lambda config, workdir, temperature, replica: NearestMean(scales[replica])  # noqa: E731
        monkeypatch.setattr(calibrate, "load_as_configured", load)
        return config, tmp_path

    return use


def test_the_figures_of_both_sets_before_and_after(workdir):
    summary = calibrate.calibrate_workdir(*workdir(1.0))
    (replica,) = summary["replicas"]
    images = data.load("fashion_mnist_lt")
    logits = NearestMean(1.0).logits(images.test_images)
    right = logits.argmax(1) == images.test_labels
    assert replica["test"]["accuracy"] == pytest.approx(right.mean())
    for when, scale in (("before", 1.0), ("after", replica["temperature"])):
        z = logits.astype(np.float64) / scale
        losses = (
            np.log(np.exp(z - z.max(1, keepdims=True)).sum(1)) + z.max(1) - z[np.arange(len(z)), images.test_labels]
        )
        confidences = 1 / np.exp(z - z.max(1, keepdims=True)).sum(1)
        assert replica["test"][when]["ece"] == pytest.approx(
            float(metrics.calibration(confidences, right).ece), abs=1e-4
        )
        assert replica["test"][when]["nll"] == pytest.approx(losses.mean(), rel=1e-4)
    assert replica["holdout"]["after"]["nll"] < replica["holdout"]["before"]["nll"]
    assert replica["test"]["after"]["ece"] < replica["test"]["before"]["ece"] / 2
    assert (summary["stage"], summary["step"], summary["num_holdout"]) == ("ce", 7, 20)


def test_the_temperature_is_fitted_on_the_holdout(workdir, monkeypatch):
    seen = {}

    def fit(logits, labels):
        seen.update(logits=logits, labels=labels)
        return fit_temperature(logits, labels)

    monkeypatch.setattr(calibrate, "fit_temperature", fit)
    summary = calibrate.calibrate_workdir(*workdir(1.0))
    assert np.bincount(seen["labels"], minlength=10).tolist() == [2] * 10 and seen["logits"].shape == (20, 10)
    assert summary["replicas"][0]["holdout"]["accuracy"] == (seen["logits"].argmax(1) == seen["labels"]).mean()


@pytest.mark.parametrize(("temperature", "noted"), [(1.0, True), (None, False)])
def test_a_temperature_that_does_not_help_is_noted(workdir, monkeypatch, capsys, temperature, noted):
    if temperature is not None:
        monkeypatch.setattr(calibrate, "fit_temperature", lambda logits, labels: temperature)
    calibrate.calibrate_workdir(*workdir(1.0))
    assert ("20 held-out images are few" in " ".join(capsys.readouterr().out.split())) == noted


def test_each_replica_has_its_own_temperature(workdir, capsys):
    config, folder = workdir(1.0, 2.0)
    calibrate.calibrate_workdir(config, folder)
    replicas = json.loads((folder / "temperature.json").read_text())["replicas"]
    assert [replica["seed"] for replica in replicas] == [0, 1]
    assert replicas[1]["temperature"] == pytest.approx(2 * replicas[0]["temperature"], rel=1e-4)
    assert "±" in capsys.readouterr().out


def test_without_a_holdout_the_error_says_how_to_get_one(workdir):
    with pytest.raises(UserError, match=r"config\.data\.holdout = 0: .*--config=FILE:holdout=5"):
        calibrate.calibrate_workdir(*workdir(1.0, **{"data.holdout": 0}))


def test_without_a_holdout_nothing_is_trained_first(tmp_path):
    flags = ("--config.data.holdout=0", "--config.epochs=1", "--calibrate", f"--workdir={tmp_path / 'run'}")
    command = [sys.executable, "run.py", "--config=configs/quickstart.py", *flags]
    ran = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert ran.returncode == 2 and ran.stderr.startswith("error: config.data.holdout = 0"), ran.stderr
    assert not (tmp_path / "run").exists()


def test_no_file_is_written_if_the_loss_has_no_minimum(workdir):
    config, folder = workdir(-1.0)  # the farthest mean: worse than guessing
    with pytest.raises(UserError, match=r"no temperature is the best for 20 held-out images of which \d+% are right"):
        calibrate.calibrate_workdir(config, folder)
    assert not (folder / "temperature.json").exists()


def test_imported_weights_get_a_note_on_their_use(workdir, capsys):
    _, folder = workdir(1.0)
    (folder / "config.json").unlink()
    (folder / "w").mkdir()
    (folder / "w" / ARRAYS).write_bytes(b"arrays")
    config = tiny_config(**HELD_OUT, weights=str(folder / "w"))
    (replica,) = calibrate.calibrate_workdir(config, folder)["replicas"]
    printed = " ".join(capsys.readouterr().out.split())
    assert f"temperature={replica['temperature']:.6g})." in printed
    assert "ltjax.load divide" not in printed


def test_another_config_is_refused(workdir):
    config, folder = workdir(1.0)
    with pytest.raises(UserError, match=r"another config .*seed: 0 -> 3"):
        calibrate.calibrate_workdir({**config, "seed": 3}, folder)
