"""The baselines' losses against their papers' equations in float64 NumPy, and their symmetries and extremes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from ltjax import losses

# (logits, labels, class_counts) -> [B]
OURS = {
    "balanced softmax": lambda z, y, n: losses.balanced_softmax(z, y, class_counts=n),
    "logit adjusted": lambda z, y, n: losses.logit_adjusted(z, y, class_counts=n, tau=1.5),
    "ldam": lambda z, y, n: losses.ldam(z, y, class_counts=n, max_margin=0.4, scale=3.0),
    "focal": lambda z, y, n: losses.focal(z, y, gamma=1.7),
}
every_value = jax.jit(lambda *arrays: {name: loss(*arrays) for name, loss in OURS.items()})
every_value_and_gradient = jax.jit(
    lambda *arrays: {
        name: jax.value_and_grad(lambda *arrays, loss=loss: loss(*arrays).sum())(*arrays) for name, loss in OURS.items()
    }
)
JITTED = {name: lambda *arrays, name=name: every_value(*arrays)[name] for name in OURS}
SUMMED = {name: lambda *arrays, name=name: every_value_and_gradient(*arrays)[name] for name in OURS}
every_loss = pytest.mark.parametrize("name", OURS)


def random_batch(seed, batch=16, classes=7, spread=2.0):
    """Return logits [B, C], labels [B], class_counts [C]."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, spread, (batch, classes)).astype(np.float32)
    return logits, random.integers(0, classes, batch), random.integers(1, 500, classes)


def softmax(z):
    exp = np.exp(z - z.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def the_papers(name, logits, labels, class_counts):
    """Return the equation as printed, example by example, float64."""
    values, n = [], class_counts.astype(np.float64)
    for z, y in zip(logits.astype(np.float64), labels, strict=True):
        match name:
            case "balanced softmax":  # equation 4
                p = n[y] * np.exp(z[y]) / (n * np.exp(z)).sum()
                values.append(-np.log(p))
            case "logit adjusted":  # equation 11: log(1 + sum of other classes' (pi'/pi)^tau exp(z' - z))
                others = np.arange(len(z)) != y
                values.append(np.log1p(((n[others] / n[y]) ** 1.5 * np.exp(z[others] - z[y])).sum()))
            case "ldam":  # equations 12 and 13; C is such that the largest margin is max_margin
                margin = 0.4 * n.min() ** 0.25 / n[y] ** 0.25
                others = np.exp(3 * np.delete(z, y)).sum()
                values.append(-np.log(np.exp(3 * (z[y] - margin)) / (np.exp(3 * (z[y] - margin)) + others)))
            case "focal":  # equation 4
                p = softmax(z)[y]
                values.append(-((1 - p) ** 1.7) * np.log(p))
    return np.array(values)


def value_and_gradient(loss, logits):
    return jax.jit(jax.value_and_grad(lambda logits: loss(logits).sum()))(logits)


@every_loss
@pytest.mark.parametrize("batch, classes", [(16, 7), (3, 100), (5, 2), (4, 1)])
def test_loss_is_the_papers_equation(name, batch, classes):
    arrays = random_batch(batch, batch, classes)
    ours = JITTED[name](*arrays)
    assert ours.shape == (batch,) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, the_papers(name, *arrays), rtol=1e-5, atol=1e-6)


@every_loss
def test_gradient_is_that_of_central_differences(name):
    logits, labels, class_counts = random_batch(1, batch=6)
    with jax.enable_x64(True):
        loss = jax.jit(lambda z: OURS[name](z, labels, class_counts))
        check_grads(loss, (jnp.asarray(logits, jnp.float64),), order=1, modes=("rev",), rtol=1e-6, atol=1e-8)


@every_loss
def test_renaming_the_classes_changes_nothing(name):
    logits, labels, class_counts = random_batch(2)
    new_name = np.random.default_rng(9).permutation(7)
    old_name = np.argsort(new_name)
    renamed = JITTED[name](logits[:, old_name], new_name[labels], class_counts[old_name])
    np.testing.assert_allclose(renamed, JITTED[name](logits, labels, class_counts), rtol=2e-6)


@every_loss
def test_adding_a_constant_to_the_logits_changes_nothing(name):
    logits, labels, class_counts = random_batch(3)
    moved = JITTED[name](logits + np.float32(64), labels, class_counts)
    np.testing.assert_allclose(moved, JITTED[name](logits, labels, class_counts), rtol=1e-4, atol=1e-5)


