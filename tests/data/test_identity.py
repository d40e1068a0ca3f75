"""Hashes tell whether a run has the same images as before, in any order."""

import numpy as np

from ltjax.data.identity import hash_images
from ltjax.data.source import Images
from ltjax.data.splits import long_tailed_split

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 3), np.uint8)
LABELS = np.arange(12, dtype=np.int32) % 3


def hashes(pixels, labels, test=PIXELS[:3]):
    images = Images(pixels, labels, test, np.arange(3, dtype=np.int32), ("a", "b", "c"))
    return hash_images(images, long_tailed_split(labels, 3, imbalance=1, holdout=1, seed=0))


def test_a_class_has_the_same_hash_in_any_order():
    order = np.random.default_rng(1).permutation(12)
    first, second = hashes(PIXELS, LABELS), hashes(PIXELS[order], LABELS[order])
    whole = [sorted([*each["train"].images, *each["holdout"].images]) for each in (first, second)]
    assert whole[0] == whole[1]
    assert first["test"].of_classes == second["test"].of_classes


def test_one_pixel_changes_the_hash_of_its_class_alone():
    test = PIXELS[:3].copy()
    test[1, 0, 0, 0] ^= 1
    first, second = (hashes(PIXELS, LABELS, each)["test"].of_classes for each in (PIXELS[:3], test))
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False, True]


def test_a_copy_of_a_training_image_in_the_test_set_has_its_hash():
    parts = hashes(PIXELS, LABELS)
    everything = {*parts["train"].images, *parts["holdout"].images}
    assert set(parts["test"].images) <= everything
