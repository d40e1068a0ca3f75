"""Where images come from, one file a source: `load(name, data_dir) -> ltjax.data.source.Images`."""

import os

from ltjax import registry
from ltjax.data.source import Images

SOURCES = {
    "cifar10": "ltjax.data.cifar",
    "cifar100": "ltjax.data.cifar",
    "fashion_mnist_lt": "ltjax.data.fashion_mnist_lt",
    "tiny_imagenet": "ltjax.data.tiny_imagenet",
}


def load(name: str, data_dir: str | os.PathLike | None = None) -> Images:
    """All images of a data set. Raises: UserError where it is unknown, missing or damaged."""
    return registry.load("data set", SOURCES, name, "load")(name, data_dir)
