"""Long-tailed splits: the authors' counts (source: tests/golden/README.md), and a frozen choice of images."""

import json
from itertools import pairwise

import numpy as np
import pytest

from ltjax.data import splits
from ltjax.types import UserError

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 200))  # 200 images of each of 10 classes


def split(imbalance=10, labels=LABELS, num_classes=10, **settings):
    return splits.long_tailed_split(labels, num_classes, imbalance=imbalance, **settings)


@pytest.mark.parametrize("imbalance", [10, 50, 100, 200])
@pytest.mark.parametrize("profile", splits.PROFILES)
@pytest.mark.parametrize("num_classes, max_count", [(10, 5000), (100, 500)])
def test_class_counts_equal_the_authors(golden, num_classes, max_count, profile, imbalance):
    ours = splits.class_counts(num_classes, max_count, imbalance=imbalance, profile=profile)
    np.testing.assert_array_equal(ours, golden("class_counts")[f"cifar{num_classes}_{profile}_if{imbalance}"])


@pytest.mark.parametrize("profile", splits.PROFILES)
def test_imbalance_1_keeps_everything(profile):
    assert splits.class_counts(7, 30, imbalance=1, profile=profile).tolist() == [30] * 7


def test_the_head_of_the_step_profile_is_half_of_the_classes_rounded_down():
    assert splits.class_counts(5, 30, imbalance=10, profile="step").tolist() == [30, 30, 3, 3, 3]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((10, 500, 0.5, "exp"), "imbalance = 0.5: it is the largest class over the smallest"),
        ((10, 500, 0, "exp"), "imbalance = 0: "),
        ((10, 500, -100, "step"), "imbalance = -100: "),
        ((10, 500, np.nan, "exp"), "imbalance = nan: "),
        ((10, 500, 10, "linear"), "unknown imbalance profile 'linear'; known: exp, step"),
        ((0, 500, 10, "exp"), "a split of 0 classes with up to 500 images: both must be at least 1"),
        ((10, 0, 10, "exp"), "a split of 10 classes with up to 0 images: both must be at least 1"),
    ],
)
def test_impossible_counts_are_explained(arguments, message):
    num_classes, max_count, imbalance, profile = arguments
    with pytest.raises(UserError, match=message):
        splits.class_counts(num_classes, max_count, imbalance=imbalance, profile=profile)


@pytest.mark.parametrize("profile", splits.PROFILES)
def test_a_split_holds_its_counts_sorted_by_class(profile):
    result = split(20, profile=profile)
    np.testing.assert_array_equal(result.class_counts, splits.class_counts(10, 200, imbalance=20, profile=profile))
    np.testing.assert_array_equal(LABELS[result.train], np.repeat(np.arange(10), result.class_counts))


def test_no_image_is_kept_twice():
    result = split(3, holdout=30)
    assert len(set(result.train.tolist()) | set(result.holdout.tolist())) == len(result.train) + len(result.holdout)


@pytest.mark.parametrize("profile", splits.PROFILES)
@pytest.mark.parametrize("holdout", [0, 20])
def test_a_higher_imbalance_keeps_a_subset(profile, holdout):
    trained = [set(split(i, profile=profile, holdout=holdout).train.tolist()) for i in (1, 10, 50, 100)]
    assert all(higher < lower for lower, higher in pairwise(trained))


def test_the_holdout_has_the_same_number_of_each_class_sorted():
    np.testing.assert_array_equal(LABELS[split(10, holdout=25).holdout], np.repeat(np.arange(10), 25))


def test_the_holdout_is_the_same_at_every_imbalance():
    np.testing.assert_array_equal(split(10, holdout=25).holdout, split(100, holdout=25).holdout)


def test_the_holdout_comes_off_the_largest_class():
    assert split(1, holdout=25).class_counts.tolist() == [175] * 10


def test_no_holdout_is_empty():
    assert split(10).holdout.shape == (0,)


def test_max_count_is_the_largest_class():
    assert split(10, max_count=50).class_counts.tolist() == splits.class_counts(10, 50, imbalance=10).tolist()


def test_seeds_keep_different_images_in_every_class():
    first, second = split(10, seed=0), split(10, seed=1)
    np.testing.assert_array_equal(first.class_counts, second.class_counts)
    for c in range(1, 10):  # the first class keeps all of its images
        members = [set(s.train[LABELS[s.train] == c].tolist()) for s in (first, second)]
        assert members[0] != members[1]


