"""`config.class_weights` in a run."""

import json
import sys

import numpy as np
import pytest
from absl.testing import flagsaver

import run
from ltjax import train
from ltjax.types import UserError
from tests.test_run import TINY

pytestmark = [
    pytest.mark.usefixtures("one_device"),
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),  # ml_collections on Python 3.11
]


@pytest.fixture
def trained(monkeypatch):
    """Return `trained(workdir, *flags)`: train a stage for an epoch; the result is the content of `results.json`."""

    def trained(workdir, *flags):
        arguments = ["run.py", *TINY, "--config.epochs=1", "--config.stages=('ce',)", *flags]
        monkeypatch.setattr(sys, "argv", arguments)
        with flagsaver.flagsaver():
            run.parse_flags(arguments)
            return train.train(run.run_config(), workdir)

    return trained


def test_a_run_keeps_its_class_weights(trained, tmp_path, capsys, monkeypatch):
    weighted = trained(tmp_path / "run", "--config.class_weights={'Bag': 9.0}")
    assert "class weights: Bag 9; 1 for other classes" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["class_weights"] == "{'Bag': 9.0}"
    assert "Class weight" in (tmp_path / "run" / "report" / "index.html").read_text()

    with pytest.raises(UserError, match=r"class_weights.*use another --workdir, or the old settings to resume"):
        trained(tmp_path / "run", "--config.class_weights=auto")

    trained(tmp_path / "run", '--config.class_weights={"Bag": 9}')
    assert "holds a finished run of this config" in " ".join(capsys.readouterr().out.split())

    monkeypatch.setattr(train, "write_report", lambda *_: None)
    plain = trained(tmp_path / "plain")
    bag = json.loads((tmp_path / "plain" / "split.json").read_text())["class_names"].index("Bag")
    assert np.argmax(np.subtract(weighted["per_class_accuracy"], plain["per_class_accuracy"])) == bag
