"""Weights without a classifier: training starts from them, and prediction refuses them."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import ltjax
from ltjax import models
from ltjax.interop import export, torch
from ltjax.interop.torch import export_state_dict, read_checkpoint
from ltjax.modes.evaluate import evaluate_workdir
from ltjax.runs.weights import load_weights, save_weights, with_weights
from ltjax.types import UserError
from tests.test_run import tiny_config

MODEL = dict(depth=8, width=2, mean=(0.286,), std=(0.353,))
SPEC = "--model=resnet_cifar,depth=8,width=2,mean=(0.286,),std=(0.353,)"


@pytest.fixture(scope="module")
def variables(variables_of):
    return variables_of(models.create("resnet_cifar", 6, **MODEL), channels=1)


@pytest.fixture(scope="module")
def files(variables, tmp_path_factory):
    """Return a file of a network with 6 classes, and one of its backbone alone."""
    folder = tmp_path_factory.mktemp("files")
    state_dict = export_state_dict(variables, models.create("resnet_cifar", 6, **MODEL))
    save_file(state_dict, folder / "whole.safetensors")
    backbone = {key: value for key, value in state_dict.items() if not key.startswith("linear.")}
    save_file(backbone, folder / "headless.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "w"
    assert torch.main([str(files / "headless.safetensors"), SPEC, f"--out={folder}"]) == 0
    return folder


def test_a_file_without_a_classifier_is_imported(folder, variables, same):
    weights = load_weights(folder)
    assert weights.num_classes == 0 and weights.variables.params["net"].keys() == {"backbone"}
    same(weights.variables.params["net"]["backbone"], variables.params["net"]["backbone"])
    same(weights.variables.stats, variables.stats)


def test_other_missing_arrays_are_named(files, tmp_path, capsys):
    deeper = SPEC.replace("depth=8", "depth=14")
    assert torch.main([str(files / "headless.safetensors"), deeper, f"--out={tmp_path / 'w'}"]) == 2
    assert "nothing for ['backbone/stage1_block2/conv1/kernel'" in capsys.readouterr().err


def test_a_stated_number_of_classes_needs_a_classifier(files, tmp_path, capsys):
    command = [str(files / "headless.safetensors"), SPEC, "--num_classes=6", f"--out={tmp_path / 'w'}"]
    assert torch.main(command) == 2
    assert "nothing for ['classifier/bias', 'classifier/kernel']" in capsys.readouterr().err


def test_a_network_with_other_classes_takes_the_existing_parts(folder, variables_of, same):
    weights, fresh = load_weights(folder), variables_of(models.create("resnet_cifar", 23, **MODEL), channels=1, seed=4)
    started = with_weights(fresh, weights)
    same(started.params["net"]["backbone"], weights.variables.params["net"]["backbone"])
    same(started.params["net"]["classifier"], fresh.params["net"]["classifier"])
    same(started.stats, weights.variables.stats)


def test_a_network_without_such_a_part_is_refused(folder, variables_of):
    other = variables_of(models.create("resnet_cifar", 23, depth=14, width=2), channels=1)
    with pytest.raises(UserError, match=r"set config\.model to their network: resnet_cifar\(.*\), no classifier"):
        with_weights(other, load_weights(folder))


def test_the_backbone_of_a_network_with_other_classes_is_read(files, variables, same):
    settings = {"name": "resnet_cifar", **MODEL}
    whole, alone = (
        read_checkpoint(files / f"{kind}.safetensors", settings, backbone=True) for kind in ("whole", "headless")
    )
    same(whole.weights.variables, alone.weights.variables)
    assert whole.weights._replace(variables=None) == alone.weights._replace(variables=None)
    assert set(whole.ignored) - set(alone.ignored) == {"linear.weight", "linear.bias"}


def test_settings_of_other_parts_are_not_those_of_a_backbone(variables_of, tmp_path):
    model = models.create("resnet_cifar", 6, **MODEL, logit_scale=True, branches=3)
    save_file(export_state_dict(variables_of(model, channels=1), model), tmp_path / "net.safetensors")
    settings = {"name": "resnet_cifar", **MODEL}
    assert read_checkpoint(tmp_path / "net.safetensors", settings, backbone=True).weights.settings == settings


def test_functions_that_need_a_classifier_say_so(folder, tmp_path, capsys):
    expected = "no classifier is among these weights; start training from them"
    with pytest.raises(UserError, match=expected):
        ltjax.load(folder)
    with pytest.raises(UserError, match=expected):
        evaluate_workdir(tiny_config(weights=str(folder)), tmp_path / "new")
    command = ["--format=stablehlo", "--image_size=8", f"--out={tmp_path / 'net'}"]
    assert export.main([str(folder), *command]) == 2
    assert expected in capsys.readouterr().err


def test_a_folder_is_exported_without_a_classifier(folder, files, tmp_path, same):
    assert export.main([str(folder), "--format=safetensors", f"--out={tmp_path / 'net.safetensors'}"]) == 0
    settings = {"name": "resnet_cifar", **MODEL}
    actual, expected = (
        read_checkpoint(f / name, settings)
        for f, name in ((tmp_path, "net.safetensors"), (files, "headless.safetensors"))
    )
    same(actual.weights.variables, expected.weights.variables)


def test_a_description_that_promises_a_classifier_is_refused(folder, variables, tmp_path):
    backbone = variables._replace(params={"net": {"backbone": variables.params["net"]["backbone"]}})
    save_weights(tmp_path, jax.tree.map(np.asarray, backbone), {"name": "resnet_cifar", **MODEL}, num_classes=6)
    with pytest.raises(UserError, match="num_classes = 6, and the classifier has 0 outputs"):
        load_weights(tmp_path)
    assert json.loads((folder / "weights.json").read_text())["model"]["num_classes"] == 0
