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
