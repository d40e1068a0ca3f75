"""Loss kernels against the authors' numbers (source: tests/golden/README.md), float64 NumPy, and their symmetries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ltjax import losses
from ltjax.losses import features

FLOAT32_MAX = float(np.finfo(np.float32).max)
cross_entropy = jax.jit(losses.cross_entropy)
label_aware_smoothing = jax.jit(losses.label_aware_smoothing)


def random_batch(seed, batch=32, classes=10, spread=3.0):
    random = np.random.default_rng(seed)
    logits = random.normal(0, spread, (batch, classes)).astype(np.float32)
    return logits, random.integers(0, classes, batch), random.uniform(0, 0.5, classes).astype(np.float32)


def soft_target_loss(logits, labels, smoothing):
    """Compute the loss as cross-entropy against an explicit soft target, in float64."""
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    share = smoothing.astype(np.float64)[labels][:, None]
    target = (1 - share) * np.eye(logits.shape[1])[labels] + share / logits.shape[1]
    return -(target * log_p).sum(-1)


def value_and_gradient(loss, logits):
    return jax.jit(jax.value_and_grad(lambda logits: loss(logits).mean()))(logits)


@pytest.mark.parametrize("shape", losses.SMOOTHING_SHAPES)
def test_smoothing_equals_the_authors(golden, shape):
    numbers = golden("label_aware_smoothing")
    ours = losses.smoothing_by_count(
        numbers["class_counts"],
        head=float(numbers["smooth_head"]),
        tail=float(numbers["smooth_tail"]),
        shape=shape,
        power=float(numbers["exp_power"]),
    )
    np.testing.assert_allclose(ours, numbers[f"smooth_{shape}"], rtol=1e-5)


@pytest.mark.parametrize("shape", losses.SMOOTHING_SHAPES)
def test_balanced_counts_are_smoothed_as_the_head(shape):
    ours = losses.smoothing_by_count(np.full(7, 50), head=0.3, tail=0.1, shape=shape, power=2.0)
    np.testing.assert_allclose(ours, np.full(7, 0.3), rtol=1e-6)


@pytest.mark.parametrize("shape", losses.SMOOTHING_SHAPES)
def test_head_and_tail_are_the_ends_whatever_the_order_of_classes(shape):
    ours = losses.smoothing_by_count(np.array([30, 5, 400, 12]), head=0.4, tail=0.1, shape=shape, power=3.0)
    assert ours.dtype == jnp.float32
    ours = np.asarray(ours)
    np.testing.assert_allclose(ours[[2, 1]], [0.4, 0.1], atol=1e-6)
    assert np.all((ours >= 0.1 - 1e-6) & (ours <= 0.4 + 1e-6))


def test_smoothing_works_on_traced_counts():
    rows = np.array([[10, 20, 30], [5, 5, 5]])
    together = jax.jit(jax.vmap(lambda counts: losses.smoothing_by_count(counts, head=0.4, tail=0.1)))(rows)
    alone = [losses.smoothing_by_count(row, head=0.4, tail=0.1) for row in rows]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-6)


def test_unknown_smoothing_shape_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown smoothing shape 'cubic'; known: concave, linear, convex, exp"):
        losses.smoothing_by_count(np.ones(3), head=0.1, tail=0.0, shape="cubic")


@pytest.mark.parametrize("name, value", [("head", 1.5), ("tail", -0.1), ("head", np.nan)])
def test_smoothing_outside_0_to_1_is_an_error_that_names_it(name, value):
    with pytest.raises(ValueError, match=f"smoothing {name} = {value}: a share of the label, from 0 to 1"):
        losses.smoothing_by_count(np.array([1, 2, 3]), **{"head": 0.1, "tail": 0.0, name: value})


@pytest.mark.parametrize("shape", losses.SMOOTHING_SHAPES)
def test_label_aware_smoothing_and_its_gradient_equal_the_authors(golden, shape):
    numbers = golden("label_aware_smoothing")
    smoothing = losses.smoothing_by_count(
        numbers["class_counts"],
        head=float(numbers["smooth_head"]),
        tail=float(numbers["smooth_tail"]),
        shape=shape,
        power=float(numbers["exp_power"]),
    )
    value, gradient = value_and_gradient(
        lambda logits: losses.label_aware_smoothing(logits, numbers["labels"], smoothing=smoothing), numbers["logits"]
    )
    np.testing.assert_allclose(value, numbers[f"loss_{shape}"], rtol=1e-5)
    theirs = numbers[f"grad_{shape}"]
    np.testing.assert_allclose(gradient, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("seed", range(4))
def test_label_aware_smoothing_is_cross_entropy_against_a_soft_target(seed):
    logits, labels, smoothing = random_batch(seed, classes=2 + 7 * seed, spread=10.0**seed / 10)
    ours = label_aware_smoothing(logits, labels, smoothing=smoothing)
    assert ours.shape == labels.shape
    np.testing.assert_allclose(ours, soft_target_loss(logits, labels, smoothing), rtol=1e-5, atol=1e-6)


def test_cross_entropy_is_minus_log_p_of_the_label():
    logits, labels, _ = random_batch(0)
    expected = soft_target_loss(logits, labels, np.zeros(10))
    np.testing.assert_allclose(cross_entropy(logits, labels), expected, rtol=1e-5, atol=1e-6)


def test_without_smoothing_it_is_cross_entropy():
    logits, labels, _ = random_batch(1)
    ours = value_and_gradient(lambda z: losses.label_aware_smoothing(z, labels, smoothing=np.zeros(10)), logits)
    plain = value_and_gradient(lambda z: losses.cross_entropy(z, labels), logits)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), ours, plain)


def test_without_smoothing_a_masked_class_costs_as_in_cross_entropy():
    logits, labels = np.array([[0.5, 0.0, -np.inf]], np.float32), np.array([1])
    ours = value_and_gradient(lambda z: losses.label_aware_smoothing(z, labels, smoothing=np.zeros(3)), logits)
    plain = value_and_gradient(lambda z: losses.cross_entropy(z, labels), logits)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, plain)


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("low, high", [(-1e4, 1e4), (-1e30, 1e30), (-FLOAT32_MAX, 0.0), (0.0, FLOAT32_MAX)])
def test_extreme_logits_have_a_finite_loss_and_gradient(low, high, smoothing):
    logits = np.array([[low, high, low], [high, low, low], [low, low, low], [high, high, low]], np.float32)
    for label in range(3):
        per_example, gradients = extremes(logits, np.full(4, label), np.full(3, smoothing))
        assert all(np.isfinite(array).all() for array in (*per_example, *gradients))


@jax.jit
def extremes(logits, labels, smoothing):
    """Return losses [B] and the gradients of their sums: of cross-entropy, and of a quarter of the smoothed one."""
    kinds = (
        lambda z: losses.cross_entropy(z, labels),
        lambda z: losses.label_aware_smoothing(z, labels, smoothing=smoothing) / 4,
    )
    return [loss(logits) for loss in kinds], [jax.grad(lambda z, loss=loss: loss(z).sum())(logits) for loss in kinds]


def test_a_class_at_minus_infinity_leaves_the_others_cross_entropy_alone():
    logits, labels = np.array([[1.0, 2.0, -np.inf]], np.float32), np.array([0])
    both = jax.value_and_grad(lambda z: losses.cross_entropy(z, labels).mean())  # eager: XLA may turn 0 * inf into 0
    (value, gradient), (rest, rest_gradient) = both(logits), both(logits[:, :2])
    np.testing.assert_allclose(value, rest, rtol=1e-6)
    np.testing.assert_allclose(gradient, np.append(rest_gradient, [[0]], axis=1), rtol=1e-6)


def test_renaming_the_classes_changes_nothing():
    logits, labels, smoothing = random_batch(2)
    new_name = np.random.default_rng(9).permutation(10)
    old_name = np.argsort(new_name)
    renamed = label_aware_smoothing(logits[:, old_name], new_name[labels], smoothing=smoothing[old_name])
    before = label_aware_smoothing(logits, labels, smoothing=smoothing)
    np.testing.assert_allclose(renamed, before, rtol=1e-6)


def test_adding_a_constant_to_the_logits_changes_nothing():
    logits, labels, smoothing = random_batch(3)
    moved = label_aware_smoothing(logits + np.float32(64), labels, smoothing=smoothing)
    before = label_aware_smoothing(logits, labels, smoothing=smoothing)
    np.testing.assert_allclose(moved, before, rtol=1e-5, atol=1e-5)


def test_jit_and_vmap_give_what_a_loop_gives():
    batches = [random_batch(seed, batch=4) for seed in range(3)]
    together = jax.jit(jax.vmap(lambda z, y, e: losses.label_aware_smoothing(z, y, smoothing=e)))(
        *(np.stack(parts) for parts in zip(*batches, strict=True))
    )
    alone = [label_aware_smoothing(z, y, smoothing=e) for z, y, e in batches]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_logits_stay_in_half_precision(dtype):
    logits, labels, smoothing = random_batch(4)
    ours = label_aware_smoothing(logits.astype(dtype), labels, smoothing=smoothing)
    assert ours.dtype == dtype
    expected = soft_target_loss(logits, labels, smoothing)
    np.testing.assert_allclose(np.asarray(ours, np.float32), expected, rtol=0.05, atol=0.1)


def test_mixed_without_a_partner_is_the_plain_loss():
    logits, labels, _ = random_batch(5)
    ours = losses.mixed(lambda labels: losses.cross_entropy(logits, labels), labels)
    np.testing.assert_array_equal(ours, losses.cross_entropy(logits, labels))


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, np.linspace(0, 1, 32)], ids=["partner", "both", "own", "each its own"])
def test_mixed_weighs_both_labels(lam):
    logits, labels, _ = random_batch(6)
    partners = np.roll(labels, 1)
    ours = losses.mixed(lambda labels: losses.cross_entropy(logits, labels), labels, partners, lam)
    with_labels, with_partners = (soft_target_loss(logits, y, np.zeros(10)) for y in (labels, partners))
    np.testing.assert_allclose(ours, lam * with_labels + (1 - lam) * with_partners, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis_type", [None, AxisType.Auto], ids=["explicit", "auto"])
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_a_sharded_batch_has_the_same_losses_and_gradient(axis_type, jitted):
    mesh = jax.make_mesh((8,), ("data",), axis_types=axis_type and (axis_type,))
    assert mesh.axis_types == ((axis_type or AxisType.Explicit),)
    logits, labels, partners, smoothing = mixed_batch()
    with jax.set_mesh(mesh):
        split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
        arguments = [jax.device_put(x, split) for x in (logits, labels, partners)] + [jax.device_put(smoothing, whole)]
        actual = (jax.jit(losses_and_gradient) if jitted else losses_and_gradient)(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), actual, on_one_device())


def mixed_batch():
    logits, labels, smoothing = random_batch(7)
    return logits, labels, np.roll(labels, 1), smoothing


def losses_and_gradient(logits, labels, partners, smoothing):
    def loss(logits):
        return losses.mixed(
            lambda y: losses.label_aware_smoothing(logits, y, smoothing=smoothing) + losses.cross_entropy(logits, y),
            labels,
            partners,
            0.3,
        )

    per_example, pull = jax.vjp(loss, logits)
    return per_example, pull(jnp.full_like(per_example, 1 / len(labels)))


@functools.cache
def on_one_device():
    return jax.jit(losses_and_gradient)(*mixed_batch())


def test_class_means_are_the_same_on_every_platform():
    """On CPUs they are scattered, elsewhere a product. Labels outside of the classes are left out."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(50, 3)).astype(np.float32)
    labels = rng.integers(-1, 6, 50)  # five classes
    expected = [values[labels == c].sum(0) for c in range(5)]
    for ways in (features._scatter, features._product):
        sums, counts = ways(5, jnp.asarray(values), jnp.asarray(labels))
        np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(counts, [(labels == c).sum() for c in range(5)])
