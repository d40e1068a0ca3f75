import jax
import numpy as np
import pytest

from ltjax import models
from ltjax.types import Variables


def random_variables(model, channels=3, seed=0):
    """Variables of a network, every array of different numbers; nothing is compiled."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), models.example(model, channels))
    rng = np.random.default_rng(seed)
    collections = jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), shapes)
    return Variables({"net": collections["params"]}, {"net": collections.get("batch_stats", {})}, {})


@pytest.fixture(scope="session")
def variables_of():
    return random_variables


@pytest.fixture
def same():
    """Assert that two pytrees have the same structure and are bitwise equal."""
    return lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
