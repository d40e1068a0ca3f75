"""Calibration against the authors' numbers (source: tests/golden/README.md), and accuracy by group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax import metrics


def bin_of(confidence, num_bins=10):
    """Return the bin that one confidence falls in."""
    counts = metrics.calibration(np.asarray([confidence], np.float32), np.array([True]), num_bins=num_bins).counts
    assert counts.sum() == 1
    return int(np.argmax(counts))


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_calibration_equals_the_authors(golden, jitted):
    numbers = golden("calibration")
    bins = int(numbers["num_bins"])

    def ours(confidences, correct):
        return metrics.calibration(confidences, correct, num_bins=bins)

    correct = numbers["predictions"] == numbers["labels"]
    result = (jax.jit(ours) if jitted else ours)(numbers["confidences"], correct)
    np.testing.assert_array_equal(result.counts, numbers["bin_counts"])
    for name, theirs in (
        ("ece", "expected_calibration_error"),
        ("mce", "max_calibration_error"),
        ("accuracies", "accuracies"),
        ("confidences", "confidences"),
        ("edges", "bins"),
    ):
        np.testing.assert_allclose(getattr(result, name), numbers[f"bin_{theirs}"], rtol=1e-5, err_msg=name)


def test_classwise_ece_is_the_mean_over_classes_of_the_gaps_in_bins():
    """Three images, three classes, two bins, by hand; the fourth image does not count."""
    probabilities = np.array([[0.8, 0.2, 0.0], [0.6, 0.3, 0.1], [0.1, 0.7, 0.2], [1.0, 0.0, 0.0]])
    labels = np.array([0, 1, 1, -1])
    gaps = metrics.classwise_gaps(probabilities, labels, num_bins=2)
    # class 0: bin 1 holds 0.1 of image 2; bin 2 holds 0.8 and 0.6, one of them right
    # class 1: bin 1 holds 0.2 and 0.3, one of them right; bin 2 holds 0.7, right; class 2: 0, 0.1 and 0.2, all wrong
    np.testing.assert_allclose(gaps, [[-0.1, 1 - 1.4], [1 - 0.5, 1 - 0.7], [-0.3, 0.0]], atol=1e-6)
    expected = ((0.1 + 0.4) + (0.5 + 0.3) + 0.3) / 3 / 3
    assert metrics.classwise_ece(gaps, 3) == pytest.approx(expected, rel=1e-6)


def test_classwise_gaps_of_batches_add_up():
    rng = np.random.default_rng(0)
    probabilities, labels = rng.dirichlet(np.ones(5), 40).astype(np.float32), rng.integers(0, 5, 40)
    whole = metrics.classwise_gaps(probabilities, labels)
    parts = [jax.jit(metrics.classwise_gaps)(probabilities[i : i + 10], labels[i : i + 10]) for i in range(0, 40, 10)]
    np.testing.assert_allclose(sum(parts), whole, atol=1e-5)


def test_bins_are_closed_on_the_right():
    edges = np.asarray(metrics.calibration(np.zeros(1, np.float32), np.zeros(1), num_bins=10).edges)
    assert [bin_of(edge) for edge in edges[1:]] == list(range(10))
    assert [bin_of(np.nextafter(edge, np.float32(2))) for edge in edges[1:-1]] == list(range(1, 10))


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("num_bins", [1, 7, 10, 15, 20, 25, 50, 100])
def test_k_nths_are_exact_edges(num_bins, jitted):
    confidences = (np.arange(1, num_bins + 1) / num_bins).astype(np.float32)

    def ours(confidences):
        return metrics.calibration(confidences, np.ones(num_bins), num_bins=num_bins).counts

    np.testing.assert_array_equal((jax.jit(ours) if jitted else ours)(confidences), np.ones(num_bins))


def test_confidence_of_0_and_1_fall_in_the_end_bins():
    assert (bin_of(0.0), bin_of(1.0)) == (0, 9)


def test_ece_is_the_gap_weighted_by_the_share_of_each_bin():
    confidences = np.array([0.95, 0.95, 0.95, 0.95, 0.35], np.float32)
    result = metrics.calibration(confidences, np.array([1, 1, 0, 0, 1]), num_bins=10)
    np.testing.assert_allclose(result.ece, (4 * 0.45 + 0.65) / 5, rtol=1e-6)
    np.testing.assert_allclose(result.mce, 0.65, rtol=1e-6)


def test_no_images_have_no_calibration_error():
    result = metrics.calibration(np.zeros(0, np.float32), np.zeros(0, bool))
    assert all(np.isfinite(values).all() for values in result)
    assert (float(result.ece), float(result.mce), int(result.counts.sum())) == (0, 0, 0)


def test_integer_confidences_are_numbers_too():
    result = metrics.calibration(np.array([1, 1, 0, 0]), np.array([1, 0, 0, 0]))
    np.testing.assert_allclose(result.ece, 0.25)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_confidences_are_counted_exactly(dtype):
    result = metrics.calibration(jnp.full(70_001, 0.75, dtype), np.ones(70_001, bool))
    assert int(result.counts.sum()) == 70_001
    np.testing.assert_allclose(result.ece.astype(jnp.float32), 0.25, atol=1e-3)


def test_20_to_100_training_images_are_medium():
    groups = metrics.count_groups([101, 100, 20, 19])
    assert {name: member.tolist() for name, member in groups.items()} == {
        "many": [True, False, False, False],
        "medium": [False, True, True, False],
        "few": [False, False, False, True],
    }


def test_group_accuracy_is_the_mean_of_its_classes_accuracies():
    """Two few-shot classes with 38 images, all right, and with 2, all wrong: 50 %, and not 95 %."""
    labels = np.repeat([0, 1, 2, 3], [3, 1, 38, 2])
    correct = np.repeat([True, False, True, True, False], [2, 1, 1, 38, 2])
    assert metrics.group_accuracy(correct, labels, [500, 50, 5, 4]) == {
        "many": pytest.approx(2 / 3),
        "medium": 1.0,
        "few": 0.5,
        "all": 41 / 44,
    }


def test_balanced_accuracy_is_the_mean_over_classes_with_images():
    assert metrics.balanced_accuracy([1, 1, 1, 0], [0, 0, 0, 4]) == 0.5


def test_scores_of_classes_are_scikit_learns():
    """Class 3 is never predicted right, class 4 has no image. Numbers of scikit-learn 1.9.1, see `class_scores`."""
    labels = [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 5]
    predictions = [0, 0, 0, 0, 1, 4, 1, 1, 0, 5, 2, 0, 1, 0, 0, 5]
    scores = metrics.class_scores(predictions, labels)
    assert scores.classes.tolist() == [0, 1, 2, 3, 5] and scores.images.tolist() == [6, 4, 3, 2, 1]
    np.testing.assert_allclose(scores.precision, [0.5, 0.5, 1.0, 0.0, 0.5], rtol=1e-15)
    np.testing.assert_allclose(scores.recall, [0.6666666666666666, 0.5, 0.3333333333333333, 0.0, 1.0], rtol=1e-15)
    np.testing.assert_allclose(scores.f1, [0.5714285714285714, 0.5, 0.5, 0.0, 0.6666666666666666], rtol=1e-15)
    assert metrics.macro_f1(predictions, labels) == pytest.approx(0.44761904761904764, rel=1e-15)


def test_recall_is_the_accuracy_of_the_class():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 9, 200), rng.integers(0, 12, 200)
    scores, (classes, accuracies) = (
        metrics.class_scores(predictions, labels),
        metrics.accuracy_by_class(predictions == labels, labels),
    )
    np.testing.assert_array_equal(scores.classes, classes)
    np.testing.assert_array_equal(scores.recall, accuracies)


def test_predictions_of_a_class_without_images_are_errors():
    assert metrics.class_scores([7, 0], [0, 0]).f1.tolist() == [pytest.approx(2 / 3)]


def test_thresholds_of_groups_are_settings():
    result = metrics.group_accuracy([1, 0], [0, 1], [30, 3], few_below=3, many_above=29)
    assert result == {"many": 1.0, "medium": 0.0, "all": 0.5}


def test_thresholds_that_put_a_class_into_two_groups_are_an_error():
    with pytest.raises(ValueError, match="few_below = 100, many_above = 20: a class would be both many and few"):
        metrics.count_groups([500, 50, 5], few_below=100, many_above=20)


def test_a_group_without_classes_is_absent():
    assert metrics.group_accuracy([True], [0], [500, 500]).keys() == {"many", "all"}


def test_a_group_whose_classes_have_no_test_image_is_absent():
    assert metrics.group_accuracy([True], [0], [500, 5]).keys() == {"many", "all"}


def test_no_images_have_no_accuracy():
    assert metrics.group_accuracy(np.zeros(0, bool), np.zeros(0, int), [500, 5]) == {}


def test_device_arrays_are_accepted():
    result = metrics.group_accuracy(jnp.array([1, 0]), jnp.array([0, 1]), jnp.array([500, 5]))
    assert result == {"many": 1.0, "few": 0.0, "all": 0.5}


def test_range_groups_end_before_their_bounds():
    groups = metrics.range_groups(10, (3, 7))
    members = {name: np.flatnonzero(member).tolist() for name, member in groups.items()}
    assert members == {"many": [0, 1, 2], "medium": [3, 4, 5, 6], "few": [7, 8, 9]}


def test_an_empty_range_is_absent_from_the_accuracies():
    groups = metrics.range_groups(4, (2, 2))
    assert metrics.accuracy_by_group([1, 0, 1, 1], [0, 1, 2, 3], groups) == {"many": 0.5, "few": 1.0, "all": 0.75}


@pytest.mark.parametrize("bounds", [(0.3, 0.7), (3, 2), (3,), (1, 2, 3), (-1, 2)])
def test_bounds_that_are_not_two_numbers_of_classes_are_an_error(bounds):
    for groups in (lambda: metrics.range_groups(4, bounds), lambda: metrics.rank_groups([9, 5, 2, 1], bounds)):
        with pytest.raises(ValueError, match="two numbers of classes, the first not above the second"):
            groups()


def test_rank_groups_are_those_of_classes_by_count():
    groups = metrics.rank_groups([5, 50, 7, 50, 1], (2, 3))
    assert {name: np.flatnonzero(member).tolist() for name, member in groups.items()} == {
        "many": [1, 3],
        "medium": [2],
        "few": [0, 4],
    }
