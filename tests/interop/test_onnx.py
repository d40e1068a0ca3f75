"""The ONNX export, run by ONNX Runtime: the logits are ltjax's, for batches of any size.

Without `pip install -e ".[onnx]"` the tests are skipped, or fail with LTJAX_REQUIRE_ONNX=1.
"""

import json
import os

import jax
import jax.export
import numpy as np
import pytest

import ltjax
from ltjax import models, predictor, train
from ltjax.interop import export
from ltjax.runs.weights import Weights, load_weights, save_weights
from ltjax.types import UserError, Variables
from tests.test_run import tiny_config

if os.environ.get("LTJAX_REQUIRE_ONNX"):
    import jax2onnx  # noqa: F401
    import onnxruntime
else:
    pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.usefixtures("no_reports")
CLASSES = 7
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
NETWORKS = {
    "resnet8": dict(name="resnet_cifar", depth=8, width=4, logit_scale=True),
    "resnet10, branches, cosine": dict(name="resnet", width=4, branches=2, branch_kind="pooled_conv", **IMAGENET)
    | dict(classifier="cosine", cosine_scale=16.0),
    "resnet8, branches": dict(name="resnet_cifar", depth=8, width=4, branches=3),
    "resnext": dict(name="resnet", depth=50, stem="large", width=16, groups=8, group_width=4, blocks=(1, 1, 1, 1)),
    "preact": dict(name="preact_resnet", width=2),
    "wide": dict(name="wide_resnet", depth=10, width=1),
    "efficientnet_lite0": dict(name="efficientnet_lite0"),
    "vit": dict(name="vit", depth=2, width=16, heads=2, patch=8, grid=4),
}


def made(name, seed=0):
    """Return weights of a network: normal kernels of variance 1 / fan-in, and random batch norms."""
    settings = dict(NETWORKS[name])
    net = models.create(settings.pop("name"), CLASSES, **settings)
    shapes = jax.eval_shape(net.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    rng = np.random.default_rng(seed)

    def array(path, leaf):
        name, fan_in = path[-1].key, max(1, int(np.prod(leaf.shape[:-1])))
        if name in ("scale", "var", "logit_scale"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return rng.normal(0, fan_in**-0.5 if name == "kernel" else 0.1, leaf.shape).astype(np.float32)

    collections = jax.tree_util.tree_map_with_path(array, shapes)
    variables = Variables({"net": collections["params"]}, {"net": collections.get("batch_stats", {})}, {})
    return Weights(variables, NETWORKS[name], CLASSES)


def images(number, side=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, side, side, 3), np.uint8)


def session(content):
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_runtime_computes_the_logits_of_the_network(name):
    weights = made(name)
    run = session(export.onnx(weights, (32, 32))).run
    model = predictor.Model(weights)
    for number in (1, 5):  # in one file
        pixels = images(number)
        expected = model.logits(pixels)
        (logits,) = run(None, {"images": pixels.astype(np.float32) / 255})
        assert np.ptp(expected) > 0.1
        np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_onnx_and_stablehlo_are_the_same_function():
    """Compare them with normalisation, on images that are not square."""
    weights, pixels = made("resnet10, branches, cosine"), images(3)[:, :24]
    stablehlo = jax.export.deserialize(bytearray(export.stablehlo(weights, (24, 32), pixels="uint8"))).call
    (logits,) = session(export.onnx(weights, (24, 32), pixels="uint8")).run(None, {"images": pixels})
    np.testing.assert_allclose(logits, stablehlo(pixels), atol=1e-4)


def test_an_operation_without_onnx_conversion_is_one_error():
    """ONNX has no resampling with antialiasing, which a transformer's positions need for other image sizes."""
    with pytest.raises(UserError, match=r"jax2onnx cannot convert .* for this size .*: take --format=stablehlo"):
        export.onnx(made("vit"), (48, 48))


def test_pixels_may_be_uint8():
    weights, pixels = made("resnet8"), images(3)
    floats = session(export.onnx(weights, (32, 32)))
    of_bytes = session(export.onnx(weights, (32, 32), pixels="uint8"))
    expected = floats.run(None, {"images": pixels.astype(np.float32) / 255})
    np.testing.assert_allclose(of_bytes.run(None, {"images": pixels}), expected, atol=1e-5)


def test_a_bfloat16_network_computes_in_float32():
    weights, pixels = made("resnet8"), images(3)
    half = weights._replace(settings={**weights.settings, "dtype": "bfloat16"})
    (logits,) = session(export.onnx(half, (32, 32), pixels="uint8")).run(None, {"images": pixels})
    np.testing.assert_allclose(logits, predictor.Model(weights).logits(pixels), atol=1e-4)


def test_logits_are_in_the_order_of_our_classes(tmp_path):
    weights, order = made("resnet8"), (3, 1, 2, 0, 5, 4, 6)
    save_weights(tmp_path / "w", weights.variables, weights.settings, num_classes=CLASSES, class_order=order)
    command = [str(tmp_path / "w"), "--format=onnx", "--image_size=32", f"--out={tmp_path / 'net.onnx'}"]
    assert export.main([*command, "--pixels=uint8"]) == 0
    pixels = images(2)
    (logits,) = session(tmp_path / "net.onnx").run(None, {"images": pixels})
    assert load_weights(tmp_path / "w").class_order == order
    expected = predictor.Model(weights).logits(pixels)  # in the folder's order
    np.testing.assert_allclose(logits[:, list(order)], expected, atol=1e-4)


def test_the_file_of_a_run_has_its_class_names(tmp_path):
    train.train(tiny_config(stages=("ce",), epochs=1), tmp_path / "run")
    file = tmp_path / "net.onnx"
    assert export.main([str(tmp_path / "run"), "--format=onnx", "--image_size=28", f"--out={file}"]) == 0
    opened, model = session(file), ltjax.load(tmp_path / "run")
    about = opened.get_modelmeta().custom_metadata_map
    assert tuple(json.loads(about["class_names"])) == model.class_names and model.class_names[0] == "T-shirt/top"
    assert json.loads(about["ltjax"])["model"]["depth"] == 8 and json.loads(about["ltjax"])["pixels"] == "float"
    assert opened.get_inputs()[0].shape[1:] == [28, 28, 1] and opened.get_outputs()[0].name == "logits"
    pixels = np.random.default_rng(0).random((4, 28, 28, 1), np.float32)
    np.testing.assert_allclose(opened.run(None, {"images": pixels})[0], model.logits(pixels), atol=1e-4)