@every_loss
def test_a_label_of_no_class_has_loss_0(name):
    logits, labels, class_counts = random_batch(4)
    labels[:3] = [-1, 7, 100]
    ours = JITTED[name](logits, labels, class_counts)
    np.testing.assert_array_equal(ours[:3], 0)
    np.testing.assert_allclose(ours[3:], the_papers(name, logits[3:], labels[3:], class_counts), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tau", [0.0, 1.0, 2.0])
def test_balanced_counts_turn_logit_adjustment_into_cross_entropy(tau):
    logits, labels, _ = random_batch(5)
    ours = value_and_gradient(lambda z: losses.logit_adjusted(z, labels, class_counts=np.full(7, 40), tau=tau), logits)
    assert_is_cross_entropy(ours, logits, labels)


def test_balanced_counts_turn_balanced_softmax_into_cross_entropy():
    logits, labels, _ = random_batch(5)
    ours = value_and_gradient(lambda z: losses.balanced_softmax(z, labels, class_counts=np.full(7, 40)), logits)
    assert_is_cross_entropy(ours, logits, labels)


def test_ldam_without_a_margin_is_cross_entropy_of_scaled_logits():
    logits, labels, class_counts = random_batch(5)
    ours = value_and_gradient(
        lambda z: losses.ldam(z / 30, labels, class_counts=class_counts, max_margin=0.0, scale=30.0), logits
    )
    assert_is_cross_entropy(ours, logits, labels)


def test_focal_with_gamma_0_is_cross_entropy():
    logits, labels, _ = random_batch(5)
    assert_is_cross_entropy(value_and_gradient(lambda z: losses.focal(z, labels, gamma=0.0), logits), logits, labels)


def test_logit_adjustment_of_tau_0_is_cross_entropy():
    logits, labels, class_counts = random_batch(5)
    ours = value_and_gradient(lambda z: losses.logit_adjusted(z, labels, class_counts=class_counts, tau=0.0), logits)
    assert_is_cross_entropy(ours, logits, labels)


def assert_is_cross_entropy(ours, logits, labels):
    plain = value_and_gradient(lambda z: losses.cross_entropy(z, labels), logits)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, plain)


def test_ldams_margin_of_the_rarest_class_is_the_largest():
    logits, class_counts = np.zeros((3, 3), np.float32), np.array([1600, 16, 1])
    ours = losses.ldam(logits, np.arange(3), class_counts=class_counts, max_margin=0.5, scale=1.0)
    margins = np.array([0.5 / 1600**0.25, 0.25, 0.5])
    np.testing.assert_allclose(ours, margins + np.log(np.exp(-margins) + 2), rtol=1e-6)


def test_ldam_scales_logits_as_scaled_logits_with_a_scaled_margin():
    logits, labels, class_counts = random_batch(6)
    ours = losses.ldam(logits, labels, class_counts=class_counts, max_margin=0.5, scale=30.0)
    scaled = losses.ldam(30 * logits, labels, class_counts=class_counts, max_margin=15.0, scale=1.0)
    np.testing.assert_allclose(ours, scaled, rtol=1e-5, atol=1e-5)


def test_focal_is_exact_if_p_is_near_1():
    logits, labels = np.array([[12.0, 0.0, 0.0]], np.float32), np.array([0])
    with jax.enable_x64(True):
        expected = value_and_gradient(lambda z: losses.focal(z, labels), jnp.asarray(logits, jnp.float64))[1]
    _, gradient = value_and_gradient(lambda z: losses.focal(z, labels), logits)
    np.testing.assert_allclose(gradient, expected, rtol=0.02)


@every_loss
@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("low, high", [(-1e4, 1e4), (0.0, 0.0)])
def test_extreme_logits_have_a_finite_loss_and_gradient(name, classes, low, high):
    logits = np.full((classes, classes), low, np.float32)
    logits[:, 0] = high
    value, gradient = SUMMED[name](logits, np.arange(classes), np.arange(1, classes + 1))
    assert np.isfinite(value) and np.isfinite(gradient).all()


@every_loss
@pytest.mark.parametrize("masked", [[2], [1, 2]], ids=["one of two others", "all others"])
def test_classes_at_minus_infinity_leave_the_loss_of_the_others(name, masked):
    logits, labels, class_counts = np.array([[1.0, 2.0, 0.5]], np.float32), np.array([0]), np.array([9, 9, 9])
    present = np.delete(np.arange(3), masked)
    logits[:, masked] = -np.inf
    eager = jax.value_and_grad(lambda z: OURS[name](z, labels, class_counts).sum())  # XLA may turn 0 * inf into 0
    value, gradient = jax.tree.map(np.asarray, eager(logits))
    rest, rest_gradient = SUMMED[name](logits[:, present], labels, class_counts[present])
    np.testing.assert_allclose(value, rest, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient[:, present], rest_gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(gradient[:, np.array(masked)], 0)


@every_loss
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_logits_stay_in_half_precision(name, dtype):
    logits, labels, _ = random_batch(7)
    class_counts = 10**5 * np.array([70, 30, 20, 9, 5, 3, 1])  # float16 ends at 65,504
    ours = JITTED[name](logits.astype(dtype), labels, class_counts)
    assert ours.dtype == dtype
    expected = the_papers(name, logits, labels, class_counts)
    np.testing.assert_allclose(np.asarray(ours, np.float32), expected, rtol=0.05, atol=0.15)


@every_loss
def test_jit_and_vmap_give_what_a_loop_gives(name):
    batches = [random_batch(seed) for seed in range(3)]
    together = jax.vmap(JITTED[name])(*(np.stack(parts) for parts in zip(*batches, strict=True)))
    np.testing.assert_allclose(together, np.stack([JITTED[name](*arrays) for arrays in batches]), rtol=1e-5, atol=1e-7)


@every_loss
@pytest.mark.parametrize("axis_type", [None, AxisType.Auto], ids=["explicit", "auto"])
def test_a_sharded_batch_has_the_same_losses_and_gradient(name, axis_type, optimised):
    assert_the_same_if_sharded(name, axis_type, lambda *arrays: every_losses_and_gradient(*arrays)[name])


@every_loss
@pytest.mark.parametrize("axis_type", [None, AxisType.Auto], ids=["explicit", "auto"])
def test_a_sharded_batch_has_the_same_losses_and_gradient_without_jit(name, axis_type):
    assert_the_same_if_sharded(name, axis_type, functools.partial(losses_and_gradient, name))


def assert_the_same_if_sharded(name, axis_type, function):
    mesh = jax.make_mesh((8,), ("data",), axis_types=axis_type and (axis_type,))
    assert mesh.axis_types == ((axis_type or AxisType.Explicit),)
    logits, labels, _ = random_batch(8)
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, PartitionSpec("data"))
        actual = function(jax.device_put(logits, split), jax.device_put(labels, split))
    expected = on_one_device()[name]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), actual, expected)


