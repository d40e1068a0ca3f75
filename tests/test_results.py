"""The repository's own figures: a row of the table can be checked, and says where it comes from."""

import json
from pathlib import Path

import pytest

from ltjax import data
from ltjax.modes.evaluate import evaluate_workdir
from ltjax.runs import trained
from ltjax.runs.checkpoint import read_json
from ltjax.types import UserError

ARCHIVES = sorted(path.parent for path in (Path(__file__).parents[1] / "results").glob("*/results.json"))
every_archive = pytest.mark.parametrize("folder", ARCHIVES, ids=[folder.name for folder in ARCHIVES])


@every_archive
def test_it_is_an_archive_that_says_where_it_comes_from(folder):
    assert trained.is_archive(folder)
    results = read_json(folder / "results.json")
    assert results["name"] + f"-seed{results['seed']}" == folder.name
    assert len(results["git_commit"]) == 40  # nothing was changed beside it
    assert results["versions"]["jax"] and results["device"] and results["seconds"] > 0
    assert (folder / "weights.safetensors").stat().st_size < 2.1e6
    assert "/" not in results["command"].replace("checkout/", "").replace("configs/", "").replace("runs/", "").replace(
        "results/", ""
    )


@every_archive
def test_its_figures_are_those_of_its_last_evaluated_epoch(folder):
    results = read_json(folder / "results.json")
    for stage in results["stages"].values():
        assert stage["evaluations"][-1]["accuracy"] == stage["accuracy"]


@pytest.mark.skipif(not ARCHIVES, reason="no archives in results/ yet")
def test_a_row_can_be_checked(tmp_path):
    """On another machine or jaxlib than it was made with: to 0.05 points of accuracy, and as much of ECE."""
    folder = next((f for f in ARCHIVES if f.name.startswith("cifar100_lt-")), ARCHIVES[0])
    config = read_json(folder / "config.json")
    try:
        data.load(config["data"]["name"])
    except UserError as error:
        pytest.skip(str(error))
    for name in ("config.json", "split.json", "results.json", "weights.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    found, expected = evaluate_workdir(config, tmp_path), json.loads((folder / "results.json").read_text())
    assert abs(found["accuracy"]["all"] - expected["accuracy"]["all"]) <= 5e-4
    assert abs(found["ece"] - expected["ece"]) <= 5e-4
