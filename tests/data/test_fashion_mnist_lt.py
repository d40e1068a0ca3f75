import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest

from ltjax.data import fashion_mnist_lt
from ltjax.data.fashion_mnist_lt import make

FOLDER = Path(fashion_mnist_lt.__file__).parent


@pytest.fixture(scope="module")
def images():
    return fashion_mnist_lt.load()


def test_shapes_and_types(images):
    assert (images.train_images.shape, images.train_images.dtype) == ((2478, 28, 28, 1), np.uint8)
    assert (images.train_labels.shape, images.train_labels.dtype) == ((2478,), np.int32)
    assert (images.test_images.shape, images.test_images.dtype) == ((1000, 28, 28, 1), np.uint8)
    assert (images.test_labels.shape, images.test_labels.dtype) == ((1000,), np.int32)


def test_training_is_long_tailed_and_test_balanced(images):
    counts = np.bincount(images.train_labels)
    np.testing.assert_array_equal(counts, [1000, 599, 359, 215, 129, 77, 46, 27, 16, 10])
    np.testing.assert_array_equal(counts, make.TRAIN_COUNTS)
    np.testing.assert_array_equal(np.bincount(images.test_labels), [100] * 10)


def test_the_order_of_classes_is_random(images):
    assert np.mean(images.train_labels[1:] == images.train_labels[:-1]) < 0.4  # 0.25 if independent


def test_class_names_are_the_official_ones(images):
    assert images.class_names == (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    )  # fmt: skip


def test_the_arrays_are_frozen(images):
    digest = hashlib.sha256(b"".join(array.tobytes() for array in images[:4])).hexdigest()
    assert digest == "92b7ef9c9fd95b8a600e98f7addde680212dc1bb572d7d43091b3092922ab155"


def test_file_is_small_and_comes_with_its_licence():
    assert (FOLDER / "subset.npz").stat().st_size < 2_000_000
    notice = (FOLDER / "NOTICE").read_text()
    assert "MIT License" in notice and "Zalando SE" in notice


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_make_keeps_the_counts_in_official_order(tmp_path):
    labels = np.tile(np.arange(10, dtype=np.uint8), 20)
    pixels = np.repeat(np.arange(200, dtype=np.uint8), 28 * 28).reshape(200, 28, 28)  # image i is of grey level i
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", pixels)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", labels)
    kept_images, kept_labels = make.subset(tmp_path, "t10k", tuple(range(10, 0, -1)))
    np.testing.assert_array_equal(np.bincount(kept_labels), range(10, 0, -1))
    positions = kept_images[:, 0, 0, 0]
    assert np.all(np.diff(positions.astype(int)) > 0)
    np.testing.assert_array_equal(kept_labels, labels[positions])


def test_make_refuses_other_files(tmp_path):
    path = tmp_path / "other.gz"
    path.write_bytes(gzip.compress(b"something else"))
    with pytest.raises(ValueError, match="is not an IDX file of unsigned bytes"):
        make.read_idx(path)
