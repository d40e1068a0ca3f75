"""EfficientNet-Lite0: its shapes, its golden numbers with the shipped weights, and its arithmetic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from ltjax import models
from ltjax.models import efficientnet_lite0
from ltjax.models.efficientnet_lite0 import STAGES
from ltjax.optim import flatten
from ltjax.runs.weights import load_weights, shipped
from ltjax.types import UserError
from tests.jaxprs import equations

NAME = "efficientnet_lite0"


@pytest.fixture(scope="module")
def golden(golden):
    return golden(NAME)


@pytest.fixture(scope="module")
def weights():
    return load_weights(shipped()[NAME])


def create(num_classes=1, **settings):
    return models.create(NAME, num_classes, **settings)


@functools.cache
def shapes():
    """Return the shapes of the variables for 1000 classes. They do not depend on the size of the images."""
    return jax.eval_shape(create(1000).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


@functools.cache
def applied(**settings):
    net = create(8, **settings)
    return jax.jit(lambda variables, images: net.apply(variables, images.astype(jnp.float32) / 255, False))


def run(weights, golden, images, **settings):
    """Evaluate uint8 images, with the logits of eight of ImageNet's classes."""
    head = {"kernel": golden["classifier"].T, "bias": golden["bias"]}
    variables = {
        "params": {**weights.variables.params["net"], "classifier": head},
        "batch_stats": weights.variables.stats["net"],
    }
    pixels = {key: weights.settings[key] for key in ("mean", "std")}
    return applied(**{**pixels, **settings})(variables, images)


@pytest.fixture(scope="module")
def outputs(weights, golden):
    return run(weights, golden, golden["images"])


# Shapes


def test_parameters_are_as_many_as_in_the_checkpoint():
    sizes = {path: leaf.size for path, leaf in flatten(shapes()["params"]).items()}
    assert sum(sizes.values()) == 4_652_008
    assert sum(size for path, size in sizes.items() if path.startswith("classifier")) == 1_281_000
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes()["batch_stats"])) == 42_016


def test_multiplications_for_an_image_are_those_of_its_table():
    """385 million for 224x224 pixels, products with the zeros of padding among them. The authors count 407 million."""
    net, image = create(1000, platform="gpu"), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    program = jax.make_jaxpr(net.apply)(shapes(), image).jaxpr
    convolutions = [eqn for eqn in equations(program) if eqn.primitive.name == "conv_general_dilated"]
    assert len(convolutions) == 49
    products = sum(eqn.outvars[0].aval.size * np.prod(eqn.invars[1].aval.shape[:-1]) for eqn in convolutions)
    side, came, expected = 112, 32, 112 * 112 * 27 * 32 + 7 * 7 * 320 * 1280
    for expansion, taps, stride, out, blocks in STAGES:
        for strides in (stride, *(1,) * (blocks - 1)):
            inner, before, side = came * expansion, side, side // strides
            expected += (before**2 * came * inner if expansion > 1 else 0) + side**2 * inner * (taps**2 + out)
            came = out
    assert products == expected == 383_907_552


@pytest.mark.parametrize(
    "size, sides", [(224, (112, 56, 28, 14, 14, 7, 7, 7)), (97, (49, 25, 13, 7, 7, 4, 4, 4)), (8, (4, 2) + 6 * (1,))]
)
def test_a_side_is_halved_by_the_stem_and_four_stages_and_rounded_up(size, sides):
    net, image = create(), jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    backbone = {name: tree["backbone"] for name, tree in shapes().items()}
    maps = jax.eval_shape(lambda variables, image: net.backbone.apply(variables, image, False), backbone, image)
    widths = (*(stage.features for stage in STAGES), 1280)
    assert {name: x.shape for name, x in maps.items()} == {
        f"stage{number}": (2, side, side, width)
        for number, (side, width) in enumerate(zip(sides, widths, strict=True), 1)
    }