def test_classes_do_not_share_a_permutation():
    labels = np.repeat(np.arange(2), 200)
    first, second = split(1, labels=labels, num_classes=2, max_count=100).train.reshape(2, 100)
    assert set(first.tolist()) != set((second - 200).tolist())


def test_every_image_of_a_class_is_kept_about_equally_often():
    labels = np.zeros(20, int)
    trained = [split(1, labels=labels, num_classes=1, max_count=5, seed=seed).train for seed in range(800)]
    counts = np.bincount(np.concatenate(trained), minlength=20)
    assert np.square(counts - 200).sum() / (200 * 0.75) < 49  # 19 degrees of freedom: p = 0.0002


def test_an_already_long_tailed_source_is_kept_whole():
    counts = splits.class_counts(10, 100, imbalance=20)
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(10), counts))
    result = split(20, labels=labels)
    np.testing.assert_array_equal(np.sort(result.train), np.arange(counts.sum()))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(imbalance=10, max_count=201), "class 0 has 200 images, but 201 training images are asked for"),
        (dict(imbalance=10, max_count=190, holdout=11), "class 0 has 200 images, but 190 training and 11 hold-out"),
        (dict(imbalance=1000), "class 7 would keep no image .*: lower data.imbalance or raise data.max_count"),
        (dict(imbalance=1000, profile="step"), "class 5 would keep no image"),
        (dict(imbalance=10, holdout=-1), "data.holdout = -1 images a class: there are 200 to 200"),
        (dict(imbalance=10, holdout=200), "data.holdout = 200 images a class: there are 200 to 200"),
        (dict(imbalance=0.5), "imbalance = 0.5"),
        (dict(imbalance=10, profile="linear"), "unknown imbalance profile 'linear'"),
        (dict(imbalance=10, num_classes=11), "class 10 has 0 images"),
    ],
)
def test_impossible_splits_are_explained(settings, message):
    with pytest.raises(UserError, match=message):
        split(**settings)


def test_the_split_of_a_set_of_cifar_100s_size_is_frozen():
    """A change would alter every training set."""
    labels = np.arange(50_000) * 7919 % 100
    result = splits.long_tailed_split(labels, 100, imbalance=100, holdout=5, max_count=400, seed=3)
    description = splits.describe(result, seed=3, groups={})
    assert (description["num_train"], description["num_holdout"]) == (8668, 500)
    assert description["sha256"] == "9608568ecbec8d6ac9f2c35f8738217f232bdeafa1b3bfe94be46ebb09b44ec7"
    assert description["holdout_sha256"] == "6d51728f3ced8f992ff55117ac0a7b2250d0fda07c6922c782dcf785880a57c9"


def test_the_description_is_json_with_the_groups_classes():
    description = splits.describe(split(10), seed=5, groups={"many": np.arange(10) < 2, "few": np.arange(10) > 7})
    assert json.loads(json.dumps(description)) == description
    assert (description["groups"], description["seed"]) == ({"many": [0, 1], "few": [8, 9]}, 5)
    assert description["class_counts"] == split(10).class_counts.tolist()


def test_a_natural_split_keeps_all_that_is_not_held_out():
    labels = np.repeat([2, 0, 1], [9, 4, 6])
    split = splits.long_tailed_split(labels, 3, imbalance=1, profile="natural", holdout=2)
    assert split.class_counts.tolist() == [2, 4, 7]
    assert np.bincount(labels[split.holdout]).tolist() == [2, 2, 2]
    assert sorted([*split.train, *split.holdout]) == list(range(19))
    assert (np.diff(labels[split.train]) >= 0).all()


def test_a_natural_split_may_cap_its_largest_classes():
    labels = np.repeat([0, 1], [9, 4])
    split = splits.long_tailed_split(labels, 2, imbalance=1, profile="natural", max_count=5)
    assert split.class_counts.tolist() == [5, 4]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"imbalance": 10}, "data.imbalance = 10: profile 'natural' keeps"),
        ({"imbalance": 1, "holdout": 4}, "data.holdout = 4 images a class: class 1 has 4 in all"),
        ({"imbalance": 1, "holdout": 4, "class_names": ("cat", "emu")}, r"class 1 \(emu\) has 4 in all"),
    ],
)
def test_impossible_natural_splits_are_explained(settings, message):
    labels = np.repeat([0, 1], [9, 4])
    with pytest.raises(UserError, match=message):
        splits.long_tailed_split(labels, 2, profile="natural", **settings)
