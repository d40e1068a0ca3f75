"""The benchmark of DRO-LT's loss at a small size: implementations agree, and its JSON has the settings."""

import json

import numpy as np
import pytest

from benchmarks import dro_loss


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    out = tmp_path_factory.mktemp("dro_loss") / "numbers.json"
    assert dro_loss.main(["--num_classes", "9", "--dim=6", "--batch_size=8", "--repeats=2", f"--out={out}"]) == 0
    return json.loads(out.read_text())


def test_all_implementations_compute_the_same_numbers(numbers):
    (size,) = numbers["sizes"]
    assert numbers["same_numbers"]
    for row in size["ways"].values():
        assert row["difference_from_naive"].keys() == {"loss", "features", "margins"}
        assert max(row["difference_from_naive"].values()) < dro_loss.CLOSE


def test_json_has_device_and_settings(numbers):
    said = {"benchmark", "batch_size", "dim", "sizes", "device", "versions", "git_commit", "command"}
    assert said <= numbers.keys() and numbers["device"] == "cpu: cpu"
    ways = numbers["sizes"][0]["ways"]
    assert {"ltjax", "naive"} <= ways.keys()
    for row in ways.values():
        assert len(row["seconds"]) == 2 and row["median_seconds"] == np.median(row["seconds"])
    assert ways["naive"]["over_ltjax"]["plan_bytes"] == ways["naive"]["plan_bytes"] / ways["ltjax"]["plan_bytes"]


def test_different_numbers_are_reported(monkeypatch, capsys):
    way = {"device": "cpu", "median_seconds": 1.0, "plan_bytes": None, "resident_growth_bytes": None}
    way |= {"over_ltjax": dict.fromkeys(("median_seconds", *dro_loss.MEMORY)), "difference_from_naive": {"loss": 0.1}}
    monkeypatch.setattr(dro_loss, "measure", lambda *_: {"ltjax": way})
    assert dro_loss.main(["--num_classes", "9"]) == 1
    assert "numbers agree to 0.0001: NO" in capsys.readouterr().out
