"""Batch norm's gradient against JAX's gradient of the formula."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax.models.layers import BatchNorm

CASES = list(itertools.product(("float32", "bfloat16"), (False, True), (False, True), (False, True)))


def formula(params, x, residual, *, relu, train):
    values, axes = x.astype(jnp.float32), (0, 1, 2)
    mean, var = (values.mean(axes), values.var(axes)) if train else (jnp.float32(0.0), jnp.float32(1.0))
    y = (values - mean) / jnp.sqrt(var + 1e-5) * params["scale"] + params["bias"]
    y = y if residual is None else y + residual.astype(jnp.float32)
    return (jax.nn.relu(y) if relu else y).astype(x.dtype)


@pytest.mark.parametrize("dtype, relu, added, train", CASES)
def test_values_and_gradients_are_the_formulas(dtype, relu, added, train):
    keys = jax.random.split(jax.random.key(0), 5)
    x = (3 + 2 * jax.random.normal(keys[0], (8, 6, 6, 5))).astype(dtype)
    residual = jax.random.normal(keys[1], x.shape).astype(dtype) if added else None
    params = {"scale": 1 + 0.3 * jax.random.normal(keys[2], (5,)), "bias": jax.random.normal(keys[3], (5,))}
    stats = {"mean": jnp.zeros(5), "var": jnp.ones(5)}

    def ours(params, x, residual):
        variables = {"params": params, "batch_stats": stats}
        return BatchNorm(relu=relu).apply(variables, x, train, residual, mutable=["batch_stats"])[0]

    def theirs(params, x, residual):
        return formula(params, x, residual, relu=relu, train=train)

    dy = jax.random.normal(keys[4], x.shape).astype(dtype)
    results = []
    for function in (ours, theirs):
        y, pull_back = jax.vjp(function, params, x, residual)
        results.append(jax.tree.leaves((y, pull_back(dy))))
    assert len(results[0]) == 4 + added
    for ours, exact in zip(*results, strict=True):
        assert ours.dtype == exact.dtype
        ours, exact = np.float64(ours), np.float64(exact)
        assert np.abs(ours - exact).max() < (2e-5 if dtype == "float32" else 2e-2) * np.abs(exact).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("train", [False, True])
def test_a_relu_may_have_a_ceiling(dtype, train):
    """Check ReLU6, with values and gradients of its formula; at 0 and 6 the slope is 0, as in PyTorch."""
    x = (3 * jax.random.normal(jax.random.key(0), (8, 6, 6, 5))).astype(dtype)
    params = {"scale": jnp.full(5, 3.0), "bias": jnp.full(5, 3.0)}
    stats = {"mean": jnp.zeros(5), "var": jnp.full(5, 4.0)}

    def run(params, x, **settings):
        norm = BatchNorm(**settings)
        return norm.apply({"params": params, "batch_stats": stats}, x, train, mutable=["batch_stats"])[0]

    def theirs(params, x):
        return jnp.clip(run(params, x), 0, 6)

    y, pull_back = jax.vjp(lambda params, x: run(params, x, relu=True, ceiling=6.0), params, x)
    expected, pull_back_theirs = jax.vjp(theirs, params, x)
    assert float(y.min()) == 0 and float(y.max()) == 6
    before = run(params, x)
    outside = ((before < -0.1) | (before > 6.1)).astype(dtype)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(pull_back(outside)))
    inside = (before > 0.1) & (before < 5.9)
    dy = jnp.where(inside, jax.random.normal(jax.random.key(1), x.shape), 0).astype(dtype)
    for ours, exact in zip(
        jax.tree.leaves((y, pull_back(dy))), jax.tree.leaves((expected, pull_back_theirs(dy))), strict=True
    ):
        ours, exact = np.float64(ours), np.float64(exact)
        assert np.abs(ours - exact).max() < (1e-5 if dtype == "float32" else 2e-2) * np.abs(exact).max()


def test_momentum_and_epsilon_can_be_set():
    x = np.random.default_rng(0).normal(size=(4, 3, 3, 2)).astype(np.float32) / 100
    norm = BatchNorm(momentum=0.01, epsilon=1e-3)
    variables = norm.init(jax.random.key(0), x, False)
    y, new = norm.apply(variables, x, True, mutable=["batch_stats"])
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-3), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(new["batch_stats"]["mean"], 0.01 * mean, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(new["batch_stats"]["var"], 0.99 + 0.01 * var * 36 / 35, rtol=1e-6)
