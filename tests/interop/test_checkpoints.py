"""Files of weights and their networks. PyTorch's files need PyTorch."""

import argparse
import json
import os
import sys
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from ltjax import models
from ltjax.interop import checkpoints, torch
from ltjax.interop.torch import export_state_dict
from ltjax.runs.weights import load_weights
from ltjax.system import npz
from ltjax.types import UserError
from tests.pytorch import pytorch

MODEL = dict(depth=8, width=4)
SPEC = "--model=resnet_cifar,depth=8,width=4,normalise=cifar"


@pytest.fixture(scope="module")
def state_dict(variables_of):
    model = models.create("resnet_cifar", 6, **MODEL)
    return export_state_dict(variables_of(model), model)


@pytest.fixture(scope="module")
def mislas(variables_of):
    """Return MiSLAS's container, as their second stage saves it."""
    model = models.create("resnet_cifar", 6, **MODEL, logit_scale=True)
    held: dict = {"epoch": 10, "best_acc1": np.float32(47.0), "its_ece": 4.8}
    for key, value in export_state_dict(variables_of(model), model).items():
        part, _, name = key.partition(".")
        held.setdefault(f"state_dict_{part}", {})[name] = value
    return held


def wrapped(state_dict, prefix="module."):
    return {prefix + key: value for key, value in state_dict.items()}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_mislas_parts_are_one_network(mislas, prefix):
    held = {key: wrapped(value, prefix) if isinstance(value, dict) else value for key, value in mislas.items()}
    actual, left_out = checkpoints.network(held)
    assert {"model.conv1.weight", "classifier.fc.weight", "lws_model.learned_norm"} <= actual.keys()
    assert left_out == ("epoch", "best_acc1", "its_ece")


def test_mislass_network_for_places_imports_whole(variables_of, same):
    settings = dict(depth=50, width=2, stem="large", blocks=(1, 1, 1, 1), extra_block=True, logit_scale=True)
    model = models.create("resnet", 5, **settings)
    ours, held = variables_of(model), {}
    for key, value in torch.export_state_dict(ours, model).items():
        part, _, name = key.partition(".")
        held.setdefault(f"state_dict_{part}", {})[f"module.{name}"] = value
    assert set(held) == {"state_dict_model", "state_dict_block", "state_dict_classifier", "state_dict_lws_model"}
    state_dict, left_out = checkpoints.network(held)
    same(torch.import_state_dict(state_dict, model), ours)
    assert left_out == () and torch.implied(state_dict)["extra_block"]


def test_the_block_of_places_keeps_its_own_names(mislas):
    block = {"module.conv1.weight": np.zeros((4, 4, 1, 1)), "module.bn1.bias": np.zeros(4)}
    actual, _ = checkpoints.network({**mislas, "state_dict_block": block})
    assert {"block.conv1.weight", "block.bn1.bias", "model.conv1.weight"} <= actual.keys()


@pytest.mark.parametrize("name", ["state_dict", "model", "net", "model_state_dict"])
def test_a_state_dict_is_found_among_other_values(state_dict, name):
    held = {"epoch": 3, "arch": "resnet32", name: wrapped(state_dict), "optimizer": {"state": {}, "param_groups": []}}
    actual, left_out = checkpoints.network(held)
    assert actual.keys() == wrapped(state_dict).keys()
    assert left_out == ("epoch", "arch", "optimizer")


@pytest.mark.parametrize("together", [True, False])
def test_one_of_two_networks_is_chosen_and_the_other_named(state_dict, together):
    model, teacher = state_dict, {key: np.asarray(value + 1) for key, value in state_dict.items()}
    if together:
        held = {**wrapped(model, "module.model."), **wrapped(teacher, "module.teacher.")}
    else:
        held = {"model": wrapped(model), "teacher": wrapped(teacher)}
    with pytest.raises(UserError, match=r"choose with --net=model\|teacher"):
        checkpoints.network(held)
    actual, left_out = checkpoints.network(held, "teacher")
    bare = {key.removeprefix("module."): value for key, value in actual.items()}
    np.testing.assert_array_equal(bare["conv1.weight"], teacher["conv1.weight"])
    assert bare.keys() == teacher.keys()
    assert {name.removeprefix("module.").partition(".")[0] for name in left_out} == {"model"}
    with pytest.raises(UserError, match="net"):
        checkpoints.network(held, "student")


def test_a_file_without_a_network_says_what_it_holds():
    with pytest.raises(UserError, match="the file holds state, param_groups"):
        checkpoints.network({"state": {}, "param_groups": []})


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_arrays_are_read_without_pytorch(state_dict, suffix, tmp_path, monkeypatch, same):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails
    file = tmp_path / f"net{suffix}"
    save_file(state_dict, file) if suffix == ".safetensors" else np.savez(file, **state_dict)
    assert torch.main([str(file), SPEC, f"--out={tmp_path / 'w'}"]) == 0
    weights = load_weights(tmp_path / "w")
    same(weights.variables, torch.import_state_dict(state_dict, models.create("resnet_cifar", 6, **MODEL)))
    assert weights.settings["mean"] == (0.4914, 0.4822, 0.4465)
    assert weights.num_classes == 6


def test_a_file_of_pytorch_without_pytorch_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "net.pth.tar").touch()
    with pytest.raises(UserError, match=r"install torch, or convert it to \.safetensors"):
        checkpoints.read(tmp_path / "net.pth.tar")


def test_an_npz_of_objects_is_refused(tmp_path):
    np.savez(tmp_path / "net.npz", x=np.array([print], dtype=object))
    with pytest.raises(UserError, match="cannot read"):
        checkpoints.read(tmp_path / "net.npz")


