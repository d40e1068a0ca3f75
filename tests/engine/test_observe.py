"""Distances of features to the means of classes."""

import jax.numpy as jnp
import numpy as np

from ltjax.engine import evaluate, observe


def test_distances_are_to_the_own_and_to_the_nearest_other_mean():
    rng = np.random.default_rng(0)
    features, means = rng.normal(size=(20, 5)).astype(np.float32), rng.normal(size=(4, 5)).astype(np.float32)
    labels = rng.integers(0, 4, 20)
    own, wrong = observe.distances(*map(jnp.asarray, (features, labels, means)))
    distances = np.linalg.norm(features[:, None] - means, axis=-1)
    of_class = np.arange(4) == labels[:, None]
    np.testing.assert_allclose(own, distances[of_class], rtol=1e-5)
    np.testing.assert_allclose(wrong, np.where(of_class, np.inf, distances).min(1), rtol=1e-5)


def test_the_closest_mean_is_the_nearest():
    rng = np.random.default_rng(1)
    features, means = rng.normal(size=(20, 5)).astype(np.float32), rng.normal(size=(4, 5)).astype(np.float32)
    closest = evaluate.closeness(jnp.asarray(features), jnp.asarray(means)).argmax(-1)
    np.testing.assert_array_equal(closest, np.linalg.norm(features[:, None] - means, axis=-1).argmin(1))
