"""ProCo's contrast and class models against its authors' numbers and exact ones (source: tests/golden/README.md), and
against SciPy's Bessel functions in float64, from no concentration to a million."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.special import gammaln, ive, logsumexp

from ltjax import losses

FILES = ("proco", "proco_small", "proco_concentrated")
STEPS = [(name, step) for name in FILES for step in range(1, 4 if name == "proco_concentrated" else 6)]
SIZES = (1, 2, 3, 8, 16, 21, 22, 64, 128, 1024)  # 21 is the largest that the recurrence leads to
KAPPAS = np.float32([0, 0.01, 1, 9.9, 10, 40, 130, 600, 3000, 2e4, 1e5, 1e6])
TEMPERATURES = (1.0, 0.1, 0.07, 0.01, 0.001)
vmf_contrast = jax.jit(losses.vmf_contrast)
vmf_kappas = jax.jit(losses.vmf_kappas)
running_class_means = jax.jit(losses.running_class_means)


def log_scaled(order, x):
    """Compute log(I(x) / x^order) in float64 by the power series, or by SciPy if that needs too many terms."""
    if x < max(1e3, order**2 / 100):
        k = np.arange(int(2 * x + 400))
        terms = 2 * k * np.log(x / 2) if x > 0 else np.where(k == 0, 0, -np.inf)
        return logsumexp(terms - gammaln(k + 1) - gammaln(order + k + 1)) - order * np.log(2)
    return np.log(ive(order, x)) + x - order * np.log(x)


def random_batch(seed, batch=6, classes=5, size=16):
    """Return features [B, P] of length 1, means [C, P] of any length, kappas [C]."""
    random = np.random.default_rng(seed)
    features, means = (random.normal(size=(number, size)).astype(np.float32) for number in (batch, classes))
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    return features, means, random.uniform(0, 300, classes).astype(np.float32)


def around(size, kappas=KAPPAS):
    """Return features at all angles to the mean of every class: [B, P], means [C, P], kappas [C]."""
    angles = np.linspace(0, np.pi, 9) if size > 1 else np.array([0, np.pi])
    features = np.zeros((len(angles), size), np.float32)
    features[:, 0] = np.cos(angles)
    if size > 1:
        features[:, 1] = np.sin(angles)
    means = np.zeros((len(kappas), size), np.float32)
    means[:, 0] = 0.5
    return features, means, kappas


def exact_logits(features, means, kappas, temperature):
    """Return the closed form in float64, pair by pair, and its derivative to q."""
    z, m, k = (x.astype(np.float64) for x in (features, means, kappas))
    m /= np.linalg.norm(m, axis=-1, keepdims=True)
    order = z.shape[-1] / 2 - 1
    logits, slopes = np.zeros((2, len(z), len(m)))
    for c in range(len(m)):
        at_k = log_scaled(order, k[c])
        for i in range(len(z)):
            q = np.linalg.norm(k[c] * m[c] + z[i] / temperature)
            logits[i, c] = log_scaled(order, q) - at_k
            slopes[i, c] = q * np.exp(log_scaled(order + 1, q) - at_k - logits[i, c])
    return logits, slopes


@jax.jit
def logits_and_gradients(features, means, kappas, *, temperature):
    """Return logits [B, C], the gradient of each to its feature [B, C, P]."""

    def one(feature):
        logits = losses.vmf_contrast(feature[None], means, kappas, temperature=temperature)[0]
        return logits, logits

    gradients, logits = jax.vmap(jax.jacrev(one, has_aux=True))(features)
    return logits, gradients


@jax.jit
def adjusted_loss_and_gradient(features, labels, means, kappas, class_counts, temperature):
    """Return ((loss with logit adjustment, logits), its gradient to the features)."""

    def loss(features):
        logits = losses.vmf_contrast(features, means, kappas, temperature=temperature)
        return losses.logit_adjusted(logits, labels, class_counts=class_counts).mean(), logits

    return jax.value_and_grad(loss, has_aux=True)(features)


def assert_close(ours, theirs, tolerance=1e-5):
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("name, step", STEPS)
def test_logits_loss_and_gradient_are_exact_for_the_authors_statistics(golden, name, step):
    z = golden(name)
    features, labels = z["features"][step - 1], z["labels"][step - 1]
    statistics = z[f"step{step}_old_mean"], z[f"step{step}_old_kappa"], z["class_counts"]
    (value, logits), gradient = adjusted_loss_and_gradient(features, labels, *statistics, float(z["temperature"]))
    assert_close(logits, z[f"step{step}_exact_logits"])
    assert_close(value, z[f"step{step}_exact_loss"])
    assert_close(gradient, z[f"step{step}_exact_grad"])


@pytest.mark.parametrize("name", FILES)
def test_running_means_and_kappas_are_the_authors(golden, name):
    z = golden(name)
    classes = len(z["class_counts"])
    old, new = ((z[f"init_mean_{which}"], np.zeros(classes, np.float32)) for which in ("old", "new"))
    for step in [step for file, step in STEPS if file == name]:
        if step == 4:  # an epoch begins
            old, new = new, (z["swapped_new_mean"], z["swapped_new_count"])
        old, new = (running_class_means(*state, z["features"][step - 1], z["labels"][step - 1]) for state in (old, new))
        np.testing.assert_allclose(old[0], z[f"step{step}_old_mean"], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(old[1], z[f"step{step}_old_count"])
        np.testing.assert_allclose(vmf_kappas(old[0]), z[f"step{step}_old_kappa"], rtol=1e-4)
        if f"step{step}_new_mean" in z:
            np.testing.assert_allclose(new[0], z[f"step{step}_new_mean"], rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(new[1], z[f"step{step}_new_count"])


@pytest.mark.parametrize("size", [16, 128, 1024])
def test_ratios_of_bessel_functions_and_their_derivatives_are_exact(golden, size):
    z = golden("proco_kernel")
    kappa = z[f"p{size}_kappa"].astype(np.float64)
    q = z["kappa_new"].astype(np.float64)
    feature, mean = np.zeros((2, 1, size))
    mean[0, 0] = 1

    def log_ratio(q):
        """With z along the mean, q = k + 1 / T, and with z opposite to it, q = |k - 1 / T|."""
        z = jnp.asarray(feature).at[0, 0].set(jnp.sign(q - kappa))
        return losses.vmf_contrast(z, mean, kappa[None], temperature=1 / jnp.abs(q - kappa))[0, 0]

    with jax.enable_x64(True):
        value, derivative = jax.jit(jax.vmap(jax.value_and_grad(log_ratio)))(q)
    np.testing.assert_allclose(value, z[f"p{size}_exact_log_ratio"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(derivative, z[f"p{size}_exact_derivative"], rtol=1e-5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("size", SIZES)
def test_float32_logits_and_gradients_are_scipys(size, temperature):
    """The gradient is I'(q) / I(q), at most 1, along q and over T."""
    features, means, kappas = around(size)
    logits, ours = logits_and_gradients(features, means, kappas, temperature=temperature)
    exact_logit, slopes = exact_logits(features, means, kappas, temperature)
    np.testing.assert_allclose(logits, exact_logit, rtol=0, atol=1e-6 * max(1, 1 / temperature))
    q = kappas[:, None].astype(np.float64) * np.eye(1, size) + features.astype(np.float64)[:, None] / temperature
    exact = slopes[..., None] * q / np.maximum(np.linalg.norm(q, axis=-1, keepdims=True), 1e-12) / temperature
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-5 / temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_in_three_dimensions_it_is_a_hyperbolic_sine(temperature):
    """I_{1/2}(x) / sqrt(x) is proportional to sinh(x) / x."""
    features, means, _ = random_batch(0, size=3)
    kappas = np.linspace(0.5, 20, 5).astype(np.float32)
    directions = means / np.linalg.norm(means, axis=-1, keepdims=True)
    q = np.linalg.norm(kappas[:, None] * directions + features[:, None] / temperature, axis=-1)
    expected = np.log(np.sinh(q) / q) - np.log(np.sinh(kappas) / kappas)
    ours = vmf_contrast(features, means, kappas, temperature=temperature)
    np.testing.assert_allclose(ours, expected, atol=2e-5)


