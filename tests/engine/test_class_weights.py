"""`config.class_weights` in a run."""

import json

import numpy as np

from tests.test_run import TINY, run

SHORT = (*TINY, "--config.epochs=1", "--config.stages=('ce',)")


def test_a_run_keeps_its_class_weights(tmp_path):
    command = (*SHORT, f"--workdir={tmp_path / 'run'}")
    code, out, error = run(*command, "--config.class_weights={'Bag': 9.0}")
    assert code == 0, error
    assert "class weights: Bag 9; 1 for other classes" in out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["class_weights"] == "{'Bag': 9.0}"
    assert "Class weight" in (tmp_path / "run" / "report" / "index.html").read_text()

    code, _, error = run(*command, "--config.class_weights=auto")
    assert code == 2 and "class_weights" in error and "use another --workdir, or the old settings to resume" in error

    code, out, error = run(*command, '--config.class_weights={"Bag": 9}')
    assert code == 0 and "holds a finished run of this config" in out, error

    plain = tmp_path / "plain"
    code, _, error = run(*SHORT, f"--workdir={plain}")
    assert code == 0, error
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path / "run", plain))
    bag = json.loads((plain / "split.json").read_text())["class_names"].index("Bag")
    assert np.argmax(np.subtract(first["per_class_accuracy"], second["per_class_accuracy"])) == bag
