"""Load Tiny ImageNet as prepared by `python -m ltjax.data.prepare tiny_imagenet`."""

import os

from ltjax.data import records
from ltjax.data.source import Images, resolve_data_dir


def load(name: str = "tiny_imagenet", data_dir: str | os.PathLike | None = None) -> Images:
    """Load 100,000 training images of [64, 64, 3] pixels (1.2 GB), 500 a class, and 10,000 test images.

    The test images are the official validation images, because the official test images have no labels. Classes are in
    the order of the archive's `wnids.txt`, which is not alphabetical; a class's name is the first word in `words.txt`.
    Training image i is number i % 500 of class i // 500; test image i is `val_<i>.JPEG`.
    UserError if the data set is missing or damaged, or only TensorFlow can read it.
    """
    return records.load(name, resolve_data_dir(data_dir))
