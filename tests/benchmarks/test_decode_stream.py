"""The benchmark of the input pipeline, --stream, at a small size."""

import json

import pytest

from benchmarks import decode
from ltjax.data import pipeline


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    out = tmp_path_factory.mktemp("decode") / "numbers.json"
    decode.main(["--stream", "--turns=1", "--chunk=10", "--batch_size", "16", "32", f"--out={out}"])
    return json.loads(out.read_text())


def test_json_has_the_rates_of_each_batch_size(numbers):
    for key in ("images_per_second", "images_per_cpu_second"):
        assert numbers[key].keys() == {"16", "32"} and min(numbers[key].values()) > 0
    assert {"python_seconds_per_image", "threads", "versions", "git_commit", "command"} <= numbers.keys()


def test_pythons_time_excludes_decoding_and_resizing(monkeypatch):
    filled, resized = [], []

    def watched(plan, step, rows, indices, images, labels):
        decoded = decode.cv2.resize
        filled.append((step, rows.tolist()))
        resized.append(decoded(None, (1, 1), dst="as it was", interpolation=0))
        fill(plan, step, rows, indices, images, labels)

    fill = pipeline.fill
    monkeypatch.setattr(pipeline, "fill", watched)
    decode.python_seconds(decode.made_up(1, 64, 64)[0], batch_size=20, turns=1)
    assert filled == [(step, rows) for step in (0, 1) for rows in (list(range(16)), list(range(16, 20)))]
    assert set(resized) == {"as it was"}