def tensors(value):
    from torch import from_numpy

    if isinstance(value, dict):
        return {key: tensors(each) for key, each in value.items()}
    return from_numpy(value) if isinstance(value, np.ndarray) else value


def test_a_checkpoint_of_mislas_becomes_weights(mislas, tmp_path, capsys):
    pt = pytorch()
    held = {**tensors(mislas), "best_acc1": pt.tensor(47.0), "its_ece": np.float64(4.8)}
    pt.save(held, tmp_path / "current.pth.tar")
    assert torch.main([str(tmp_path / "current.pth.tar"), SPEC, f"--out={tmp_path / 'w'}"]) == 0
    weights = load_weights(tmp_path / "w")
    theirs = mislas["state_dict_lws_model"]["learned_norm"][0]
    np.testing.assert_array_equal(weights.variables.params["net"]["logit_scale"], theirs)
    assert weights.settings["logit_scale"] is True  # asked for by the file
    output = capsys.readouterr().out
    assert "ignored: epoch, best_acc1, its_ece, model.bn1.num_batches_tracked and 6 more" in output
    assert f"--config.weights={tmp_path / 'w'}" in output


@pytest.mark.parametrize("number", [np.float32(0.1), np.float64(0.1), np.int64(7), np.bool_(True)], ids=repr)
def test_numbers_of_numpy_are_read(state_dict, number, tmp_path):
    pt = pytorch()
    pt.save({"state_dict": tensors(state_dict), "number": number}, tmp_path / "net.pt")
    actual = checkpoints.read(tmp_path / "net.pt")
    assert actual["number"] == number
    np.testing.assert_array_equal(actual["state_dict"]["conv1.weight"], state_dict["conv1.weight"])


def test_bfloat16_is_read(tmp_path):
    pt = pytorch()
    pt.save({"x": pt.tensor([0.5, 2.0], dtype=pt.bfloat16)}, tmp_path / "net.pt")
    np.testing.assert_array_equal(checkpoints.read(tmp_path / "net.pt")["x"], np.float32([0.5, 2.0]))


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_is_read(kind, tmp_path):
    pt = pytorch()
    pt.save({"x": pt.tensor([0.5, 2.0]).to(getattr(pt, kind))}, tmp_path / "net.pt")
    np.testing.assert_array_equal(checkpoints.read(tmp_path / "net.pt")["x"], np.float32([0.5, 2.0]))


UNREADABLE = {
    "sparse": lambda pt: pt.eye(3).to_sparse(),
    "meta": lambda pt: pt.empty(3, device="meta"),
    "complex": lambda pt: pt.ones(3, dtype=pt.complex64),
    "conjugate": lambda pt: pt.ones(3, dtype=pt.complex64).conj(),
    "8 TiB in 2 bytes": lambda pt: pt.zeros(1, dtype=pt.bfloat16).as_strided((1 << 40, 4), (0, 0)),
    "4 GiB in 4 bytes": lambda pt: pt.zeros(1).as_strided((1 << 30, 1), (0, 0)),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_tensor_that_is_not_dense_real_numbers_is_named(kind, tmp_path):
    pt = pytorch()
    pt.save({"conv1.weight": UNREADABLE[kind](pt)}, tmp_path / "net.pt")
    with pytest.raises(UserError, match=r"conv1\.weight (is a tensor of|repeats its numbers)"):
        checkpoints.read(tmp_path / "net.pt")


def test_a_compressed_file_that_declares_too_much_is_not_unpacked(state_dict, tmp_path, monkeypatch):
    pt = pytorch()
    pt.save({"conv1.weight": pt.zeros(64, 64, 64, 1)}, tmp_path / "net.pt")
    with (
        zipfile.ZipFile(tmp_path / "net.pt") as plain,
        zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as z,
    ):
        for name in plain.namelist():
            z.writestr(name, plain.read(name))
    monkeypatch.setattr(npz, "SMALL", 1000)
    monkeypatch.setattr(pt, "load", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(UserError):
        checkpoints.read(tmp_path / "z.pt")


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "F4", "X"])
def test_a_type_that_numpy_lacks_is_refused(kind, tmp_path):
    header = json.dumps({"x": {"dtype": kind, "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "net.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"12")
    with pytest.raises(UserError, match=r"cannot read .*net\.safetensors"):
        checkpoints.read(tmp_path / "net.safetensors")


class Runs:
    """An object whose unpickling runs code."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(state_dict, tmp_path):
    pt = pytorch()
    pt.save({"state_dict": tensors(state_dict), "more": Runs(f"touch {tmp_path / 'ran'}")}, tmp_path / "net.pt")
    with pytest.raises(UserError, match=r"refused: it holds (posix|nt)\.system"):
        checkpoints.read(tmp_path / "net.pt")
    assert not (tmp_path / "ran").exists()


def test_an_object_that_is_no_number_is_named(state_dict, tmp_path):
    pt = pytorch()
    pt.save({"state_dict": tensors(state_dict), "args": argparse.Namespace(lr=0.1)}, tmp_path / "net.pt")
    with pytest.raises(UserError, match=r"refused: it holds argparse\.Namespace"):
        checkpoints.read(tmp_path / "net.pt")


def test_a_file_cut_short_is_named(state_dict, tmp_path):
    pt = pytorch()
    pt.save(tensors(state_dict), tmp_path / "net.pt")
    whole = (tmp_path / "net.pt").read_bytes()
    (tmp_path / "net.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="or is truncated"):
        checkpoints.read(tmp_path / "net.pt")
