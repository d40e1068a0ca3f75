"""A long-tailed subset of Fashion-MNIST that ships with ltjax, so a first run needs no download.

Training: 2,478 images, from 1,000 of class 0 down to 10 of class 9 (1000, 599, 359, 215, 129, 77, 46, 27, 16, 10: the
exponential profile with imbalance factor 100). Test: 100 images of each class. Fashion-MNIST is by Xiao, Rasul and
Vollgraf (2017, arXiv 1708.07747), under the licence in `NOTICE`; `make.py` made the subset from the official files.
"""

import os
from pathlib import Path

import numpy as np

from ltjax.data.source import Images


def load(name: str = "fashion_mnist_lt", data_dir: str | os.PathLike | None = None) -> Images:
    """Load 2,478 training and 1,000 test images of [28, 28, 1] grey levels, in the official order.

    Both arguments are ignored; every source has them.
    """
    with np.load(Path(__file__).with_name("subset.npz")) as arrays:
        return Images(
            train_images=arrays["train_images"],
            train_labels=arrays["train_labels"].astype(np.int32),
            test_images=arrays["test_images"],
            test_labels=arrays["test_labels"].astype(np.int32),
            class_names=tuple(arrays["class_names"].tolist()),
        )
