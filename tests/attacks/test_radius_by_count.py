"""RobustLT's radius of each class, against its authors' (source: tests/golden/README.md)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax import attacks


@pytest.mark.parametrize("case, share", [("cifar10", 0.3), ("cifar100", 0.4)])
def test_the_radius_equals_the_authors(golden, case, share):
    z = golden("robust_lt")
    ours = attacks.radius_by_count(z["class_counts"], epsilon="8/255", share=share)
    np.testing.assert_allclose(ours, z[f"robustlt_{case}_epoch100_radius_max"], rtol=1e-5)


@pytest.mark.parametrize("share", [0, 0.3, 1.0])
def test_the_mean_radius_of_an_image_is_epsilon(share):
    counts = np.random.default_rng(0).integers(1, 5000, 100)
    ours = attacks.radius_by_count(counts, epsilon=0.03, share=share)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(counts @ np.asarray(ours) / counts.sum(), 0.03, rtol=1e-5)


def test_rarer_classes_have_a_larger_radius():
    ours = attacks.radius_by_count(np.array([5, 5000, 1, 60]), epsilon=0.03, share=0.4)
    np.testing.assert_array_equal(np.argsort(ours), [1, 3, 0, 2])


@pytest.mark.parametrize("counts", [np.full(7, 50), np.array([3])])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_balanced_counts_give_every_class_epsilon(counts, share):
    np.testing.assert_allclose(attacks.radius_by_count(counts, epsilon=0.03, share=share), 0.03, rtol=1e-6)


def test_counts_that_differ_by_one_have_the_radius_of_float64():
    counts = np.array([100_000, 99_999, 10])
    ours = attacks.radius_by_count(counts, epsilon=0.03, share=0.5)
    r = np.sqrt(np.log(counts.max() / counts))
    exact = 0.03 * (0.5 + 0.5 * r / (counts @ r / counts.sum()))
    np.testing.assert_allclose(ours, exact, rtol=1e-5)


def test_counts_epsilon_and_share_may_be_traced():
    counts = np.array([500, 50, 5])
    ours = jax.jit(lambda n, e, a: attacks.radius_by_count(n, epsilon=e, share=a))(counts, 0.03, 0.3)
    np.testing.assert_allclose(ours, attacks.radius_by_count(counts, epsilon=0.03, share=0.3), rtol=1e-6)


@pytest.mark.parametrize("share", [-0.1, 1.1, np.nan])
def test_a_share_outside_0_to_1_is_an_error_that_names_it(share):
    with pytest.raises(ValueError, match=f"share = {share}: of the radius that depends on the count, from 0 to 1"):
        attacks.radius_by_count(np.array([2, 1]), epsilon=0.03, share=share)


def test_a_class_without_training_images_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="class_counts = 0 for class 1: every class needs 1 training image or more"):
        attacks.radius_by_count(np.array([5, 0, 7]), epsilon=0.03, share=0.3)


def test_a_radius_in_255ths_is_refused_with_a_hint():
    with pytest.raises(ValueError, match=r"epsilon = 8: .*did you mean 8/255"):
        attacks.radius_by_count(np.array([5, 1]), epsilon=8, share=0.3)
