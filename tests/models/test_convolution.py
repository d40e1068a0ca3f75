"""Convolutions and their gradients are `lax`'s, however a platform computes them."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ltjax.models import convolution

ONE = ((1, 1), (1, 1))


CONVOLUTIONS = [  # image, kernel, strides, padding
    ((8, 8), (3, 3), (1, 1), ONE),
    ((8, 8), (3, 3), (2, 2), ONE),
    ((7, 9), (3, 3), (2, 2), ONE),
    ((7, 9), (3, 3), (1, 1), ((0, 0), (0, 0))),
    ((8, 8), (1, 1), (1, 1), ((0, 0), (0, 0))),
    ((8, 7), (1, 1), (2, 2), ((0, 0), (0, 0))),
    ((6, 6), (1, 1), (1, 1), ONE),
    ((9, 8), (3, 3), (2, 2), ((0, 1), (2, 0))),
    ((9, 8), (5, 2), (2, 3), ((4, 1), (0, 3))),
    ((3, 3), (3, 3), (1, 1), ((3, 0), (0, 3))),
    ((1, 1), (3, 3), (2, 2), ONE),
    ((2, 2), (3, 3), (1, 1), ONE),
    ((1, 2), (3, 3), (1, 1), ((2, 1), (1, 2))),
    ((2, 2), (2, 1), (1, 1), ((0, 0), (0, 0))),
    ((11, 10), (7, 7), (2, 2), ((3, 3), (3, 3))),
    ((7, 8), (3, 3), (2, 2), "SAME"),
    ((7, 8), (3, 3), (2, 2), "VALID"),
]


@pytest.mark.parametrize("size, taps, strides, padding", CONVOLUTIONS)
def test_the_cpu_convolution_and_both_gradients_are_laxs(size, taps, strides, padding):
    compare_with_lax(size, taps, strides, padding, came=4, out=5, groups=1)


@pytest.mark.parametrize("came, out, groups", [(4, 6, 2), (6, 3, 3), (4, 4, 4), (3, 6, 3)])
@pytest.mark.parametrize("size, taps, strides, padding", [CONVOLUTIONS[0], CONVOLUTIONS[2], CONVOLUTIONS[-2]])
def test_the_grouped_cpu_convolution_and_both_gradients_are_laxs(size, taps, strides, padding, came, out, groups):
    compare_with_lax(size, taps, strides, padding, came=came, out=out, groups=groups)


@pytest.mark.parametrize("size, taps, strides, padding", [CONVOLUTIONS[0], CONVOLUTIONS[7]])
def test_the_gradient_of_a_kernel_in_parts_is_laxs(monkeypatch, size, taps, strides, padding):
    monkeypatch.setattr(convolution, "CACHE", 0)
    parts, split = [], convolution._kernel_gradient
    monkeypatch.setattr(convolution, "_kernel_gradient", lambda x, *more: parts.append(len(x)) or split(x, *more))
    compare_with_lax(size, taps, strides, padding, came=4, out=5, groups=1, batch=64)
    assert parts == [16] * 4


def test_devices_add_the_parts_of_a_kernels_gradient_once():
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    maps = jax.ShapeDtypeStruct((64, 32, 32, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("batch")))
    assert convolution._needs_parts(maps)

    def gradient(x, dy):
        return convolution._kernel_gradient_in_parts(x, dy, (3, 3, 16, 16), (1, 1), ONE, None)

    whole = NamedSharding(mesh, PartitionSpec())
    program = jax.jit(gradient, out_shardings=whole).lower(maps, maps).compile().as_text()
    assert len(re.findall(r" all-reduce\(", program)) == 1
    assert not re.search(r" (all-gather|all-to-all|collective-permute)\(", program)


def compare_with_lax(size, taps, strides, padding, *, came, out, groups, batch=3):
    random = np.random.default_rng(0)
    x = random.normal(size=(batch, *size, came)).astype(np.float32)
    kernel = random.normal(size=(*taps, came // groups, out)).astype(np.float32)

    def both(convolution):
        def run(x, kernel):
            rest = dict(lhs_dilation=(1, 1), rhs_dilation=(1, 1), dimension_numbers=("NHWC", "HWIO", "NHWC"))
            return convolution(x, kernel, strides, padding, feature_group_count=groups, **rest)

        value, pull_back = jax.vjp(run, x, kernel)
        weights = np.random.default_rng(1).normal(size=value.shape).astype(np.float32)
        return value, pull_back(jnp.asarray(weights))

    ours = jax.jit(partial(both, convolution.convolution_for("cpu")))()
    theirs = jax.jit(partial(both, lax.conv_general_dilated))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


@pytest.mark.parametrize("name", ["rhs_dilation", "lhs_dilation"])
def test_dilated_convolutions_are_laxs(name):
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 8, 8, 4)).astype(np.float32)
    kernel = random.normal(size=(3, 3, 4, 6)).astype(np.float32)
    settings = dict(lhs_dilation=(1, 1), rhs_dilation=(1, 1), dimension_numbers=("NHWC", "HWIO", "NHWC"), padding=ONE)
    settings[name] = (2, 2)
    actual = convolution.convolution_for("cpu")(x, kernel, (1, 1), **settings)
    np.testing.assert_array_equal(actual, lax.conv_general_dilated(x, kernel, (1, 1), **settings))


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_accelerators_run_laxs_convolution(platform):
    def program(convolution):
        run = lambda x, kernel: convolution(x, kernel, (2, 2), ONE, **NHWC)  # noqa: E731
        both = lambda x, kernel, dy: jax.vjp(run, x, kernel)[1](dy)  # noqa: E731
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 8, 8, 4), (3, 3, 4, 6), (2, 4, 4, 6))]
        return convolutions(jax.jit(both).lower(*shapes))

    assert len(program(lax.conv_general_dilated)) == 2
    assert set(program(convolution.convolution_for(platform))) == set(program(lax.conv_general_dilated))


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_of_vmapped_convolutions_are_those_of_a_grouped_one(groups):
    """Two with respect to the maps' channels, and none whose window is as wide as the map."""

    def gradients(convolution):
        def one(x, kernel, dy):
            run = lambda x, kernel: convolution(x, kernel, (2, 2), ONE, feature_group_count=groups, **NHWC)  # noqa: E731
            return jax.vjp(run, x, kernel)[1](dy)

        return jax.jit(jax.vmap(one))

    random = np.random.default_rng(0)
    operands = [
        random.normal(size=(5, *s)).astype(np.float32) for s in ((2, 8, 8, 4), (3, 3, 4 // groups, 6), (2, 4, 4, 6))
    ]
    ours, laxs = gradients(convolution.convolution_for("gpu")), gradients(lax.conv_general_dilated)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours(*operands), laxs(*operands))
    (to_x, to_kernel) = sorted(
        convolutions(ours.lower(*operands)), key=lambda line: "batch_group_count = 1 " not in line
    )
    assert f"feature_group_count = {5 * groups} " in to_x and f"batch_group_count = {5 * groups} " in to_kernel


@pytest.mark.parametrize("which, batched", [("x", (0, None)), ("kernel", (None, 0))])
def test_one_operand_of_a_vmapped_convolution_may_be_shared(which, batched):
    random = np.random.default_rng(0)
    x, kernel = (random.normal(size=s).astype(np.float32) for s in ((2, 8, 8, 4), (3, 3, 4, 6)))
    operands = [np.stack([value, 2 * value]) if batched[i] == 0 else value for i, value in enumerate((x, kernel))]

    def gradients(convolution):
        loss = lambda x, kernel: jnp.sin(convolution(x, kernel, (1, 1), ONE, **NHWC)).sum()  # noqa: E731
        return jax.vmap(jax.grad(loss, (0, 1)), batched)(*operands)

    ours, laxs = gradients(convolution.convolution_for("gpu")), gradients(lax.conv_general_dilated)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, laxs)


def test_gradients_have_the_precision_of_their_convolution():
    """Check that the precision is that of the forward call's context."""

    def loss(x, kernel):
        with jax.default_matmul_precision("float32"):
            return jnp.sin(convolution.convolution_for("gpu")(x, kernel, (1, 1), ONE, **NHWC)).sum()

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 8, 8, 4), (3, 3, 4, 6))]
    actual = convolutions(jax.jit(jax.grad(loss, (0, 1))).lower(*shapes))
    assert len(actual) == 3 and all("precision HIGHEST" in line and "DEFAULT" not in line for line in actual)


NHWC = dict(lhs_dilation=(1, 1), rhs_dilation=(1, 1), dimension_numbers=("NHWC", "HWIO", "NHWC"))


def convolutions(lowered):
    """Return the convolutions of a program, without the names of operands."""
    lines = [line for line in lowered.as_text().splitlines() if "stablehlo.convolution" in line]
    return [line.partition(" dim_numbers")[2] for line in lines]
