"""A file of weights, of a config or of results is read in full, or is refused in one line."""

import functools
import io
import json
import tempfile
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.numpy import save

import ltjax
from ltjax import compare, models
from ltjax.data.index import make_index, read_index, write_index
from ltjax.interop import checkpoints, torch
from ltjax.runs.weights import load_weights, save_weights
from ltjax.system.files import read_json, write_json
from ltjax.types import UserError, Variables
from tests.report import made_up

SETTINGS = {"name": "resnet_cifar", "depth": 8, "width": 2}


@functools.cache
def network():
    net = models.create("resnet_cifar", 3, depth=8, width=2)
    collections = net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    return net, Variables({"net": collections["params"]}, {"net": collections["batch_stats"]}, {})


@functools.cache
def folder_of_weights():
    with tempfile.TemporaryDirectory() as folder:
        save_weights(folder, network()[1], SETTINGS, num_classes=3)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@functools.cache
def state_dict_files():
    arrays, npz = torch.export_state_dict(network()[1], network()[0]), io.BytesIO()
    np.savez(npz, **arrays)
    compressed = io.BytesIO()
    np.savez_compressed(compressed, **arrays)
    return {"a.safetensors": save(arrays), "a.npz": npz.getvalue(), "b.npz": compressed.getvalue()}


@st.composite
def damaged(draw, content):
    """Cut, change, repeat or insert bytes; more often near the start, where the headers are."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        most = draw(st.sampled_from([16, 200, len(content)]))
        place = draw(st.integers(0, min(most, len(content))))
        kind = draw(st.sampled_from(["cut", "set", "insert", "remove", "digits"]))
        if kind == "cut":
            del content[place:]
        elif kind == "set" and place < len(content):
            content[place] = draw(st.integers(0, 255))
        elif kind == "insert":
            content[place:place] = draw(st.binary(max_size=9))
        elif kind == "remove":
            del content[place : place + draw(st.integers(1, 9))]
        elif kind == "digits":
            content[place:place] = b"999999999999"
    return bytes(content)


def write_with(folder, change):
    """Write the folder of weights with other settings of its network."""
    for name, content in folder_of_weights().items():
        (folder / name).write_bytes(content)
    description = json.loads((folder / "weights.json").read_text())
    description["model"].update(change)
    (folder / "weights.json").write_text(json.dumps(description))


def is_one_line(error):
    text = str(error)
    assert text and "\n" not in text.strip() and len(text) < 3000, text
    return True


@pytest.mark.parametrize("name", ["a.safetensors", "a.npz", "b.npz"])
@given(data=st.data())
def test_a_damaged_state_dict_is_read_or_refused(name, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data.draw(damaged(state_dict_files()[name])))
        try:
            state_dict, _ = checkpoints.network(checkpoints.read(path))
            torch.import_state_dict(state_dict, network()[0])
        except UserError as error:
            assert is_one_line(error)


@functools.cache
def transformer():
    """Return the arrays of a vision transformer with all optional parts, under CLIP's and DINOv2's names."""
    net = models.create("vit", 3, depth=2, width=8, heads=2, patch=4, grid=2, registers=2, layer_scale=True)
    shapes = jax.eval_shape(net.init, jax.random.key(0), models.example(net))
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    arrays = torch.export_state_dict(Variables({"net": ones["params"]}, {"net": {}}, {}), net)
    return arrays | {"proj": np.ones((8, 4), np.float32), "norm_pre.weight": np.ones(8, np.float32)}


@given(st.data())
def test_changed_arrays_of_a_vision_transformer_are_read_or_refused(data):
    arrays = dict(transformer())
    for _ in range(data.draw(st.integers(1, 4))):
        key = data.draw(st.sampled_from(sorted(arrays)))
        kind = data.draw(st.sampled_from(["remove", "shape", "type", "visual"]))
        if kind == "remove":
            del arrays[key]
        elif kind == "shape":
            arrays[key] = np.ones(data.draw(st.lists(st.integers(0, 9), max_size=5)), np.float32)
        elif kind == "type":
            arrays[key] = arrays[key].astype(data.draw(st.sampled_from(["f2", "f8", "i4", "u1", "?"])))
        else:
            arrays[f"visual.{key}"] = arrays.pop(key)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "a.npz", **arrays)
        try:
            torch.read_checkpoint(Path(folder) / "a.npz", {"name": "vit"}, backbone=data.draw(st.booleans()))
        except UserError as error:
            assert is_one_line(error)


@given(st.dictionaries(st.text(max_size=8), st.one_of(st.binary(max_size=40), st.integers(), st.none()), max_size=4))
def test_a_zip_of_anything_is_refused(members):
    assume(all(name and "\0" not in name for name in members))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npz"
        with zipfile.ZipFile(path, "w") as file:
            for name, content in members.items():
                file.writestr(f"{name}.npy", content if isinstance(content, bytes) else repr(content))
        with pytest.raises(UserError) as raised:
            checkpoints.network(checkpoints.read(path))
        assert is_one_line(raised.value)


def test_an_array_of_objects_is_not_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    np.savez(tmp_path / "a.npz", x=np.array([Evil()], dtype=object))
    with pytest.raises(UserError):
        checkpoints.read(tmp_path / "a.npz")
    assert not (tmp_path / "ran").exists()


def test_a_header_with_a_huge_array_takes_no_memory(tmp_path):
    """Reading 8 TiB would fail with MemoryError, or get this process killed."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("x.npy", header.getvalue())
    with pytest.raises(UserError):
        checkpoints.read(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "change",
    [{"width": 10**9}, {"depth": 6002}, {"num_classes": 10**12}, {"mean": [0.0] * 10**5, "std": [1.0] * 10**5}],
)
def test_a_huge_network_is_refused(change, tmp_path):
    write_with(tmp_path, change)
    with pytest.raises(UserError, match=r"does not fit|num_classes"):
        load_weights(tmp_path)


