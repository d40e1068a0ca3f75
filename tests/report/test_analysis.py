"""The numbers of the page, against values by hand."""

import json

import numpy as np
import pytest

from ltjax.report import analysis, charts, panels
from ltjax.report.charts import Scale

GROUPS = {"many": np.array([True, False, False]), "few": np.array([False, True, True])}
LABELS = np.array([0, 0, 1, 1, 2, 2, 2, 2])
PREDICTIONS = np.array([0, 1, 0, 1, 2, 1, 1, 0])


def test_errors_are_counted_by_the_group_of_the_predicted_class():
    actual = analysis.errors_by_group(PREDICTIONS, LABELS, GROUPS)
    assert actual["many"] == {"right": 0.5, "many": 0.0, "few": 0.5}
    # of six images: two right; 1 -> 0 and 2 -> 0 many; twice 2 -> 1 few
    assert actual["few"] == pytest.approx({"right": 2 / 6, "many": 2 / 6, "few": 2 / 6})


def test_a_group_without_test_images_is_absent():
    assert list(analysis.errors_by_group(PREDICTIONS[:2], LABELS[:2], GROUPS)) == ["many"]


def test_scores_are_means_over_replicas():
    actual = analysis.scores_by_class([{"predictions": PREDICTIONS}, {"predictions": LABELS}], LABELS, 4)
    expected = {
        "images": [2, 2, 4],
        "predicted": [(3 + 2) / 2, (4 + 2) / 2, (1 + 4) / 2],
        "precision": [(1 / 3 + 1) / 2, (1 / 4 + 1) / 2, 1],
        "recall": [0.75, 0.75, 0.625],
        "f1": [(2 / 5 + 1) / 2, (2 / 6 + 1) / 2, (2 / 5 + 1) / 2],
    }
    assert list(actual) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(actual[name], [*values, np.nan])  # class 3 has no test image


def test_large_counts_are_not_rounded_to_tens():
    assert analysis.brief(np.array([12345.0, 0.123456])) == [12345.0, 0.1235]


def test_cells_of_the_confusion_matrix_are_counted():
    actual = analysis.confusions(PREDICTIONS, LABELS, 3)
    assert list(zip(*actual, strict=True)) == [
        (0, 0, 1),
        (0, 1, 1),
        (1, 0, 1),
        (1, 1, 1),
        (2, 0, 1),
        (2, 1, 2),
        (2, 2, 1),
    ]


def test_rows_of_the_confusion_matrix_have_the_given_order():
    numbers = analysis.confusion_numbers(analysis.confusions(PREDICTIONS, LABELS, 3), np.array([2, 0, 1]))
    assert numbers["classes"] == 1
    assert sorted(numbers["cells"]) == [[0, 0, 1], [0, 1, 1], [0, 2, 2], [1, 1, 1], [1, 2, 1], [2, 1, 1], [2, 2, 1]]


def test_the_most_confused_pairs_are_first():
    numbers = analysis.confusion_numbers(analysis.confusions(PREDICTIONS, LABELS, 3), np.arange(3))
    assert numbers["pairs"] == [[2, 1, 2, 0], [0, 1, 1, 1], [1, 0, 1, 1], [2, 0, 1, 0]]


def test_many_classes_are_summed_to_ranges_without_a_matrix_of_all():
    rng = np.random.default_rng(0)
    labels, predictions = np.repeat(np.arange(8142), 3), rng.integers(0, 8142, 3 * 8142)
    order = rng.permutation(8142)
    numbers = analysis.confusion_numbers(analysis.confusions(predictions, labels, 8142), order)
    row_of = np.empty(8142, int)
    row_of[order] = np.arange(8142) // numbers["classes"]
    expected = np.zeros((100, 100), int)
    np.add.at(expected, (row_of[labels], row_of[predictions]), 1)
    actual = np.zeros((100, 100), int)
    for row, column, images in numbers["cells"]:
        actual[row, column] = images
    np.testing.assert_array_equal(actual, expected)
    assert len(json.dumps(numbers)) < 200_000


def test_a_perfect_classifier_confuses_no_pair():
    assert analysis.confusion_numbers(analysis.confusions(LABELS, LABELS, 3), np.arange(3))["pairs"] == []


def test_classes_are_ordered_by_group_and_count():
    groups = {"many": np.array([False, True, False, True]), "few": np.array([True, False, True, False])}
    assert charts.class_order(groups, np.array([3, 200, 5, 300])).tolist() == [3, 1, 2, 0]


