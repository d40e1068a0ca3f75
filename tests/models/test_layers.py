"""Layers, each against another way to compute it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ltjax.models import layers


def params_of(layer, x):
    return jax.tree.map(np.asarray, jax.jit(layer.init)(jax.random.key(0), x)["params"])


def value_and_gradient(function, x, dy):
    """Return `function(x)` and dy's way back through it."""

    @jax.jit
    def both(x, dy):
        y, pull_back = jax.vjp(function, x)
        return y, *pull_back(dy)

    return both(x, dy)


@pytest.mark.parametrize(
    "init, weights, biases", [("he", 2, 1 / 3), ("torch", 1 / 3, 1 / 3), ("torch_no_bias", 1 / 3, 0)]
)
def test_a_classifier_begins_as_its_authors_does(init, weights, biases):
    """Variances times the width: He's are 2, PyTorch's 1/3."""
    width = 64
    actual = params_of(layers.LinearClassifier(500, init), np.ones((1, width), np.float32))
    assert actual["kernel"].var() * width == pytest.approx(weights, rel=0.05)
    assert actual["bias"].var() * width == pytest.approx(biases, rel=0.2)
    if init != "he":
        assert np.abs(actual["kernel"]).max() <= width**-0.5


def test_initial_bias_is_uniform_within_one_over_the_root_of_the_width():
    bias = params_of(layers.LinearClassifier(4000), np.ones((1, 16), np.float32))["bias"]
    assert np.abs(bias).max() <= 1 / 4
    actual, uniform = [bias.min(), bias.max(), bias.mean(), bias.std()], [-0.25, 0.25, 0, 0.5 / 12**0.5]
    np.testing.assert_allclose(actual, uniform, atol=0.01)


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 6), (2, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_max_pool_and_its_gradient_are_flaxs(size, dtype):
    """The forward pass is bit-identical. Gradients of a pixel in several windows are summed in float32."""
    rows, columns = ((pixels + 1) // 2 for pixels in size)
    x = np.random.default_rng(0).integers(-3, 4, (2, *size, 5)).astype(jnp.dtype(dtype))  # many are equal
    dy = (np.random.default_rng(1).integers(-8, 9, (2, rows, columns, 5)) / 8).astype(x.dtype)  # sums are exact
    with jax.enable_x64(dtype == "float64"):
        ours = value_and_gradient(layers.max_pool, x, dy)
        theirs = value_and_gradient(lambda x: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))), x, dy)
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.dtype == expected.dtype == x.dtype
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


@pytest.mark.parametrize("platform, scatters", [("cpu", False), ("gpu", False), ("tpu", True)])
def test_max_pools_gradient_scatters_only_on_a_tpu(platform, scatters):
    x = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.bfloat16)
    program = jax.jit(jax.grad(lambda x: layers.max_pool(x, platform).sum())).lower(x).as_text()
    assert ("select_and_scatter" in program) == scatters


@pytest.mark.parametrize("kernel_size, strides, size", [(3, 1, 9), (3, 2, 5), (1, 1, 9), (1, 2, 5), (7, 2, 5)])
def test_convolutions_are_padded_as_in_pytorch(kernel_size, strides, size):
    conv = layers.Conv(2, kernel_size=kernel_size, strides=strides)
    out, _ = jax.eval_shape(conv.init_with_output, jax.random.key(0), jnp.ones((1, 9, 9, 3)))
    assert out.shape == (1, size, size, 2)


def batch_norm(x, *, scale=1.0, bias=0.0, mean=0.0, var=1.0, train=True, steps=1):
    """Return the output and the running statistics after some steps on the same x."""
    width = x.shape[-1]
    scale, bias, mean, var = (np.full(width, v, np.float32) for v in (scale, bias, mean, var))
    params, stats = {"scale": scale, "bias": bias}, {"mean": mean, "var": var}
    for _ in range(steps):
        out, stats = normalised({"params": params, "batch_stats": stats}, x, train)
    return out, stats


@functools.partial(jax.jit, static_argnums=2)
def normalised(variables, x, train):
    out, new = layers.BatchNorm().apply(variables, x, train, mutable=["batch_stats"])
    return out, new["batch_stats"]


