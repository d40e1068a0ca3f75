"""The hold-out of training images outside a long tail."""

import numpy as np

from benchmarks import left_out
from ltjax.data import splits

LABELS = np.repeat(np.arange(4), 50).astype(np.int32)


def test_images_are_balanced_and_outside_the_long_tail():
    split = splits.long_tailed_split(LABELS, 4, imbalance=25, holdout=2, seed=3)
    chosen = left_out.left_out(LABELS, split, 10)
    assert not np.isin(chosen, [*split.train, *split.holdout]).any()
    assert len(np.unique(chosen)) == len(chosen)
    with_enough = 50 - 2 - split.class_counts >= 10
    assert not with_enough[0] and with_enough[1:].all()
    np.testing.assert_array_equal(np.bincount(LABELS[chosen], minlength=4), 10 * with_enough)
    np.testing.assert_array_equal(LABELS[chosen], np.sort(LABELS[chosen]))


def test_images_do_not_depend_on_what_is_evaluated():
    split = splits.long_tailed_split(LABELS, 4, imbalance=25, seed=3)
    np.testing.assert_array_equal(left_out.left_out(LABELS, split, 8), left_out.left_out(LABELS, split, 8))
    assert not np.array_equal(left_out.left_out(LABELS, split, 8), left_out.left_out(LABELS, split, 8, seed=1))


def test_scores_are_percent_and_a_temperature_mends_confidence():
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(3), 400)
    logits = rng.normal(size=(1200, 3)).astype(np.float32)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    drawn = (probabilities.cumsum(-1) > rng.random((1200, 1))).argmax(-1)
    logits = np.take_along_axis(logits, (np.arange(3) - labels[:, None] + drawn[:, None]) % 3, -1)  # drawn is labels
    found = left_out.scores(3 * logits, labels, np.array([500, 50, 5]))
    accuracy = 100 * (logits.argmax(-1) == labels).mean()
    assert found["all"] == accuracy and abs(np.mean([found[g] for g in ("many", "medium", "few")]) - accuracy) < 1e-9
    np.testing.assert_allclose(found["confidence"] - accuracy, found["ece"], atol=2)
    np.testing.assert_allclose(found["temperature"], 3, rtol=0.15)
    assert found["fitted"] < 6 < 15 < found["ece"]
