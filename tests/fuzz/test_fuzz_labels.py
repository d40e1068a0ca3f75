"""Splits and figures of any set of labels are exact, or refused in one line; none is nan."""

import contextlib
import io
import json
import math
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ltjax import metrics
from ltjax.data import load as load_images
from ltjax.data import samplers, splits
from ltjax.engine import evaluate
from ltjax.types import UserError
from tests.data.miniatures import photo

num_classes = st.integers(2, 6)


@st.composite
def label_sets(draw):
    """Return (C, labels of training images, labels of test images); classes may lack either."""
    classes = draw(num_classes)
    label = st.integers(0, classes - 1)
    return classes, draw(st.lists(label, min_size=1, max_size=40)), draw(st.lists(label, min_size=1, max_size=40))


def finite(value):
    """Return whether no number in nested dicts and lists is nan or infinite."""
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


@given(
    label_sets(),
    st.sampled_from(["exp", "step", "natural"]),
    st.one_of(st.just(1), st.floats(0.5, 200)),
    st.integers(0, 5),
    st.integers(0, 3),
    st.one_of(st.none(), st.integers(-1, 20)),
)
def test_a_split_has_the_requested_images_or_is_refused(sets, profile, imbalance, holdout, seed, max_count):
    classes, labels, _ = sets
    labels = np.array(labels)
    try:
        split = splits.long_tailed_split(
            labels, classes, imbalance=imbalance, profile=profile, holdout=holdout, seed=seed, max_count=max_count
        )
    except UserError as error:
        assert "\n" not in str(error)
        return
    together = np.concatenate([split.train, split.holdout])
    assert len(np.unique(together)) == len(together)  # no image twice, none both trained on and held out
    assert np.bincount(labels[split.train], minlength=classes).tolist() == split.class_counts.tolist()
    assert np.bincount(labels[split.holdout], minlength=classes).tolist() == [holdout] * classes
    assert split.class_counts.min() >= 1
    if profile != "natural" and max_count is None:
        assert split.class_counts[0] == (labels == 0).sum() - holdout


@given(label_sets(), st.data())
def test_figures_are_means_that_numpy_confirms(sets, data):
    classes, train_labels, labels = sets
    labels, size = np.array(labels, np.int32), len(labels)
    predictions = np.array(data.draw(st.lists(st.integers(0, classes - 1), min_size=size, max_size=size)), np.int32)
    confidences = np.array(data.draw(st.lists(st.floats(0, 1, width=32), min_size=size, max_size=size)), np.float32)
    losses = np.array(data.draw(st.lists(st.floats(0, 100, width=32), min_size=size, max_size=size)), np.float32)
    groups = metrics.count_groups(np.bincount(train_labels, minlength=classes), few_below=3, many_above=8)
    outcome = {"predictions": predictions, "confidences": confidences, "losses": losses}
    figures = evaluate.figures_of(outcome, labels, groups, classes)
    assert finite(figures) and json.loads(json.dumps(figures, allow_nan=False))
    right = predictions == labels
    assert figures["accuracy"]["all"] == np.mean(right)
    of_class = {c: right[labels == c].mean() for c in np.unique(labels)}
    for c, accuracy in enumerate(figures["per_class_accuracy"]):
        assert accuracy == of_class.get(c)
    for name, member in groups.items():
        present = [of_class[c] for c in np.flatnonzero(member) if c in of_class]
        assert (name in figures["accuracy"]) == bool(present)
        if present:
            np.testing.assert_allclose(figures["accuracy"][name], np.mean(present), rtol=1e-12)
    np.testing.assert_allclose(figures["balanced_accuracy"], np.mean(list(of_class.values())), rtol=1e-12)
    f1 = [
        2 * ((predictions == c) & right).sum() / ((labels == c).sum() + (predictions == c).sum())
        for c in np.unique(labels)
    ]
    np.testing.assert_allclose(figures["macro_f1"], np.mean(f1), rtol=1e-12)


@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=6),
    st.sampled_from(sorted(samplers.SAMPLERS)),
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**31 - 1),
)
def test_a_sampler_draws_only_existing_images(counts, name, batch_size, seed, step):
    sampler = samplers.create(name)
    drawn = sampler(np.uint32(seed), np.uint32(step), batch_size=batch_size, class_counts=counts)
    assert drawn.shape == (batch_size,) and drawn.min() >= 0 and drawn.max() < sum(counts)


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.data())
def test_a_class_absent_in_validation_is_noted_and_has_no_images(counts, data):
    present = data.draw(st.lists(st.booleans(), min_size=len(counts), max_size=len(counts)).filter(any))
    stderr = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for label, count in enumerate(counts):
            for part, number in (("train", count), ("val", int(present[label]))):
                (root / part / f"class{label}").mkdir(parents=True)
                for i in range(number):
                    (root / part / f"class{label}" / f"{i}.jpg").write_bytes(photo(label, i + 10 * (part == "val"), 16))
        with contextlib.redirect_stderr(stderr):
            loaded = load_images("image_folder", root)
    assert np.bincount(loaded.train_labels, minlength=len(counts)).tolist() == counts
    assert np.bincount(loaded.test_labels, minlength=len(counts)).tolist() == list(map(int, present))
    for label, there in enumerate(present):
        assert (f"class{label}" in stderr.getvalue()) == (not there)