@pytest.mark.parametrize("size", [2, 16, 128])
def test_the_logit_is_the_log_of_the_mean_over_the_distribution(size):
    """The marginal density of u = m.x is proportional to exp(k u) (1 - u^2)^((P - 3) / 2)."""
    kappa, temperature = 30.0, 0.2
    u = np.cos((np.arange(200_000) + 0.5) * np.pi / 200_000)
    density = np.exp(kappa * (u - 1)) * (1 - u**2) ** ((size - 2) / 2)  # of the angle
    expected = np.log((density * np.exp(u / temperature)).sum() / density.sum())  # for z = m
    mean = np.eye(1, size, dtype=np.float32)
    ours = vmf_contrast(mean, mean, jnp.full(1, kappa), temperature=temperature)
    np.testing.assert_allclose(ours, [[expected]], rtol=1e-5)


@pytest.mark.parametrize("size", [3, 24])
def test_gradient_is_that_of_central_differences(size):
    features, means, kappas = random_batch(1, size=size)
    with jax.enable_x64(True):
        loss = jax.jit(lambda z: losses.vmf_contrast(z, means, kappas, temperature=0.3))
        check_grads(loss, (jnp.asarray(features, jnp.float64),), order=1, modes=("rev",), rtol=1e-6, atol=1e-8)