@pytest.mark.parametrize("change", [{"width": 4}, {"depth": 14}, {"branches": 3}, {"logit_scale": True}])
def test_weights_of_another_network_are_refused(change, tmp_path):
    write_with(tmp_path, change)
    with pytest.raises(UserError, match="are not those of its network"):
        ltjax.load(tmp_path)


@given(st.data())
def test_a_damaged_folder_of_weights_is_read_or_refused(data):
    files = folder_of_weights()
    spoilt = data.draw(st.sampled_from(sorted(files)))
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(data.draw(damaged(content)) if name == spoilt else content)
        try:
            load_weights(folder)
            ltjax.load(folder)
        except UserError as error:
            assert is_one_line(error)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=5,
)


def replaced(value, path, new):
    """Return a copy of nested dicts and lists with another value at a path."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


def places(value, path=()):
    yield path
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield from places(value[key], (*path, key))


@given(st.data())
def test_changed_results_are_compared_or_refused(data):
    results = json.loads(json.dumps(made_up.results()))
    place = data.draw(st.sampled_from(list(places(results))))
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "results.json", replaced(results, place, data.draw(json_values)))
        try:
            comparison = compare.compare([folder])
            compare.cells(comparison.rows)
        except UserError as error:
            assert is_one_line(error)


@given(st.one_of(st.binary(max_size=60), st.integers(1, 100_000).map(lambda depth: b"[" * depth)))
def test_any_bytes_are_json_or_refused(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        path.write_bytes(content)
        try:
            assert isinstance(read_json(path), dict)
        except UserError as error:
            assert is_one_line(error)


@given(st.data())
def test_a_damaged_index_is_read_as_it_was_or_made_again(data):
    with tempfile.TemporaryDirectory() as folder:
        shard, path = Path(folder) / "shard", Path(folder) / "train.index.npz"
        shard.write_bytes(b"123")
        index = make_index([1, 0, 1], ["b", "a", "c"])
        write_index(path, index, [shard])
        path.write_bytes(data.draw(damaged(path.read_bytes())))
        read = read_index(path, [shard])
        if read is not None:
            for ours, theirs in zip(index, read, strict=True):
                np.testing.assert_array_equal(ours, theirs)
