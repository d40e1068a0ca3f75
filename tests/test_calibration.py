"""Temperature scaling against a search, and inputs without a best temperature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax.calibration import HIGHEST, LOWEST, fit_temperature, has_minimum


def sample(temperature, size=400, classes=5, seed=0):
    """Draw logits, and labels from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (size, classes))
    scaled = logits / temperature
    p = np.exp(scaled - scaled.max(1, keepdims=True))
    chosen = rng.uniform(size=(size, 1)) > np.cumsum(p / p.sum(1, keepdims=True), 1)
    return logits.astype(np.float32), np.minimum(chosen.sum(1), classes - 1).astype(np.int32)


def nll(logits, labels, temperature):
    scaled = np.asarray(logits, np.float64) / temperature
    scaled -= scaled.max(1, keepdims=True)
    return (np.log(np.exp(scaled).sum(1)) - scaled[np.arange(len(labels)), labels]).mean()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_no_other_temperature_is_better(temperature):
    logits, labels = sample(temperature)
    fitted = float(fit_temperature(logits, labels))
    tried = np.geomspace(LOWEST, HIGHEST, 4_001)
    losses = [nll(logits, labels, t) for t in tried]
    assert fitted == pytest.approx(tried[np.argmin(losses)], rel=3e-3)
    assert nll(logits, labels, fitted) <= min(losses) + 1e-9


def test_the_temperature_of_drawn_labels_is_found():
    logits, labels = sample(2.5, size=20_000)
    assert float(fit_temperature(logits, labels)) == pytest.approx(2.5, rel=0.05)


def test_logits_twice_as_large_have_twice_the_temperature():
    logits, labels = sample(1.5)
    once, twice = (float(fit_temperature(factor * logits, labels)) for factor in (1, 2))
    assert twice == pytest.approx(2 * once, rel=1e-5)


def test_a_number_added_to_an_images_logits_changes_nothing():
    logits, labels = sample(1.5)
    shifted = logits + np.linspace(-50, 50, len(logits), dtype=np.float32)[:, None]
    assert float(fit_temperature(shifted, labels)) == pytest.approx(float(fit_temperature(logits, labels)), rel=1e-4)


def test_saturated_logits_are_brought_back():
    logits, labels = sample(1.0)
    logits = 300 * logits  # softmax is one-hot, and sometimes wrong
    fitted = float(fit_temperature(logits, labels))
    assert fitted == pytest.approx(300, rel=0.3) and nll(logits, labels, fitted) < 1.5


def test_half_precision_is_fitted_in_single():
    logits, labels = sample(2.0)
    logits = jnp.asarray(logits, jnp.bfloat16)
    assert float(fit_temperature(logits, labels)) == float(fit_temperature(logits.astype(jnp.float32), labels))


def all_right():
    logits, _ = sample(1.0, size=20)
    return logits, logits.argmax(1).astype(np.int32)


def all_wrong():
    logits, _ = sample(1.0, size=20)
    return logits, logits.argmin(1).astype(np.int32)


@pytest.mark.parametrize("degenerate", [all_right, all_wrong, lambda: (np.zeros((4, 3), np.float32), np.zeros(4, int))])
def test_a_fit_without_a_minimum_is_bounded(degenerate):
    logits, labels = degenerate()
    assert LOWEST * 0.999 <= float(fit_temperature(logits, labels)) <= HIGHEST * 1.001
    assert not has_minimum(logits, labels)


def test_an_ordinary_set_has_a_best_temperature():
    assert has_minimum(*sample(2.0))


def test_fit_temperature_works_under_vmap():
    logits, labels = sample(1.0, size=50)
    both = jax.vmap(fit_temperature)(np.stack([logits, 3 * logits]), np.stack([labels, labels]))
    assert both[1] == pytest.approx(3 * float(both[0]), rel=1e-5)
