"""Make `subset.npz`, which ltjax ships, from the four official Fashion-MNIST files.

    python -m ltjax.data.fashion_mnist_lt.make FOLDER

FOLDER holds train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and
t10k-labels-idx1-ubyte.gz of https://github.com/zalandoresearch/fashion-mnist (the Debian package
dataset-fashion-mnist installs them in /usr/share/datasets/fashion-mnist). The same files give the same arrays.
"""

import gzip
import math
import sys
from pathlib import Path

import numpy as np

CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
TRAIN_COUNTS = tuple(int(1000 * (1 / 100) ** (k / 9)) for k in range(10))
TEST_COUNTS = (100,) * 10
SEED = 0


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes; ValueError if it is something else."""
    data = gzip.decompress(path.read_bytes())
    num_axes = data[3]
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    shape = np.frombuffer(data, ">u4", num_axes, offset=4)
    return np.frombuffer(data, np.uint8, math.prod(shape.tolist()), offset=4 + 4 * num_axes).reshape(shape)


def subset(folder: Path, split: str, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Choose `counts[k]` images of each class k, in official order: images [N, 28, 28, 1] and labels [N], uint8."""
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    rng = np.random.default_rng(SEED)
    chosen = [rng.permutation(np.flatnonzero(labels == k))[:count] for k, count in enumerate(counts)]
    indices = np.sort(np.concatenate(chosen))
    return images[indices, :, :, None], labels[indices]


def main(folder: Path) -> None:
    train_images, train_labels = subset(folder, "train", TRAIN_COUNTS)
    test_images, test_labels = subset(folder, "t10k", TEST_COUNTS)
    np.savez_compressed(
        Path(__file__).with_name("subset.npz"),
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        class_names=np.array(CLASS_NAMES),
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m ltjax.data.fashion_mnist_lt.make FOLDER")
    main(Path(sys.argv[1]))
