"""ProCo and BCL as methods: their authors' losses, class means over epochs, and the pass over all views."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax import methods
from ltjax.methods import bcl, proco, views
from ltjax.types import Batch, Outputs, UserError, Variables

COUNTS = np.array([50, 20, 5])
LABELS = jnp.array([0, 1, 2, 0])


class AsItIs:
    """A head that changes nothing, so that the method takes the features given."""

    def init(self, rng):
        return {}

    def __call__(self, params, features):
        return features


@pytest.fixture
def no_head(monkeypatch):
    for module in (proco, bcl):
        monkeypatch.setattr(module, "create_head", lambda widths, num_features: AsItIs())


def assert_close(ours, theirs, tolerance=1e-5):
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max())


def of_views(features, logits):
    """Return an `apply` with outputs `features` of the views [V, B, P], and `logits` [B, C] of the images."""

    def apply(variables, images, *, net="net", bn=None):
        own = jnp.concatenate([jnp.zeros_like(features[:1]), features]).swapaxes(0, 1)  # [B, 1 + V, P]
        of_classifier = jnp.repeat(logits[:, None], own.shape[1], 1)
        of_classifier = of_classifier.at[:, 1:].set(7.0)
        return Outputs(of_classifier.reshape(-1, logits.shape[-1]), own.reshape(-1, own.shape[-1])), variables

    return apply


def batch_of(labels, num_views):
    images = jnp.zeros((len(labels), 2, 2, 3))
    return Batch(images, jnp.asarray(labels, jnp.int32), views=jnp.zeros((len(labels), num_views, 2, 2, 3)))


@pytest.mark.parametrize("name", ["proco", "proco_small", "proco_concentrated"])
def test_proco_takes_the_authors_steps_over_two_epochs(golden, no_head, name):
    """With one view: the loss and its gradient are exact, means and counts the authors'."""
    z = golden(name)
    classes, size = z["init_mean_old"].shape
    settings = dict(temperature=float(z["temperature"]), projection=(size,))
    method = methods.create("proco", z["class_counts"], size, **settings)
    arrays = {"means": z["init_mean_old"], "counts": np.zeros(classes, np.float32)}
    arrays |= {"next_means": z["init_mean_new"], "next_counts": np.zeros(classes, np.float32)}
    assert jax.tree.map(np.shape, arrays) == jax.tree.map(np.shape, method.init(jax.random.key(0))[1])

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def of_features(features, arrays, labels):
        variables = Variables({"method": {"projection": {}}}, {}, arrays)
        apply = of_views(features[None], jnp.zeros((len(features), classes)))
        _, (variables, metrics) = method.loss(apply, variables, batch_of(labels, 1), None)
        return metrics["contrast_loss"], variables.arrays

    for step in range(1, 6 if "step5_exact_loss" in z else 4):
        if step == 4:
            arrays = method.refresh(arrays, None)
            np.testing.assert_array_equal(arrays["counts"], z["swapped_old_count"])
            np.testing.assert_array_equal(arrays["next_counts"], 0)
        of_step = z["features"][step - 1], arrays, z["labels"][step - 1]
        (value, arrays), gradient = jax.tree.map(np.asarray, of_features(*of_step))
        assert_close(value, z[f"step{step}_exact_loss"])
        assert_close(gradient, z[f"step{step}_exact_grad"])
        np.testing.assert_allclose(arrays["means"], z[f"step{step}_old_mean"], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(arrays["counts"], z[f"step{step}_old_count"])
        if f"step{step}_new_mean" in z:
            seen = z[f"step{step}_new_count"] > 0
            np.testing.assert_array_equal(arrays["next_counts"] > 0, seen)
            np.testing.assert_allclose(
                arrays["next_means"][seen], z[f"step{step}_new_mean"][seen], rtol=1e-5, atol=1e-6
            )


def random_units(seed, *shape):
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def loss_of(method, params, arrays, features, logits, batch):
    """Return the loss's metrics and the arrays after it, computed in one program."""

    @jax.jit
    def metrics_and_arrays(params, arrays, features, logits, batch):
        variables = Variables(params, {}, arrays)
        _, (variables, metrics) = method.loss(of_views(features, logits), variables, batch, None)
        return metrics, variables.arrays

    return jax.tree.map(np.asarray, metrics_and_arrays(params, arrays, features, logits, batch))


NO_HEAD = {"method": {"projection": {}}}


def test_the_second_view_is_compared_with_means_that_have_the_first(no_head):
    """So a method with both views in one step does what one view does in two."""
    features, logits = random_units(0, 2, 4, 16), np.zeros((4, 3), np.float32)
    method = methods.create("proco", COUNTS, 16, projection=(16,))
    arrays, ones = method.init(jax.random.key(1))[1], []
    both, after_both = loss_of(method, NO_HEAD, arrays, features, logits, batch_of(LABELS, 2))
    for view in features:
        metrics, arrays = loss_of(method, NO_HEAD, arrays, view[None], logits, batch_of(LABELS, 1))
        ones.append(metrics["contrast_loss"])
    np.testing.assert_allclose(both["contrast_loss"], np.mean(ones), rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), after_both, arrays)


