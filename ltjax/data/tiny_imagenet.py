"""Tiny ImageNet, read from what `python -m ltjax.data.prepare tiny_imagenet` has prepared."""

import os

from ltjax.data import records
from ltjax.data.source import Images, resolve_data_dir
from ltjax.types import UserError

NAMES = ("tiny_imagenet",)


def load(name: str = "tiny_imagenet", data_dir: str | os.PathLike | None = None) -> Images:
    """Reads all of it: 100,000 training images of [64, 64, 3] pixels (1.2 GB), 500 a class, and 10,000 for testing.

    The test images are the official validation images, since the official test images have no labels. Classes stand in
    the order of the archive's `wnids.txt`, which is not alphabetical, and are named by the first word of `words.txt`.
    Training image i is number i % 500 of class i // 500; test image i is `val_<i>.JPEG`.

    Args:
      name: "tiny_imagenet".
      data_dir: the folder that holds `tiny_imagenet/<version>`; by default `TFDS_DATA_DIR`, else
        `~/tensorflow_datasets`.

    Raises:
      UserError: an unknown name, a data set that is not there, damaged files, or files that only TensorFlow reads.
    """
    if name not in NAMES:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(NAMES)}")
    return records.load(name, resolve_data_dir(data_dir))
