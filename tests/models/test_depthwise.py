"""Depthwise convolution by products of taps, against XLA's grouped convolution; batch norm with ReLU6."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from ltjax.models import layers
from tests.jaxprs import equations

# image, kernel's side, stride: even and odd sides, maps smaller than the kernel, and rows that a stride leaves out
CASES = [
    ((14, 14), 5, 1),
    ((8, 6), 3, 1),
    ((7, 7), 3, 2),
    ((8, 8), 3, 2),
    ((8, 8), 5, 2),
    ((9, 5), 5, 2),
    ((1, 2), 5, 1),
    ((1, 1), 5, 2),
    ((2, 3), 3, 2),
]


def drawn(size, taps, channels=4, dtype=np.float32):
    random = np.random.default_rng(0)
    return random.normal(size=(3, *size, channels)).astype(dtype), random.normal(size=(taps, taps, 1, channels))


def xlas(x, kernel, stride):
    settings = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1])
    return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", **settings)


def ours(x, kernel, stride, platform="cpu", dtype=None):
    conv = layers.DepthwiseConv(kernel.shape[0], stride, dtype=dtype or x.dtype, platform=platform)
    return conv.apply({"params": {"kernel": kernel}}, x)


def value_and_gradients(convolution, x, kernel, stride):
    value, pull_back = jax.vjp(lambda x, kernel: convolution(x, kernel, stride), x, kernel)
    weights = np.random.default_rng(1).integers(-3, 4, value.shape)  # exact in any type
    return value, *pull_back(jnp.asarray(weights, value.dtype))


@pytest.mark.parametrize("size, taps, stride", CASES)
def test_the_value_and_both_gradients_are_xlas(size, taps, stride):
    with jax.enable_x64(True):
        arrays = drawn(size, taps, dtype=np.float64)
        actual, expected = (
            jax.jit(value_and_gradients, static_argnums=(0, 3))(f, *arrays, stride) for f in (ours, xlas)
        )
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == jnp.float64
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size, taps, stride", CASES[:4])
def test_bfloat16_is_rounded_once(size, taps, stride):
    """The value and the gradients are those in float32, rounded."""
    x, kernel = (jnp.asarray(array, jnp.bfloat16) for array in drawn(size, taps))
    actual = jax.jit(value_and_gradients, static_argnums=(0, 3))(ours, x, kernel, stride)
    exact = value_and_gradients(xlas, x.astype(jnp.float32), kernel.astype(jnp.float32), stride)
    for a, b in zip(actual, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(a), b, rtol=2**-8, atol=1e-5)


def test_replicas_are_convolved_each_with_its_own_kernel():
    x, kernel = drawn((6, 6), 3)
    both = np.stack([x, 2 * x]), np.stack([kernel, kernel - 1]).astype(np.float32)
    actual = jax.jit(jax.vmap(lambda x, kernel: value_and_gradients(ours, x, kernel, 2)))(*both)
    for replica in (0, 1):
        expected = value_and_gradients(xlas, both[0][replica], both[1][replica], 2)
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a[replica], b, rtol=1e-4, atol=1e-4)


def test_a_cpu_runs_no_convolution():
    """Check forward and backward: XLA's CPU backend takes 20 times as long for convolutions."""
    x, kernel = drawn((8, 8), 3)
    jaxpr = jax.make_jaxpr(lambda *arrays: value_and_gradients(ours, *arrays, 2))(x, jnp.float32(kernel))
    names = {eqn.primitive.name for eqn in equations(jaxpr.jaxpr)}
    assert "dynamic_slice" in names  # of the kernel's gradient
    assert "conv_general_dilated" not in names and "dot_general" not in names


@pytest.mark.parametrize("platform, lowered_for", [("gpu", "cuda"), ("tpu", "tpu")])
def test_an_accelerator_only_runs_grouped_convolutions(platform, lowered_for):
    def all_three(x, kernel):
        return value_and_gradients(lambda *arrays: ours(*arrays, platform, jnp.bfloat16), x, kernel, 2)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, 8, 8, 4), (3, 3, 1, 4))]
    text = export.export(jax.jit(all_three), platforms=[lowered_for])(*shapes).mlir_module()
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert len(convolutions) == 3
    assert all("feature_group_count = 4" in line or "batch_group_count = 4" in line for line in convolutions)
    assert "while" not in text


def test_initial_weights_are_hes_for_the_one_channel_of_each_kernel():
    conv = layers.DepthwiseConv(5)
    kernel = conv.init(jax.random.key(0), jnp.zeros((1, 8, 8, 2000)))["params"]["kernel"]
    assert kernel.shape == (5, 5, 1, 2000)
    assert abs(float(kernel.std()) / (2 / 25) ** 0.5 - 1) < 4 / (2 * kernel.size) ** 0.5


@pytest.mark.parametrize("size, pads", [(8, (0, 1)), (7, (1, 1))])
def test_same_padding_puts_the_odd_pixel_behind_the_image(size, pads):
    x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    for platform in ("cpu", "gpu"):
        conv = layers.Conv(4, strides=2, padding="SAME", platform=platform)
        actual, variables = conv.init_with_output(jax.random.key(0), x)
        settings = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))
        expected = lax.conv_general_dilated(x, variables["params"]["kernel"], (2, 2), (pads, pads), **settings)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