def test_class_models_have_no_gradient():
    features, means, kappas = random_batch(2)
    gradients = jax.grad(lambda m, k: losses.vmf_contrast(features, m, k, temperature=0.1).sum(), argnums=(0, 1))
    to_means, to_kappas = jax.tree.map(np.asarray, jax.jit(gradients)(means, kappas))
    assert not to_means.any() and not to_kappas.any()


def test_the_length_of_the_means_does_not_matter():
    features, means, kappas = random_batch(3)
    ours = vmf_contrast(features, 0.01 * means, kappas, temperature=0.1)
    np.testing.assert_allclose(ours, vmf_contrast(features, means, kappas, temperature=0.1), rtol=1e-5, atol=1e-6)


def test_a_class_without_concentration_has_a_constant_logit():
    features, means, kappas = random_batch(4, 9, 12)  # the shapes of `around`
    kappas[0] = 0
    means[1] = 0
    ours, gradients = logits_and_gradients(features, means, kappas, temperature=0.1)
    np.testing.assert_allclose(ours[:, :2], np.broadcast_to(ours[:1, :2], (9, 2)), rtol=1e-5)
    assert np.isfinite(ours).all() and np.isfinite(gradients).all()


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("size", SIZES)
def test_extremes_have_finite_logits_and_gradients(size, temperature):
    features, means, kappas = around(size, np.float32([0, 1e-20, 1e-3, 1, 10, 30, 100, 1e3, 1e4, 1e5, 1e6, 1e9]))
    features[0] = 0
    means[1] = 0
    values = logits_and_gradients(features, means, kappas, temperature=temperature)
    assert all(np.isfinite(value).all() for value in values)


def test_the_gradient_at_q_0_is_0():
    features, means, _ = random_batch(5, 9, 12)
    means[0] = -features[0]
    arrays = features, means, np.full(12, 10, np.float32)
    ours, gradients = logits_and_gradients(*arrays, temperature=0.1)
    np.testing.assert_allclose(ours, exact_logits(*arrays, 0.1)[0], atol=1e-5)
    np.testing.assert_allclose(gradients[0, 0], 0, atol=1e-5)


@pytest.mark.parametrize("temperature", [0, -0.1, np.nan])
def test_a_temperature_that_is_not_above_0_is_an_error_that_names_it(temperature):
    with pytest.raises(ValueError, match=f"temperature = {temperature}: a number above 0"):
        losses.vmf_contrast(*random_batch(0), temperature=temperature)


def test_kappas_follow_the_length_of_the_mean():
    random = np.random.default_rng(0)
    lengths = np.array([0, 0.1, 0.5, 0.9])
    means = random.normal(size=(4, 64))
    means *= lengths[:, None] / np.linalg.norm(means, axis=-1, keepdims=True)
    np.testing.assert_allclose(vmf_kappas(means.astype(np.float32)), 64 * lengths / (1 - lengths**2), rtol=1e-5)


@pytest.mark.parametrize("length", [0.9999999, 1.0, 1.0000001, 1.1])
def test_a_class_of_one_image_has_the_largest_kappa(length):
    means = np.float32([[length, 0, 0, 0]])
    np.testing.assert_array_equal(vmf_kappas(means), [1e5])
    np.testing.assert_array_equal(vmf_kappas(means, largest=50.0), [50])


def test_kappas_have_finite_gradients():
    means = np.float32([[0, 0, 0], [1, 0, 0], [0.5, 0, 0]])
    assert np.isfinite(jax.jit(jax.grad(lambda m: losses.vmf_kappas(m).sum()))(means)).all()


def test_running_means_are_the_means_of_all_batches_together():
    random = np.random.default_rng(0)
    features = random.normal(size=(5, 8, 3)).astype(np.float32)
    labels = random.integers(0, 4, (5, 8))
    state = random.normal(size=(5, 3)).astype(np.float32), np.zeros(5, np.float32)
    first = state[0]
    for batch in zip(features, labels, strict=True):
        state = jax.tree.map(np.asarray, running_class_means(*state, *batch))
    expected, counts = losses.class_means(features.reshape(-1, 3), labels.ravel(), 5)
    np.testing.assert_allclose(state[0][:4], expected[:4], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(state[0][4], first[4])  # a class without images keeps its first mean
    np.testing.assert_array_equal(state[1], counts)


def test_running_means_leave_out_examples_of_no_class():
    state = np.ones((2, 3), np.float32), np.ones(2, np.float32)
    means, counts = running_class_means(*state, np.full((2, 3), 7, np.float32), np.array([-1, 2]))
    np.testing.assert_array_equal(means, state[0])
    np.testing.assert_array_equal(counts, state[1])
