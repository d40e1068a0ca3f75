"""From official files to a trained network: a config for large images trains on the output of `prepare`."""

import json

import numpy as np

from ltjax import train
from ltjax.data.prepare.__main__ import main
from tests.configs.reading import read
from tests.data import miniatures

COUNTS = (12, 7, 4, 3)


def test_runlocal_trains_on_inat18_of_the_official_layout(tmp_path):
    source = miniatures.inat18(tmp_path / "source", counts=COUNTS, validation=2, size=40)
    assert main(["inat18", f"--source={source}", f"--data_dir={tmp_path / 'data'}"]) == 0
    config = read("inat18", "method=ce,runlocal")
    config.update(batch_size=8, eval_batch_size=8, epochs=1)
    config.model.width = 2
    config.data.update(size=32, resize=36, many_above=10, few_below=4)
    results = train.train(config.to_dict(), tmp_path / "run", tmp_path / "data")
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert split["class_counts"] == list(COUNTS)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line["values"]["loss"] for line in lines if line["split"] == "train"]
    assert trained and np.isfinite(trained).all()
    assert len(results["per_class_accuracy"]) == len(COUNTS)
