"""GKL and distillation against the authors' numbers (source: tests/golden/README.md), sums over pairs of classes in
float64, and properties of the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from ltjax import losses

PLAIN = dict(alpha=1.0, beta=1.0)
ADVERSARIAL = {  # alpha, beta, gamma, and what the weights are
    "attack": (1, 1, 1, "class_means_T4"),
    "cifar100_T4": (4, 20, 1, "class_means_T4"),
    "cifar100_g04": (4, 20, 0.4, "class_means_T1"),
    "cifar10_g02": (4, 20, 0.2, "class_means_T1"),
    "first_epoch": (4, 20, 1, "uniform"),
    "mse_only": (0, 1, 1, "class_means_T4"),
    "sce_only": (1, 0, 1, "class_means_T4"),
    "ikl": (4, 20, 1, "class_means_T4"),
}
DISTILLED = {  # temperature, alpha, beta, gamma, the weights, and their temperature
    "res110_res32": (4, 1, 4, 0.1, "image", 4),
    "res56_res20": (4, 1, 4, 0.2, "class_means_T4", 4),
    "res32x4_res8x4": (4, 1, 16, 0.05, "class_means_T4", 4),
    "imagenet": (1, 1, 0.5, 0.6, "class_means_T1", 1),
    "imagenetlt_x101_r50": (1, 3, 4, 0.3, "class_means_T1", 1),
    "imagenetlt_x101_r18": (1, 4, 4, 0.3, "class_means_T1", 1),
    "ikl_res110_res32": (4, 1, 12, 1, "image", 100),
}
DIVE = {"cifar100": (2, 0.5, 0.5), "T3_no_power": (3, 1, 0.5), "kd_only": (2, 0.5, 1)}  # temperature, power, share


def random_batch(seed, batch=6, classes=7, spread=2.0):
    """Return student [B, C], teacher [B, C], weights [B, C]: a softmax of other logits."""
    random = np.random.default_rng(seed)
    student, teacher, other = random.normal(0, spread, (3, batch, classes)).astype(np.float32)
    return student, teacher, softmax(other)


def assert_close(ours, theirs, tolerance=1e-5):
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max())


def log_softmax(z):
    z = z.astype(np.float64)
    return z - z.max(-1, keepdims=True) - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))


def softmax(z):
    return np.exp(log_softmax(z)).astype(np.float32)


def gkl_by_pairs(student, teacher, weights, alpha, beta, gamma, temperature):
    """Return the equation as printed in the docstring, over all pairs of classes, float64."""
    a, t, w = (x.astype(np.float64) for x in (student, teacher, weights))
    pairs = (w**gamma)[:, :, None] * (w**gamma)[:, None]  # [B, C, C]
    differences = (t[:, :, None] - t[:, None]) - (a[:, :, None] - a[:, None])
    square = (pairs * differences**2).sum() / (4 * pairs.sum())
    return beta * square - alpha * (np.exp(log_softmax(t / temperature)) * log_softmax(a / temperature)).sum(-1).mean()


@jax.jit
def gkl_and_gradients(student, teacher, weights, *, alpha=1.0, beta=1.0, gamma=1.0, temperature=1.0):
    """Return loss, (its gradient to the student, to the teacher, to the weights)."""
    return jax.value_and_grad(
        lambda a, t, w: losses.gkl(a, t, weights=w, alpha=alpha, beta=beta, gamma=gamma, temperature=temperature),
        argnums=(0, 1, 2),
    )(student, teacher, weights)


def of_kind(kind, student, teacher, weights):
    """Return the loss and its gradients to student and teacher."""
    return jax.value_and_grad(
        lambda a, t: {
            "gkl": lambda: losses.gkl(a, t, weights=weights, gamma=0.5, temperature=2.0, **PLAIN),
            "distillation": lambda: losses.distillation(a, t, temperature=2.0, power=0.5).sum(),
            "kl_divergence": lambda: losses.kl_divergence(t, a).sum(),
        }[kind](),
        argnums=(0, 1),
    )(student, teacher)


jitted_of_kind = jax.jit(of_kind, static_argnames="kind")
running_class_means = jax.jit(losses.running_class_means)

gradients_of_kl = jax.jit(jax.grad(lambda a, t: losses.kl_divergence(t, a).mean(), argnums=(0, 1)))


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_gkl_of_adversarial_images_equals_the_authors(golden, case):
    z = golden("gkl_adversarial")
    alpha, beta, gamma, kind = ADVERSARIAL[case]
    weights = np.full((24, 10), 0.1, np.float32) if kind == "uniform" else z[kind][z["labels"]]
    settings = dict(alpha=alpha, beta=beta, gamma=float(gamma))
    value, (to_student, to_teacher, _) = gkl_and_gradients(
        z["logits_adversarial"], z["logits_natural"], weights, **settings
    )
    assert_close(value, z[f"{case}_loss"])
    assert_close(to_student, z[f"{case}_grad_adversarial"])
    assert_close(to_teacher, z[f"{case}_grad_natural"])


@pytest.mark.parametrize("case", DISTILLED)
def test_gkl_of_a_teacher_equals_the_authors(golden, case):
    z = golden("gkl_distillation")
    temperature, alpha, beta, gamma, kind, of_weights = DISTILLED[case]
    by_image = softmax(z["logits_teacher"] / of_weights)
    weights = by_image if kind == "image" else z[kind][z["labels"]]
    settings = dict(alpha=alpha, beta=beta, gamma=float(gamma), temperature=temperature)
    value, (to_student, *_) = gkl_and_gradients(z["logits_student"], z["logits_teacher"], weights, **settings)
    assert_close(value, z[f"{case}_loss"])
    assert_close(to_student, z[f"{case}_grad_student"])


@pytest.mark.parametrize("name", ["gkl_adversarial", "gkl_distillation"])
@pytest.mark.parametrize("temperature", [1, 4])
def test_running_means_of_the_softmax_are_the_authors_weights(golden, name, temperature):
    z = golden(name)
    classes = z["history_logits"].shape[-1]
    state = np.zeros((classes, classes), np.float32), np.zeros(classes, np.float32)
    for logits, labels in zip(z["history_logits"], z["history_labels"], strict=True):
        state = running_class_means(*state, softmax(logits / temperature), labels)
    assert_close(state[0], z[f"class_means_T{temperature}"])


@pytest.mark.parametrize("case", DIVE)
def test_distillation_equals_the_authors(golden, case):
    z = golden("dive")
    temperature, power, share = DIVE[case]

    def loss(student):
        of_labels = losses.balanced_softmax(student, z["labels"], class_counts=z["class_counts"])
        of_teacher = losses.distillation(student, z["logits_teacher"], temperature=temperature, power=power)
        return (share * temperature**2 * of_teacher + (1 - share) * of_labels).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(z["logits_student"])
    assert_close(value, z[f"{case}_loss"])
    assert_close(gradient, z[f"{case}_grad_student"])


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("batch, classes, temperature", [(6, 7, 1.0), (1, 2, 4.0), (3, 1, 0.5), (5, 40, 2.0)])
def test_gkl_is_the_sum_over_pairs_of_classes(batch, classes, temperature, gamma):
    arrays = random_batch(batch, batch, classes)
    settings = dict(alpha=1.5, beta=3.0, gamma=gamma, temperature=temperature)
    value, _ = gkl_and_gradients(*arrays, **settings)
    assert_close(value, gkl_by_pairs(*arrays, **settings))


def test_gradients_of_gkl_are_those_of_central_differences():
    student, teacher, weights = random_batch(0)
    with jax.enable_x64(True):
        # The target of the cross-entropy has no gradient: alpha is 0 for the teacher's.
        student, teacher = jnp.asarray(student, jnp.float64), jnp.asarray(teacher, jnp.float64)
        settings = dict(weights=weights, beta=2.0, gamma=0.5, temperature=3.0)
        to_student = jax.jit(lambda a: losses.gkl(a, teacher, alpha=1.5, **settings))
        check_grads(to_student, (student,), order=1, modes=("rev",), rtol=1e-6, atol=1e-8)
        to_teacher = jax.jit(lambda t: losses.gkl(student, t, alpha=0.0, **settings))
        check_grads(to_teacher, (teacher,), order=1, modes=("rev",), rtol=1e-6, atol=1e-8)


def test_with_the_softmax_as_weights_the_gradient_to_the_teacher_is_kls():
    student, teacher, _ = random_batch(1)
    _, (to_student, to_teacher, _) = gkl_and_gradients(student, teacher, softmax(teacher))
    kl = gradients_of_kl(student, teacher)
    assert_close(to_teacher, kl[1])
    assert np.abs(to_student - kl[0]).max() > 0.1 * np.abs(kl[0]).max()


def test_the_two_terms_of_gkl_have_the_gradients_of_the_kl():
    student, teacher, _ = random_batch(1)
    settings = dict(weights=softmax(teacher))

    def taken_apart(a, t):
        square = losses.gkl(jax.lax.stop_gradient(a), t, alpha=0.0, beta=1.0, **settings)
        return square + losses.gkl(a, t, alpha=1.0, beta=0.0, **settings)

    ours = jax.jit(jax.grad(taken_apart, argnums=(0, 1)))(student, teacher)
    kl = gradients_of_kl(student, teacher)
    jax.tree.map(assert_close, ours, kl)


def test_weights_have_no_gradient():
    student, teacher, weights = random_batch(2)
    _, (*_, to_weights) = gkl_and_gradients(student, teacher, weights)
    np.testing.assert_array_equal(to_weights, 0)


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_the_size_of_the_weights_does_not_matter(factor):
    student, teacher, weights = random_batch(3)
    expected = gkl_and_gradients(student, teacher, weights)
    ours = gkl_and_gradients(student, teacher, weights * np.float32(factor))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, expected)


def test_an_example_without_weights_is_left_out_of_the_square():
    student, teacher, weights = random_batch(4)
    weights[2:] = 0
    value, gradients = gkl_and_gradients(student, teacher, weights, alpha=0.0)
    alone, expected = gkl_and_gradients(student[:2], teacher[:2], weights[:2], alpha=0.0)
    np.testing.assert_allclose(value, alone, rtol=1e-6)
    np.testing.assert_array_equal(gradients[0][2:], 0)
    np.testing.assert_allclose(gradients[0][:2], expected[0], rtol=1e-5, atol=1e-7)


def test_without_weights_only_the_cross_entropy_remains():
    student, teacher, weights = random_batch(4)
    value, gradients = gkl_and_gradients(student, teacher, 0 * weights, beta=5.0)
    alone, expected = gkl_and_gradients(student, teacher, weights, beta=0.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), (value, gradients), (alone, expected))


@pytest.mark.parametrize("offset", [64.0, 1e4])
def test_a_constant_between_the_logits_costs_no_digits(offset):
    student, teacher, weights = random_batch(5)
    student, teacher = np.round(student * 64) / 64, np.round(teacher * 64) / 64  # exact also far from 0
    expected, _ = gkl_and_gradients(student, teacher, weights)
    moved, _ = gkl_and_gradients(student + np.float32(offset), teacher, weights)
    np.testing.assert_allclose(moved, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gkl", "distillation", "kl_divergence"])
def test_a_class_at_minus_infinity_in_both_leaves_the_loss_of_the_others(kind):
    student, teacher, weights = random_batch(6)
    value, gradient = jitted_of_kind(kind, student[:, :-2], teacher[:, :-2], weights[:, :-2])
    student[:, -2:] = teacher[:, -2:] = -np.inf
    masked, of_masked = of_kind(kind, student, teacher, weights)  # eager: XLA may turn 0 * inf into 0
    np.testing.assert_allclose(masked, value, rtol=1e-5)
    for ours, expected in zip(map(np.asarray, of_masked), gradient, strict=True):
        np.testing.assert_array_equal(ours[:, -2:], 0)
        np.testing.assert_allclose(ours[:, :-2], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["gkl", "distillation", "kl_divergence"])
@pytest.mark.parametrize("which", [0, 1], ids=["student", "teacher"])
def test_a_logit_of_nan_is_not_hidden(kind, which):
    arrays = random_batch(7)
    arrays[which][0, 0] = np.nan
    assert np.isnan(jitted_of_kind(kind, *arrays)[0])


@pytest.mark.parametrize("kind", ["gkl", "distillation", "kl_divergence"])
@pytest.mark.parametrize("low, high", [(-1e4, 1e4), (-1e15, 1e15), (0.0, 0.0), (1e15, 1e15)])
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_extreme_logits_have_a_finite_loss_and_gradient(kind, low, high, classes):
    rows = np.full((4, classes), low, np.float32)
    rows[:, 0] = high
    for student, teacher in ((rows, rows), (rows, rows[:, ::-1]), (rows, 0 * rows), (0 * rows, rows)):
        value, gradients = jitted_of_kind(kind, student, teacher, softmax(teacher))
        assert np.isfinite(value) and all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_extreme_temperatures_have_a_finite_loss_and_gradient(temperature):
    student, teacher, weights = random_batch(8, spread=30.0)

    def both(a, t):
        return (
            losses.gkl(a, t, weights=weights, temperature=temperature, **PLAIN)
            + losses.distillation(a, t, temperature=temperature).sum()
        )

    value, gradients = jax.jit(jax.value_and_grad(both, argnums=(0, 1)))(student, teacher)
    assert np.isfinite(value) and all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("temperature, power", [(1.0, 1.0), (2.0, 0.5), (3.0, 2.0)])
def test_distillation_is_the_kl_from_the_teachers_softmax_to_a_power(temperature, power):
    student, teacher, _ = random_batch(9)
    q = np.exp(log_softmax(teacher / temperature)) ** power
    q /= q.sum(-1, keepdims=True)
    expected = (q * (np.log(q) - log_softmax(student / temperature))).sum(-1)
    ours = losses.distillation(student, teacher, temperature=temperature, power=power)
    assert ours.shape == (6,)
    assert_close(ours, expected)


def test_a_student_equal_to_its_teacher_has_no_gradient():
    _, teacher, _ = random_batch(10)
    loss = jax.jit(jax.value_and_grad(lambda s: losses.distillation(s, teacher, temperature=2.0).sum()))
    value, gradient = loss(teacher)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("temperature", [0, -1.0, np.nan, np.inf, np.float32(0)])
@pytest.mark.parametrize("kind", ["gkl", "distillation"])
def test_a_temperature_that_is_not_above_0_is_an_error_that_names_it(kind, temperature):
    student, teacher, weights = random_batch(0)
    with pytest.raises(ValueError, match=r"temperature = .*: a number above 0"):
        if kind == "gkl":
            losses.gkl(student, teacher, weights=weights, temperature=temperature, **PLAIN)
        else:
            losses.distillation(student, teacher, temperature=temperature)


@pytest.mark.parametrize("gamma", [-0.1, np.nan])
def test_a_negative_gamma_is_an_error_that_names_it(gamma):
    student, teacher, weights = random_batch(0)
    with pytest.raises(ValueError, match=f"gkl gamma = {gamma}: 0 or more"):
        losses.gkl(student, teacher, weights=weights, gamma=gamma, **PLAIN)
