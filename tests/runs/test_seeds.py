"""Means over seeds."""

import jax.numpy as jnp
import numpy as np
import pytest

from ltjax import metrics
from ltjax.runs.seeds import MeanStd, mean_and_std, pool, pooled_bins


def test_one_seed_has_no_deviation():
    assert mean_and_std([0.5]) == MeanStd(0.5, None)
    assert mean_and_std([1.0, 2.0, 3.0]) == MeanStd(2.0, 1.0)


def test_what_a_seed_lacks_is_left_out_at_every_depth():
    parts = [{"a": 1, "b": {"c": 2, "d": 3}}, {"a": 3, "b": {"c": 4}, "e": 5}]
    assert pool(parts, np.mean) == {"a": 2, "b": {"c": 3}}


def test_pooled_bins_are_those_of_all_predictions():
    rng = np.random.default_rng(0)
    confidences, correct = rng.uniform(size=(3, 50)).astype(np.float32), rng.integers(0, 2, (3, 50))
    of_seeds = [metrics.calibration(jnp.asarray(c), jnp.asarray(r)) for c, r in zip(confidences, correct, strict=True)]
    names = ("accuracies", "confidences", "counts")
    pooled = pooled_bins([{name: np.asarray(getattr(bins, name)).tolist() for name in names} for bins in of_seeds])
    together = metrics.calibration(jnp.asarray(confidences.ravel()), jnp.asarray(correct.ravel()))
    for name in names:
        assert pooled[name] == pytest.approx(np.asarray(getattr(together, name)), abs=1e-6)
