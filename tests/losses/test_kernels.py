"""Common properties of the losses that compare features with class models, or a student with a teacher."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ltjax import losses
from tests.jaxprs import equations

B, C, P, V = 8, 5, 18, 2  # P so small that vmf_contrast takes two steps of its recurrence
PER_EXAMPLE = PartitionSpec("data")
# name: (kernel, shape of each array ("labels" for labels), how each is split over devices)
KERNELS = {
    "gkl": (
        lambda a, t, w: losses.gkl(a, t, weights=w, alpha=1.5, beta=2.0, gamma=0.5, temperature=2.0),
        ((B, C), (B, C), "weights"),
        (PER_EXAMPLE,) * 3,
    ),
    "distillation": (
        lambda s, t: losses.distillation(s, t, temperature=2.0, power=0.5),
        ((B, C), (B, C)),
        (PER_EXAMPLE,) * 2,
    ),
    "vmf_contrast": (
        lambda z, m, k: losses.vmf_contrast(z, m, k, temperature=0.5),
        ((B, P), (C, P), "kappas"),
        (PER_EXAMPLE, PartitionSpec(), PartitionSpec()),
    ),
    "balanced_contrast": (
        lambda f, y, u: losses.balanced_contrast(f, y, u, temperature=0.5),
        ((V, B, P), "labels", (C, P)),
        (PartitionSpec(None, "data"), PER_EXAMPLE, PartitionSpec()),
    ),
    "running_class_means": (
        losses.running_class_means,
        ((C, P), "counts", (B, P), "labels"),
        (PartitionSpec(), PartitionSpec(), PER_EXAMPLE, PER_EXAMPLE),
    ),
    "vmf_kappas": (lambda m: losses.vmf_kappas(0.1 * m), ((C, P),), (PartitionSpec(),)),
}
every_kernel = pytest.mark.parametrize("name", KERNELS)


def arrays_of(name, seed=0):
    random = np.random.default_rng(seed)
    made = {
        "labels": lambda: random.integers(0, C, B),
        "weights": lambda: random.uniform(0, 1, (B, C)),
        "kappas": lambda: random.uniform(0, 50, C),
        "counts": lambda: random.integers(0, 9, C),
    }

    def array(shape):
        if isinstance(shape, tuple):
            x = random.normal(size=shape)
            x = x / np.linalg.norm(x, axis=-1, keepdims=True) if shape[-1] == P else x
        else:
            x = made[shape]()
        return x if shape == "labels" else x.astype(np.float32)

    return [array(shape) for shape in KERNELS[name][1]]


@functools.cache
def value_and_gradient(name):
    """Return a function of the arrays: the kernel's values, and the gradient of their sum to the first array."""
    kernel = KERNELS[name][0]

    def both(first, *rest):
        values, pull = jax.vjp(lambda first: kernel(first, *rest), first)
        return values, pull(jax.tree.map(jnp.ones_like, values))

    return both


@functools.cache
def jitted(name):
    return jax.jit(value_and_gradient(name))


@functools.cache
def on_one_device(name):
    return jitted(name)(*arrays_of(name))


def assert_all_close(ours, expected, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), ours, expected)


@every_kernel
def test_jit_and_vmap_give_what_a_loop_gives(name):
    batches = [arrays_of(name, seed) for seed in range(3)]
    both = jitted(name)
    together = jax.jit(jax.vmap(both))(*(np.stack(parts) for parts in zip(*batches, strict=True)))
    alone = jax.tree.map(lambda *parts: np.stack(parts), *(both(*arrays) for arrays in batches))
    assert_all_close(together, alone, rtol=1e-5, atol=1e-6)


@every_kernel
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_near_float32(name, dtype):
    arrays = arrays_of(name)
    halves = [x.astype(dtype) if x.dtype == np.float32 else x for x in arrays]
    ours, (expected, _) = jax.jit(KERNELS[name][0])(*halves), on_one_device(name)
    wanted = jnp.float32 if name == "vmf_kappas" else dtype
    assert all(value.dtype == wanted for value in jax.tree.leaves(ours))
    assert_all_close(jax.tree.map(lambda x: np.asarray(x, np.float32), ours), expected, rtol=0.05, atol=0.05)


@every_kernel
def test_float64_stays_float64(name):
    with jax.enable_x64(True):
        arrays = [x.astype(np.float64) if x.dtype == np.float32 else x for x in arrays_of(name)]
        ours = jitted(name)(*arrays)
    assert all(value.dtype == np.float64 for value in jax.tree.leaves(ours))
    assert_all_close(ours, on_one_device(name), rtol=1e-4, atol=1e-5)


@every_kernel
@pytest.mark.parametrize("axis_type", [None, AxisType.Auto], ids=["explicit", "auto"])
@pytest.mark.parametrize("as_jit", [False, True], ids=["eager", "jit"])
def test_a_sharded_batch_has_the_same_values_and_gradient(name, axis_type, as_jit):
    mesh = jax.make_mesh((8,), ("data",), axis_types=axis_type and (axis_type,))
    assert mesh.axis_types == ((axis_type or AxisType.Explicit),)
    arrays = arrays_of(name)
    both = jitted(name) if as_jit else value_and_gradient(name)
    with jax.set_mesh(mesh):
        split = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, KERNELS[name][2], strict=True)]
        actual = both(*split)
    assert_all_close(actual, on_one_device(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@every_kernel
def test_a_kernel_lowers_for_accelerators(name, platform):
    exported = export.export(jitted(name), platforms=[platform])(*arrays_of(name))
    assert exported.platforms == (platform,)


def largest(function, *arrays):
    """Count the numbers in the largest array of a function's gradient."""
    jaxpr = jax.make_jaxpr(jax.grad(lambda *x: function(*x).sum()))(*arrays)
    return max(variable.aval.size for equation in equations(jaxpr.jaxpr) for variable in equation.outvars)


def test_gkl_has_no_array_larger_than_the_logits():
    batch, classes = 4, 300
    logits = np.zeros((batch, classes), np.float32)
    assert largest(lambda a, t: KERNELS["gkl"][0](a, t, logits + 1), logits, logits) == batch * classes


@pytest.mark.parametrize("size", [16, 64], ids=["with the recurrence", "without"])
def test_vmf_contrast_has_no_vector_for_each_example_and_class(size):
    batch, classes = 32, 40
    arrays = [np.ones(shape, np.float32) for shape in ((batch, size), (classes, size), (classes,))]
    found = largest(KERNELS["vmf_contrast"][0], *arrays)
    assert found <= max(batch * classes, batch * size, classes * size)


def test_balanced_contrast_has_no_array_of_all_pairs_of_classes():
    batch, classes, size = 4, 300, 8
    features, centres = np.ones((2, batch, size), np.float32), np.ones((classes, size), np.float32)
    found = largest(lambda f, u: KERNELS["balanced_contrast"][0](f, np.zeros(batch, int), u), features, centres)
    assert found <= 2 * batch * (2 * batch + classes)


def test_compiled_gkl_needs_memory_in_proportion_to_the_logits(optimised):
    batch, classes = 16, 2000
    logits = jax.ShapeDtypeStruct((batch, classes), jnp.float32)
    gradient = jax.grad(lambda a, t, w: KERNELS["gkl"][0](a, t, w), argnums=(0, 1))
    compiled = jax.jit(gradient, compiler_options=optimised or None).lower(logits, logits, logits).compile()
    plan = compiled.memory_analysis()
    if plan is None:
        pytest.skip("this backend has no plan of its memory")
    assert plan.temp_size_in_bytes < 12 * 4 * batch * classes  # [B, C, C] would be 2,000 times that
