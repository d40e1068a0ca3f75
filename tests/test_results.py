"""The archives in results/: their figures can be reproduced, and their origin is recorded."""

import json
from pathlib import Path

import pytest

from ltjax import data
from ltjax.modes.evaluate import evaluate_workdir
from ltjax.runs import archive
from ltjax.system import xla
from ltjax.system.files import read_json
from ltjax.types import UserError

ARCHIVES = sorted(path.parent for path in (Path(__file__).parents[1] / "results").glob("*/results.json"))
every_archive = pytest.mark.parametrize("folder", ARCHIVES, ids=[folder.name for folder in ARCHIVES])


@every_archive
def test_an_archive_records_its_origin(folder):
    assert archive.is_archive(folder)
    results = read_json(folder / "results.json")
    assert results["name"] + f"-seed{results['seed']}" == folder.name
    assert len(results["git_commit"]) == 40  # without "-dirty"
    assert results["versions"]["jax"] and results["device"] and results["seconds"] > 0
    assert (folder / "weights.safetensors").stat().st_size < 2.1e6
    assert "/" not in results["command"].replace("checkout/", "").replace("configs/", "").replace("runs/", "").replace(
        "results/", ""
    )


@every_archive
def test_figures_are_those_of_the_last_evaluated_epoch(folder):
    results = read_json(folder / "results.json")
    for stage in results["stages"].values():
        assert stage["evaluations"][-1]["accuracy"] == stage["accuracy"]


@pytest.mark.skipif(not ARCHIVES, reason="no archives in results/ yet")
def test_an_archive_can_be_evaluated_again(tmp_path, monkeypatch, one_device, optimised):
    """On any machine and jaxlib, accuracy and ECE agree to 0.05 points, and to 0.2 if the run computed in bfloat16.

    Without oneDNN, XLA rounds bfloat16 otherwise: of 10,000 images 5 get another class.
    """
    folder = next((f for f in ARCHIVES if f.name.startswith("cifar100_lt-")), ARCHIVES[0])
    config = read_json(folder / "config.json")
    try:
        images = data.load(config["data"]["name"])
    except UserError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(data, "load", lambda *_: images)  # loading takes seconds
    options = {**xla.cpu_options(), **optimised}
    monkeypatch.setattr(xla, "cpu_options", lambda: options)
    for name in ("config.json", "split.json", "results.json", "weights.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    actual, expected = evaluate_workdir(config, tmp_path), json.loads((folder / "results.json").read_text())
    most = 2e-3 if config["model"]["dtype"] == "bfloat16" else 5e-4
    assert abs(actual["accuracy"]["all"] - expected["accuracy"]["all"]) <= most
    assert abs(actual["ece"] - expected["ece"]) <= most
