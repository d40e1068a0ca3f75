"""Export weights by PyTorch's names and as StableHLO, and import them again."""

import json
import sys

import jax
import jax.export
import numpy as np
import pytest
from safetensors import safe_open

from ltjax import models
from ltjax.interop import export, names
from ltjax.interop.torch import export_state_dict, import_state_dict
from ltjax.runs.weights import Weights, load_weights, save_weights
from tests.pytorch import pytorch

NETWORKS = {
    "drolt": ("resnet_cifar", dict(depth=8, width=4)),
    "mislas": ("resnet_cifar", dict(depth=8, width=4, logit_scale=True)),
    "reslt": ("resnet_cifar", dict(depth=8, width=4, branches=3)),
    "reslt scaled": ("resnet_cifar", dict(depth=8, width=4, branches=2, logit_scale=True)),
    "reslt large": ("resnet", dict(width=2, branches=2, branch_kind="conv")),
    "torchvision": ("resnet", dict(width=2)),
    "preact": ("preact_resnet", dict(width=2)),
    "lbgat": ("wide_resnet", dict(depth=16, width=1)),
    "cosine": ("resnet_cifar", dict(depth=8, width=4, classifier="cosine")),
    "resnet50": ("resnet", dict(depth=50, stem="large", width=4)),
    "resnext50": ("resnet", dict(depth=50, stem="large", width=16, groups=8, group_width=4)),
    "places": ("resnet", dict(depth=50, blocks=(1, 1, 1, 1), width=4, stem="large", extra_block=True)),
    "efficientnet": ("efficientnet_lite0", {}),
    "efficientnet scaled": ("efficientnet_lite0", dict(logit_scale=True)),
    "vit": ("vit", dict(depth=11, width=8, patch=4, grid=3, qkv_bias=False)),
    "dinov2": ("vit", dict(depth=2, width=8, patch=7, grid=3, registers=2, layer_scale=True, mlp_width=20)),
    "clip": ("vit", dict(depth=2, width=8, patch=4, grid=3, pre_norm=True, epsilon=1e-5)),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request, variables_of):
    name, settings = NETWORKS[request.param]
    model = models.create(name, 10, **settings)
    return request.param, model, variables_of(model)


def test_import_undoes_export(network, same):
    _, model, variables = network
    same(import_state_dict(export_state_dict(variables, model), model), variables)


# names in the authors' and torchvision's classes, one of each kind
THEIRS = {
    "drolt": ("conv1.weight", "bn1.running_var", "layer3.0.conv2.weight", "layer1.0.bn1.bias", "linear.weight"),
    "mislas": ("model.conv1.weight", "model.layer1.0.bn2.weight", "classifier.fc.bias", "lws_model.learned_norm"),
    "reslt": ("model.bn1.weight", "model.layer2.0.conv1.weight", "BNH.weight", "BNT.running_mean", "linear.bias"),
    "torchvision": ("conv1.weight", "layer2.0.downsample.0.weight", "layer4.0.downsample.1.running_var", "fc.weight"),
    "resnet50": (
        "conv1.weight",
        "layer1.0.downsample.0.weight",
        "layer3.5.conv3.weight",
        "layer4.2.bn3.bias",
        "fc.bias",
    ),
    "resnext50": ("layer1.0.conv2.weight", "layer1.0.downsample.1.running_var", "fc.weight"),
    "places": ("model.conv1.weight", "model.layer4.0.conv3.weight", "block.bn3.bias", "classifier.fc.weight"),
    "preact": ("conv1.weight", "bn.weight", "layer2.0.shortcut.0.weight", "linear.weight"),
    "vit": ("cls_token", "pos_embed", "patch_embed.proj.bias", "blocks.10.attn.qkv.weight", "norm.bias", "head.bias"),
    "dinov2": ("reg_token", "blocks.0.ls1.gamma", "blocks.1.mlp.fc2.weight", "blocks.1.norm2.weight"),
    "clip": ("norm_pre.weight", "patch_embed.proj.weight", "blocks.1.attn.proj.bias", "blocks.0.norm1.bias"),
    "lbgat": ("block1.layer.1.bn2.running_mean", "block2.layer.0.convShortcut.weight", "bn1.weight", "fc.bias"),
}


@pytest.mark.parametrize("network", [kind for kind in NETWORKS if kind in THEIRS], indirect=True)
def test_names_are_the_authors(network):
    kind, model, variables = network
    assert set(THEIRS[kind]) <= export_state_dict(variables, model).keys()


def test_every_batch_norm_has_counted_no_batches(network):
    _, model, variables = network
    state_dict = export_state_dict(variables, model)
    norms = {key.rpartition(".")[0] for key in state_dict if key.endswith("running_var")}
    assert {key.rpartition(".")[0] for key in state_dict if key.endswith("num_batches_tracked")} == norms


PATHS = (
    *(f"backbone/stage3_block36/{layer}" for layer in ("conv3/kernel", "norm3/scale", "norm1/var")),
    *(f"backbone/stage1_block1/{layer}" for layer in ("shortcut/kernel", "shortcut_norm/mean")),
    *(f"block/{layer}" for layer in ("conv1/kernel", "norm3/bias", "norm2/mean")),
    *(f"branches/{layer}" for layer in ("conv/kernel", "norm/var", "norm3/scale")),
    *("backbone/conv/kernel", "backbone/norm/bias", "classifier/kernel", "logit_scale"),
)


