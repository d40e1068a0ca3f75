"""Identify images by their content, to refuse a data set that has changed."""

import hashlib
from typing import Any, NamedTuple

import numpy as np

from ltjax.data.source import Images, Stored
from ltjax.data.splits import Split

SIZE = 16  # bytes of a hash


class Hashes(NamedTuple):
    """The hashes of a part of a data set.

    Attributes:
      images: [N], each of `SIZE` bytes.
      of_classes: C hexadecimal strings, the hash of all images of a class, in any order.
    """

    images: np.ndarray
    of_classes: list[str]


def digest(content: Any) -> bytes:
    """Hash bytes, or an array's: an image's file, or its pixels."""
    return hashlib.blake2b(content, digest_size=SIZE).digest()


def hash_images(data: Images | Stored, split: Split) -> dict[str, Hashes]:
    """Hash the images of a run's parts: {"train", "holdout" and "test": Hashes}."""
    everything = np.arange(len(data.test_labels))
    if isinstance(data, Images):
        train = [digest(np.ascontiguousarray(image)) for image in data.train_images]
        test = [digest(np.ascontiguousarray(image)) for image in data.test_images]
    else:
        train = [data.train_files.identity(i) for i in range(len(data.train_labels))]
        test = [data.test_files.identity(i) for i in range(len(data.test_labels))]
    parts = {
        "train": (train, data.train_labels, split.train),
        "holdout": (train, data.train_labels, split.holdout),
        "test": (test, data.test_labels, everything),
    }
    hashes = {}
    for name, (of_images, labels, indices) in parts.items():
        images = np.frombuffer(b"".join(of_images), f"S{SIZE}")[indices]
        order = np.lexsort((images, labels[indices]))  # by class, then by hash
        ends = np.cumsum(np.bincount(labels[indices], minlength=len(data.class_names)))[:-1]
        members = np.split(images[order], ends)
        hashes[name] = Hashes(images, [digest(of_class.tobytes()).hex() for of_class in members])
    return hashes
