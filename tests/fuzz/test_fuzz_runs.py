"""A run with changed JSON files is read, or refused in one line that names the file."""

import contextlib
import io
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ltjax import compare, predictor
from ltjax.config import parse
from ltjax.interop import torch
from ltjax.report import page, panels
from ltjax.runs import archive, trained
from ltjax.runs.weights import load_weights
from ltjax.runs.workdir import check_same_config, check_same_images
from ltjax.system.files import read_json, write_json
from ltjax.types import UserError
from tests.fuzz.test_fuzz_weights import folder_of_weights, is_one_line, places, replaced
from tests.report import made_up
from tests.test_run import tiny_config

NEW = [None, True, -1, 1.5, float("nan"), float("inf"), "", "x", [], {}, [1], [[1]], {"a": 1}, 10**30, list("abcd")]
CLASSES = 10


def files():
    """Return the contents of the JSON files of a finished run and its archive."""
    results = made_up.results(CLASSES)
    evaluations = [{"step": 7, "epoch": 1, "accuracy": {"all": 0.5}, "ece": 0.1, "loss": 1.0}]
    for stage in results["stages"].values():
        stage["evaluations"] = evaluations
    groups = made_up.groups_of(made_up.class_counts(CLASSES))
    split = {
        **{key: results[key] for key in ("class_names", "class_counts")},
        "groups": {name: member.nonzero()[0].tolist() for name, member in groups.items()},
        "sha256": "0" * 64,
        "holdout_sha256": "1" * 64,
        "images": {part: [f"{c:032x}" for c in range(CLASSES)] for part in ("train", "test")},
    }
    config = json.loads(json.dumps(tiny_config()))
    return {"config.json": config, "split.json": split, "results.json": results}


def readers(folder, before):
    """Return all functions that read the JSON files of a run."""
    return {
        "config": lambda: parse(read_json(folder / "config.json")),
        "another config": lambda: check_same_config(folder, before["config.json"]),
        "other images": lambda: check_same_images(folder, before["split.json"]),
        "names": lambda: predictor.class_names(folder, CLASSES),
        "table": lambda: compare.cells(compare.compare([folder]).rows),
        "page": lambda: page.write(folder),
        "archive": lambda: archive.read_archive(folder),
        "newest": lambda: trained.newest(folder),
    }


@pytest.mark.parametrize("name", ["config.json", "split.json", "results.json"])
@given(data=st.data())
def test_a_changed_file_of_a_run_is_read_or_refused(name, data):
    before = files()
    place = data.draw(st.sampled_from(list(places(before[name]))))
    changed = replaced(before[name], place, data.draw(st.sampled_from(NEW)))
    with tempfile.TemporaryDirectory() as folder:
        for file, content in {**before, name: changed}.items():
            write_json(Path(folder) / file, content)
        for reader in readers(Path(folder), before).values():
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    reader()
            except UserError as error:
                assert is_one_line(error)


@pytest.mark.parametrize(
    "name, key, value, reader",
    [
        ("config.json", "stages", 3, "another config"),
        ("split.json", "images", 1, "other images"),
        ("split.json", "class_names", 5, "names"),
        ("results.json", "stages", {}, "page"),
        ("results.json", "seconds", float("inf"), "table"),
        ("results.json", "final_stage", [], "archive"),
    ],
)
def test_a_file_of_another_shape_is_named(name, key, value, reader, tmp_path):
    before = files()
    for file, content in before.items():
        write_json(tmp_path / file, {**content, key: value} if file == name else content)
    with pytest.raises(UserError, match=rf"{name} does not hold what ltjax writes there"):
        readers(tmp_path, before)[reader]()


def test_readers_accept_unchanged_files(tmp_path):
    before = files()
    for file, content in before.items():
        write_json(tmp_path / file, content)
    for name, reader in readers(tmp_path, before).items():
        if name not in ("archive", "newest"):  # there are no arrays
            reader()


@given(st.lists(st.one_of(st.sampled_from(NEW), st.text(max_size=5)), min_size=1, max_size=6))
@example([None, None, None, float("inf")])  # a step
@example([None, None, "0"])  # an epoch
def test_any_lines_are_learning_curves_or_left_out(values):
    keys = ("stage", "split", "epoch", "step", "values", "loss")
    lines = [dict(zip(keys, ("ce", "train", 1, 7, {"loss": 1.0, "lr": 0.1}), strict=False))]
    lines += [{**lines[0], key: value} for key, value in zip(keys, values, strict=False)]
    lines += [{**lines[0], "values": {"loss": value, "lr": value}} for value in values]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        path.write_text("\n".join([*map(json.dumps, lines), "[" * 100_000]))
        assert panels.read_curves(path)["ce"]["train"]


@given(st.data())
def test_a_changed_description_of_weights_is_read_or_refused(data):
    contents = folder_of_weights()
    description = json.loads(contents["weights.json"])
    description["model"] |= {"mean": [0.0], "std": [1.0], "dtype": "float32"}
    place = data.draw(st.sampled_from(list(places(description))))
    changed = replaced(description, place, data.draw(st.sampled_from([*NEW, [0, 1, 2], [2, 0, 1], [0.5], "bfloat16"])))
    with tempfile.TemporaryDirectory() as folder:
        for name, content in contents.items():
            (Path(folder) / name).write_bytes(content)
        write_json(Path(folder) / "weights.json", changed)
        try:
            weights = load_weights(folder)
            assert weights.class_order is None or sorted(weights.class_order) == [0, 1, 2]
            predictor.load(folder)
        except UserError as error:
            assert is_one_line(error)


@given(st.data())
def test_a_changed_temperature_is_read_or_refused(data):
    described = {"stage": "ce", "step": 7, "class_names": ["a"], "replicas": [{"temperature": 1.5}]}
    place = data.draw(st.sampled_from(list(places(described))))
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "temperature.json", replaced(described, place, data.draw(st.sampled_from(NEW))))
        try:
            fitted = predictor._temperature(Path(folder), {"stage": "ce", "step": 7}, 0, predictor.FITTED)
            assert 0 < fitted < float("inf")
        except UserError as error:
            assert is_one_line(error)


@given(st.one_of(st.text(max_size=30), st.lists(st.sampled_from([*NEW, 0, 1, 2]), max_size=5).map(json.dumps)))
def test_any_order_of_classes_is_a_permutation_or_refused(text):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "order"
        file.write_text(text, encoding="utf-8", errors="replace")
        for kind in ("", "map:", "counts:", "counts-ascending:"):
            try:
                assert sorted(torch.class_order(f"{kind}{file}", 3)) == [0, 1, 2]
            except UserError as error:
                assert is_one_line(error)