def losses_and_gradient(name, logits, labels):
    _, _, class_counts = random_batch(8)
    per_example, pull = jax.vjp(lambda z: OURS[name](z, labels, class_counts), logits)
    return per_example, pull(jnp.ones_like(per_example))


@jax.jit
def every_losses_and_gradient(logits, labels):
    return {name: losses_and_gradient(name, logits, labels) for name in OURS}


@functools.cache
def on_one_device():
    logits, labels, _ = random_batch(8)
    return every_losses_and_gradient(logits, labels)


def test_log_prior_is_the_logarithm_of_each_share():
    np.testing.assert_allclose(np.exp(losses.log_prior(np.array([6, 3, 1]))), [0.6, 0.3, 0.1], rtol=1e-6)


@pytest.mark.parametrize("beta", [0.5, 0.99, 0.9999, 1 - 1e-7])
def test_effective_number_weights_are_the_papers(beta):
    class_counts = np.array([5000, 800, 31, 2, 1])
    effective = np.array([sum(beta**k for k in range(n)) for n in class_counts])  # (1 - beta^n) / (1 - beta)
    ours = losses.effective_number_weights(class_counts, beta=beta)
    np.testing.assert_allclose(ours, (1 / effective) / (1 / effective).mean(), rtol=1e-5)


def test_effective_number_weights_of_beta_0_are_ones():
    np.testing.assert_array_equal(losses.effective_number_weights(np.array([500, 7, 1]), beta=0.0), np.ones(3))


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999])
def test_effective_number_weights_have_mean_1(beta):
    ours = losses.effective_number_weights(random_batch(9, classes=100)[2], beta=beta)
    np.testing.assert_allclose(ours.mean(), 1, rtol=1e-6)


def test_renaming_the_classes_renames_the_effective_number_weights():
    class_counts, old_name = random_batch(9)[2], np.random.default_rng(9).permutation(7)
    ours = losses.effective_number_weights(class_counts)
    np.testing.assert_allclose(losses.effective_number_weights(class_counts[old_name]), ours[old_name], rtol=1e-6)


@pytest.mark.parametrize("beta", [-0.1, 1.0, 1.5, np.nan])
def test_effective_number_beta_outside_0_to_1_is_an_error_that_names_it(beta):
    with pytest.raises(ValueError, match=f"effective number beta = {beta}: from 0 up to, not including, 1"):
        losses.effective_number_weights(np.array([1, 2]), beta=beta)


KERNELS_OF_COUNTS = {
    "log_prior": losses.log_prior,
    "effective_number_weights": losses.effective_number_weights,
    "ldam_margins": losses.ldam_margins,
    "logit_adjusted with tau 0": lambda n: losses.logit_adjusted(
        jnp.zeros((1, 3)), jnp.zeros(1, int), class_counts=n, tau=0
    ),
    "balanced_softmax": lambda n: losses.balanced_softmax(jnp.zeros((1, 3)), jnp.zeros(1, int), class_counts=n),
    "ldam": lambda n: losses.ldam(jnp.zeros((1, 3)), jnp.zeros(1, int), class_counts=n),
}


@pytest.mark.parametrize("as_array", [list, np.array, jnp.array])
@pytest.mark.parametrize("kernel", KERNELS_OF_COUNTS)
def test_a_class_without_training_images_is_an_error_that_names_it(kernel, as_array):
    with pytest.raises(ValueError, match="class_counts = 0 for class 1: every class needs 1 training image or more"):
        KERNELS_OF_COUNTS[kernel](as_array([5, 0, 7]))


@pytest.mark.parametrize("kernel", KERNELS_OF_COUNTS)
def test_traced_counts_give_what_known_counts_give(kernel):
    function, counts = KERNELS_OF_COUNTS[kernel], np.array([5, 1, 7])
    np.testing.assert_allclose(jax.jit(function)(counts), function(counts), rtol=1e-6)
