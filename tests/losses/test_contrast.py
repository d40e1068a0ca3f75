"""BCL's balanced contrast against its authors' numbers (source: tests/golden/README.md) and float64 loops, its
symmetries and hard cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from ltjax import losses

CASES = ("one class", "one image", "one view", "views that are the same", "centres that are the same", "cold")
loss_and_gradients = jax.jit(
    lambda features, labels, centres, temperature=0.1: jax.value_and_grad(
        lambda f, u: losses.balanced_contrast(f, labels, u, temperature=temperature), argnums=(0, 1)
    )(features, centres)
)


def units(random, *shape):
    x = random.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def random_batch(seed, views=2, batch=8, classes=5, size=6):
    """Return features [V, B, P], labels [B], centres [C, P]."""
    random = np.random.default_rng(seed)
    return units(random, views, batch, size), random.integers(0, classes, batch), units(random, classes, size)


def contrast_by_loops(features, labels, centres, temperature=0.1):
    """Return the equation as printed in the docstring, anchor by anchor, float64."""
    views, batch, size = features.shape
    columns = np.concatenate([features.reshape(-1, size), centres]).astype(np.float64)
    label = np.concatenate([np.tile(labels, views), np.arange(len(centres))])
    total = 0.0
    for i in range(views * batch):
        e = np.exp(columns @ columns[i] / temperature)
        others = np.arange(len(columns)) != i
        denominator = sum(e[others & (label == c)].mean() for c in range(len(centres)))
        positives = np.flatnonzero(others & (label == label[i]))
        total -= np.log(e[positives] / denominator).mean() / (views * batch)
    return total


def hard_batch(case):
    """Return features, labels, centres, temperature."""
    features, labels, centres = random_batch(0)
    match case:
        case "one class":
            return features, 0 * labels, centres[:1], 0.1
        case "one image":
            return features[:, :1], labels[:1], centres, 0.1
        case "one view":
            return features[:1], labels, centres, 0.1
        case "views that are the same":
            return np.stack([features[0]] * 2), labels, centres, 0.1
        case "centres that are the same":
            return features, labels, np.stack([centres[0]] * 5), 0.1
        case _:
            return features, labels, centres, 0.005


def assert_close(ours, theirs, tolerance=1e-5):
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("temperature", [0.1, 0.07, 1])
def test_loss_and_gradients_equal_the_authors(golden, temperature):
    z = golden("bcl")
    features = z["features"].swapaxes(0, 1)  # theirs: image, view
    value, (to_features, to_centres) = loss_and_gradients(features, z["labels"], z["centers"], temperature)
    assert_close(value, z[f"T{temperature}_loss"])
    assert_close(to_features.swapaxes(0, 1), z[f"T{temperature}_grad_features"])
    assert_close(to_centres, z[f"T{temperature}_grad_centers"])


def test_loss_with_logit_adjustment_equals_the_authors(golden):
    z = golden("bcl")

    def total(logits, features, centres):
        contrast = losses.balanced_contrast(features.swapaxes(0, 1), z["labels"], centres, temperature=0.07)
        return losses.logit_adjusted(logits, z["labels"], class_counts=z["class_counts"]).mean() + 0.35 * contrast

    arrays = z["logits"], z["features"], z["centers"]
    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(*arrays)
    assert_close(value, z["total_loss"])
    for name, gradient in zip(("logits", "features", "centers"), gradients, strict=True):
        assert_close(gradient, z[f"total_grad_{name}"])


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("views, batch, classes, size", [(2, 8, 5, 6), (1, 9, 2, 3), (3, 4, 1, 16), (2, 3, 40, 8)])
def test_loss_is_the_papers_in_loops(views, batch, classes, size, temperature):
    arrays = random_batch(batch, views, batch, classes, size)
    value, _ = loss_and_gradients(*arrays, temperature)
    assert_close(value, contrast_by_loops(*arrays, temperature))


@pytest.mark.parametrize("argument", [0, 1], ids=["features", "centres"])
def test_gradient_is_that_of_central_differences(argument):
    features, labels, centres = random_batch(1)
    with jax.enable_x64(True):
        given = [jnp.asarray(features, jnp.float64), jnp.asarray(centres, jnp.float64)]

        def loss(array):
            f, u = [*given[:argument], array, *given[argument + 1 :]]
            return losses.balanced_contrast(f, labels, u, temperature=0.3)

        check_grads(jax.jit(loss), (given[argument],), order=1, modes=("rev",), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_a_hard_batch_has_the_papers_loss(case):
    arrays = hard_batch(case)
    value, _ = loss_and_gradients(*arrays)
    np.testing.assert_allclose(value, contrast_by_loops(*arrays), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_hard_batch_has_finite_gradients(case):
    _, gradients = loss_and_gradients(*hard_batch(case))
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("outside", [-1, 5, 1000])
def test_images_of_no_class_are_left_out(outside):
    features, labels, centres = random_batch(2)
    labels[::3] = outside
    inside = labels != outside
    value, (to_features, to_centres) = loss_and_gradients(features, labels, centres)
    alone, (of_inside, of_centres) = loss_and_gradients(features[:, inside], labels[inside], centres)
    np.testing.assert_allclose(value, alone, rtol=1e-6)
    np.testing.assert_array_equal(to_features[:, ~inside], 0)
    assert_close(to_features[:, inside], of_inside)
    assert_close(to_centres, of_centres)


def test_a_batch_of_no_class_has_loss_and_gradients_0():
    features, labels, centres = random_batch(2)
    value, gradients = loss_and_gradients(features, labels + 5, centres)
    assert value == 0 and not any(gradient.any() for gradient in gradients)


def test_the_order_of_the_images_does_not_matter():
    features, labels, centres = random_batch(3)
    order = np.random.default_rng(0).permutation(8)
    moved, _ = loss_and_gradients(features[:, order], labels[order], centres)
    np.testing.assert_allclose(moved, loss_and_gradients(features, labels, centres)[0], rtol=1e-6)


def test_the_order_of_the_views_does_not_matter():
    features, labels, centres = random_batch(3)
    moved, _ = loss_and_gradients(features[::-1], labels, centres)
    np.testing.assert_allclose(moved, loss_and_gradients(features, labels, centres)[0], rtol=1e-6)


def test_renaming_the_classes_changes_nothing():
    features, labels, centres = random_batch(4)
    new_name = np.random.default_rng(9).permutation(5)
    renamed, _ = loss_and_gradients(features, new_name[labels], centres[np.argsort(new_name)])
    np.testing.assert_allclose(renamed, loss_and_gradients(features, labels, centres)[0], rtol=1e-6)


@pytest.mark.parametrize("temperature", [0, -1.0, np.nan])
def test_a_temperature_that_is_not_above_0_is_an_error_that_names_it(temperature):
    with pytest.raises(ValueError, match=f"temperature = {temperature}: a number above 0"):
        losses.balanced_contrast(*random_batch(0), temperature=temperature)