def test_batch_norm_is_pytorchs():
    random = np.random.default_rng(0)
    x = random.normal(2, 3, (4, 3, 2, 5)).astype(np.float32)  # 24 numbers a channel
    scale, bias = (random.normal(size=5).astype(np.float32) for _ in range(2))
    out, stats = batch_norm(x, scale=scale, bias=bias, steps=2)
    flat = x.astype(np.float64).reshape(-1, 5)
    expected = (x - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5) * scale + bias
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats["mean"], (1 - 0.9**2) * flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9**2 + (1 - 0.9**2) * flat.var(0, ddof=1), rtol=1e-5)


def test_batch_norm_in_evaluation_uses_and_keeps_running_statistics():
    x = np.random.default_rng(0).normal(size=(2, 3, 3, 2)).astype(np.float32)
    settings = {"scale": [1.0, 3.0], "bias": [0.5, 0.0], "mean": [1.0, -2.0], "var": [4.0, 0.25]}
    scale, bias, mean, var = (np.array(v, np.float32) for v in settings.values())
    out, after = batch_norm(x, **settings, train=False)
    np.testing.assert_allclose(out, (x - mean) / np.sqrt(var + 1e-5) * scale + bias, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, dict(after), {"mean": mean, "var": var})


def test_batch_norm_of_one_pixel_is_finite():
    out, stats = batch_norm(np.full((1, 1, 1, 2), 3.0, np.float32))
    np.testing.assert_allclose(out, np.zeros((1, 1, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(stats["var"], [0.9, 0.9], rtol=1e-6)


def test_batch_norm_of_equal_values_has_a_finite_gradient():
    gradient = jax.jit(jax.grad(lambda x: jnp.square(batch_norm(x)[0] - 1).sum()))(
        np.full((2, 2, 2, 1), 7.1, np.float32)
    )
    assert np.isfinite(gradient).all()


@functools.partial(jax.jit, static_argnums=2)
def cosine(features, kernel, scale=1.0):
    module = layers.CosineClassifier(kernel.shape[1], scale)
    return module.apply({"params": {"kernel": kernel}}, features)


def test_cosine_logits_are_scaled_cosines():
    random = np.random.default_rng(0)
    features, kernel = random.normal(size=(6, 8)).astype(np.float32), random.normal(size=(8, 5)).astype(np.float32)
    lengths = np.linalg.norm(features, axis=1)[:, None] * np.linalg.norm(kernel, axis=0)
    np.testing.assert_allclose(cosine(features, kernel, 30.0), 30 * (features @ kernel) / lengths, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [0.0, 1e-20, 1e-6, 1.0, 1e15])
def test_cosine_logits_stay_within_the_scale(length):
    kernel = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    features = kernel.T * np.float32(length)
    logits = cosine(features, kernel, 30.0)
    assert np.abs(logits).max() <= 30 * (1 + 1e-5)


def test_cosine_weights_begin_with_length_1():
    """LDAM's authors do so, too: a step turns longer vectors less."""
    kernel = params_of(layers.CosineClassifier(5), np.zeros((1, 64), np.float32))["kernel"]
    np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), np.ones(5), rtol=1e-6)


def test_cosine_classifier_has_a_finite_gradient_at_zero_features():
    kernel = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    loss = jax.grad(lambda f, k: jnp.square(cosine(f, k, 30.0) - 1).sum(), (0, 1))
    gradients = jax.jit(loss)(np.zeros((3, 8), np.float32), kernel)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_float64_batch_norm_and_pooling_are_numpys():
    x = np.random.default_rng(0).normal(2, 3, (4, 3, 2, 5))
    with jax.enable_x64(True):
        params, stats = {"scale": np.full(5, 3.0), "bias": np.ones(5)}, {"mean": np.zeros(5), "var": np.ones(5)}
        variables = {"params": params, "batch_stats": stats}
        out, stats = normalised(variables, x, True)
        pooled = layers.pool(out)
    flat = x.reshape(-1, 5)
    expected = (x - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5) * 3 + 1
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(pooled, expected.mean((1, 2)), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(stats["mean"], 0.1 * flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-12)