def test_the_surest_mistake_comes_first():
    confidences = np.array([0.9, 0.2, 0.95, 0.9, 0.9, 0.3, 0.7, 0.3])
    assert analysis.surest_mistakes(PREDICTIONS, confidences, LABELS).tolist() == [2, 6, 5, 7, 1]


def test_pairs_are_ordered_by_their_share_of_the_class():
    actual = analysis.confused_pairs(PREDICTIONS, LABELS, np.array([True, True, True]))
    assert [(p.true, p.predicted, p.share) for p in actual] == [(2, 1, 0.5), (0, 1, 0.5), (1, 0, 0.5), (2, 0, 0.25)]
    assert [p.true for p in analysis.confused_pairs(PREDICTIONS, LABELS, GROUPS["many"])] == [0]


def test_samples_of_a_pair_begin_with_the_most_confident_mistake():
    pair = analysis.Pair(2, 1, 0.5)
    confidences = np.array([0.9, 0.9, 0.9, 0.9, 0.9, 0.3, 0.7, 0.9])
    assert analysis.samples(pair, PREDICTIONS, confidences, LABELS) == [6, 5]


def test_a_class_without_images_has_no_mean():
    actual = analysis.by_class(np.array([1.0, 3.0]), np.array([0, 0]), 2)
    assert actual[0] == 2 and np.isnan(actual[1])
    assert analysis.brief(actual) == [2.0, None]


def test_the_nearest_mean_is_compared_by_group():
    own = {"own": np.arange(8.0), "wrong": np.full(8, 3.5), "predictions": PREDICTIONS, "gaps": np.ones((3, 15))}
    numbers = analysis.stage_numbers([own], LABELS, GROUPS, {"Logit scale": np.array([1.0, 2.0, 3.0])})
    assert numbers["distances"]["own"] == [0.5, 2.5, 5.5]
    assert numbers["distances"]["nearest_is_own"] == pytest.approx({"many": 1.0, "few": 0.5, "all": 0.5})
    assert numbers["learned"] == {"Logit scale": [1.0, 2.0, 3.0]}


def test_replicas_are_pooled():
    one = {"predictions": PREDICTIONS, "gaps": np.zeros((3, 15))}
    other = {"predictions": LABELS, "gaps": np.ones((3, 15))}
    numbers = analysis.stage_numbers([one, other], LABELS, GROUPS, {})
    assert numbers["errors"]["many"]["right"] == 0.75
    assert numbers["classwise_ece"] == pytest.approx(15 / 8 / 2)
    assert "distances" not in numbers


def test_classes_of_equal_count_are_placed_side_by_side_inside_the_frame():
    counts = np.array([100, 100, 100, 10, 10])
    scale = Scale(100, 10, 0, 300, log=True)
    actual = charts.places(counts, np.array([0.1, 0.9, 0.5, 0.2, 0.3]), scale)
    assert (np.argsort(actual) == [1, 2, 0, 4, 3]).all()  # the best first
    assert actual.min() >= 0 and actual.max() <= 300


@pytest.mark.parametrize("low, high", [(0, 1), (0, 0.031), (3, 4000), (-2, 7), (5, 5)])
def test_ticks_are_few_and_inside_the_range(low, high):
    ticks = charts.round_ticks(low, high)
    assert 1 <= len(ticks) <= 9
    assert min(ticks) >= low - 1e-9 and max(ticks) <= high + 1e-9


def test_ranges_of_counts_hold_every_class_once():
    counts = np.geomspace(1000, 2, 8142).astype(int)
    actual = charts.count_ranges(counts)
    assert sorted(np.concatenate(actual)) == list(range(8142))
    assert len(actual) <= charts.BINS and counts[actual[0]].min() > counts[actual[-1]].max()


def test_long_learning_curves_are_averaged(tmp_path):
    path, steps = tmp_path / "metrics.jsonl", 5 * panels.MOST_POINTS
    entries = [
        {"stage": "ce", "epoch": 1 + s // 100, "step": s + 1, "split": "train", "values": {"loss": s, "lr": 0.1}}
        for s in range(steps)
    ]
    entries.append({"stage": "ce", "epoch": 8, "step": steps, "split": "test", "values": {"accuracy": {"all": 0.5}}})
    path.write_text("\n".join(map(json.dumps, entries)) + '\n{"st')  # cut short by a kill
    actual = panels.read_curves(path)["ce"]
    assert actual["test"] == [(8, {"all": 0.5})]
    assert len(actual["train"]) == panels.MOST_POINTS
    places, losses, _ = zip(*actual["train"], strict=True)
    assert np.mean(losses) == pytest.approx((steps - 1) / 2)
    assert places[0] == pytest.approx(0.025) and places[-1] == pytest.approx(7.975)  # the middle of 5 steps of 100
