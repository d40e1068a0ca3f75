"""Data sets, one file a source: `load(name, data_dir)` returns `Images`, in memory, or `Stored`, on disk."""

import os

from ltjax.data.source import Images, Stored
from ltjax.system import registry
from ltjax.types import UserError

SOURCES = {
    "cifar10": "ltjax.data.cifar",
    "cifar100": "ltjax.data.cifar",
    "features": "ltjax.data.feature_files",
    "i_naturalist2018": "ltjax.data.shards",
    "image_folder": "ltjax.data.image_folder",
    "imagenet_lt": "ltjax.data.shards",
    "places_lt": "ltjax.data.shards",
    "fashion_mnist_lt": "ltjax.data.fashion_mnist_lt",
    "tiny_imagenet": "ltjax.data.tiny_imagenet",
}
# Side in pixels of images in memory. For the other sources, config.data sets the size.
SIDES = {"cifar10": 32, "cifar100": 32, "fashion_mnist_lt": 28, "tiny_imagenet": 64}


def load(name: str, data_dir: str | os.PathLike | None = None, labels: str = "") -> Images | Stored:
    """Load all images of a data set; UserError if it is unknown, missing or damaged.

    Args:
      name: One of `SOURCES`.
      data_dir: Folder of prepared data sets, or of the images of an image_folder.
      labels: Table of the labels of an image_folder, instead of folders.
    """
    function = registry.load("data set", SOURCES, name, "load")
    if labels and name != "image_folder":
        raise UserError(f"config.data.labels = {labels!r}: {name} has labels of its own; a table is for image_folder")
    return function(name, data_dir, labels) if labels else function(name, data_dir)
