"""Values of each class in the report: learned margins, or values by count."""

import jax
import numpy as np
import pytest

from ltjax import losses, methods

COUNTS = np.array([100, 40, 10, 5])
LDAM = {"name": "ldam", "max_margin": 0.3}


def per_class(name, **settings):
    """Return the values of a new method."""
    method = methods.create(name, COUNTS, **settings)
    return method.per_class(method.init(jax.random.key(0))[0])


def test_label_aware_smoothing_is_set_by_count():
    (actual,) = per_class("mislas", head=0.4, tail=0.1).values()
    np.testing.assert_array_equal(actual, losses.smoothing_by_count(COUNTS, head=0.4, tail=0.1))


def test_class_weights_are_added_to_the_values_of_the_loss():
    actual = per_class("erm", loss={**LDAM, "class_weights": {"kind": "count"}})
    assert list(actual) == ["LDAM's margin", "Class weight"]
    np.testing.assert_array_equal(actual["LDAM's margin"], losses.ldam_margins(COUNTS, max_margin=0.3))
    np.testing.assert_allclose(actual["Class weight"], COUNTS / 100, rtol=1e-6)


@pytest.mark.parametrize(
    "name, key", [("pgd_at", "loss"), ("trades", "loss"), ("alp", "loss"), ("lbgat", "guide_loss")]
)
def test_adversarial_training_has_the_values_of_its_loss(name, key):
    assert list(per_class(name, **{key: LDAM})) == ["LDAM's margin"]


@pytest.mark.parametrize("name, settings", [("erm", {}), ("bgat", {}), ("reslt", {"medium_start": 0.5, "beta": 0.9})])
def test_plain_cross_entropy_has_no_values(name, settings):
    assert per_class(name, **settings) == {}


def margins(values, **settings):
    """Return DRO-LT's margins after training has changed them to `values` [L, C]."""
    actual = methods.create("drolt", COUNTS, **settings).per_class({"margins": np.asarray(values, np.float32)})
    return {title: np.asarray(margin) for title, margin in actual.items() if title.startswith("DRO-LT's")}


def test_learned_margins_are_clipped_at_0_unless_unconstrained():
    learned = [[-1, 0, 0.5, 1]]
    np.testing.assert_array_equal(margins(learned)["DRO-LT's margin"], [0, 0, 0.5, 1])
    np.testing.assert_array_equal(margins(learned, radius="learned_unconstrained")["DRO-LT's margin"], learned[0])


def test_every_layer_of_drolt_has_its_margins():
    actual = margins([[1, 2, 3, 4], [5, 6, 7, 8]], layers=("stage2", "stage3"))
    assert {title: margin.tolist() for title, margin in actual.items()} == {
        "DRO-LT's margin, stage2": [1, 2, 3, 4],
        "DRO-LT's margin, stage3": [5, 6, 7, 8],
    }


def test_a_radius_by_count_is_that_of_the_count():
    (actual,) = margins([], radius="by_count", radius_size=0.5).values()
    np.testing.assert_allclose(actual, 1 / np.sqrt(COUNTS), rtol=1e-6)