@pytest.mark.parametrize("form", [dict(mislas=m, reslt=r) for m in (True, False) for r in (True, False)], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_a_name_of_a_large_network_leads_back_to_its_path(path, form):
    ndim = {"kernel": 4, "logit_scale": 2}.get(path.rpartition("/")[2], 1)
    assert names.path_of(names.bare(names.key_of(path, "resnet", **form)), ndim) == path


@pytest.fixture
def folder(tmp_path, variables_of):
    model = models.create("resnet_cifar", 6, depth=8, width=2, logit_scale=True)
    settings = dict(name="resnet_cifar", depth=8, width=2, logit_scale=True)
    more = dict(class_order=(3, 1, 2, 0, 5, 4), images={"size": 8}, licence="MIT")
    save_weights(tmp_path / "w", variables_of(model), settings, num_classes=6, **more)
    return tmp_path / "w"


def test_stablehlo_gives_the_logits_in_our_order_for_batches_of_any_size(folder, tmp_path):
    command = [str(folder), "--format=stablehlo", "--image_size=8x12", f"--out={tmp_path / 'net'}"]
    assert export.main(command) == 0
    loaded = jax.export.deserialize(bytearray((tmp_path / "net").read_bytes()))
    assert loaded.platforms == ("cpu", "cuda", "tpu")
    weights = load_weights(folder)
    model = models.create("resnet_cifar", 6, depth=8, width=2, logit_scale=True)
    collections = {"params": weights.variables.params["net"], "batch_stats": weights.variables.stats["net"]}
    images = np.random.default_rng(0).uniform(size=(3, 8, 12, 3)).astype(np.float32)
    theirs = np.asarray(jax.jit(lambda x: model.apply(collections, x).logits)(images))
    for size in (1, 3):
        ours = np.asarray(loaded.call(images[:size]))
        np.testing.assert_allclose(ours[:, list(weights.class_order)], theirs[:size], rtol=1e-5)


def test_stablehlo_of_a_vision_transformer_takes_batches_of_any_size(variables_of):
    settings = dict(depth=1, width=8, heads=2, patch=4, grid=3, registers=1, adapter="adaptformer", rank=2)
    model = models.create("vit", 6, **settings)
    variables = variables_of(model)
    file = export.stablehlo(Weights(variables, {"name": "vit", **settings}, 6), (8, 12))
    loaded = jax.export.deserialize(bytearray(file))
    images = np.random.default_rng(0).uniform(size=(3, 8, 12, 3)).astype(np.float32)
    expected = np.asarray(jax.jit(lambda x: model.apply({"params": variables.params["net"]}, x).logits)(images))
    for size in (1, 3):
        np.testing.assert_allclose(np.asarray(loaded.call(images[:size])), expected[:size], rtol=1e-4)


def test_a_stablehlo_may_take_pixels_of_uint8(folder, tmp_path):
    pixels, logits = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8), {}
    for kind in export.PIXELS:
        command = [str(folder), "--format=stablehlo", "--image_size=8", f"--pixels={kind}"]
        assert export.main([*command, f"--out={tmp_path / kind}"]) == 0
        network = jax.export.deserialize(bytearray((tmp_path / kind).read_bytes())).call
        logits[kind] = network(pixels if kind == "uint8" else pixels.astype(np.float32) / 255)
    np.testing.assert_allclose(logits["uint8"], logits["float"], rtol=1e-5)


def test_safetensors_hold_the_settings_of_their_model(folder, tmp_path):
    assert export.main([str(folder), "--format=safetensors", f"--out={tmp_path / 'net.safetensors'}"]) == 0
    with safe_open(tmp_path / "net.safetensors", "numpy") as file:
        about = json.loads(file.metadata()["ltjax"])
        assert file.get_tensor("lws_model.learned_norm").shape == (1, 6)
    assert about["model"]["depth"] == 8
    assert about["class_order"] == [3, 1, 2, 0, 5, 4]


def test_exported_weights_are_unchanged(folder, tmp_path, same):
    assert export.main([str(folder), "--format=weights", f"--out={tmp_path / 'copy'}"]) == 0
    actual, expected = load_weights(tmp_path / "copy"), load_weights(folder)
    same(actual.variables, expected.variables)
    assert actual[1:] == expected[1:] and (actual.images, actual.licence) == ({"size": 8}, "MIT")


def test_pytorch_loads_an_exported_state_dict(folder, tmp_path):
    torch = pytorch()
    assert export.main([str(folder), "--format=state_dict", f"--out={tmp_path / 'net.pt'}"]) == 0
    state_dict = torch.load(tmp_path / "net.pt", weights_only=True)
    kernel = load_weights(folder).variables.params["net"]["classifier"]["kernel"]
    np.testing.assert_array_equal(state_dict["classifier.fc.weight"].numpy().T, kernel)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--format=stablehlo"], "needs --image_size"),
        (["--format=stablehlo", "--image_size=big"], "such as 32 or 224x224"),
        (["--format=state_dict"], "install torch"),
        (["--format=onnx"], "--format=onnx needs --image_size"),
        (["--format=onnx", "--image_size=8"], 'pip install "ltjax[onnx]"'),
    ],
)
def test_a_mistake_is_one_line(folder, tmp_path, arguments, message, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    assert export.main([str(folder), *arguments, f"--out={tmp_path / 'net'}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_of_neither_kind_is_named(tmp_path, capsys):
    assert export.main([str(tmp_path), "--format=weights", f"--out={tmp_path / 'net'}"]) == 2
    assert "neither a run's workdir" in capsys.readouterr().err