def test_grey_images_have_a_first_convolution_of_their_own():
    grey = jax.eval_shape(create().init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    assert models.input_channels(grey["params"]) == 1


def test_it_has_no_settings():
    with pytest.raises(UserError, match="model 'efficientnet_lite0' has no setting 'depth'; allowed: none"):
        create(depth=32)


def test_initial_weights_are_hes_for_the_channels_out(monkeypatch):
    """Check the first block of each stage."""
    monkeypatch.setattr(efficientnet_lite0, "STAGES", [stage._replace(blocks=1) for stage in STAGES])
    net = create(10)
    key = jax.random.key(0, impl="unsafe_rbg")  # quick to compile
    params = jax.device_get(jax.jit(net.init)(key, jnp.zeros((1, 32, 32, 3)))["params"])
    kernels = {path: kernel for path, kernel in flatten(params["backbone"]).items() if path.endswith("kernel")}
    assert len(kernels) == 1 + 2 + 6 * 3 + 1
    for path, kernel in kernels.items():
        taps, out = kernel.shape[0] ** 2, 1 if "depthwise" in path else kernel.shape[-1]
        standard = float(kernel.std()) * (taps * out / 2) ** 0.5
        assert abs(standard - 1) < 4.5 / (2 * kernel.size) ** 0.5, path


# Golden numbers


def test_features_are_pytorchs(golden, outputs):
    np.testing.assert_allclose(outputs.features, golden["shipped/features"], rtol=0, atol=1e-4)


def test_logits_are_pytorchs(golden, outputs):
    np.testing.assert_allclose(outputs.logits, golden["shipped/logits"], rtol=0, atol=1e-4)


def test_the_map_after_each_stage_is_pytorchs(golden, outputs):
    last = np.cumsum([stage.blocks for stage in STAGES]) - 1
    for number, block in enumerate(last, 1):
        expected = golden[f"shipped/tap_block{block:02}"]
        np.testing.assert_allclose(outputs.layers[f"stage{number}"], expected, rtol=0, atol=1e-4)


def centre(golden, size):
    low = (224 - size) // 2
    return golden["images"][:1, low : low + size, low : low + size]


@pytest.mark.parametrize("size", [97, 160])
def test_features_of_other_sizes_are_pytorchs(golden, weights, size):
    actual = run(weights, golden, centre(golden, size)).features
    np.testing.assert_allclose(actual, golden[f"shipped/features_{size}"], rtol=0, atol=1e-4)


def test_with_every_array_rounded_to_float16_features_are_pytorchs(golden, weights):
    """The shipped norms, rounded as well, are those of the rounded checkpoint."""
    rounded = jax.tree.map(lambda leaf: leaf.astype(np.float16).astype(np.float32), weights.variables)
    actual = run(weights._replace(variables=rounded), golden, golden["images"]).features
    np.testing.assert_allclose(actual, golden["features_f16weights"], rtol=0, atol=1e-4)


def relative(actual, expected):
    """Return the relative difference of each image's features."""
    return np.linalg.norm(np.float32(actual) - expected, axis=1) / np.linalg.norm(expected, axis=1)


def test_float16_kernels_change_features_little(golden, outputs):
    """They change by 0.35 to 1.14 % on these images, which are not photographs."""
    errors = relative(outputs.features, golden["features"])
    assert 0.003 < errors.min() and errors.max() < 0.012


def test_imagenets_mean_and_deviation_change_features(golden, weights):
    """With these, features change by 37 % or more, without an error."""
    imagenet = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    actual = run(weights, golden, golden["images"], **imagenet).features
    assert relative(actual, golden["features_imagenetnorm"]).max() < 0.02
    assert relative(actual, golden["features"]).min() > 0.3


# Types and platforms


@pytest.fixture(scope="module")
def small(weights, golden):
    """Return features of 64x64 pixels, in float32 by the convolutions of a CPU."""
    return np.asarray(run(weights, golden, centre(golden, 64), platform="cpu").features)


def test_bfloat16_features_are_near_float32s(golden, weights, small):
    rounded = run(weights, golden, centre(golden, 64), dtype="bfloat16").features
    assert rounded.dtype == jnp.float32
    assert relative(rounded, small).max() < 0.1


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_the_convolutions_of_accelerators_give_the_same(golden, weights, small, platform):
    actual = run(weights, golden, centre(golden, 64), platform=platform).features
    np.testing.assert_allclose(actual, small, rtol=0, atol=1e-4)


@pytest.mark.parametrize("platform, lowered_for, remat", [("gpu", "cuda", False), ("tpu", "tpu", True)])
def test_a_training_step_lowers_for_accelerators(platform, lowered_for, remat):
    net = create(1000, platform=platform, dtype="bfloat16", remat=remat)
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    variables = shapes()

    def loss(params, stats, images):
        outputs, new = net.apply({"params": params, "batch_stats": stats}, images, True, mutable=["batch_stats"])
        return outputs.logits.sum(), new

    step = jax.jit(jax.grad(loss, has_aux=True))
    text = export.export(step, platforms=[lowered_for])(variables["params"], variables["batch_stats"], images)
    assert text.mlir_module().count("stablehlo.convolution") >= 49 * 3 - 1