def test_a_class_that_an_epoch_does_not_show_keeps_its_mean(no_head):
    method = methods.create("proco", COUNTS, 16, projection=(16,))
    arrays, features = method.init(jax.random.key(0))[1], random_units(3, 1, 4, 16)
    for labels in (LABELS, jnp.zeros_like(LABELS)):
        arrays = method.refresh(arrays, None)
        before = arrays
        _, arrays = loss_of(method, NO_HEAD, arrays, features, np.zeros((4, 3), np.float32), batch_of(labels, 1))
    np.testing.assert_array_equal(method.refresh(arrays, None)["means"][1], before["next_means"][1])


def test_bcl_is_the_authors(golden, no_head):
    z = golden("bcl")
    method = methods.create("bcl", z["class_counts"], 16, alpha=1.0, beta=0.35, temperature=0.07)

    def total(logits, features, kernel):
        params = {"net": {"classifier": {"kernel": kernel}}, "method": {"projection": {}, "centres": {}}}
        apply = of_views(features.swapaxes(0, 1), logits)  # theirs: image, view
        return method.loss(apply, Variables(params, {}, {}), batch_of(z["labels"], 2), None)[0]

    arrays = z["logits"], z["features"], z["centers"].T
    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(*arrays)
    assert_close(value, z["total_loss"])
    for gradient, name in zip((*gradients[:2], gradients[2].T), ("logits", "features", "centers"), strict=True):
        assert_close(gradient, z[f"total_grad_{name}"])


@pytest.mark.parametrize("name", ["proco", "bcl"])
def test_the_classifier_sees_mixed_images_and_not_their_views(no_head, name):
    method = methods.create(name, COUNTS, 16, loss=dict(name="cross_entropy"), projection=(16,))
    params = {"net": {"classifier": {"kernel": random_units(2, 3, 16).T}}, "method": {"projection": {}, "centres": {}}}
    arrays = method.init(jax.random.key(0))[1]
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    mixed = batch_of(LABELS, 2)._replace(partner_labels=LABELS[::-1], lam=jnp.float32(0.3))
    metrics, _ = loss_of(method, params, arrays, random_units(1, 2, 4, 16), logits, mixed)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    own, partners = (-log_p[np.arange(4), np.asarray(y)].mean() for y in (LABELS, LABELS[::-1]))
    np.testing.assert_allclose(metrics["classification_loss"], 0.3 * own + 0.7 * partners, rtol=1e-6)


def test_a_head_is_linear_batch_norm_relu_linear_of_length_1():
    head = views.create_head((512, 128), 64)
    params = jax.tree.map(np.asarray, jax.jit(head.init)(jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(params)) == 99_968  # the authors'
    features = np.random.default_rng(0).normal(size=(10, 64)).astype(np.float32)
    hidden = features @ params["linear1"]["kernel"] + params["linear1"]["bias"]
    hidden = np.maximum((hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5), 0)
    expected = hidden @ params["linear2"]["kernel"] + params["linear2"]["bias"]
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(jax.jit(head.__call__)(params, features), expected, rtol=1e-4, atol=1e-5)


def test_rows_of_an_image_and_its_views_are_together():
    seen = []

    def apply(variables, images):
        seen.append(images)
        return Outputs(images.mean((1, 2)), images.mean((1, 2))), variables

    images = jnp.arange(4.0)[:, None, None, None] * jnp.ones((4, 2, 2, 3))
    batch = Batch(images, LABELS, views=jnp.stack([images + 10, images + 20], 1))
    outputs, _ = views.forward(apply, None, batch)
    np.testing.assert_array_equal(seen[0][:3, 0, 0, 0], [0, 10, 20])
    np.testing.assert_array_equal(
        views.by_view(outputs.logits, batch)[..., 0], [[0, 1, 2, 3], [10, 11, 12, 13], [20, 21, 22, 23]]
    )


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("proco", dict(temperature=0.0), "method 'proco': weight = 1.0, temperature = 0.0: from 0 up, and above 0"),
        ("bcl", dict(beta=-1.0), "method 'bcl': alpha = 1.0, beta = -1.0, temperature = 0.1: from 0 up, and above 0"),
        ("bcl", dict(projection=()), r"method 'bcl': projection = \(\): widths of its layers, such as \(512, 128\)"),
    ],
)
def test_impossible_settings_are_explained(name, settings, message):
    with pytest.raises(UserError, match=message):
        methods.create(name, COUNTS, 16, **settings)


def test_a_batch_without_views_is_refused():
    method = methods.create("proco", COUNTS, 16)
    with pytest.raises(UserError, match="give the stage `views`"):
        method.loss(None, None, Batch(jnp.zeros((4, 2, 2, 3)), LABELS), None)


def test_a_method_with_layers_needs_the_number_of_features():
    with pytest.raises(UserError, match="method 'bcl' needs num_features"):
        methods.create("bcl", COUNTS)
