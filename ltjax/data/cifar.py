"""CIFAR-10 and CIFAR-100, read from what TensorFlow Datasets or `python -m ltjax.data.prepare` has prepared.

Or from one file, `<data_dir>/<name>.npz`, which needs neither TFDS nor OpenCV: for machines that lack them.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from ltjax.data.source import Images, newest_version, prepare_command, resolve_data_dir
from ltjax.types import UserError, one_line

NAMES = ("cifar10", "cifar100")


def load(name: str, data_dir: str | os.PathLike | None = None) -> Images:
    """Reads all of `name`, one of `NAMES`: 50,000 training and 10,000 test images of [32, 32, 3] pixels.

    Images stand in the order of the original archive, however the prepared files were shuffled or sharded: record
    `train_00042` becomes training image 42. `<data_dir>/<name>.npz`, whose arrays are the fields of `Images`, goes
    before prepared folders, and may hold any number of images; of several prepared versions the newest is read.

    Args:
      name: "cifar10" (10 classes) or "cifar100" (the 100 fine classes).
      data_dir: the folder that holds `<name>.npz` or `<name>/<version>`; by default `TFDS_DATA_DIR`, else
        `~/tensorflow_datasets`.

    Raises:
      UserError: an unknown name, a data set that is not there, damaged files, or files that only TensorFlow reads.
    """
    if name not in NAMES:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(NAMES)}")
    data_dir = resolve_data_dir(data_dir)
    if (data_dir / f"{name}.npz").is_file():
        return _read_npz(data_dir / f"{name}.npz")
    directory = newest_version(data_dir, name)
    if directory is None:
        raise UserError(f"{name} is not in {data_dir}: prepare it with `{prepare_command(name, data_dir)}`")
    try:
        return _read(directory)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # TFDS, protobuf and array_record each raise their own kinds on a damaged folder
        raise UserError(
            f"{directory} is damaged or incomplete ({one_line(error)}): delete that folder, "
            f"then run `{prepare_command(name, data_dir)}`"
        ) from error


def _read_npz(path: Path) -> Images:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            values: dict[str, Any] = {field: arrays[field] for field in Images._fields}
        values["class_names"] = tuple(values["class_names"].tolist())
        images = Images(**values)
        for pixels, labels in (images[:2], images[2:4]):
            if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 32, 32, 3):
                raise ValueError(f"images are {pixels.dtype}{list(pixels.shape)} for {len(labels)} labels")
            if labels.dtype != np.int32 or not 0 <= labels.min() <= labels.max() < len(images.class_names):
                raise ValueError(f"labels are not int32 below {len(images.class_names)}")
        return images
    except MemoryError:
        raise
    except Exception as error:  # zip files that are cut short raise many kinds
        raise UserError(f"{path} is damaged or incomplete ({one_line(error)}): make it anew, or delete it") from error


def _read(directory: Path) -> Images:
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(directory)
    file_format = builder.info.file_format.value
    if file_format != "array_record":
        raise UserError(
            f"{directory} is in the {file_format} format, which is not readable without TensorFlow: prepare an "
            f"array_record copy elsewhere with `{prepare_command(builder.name, 'OTHER_DIR')}`"
        )
    # Without this file TFDS would silently call the classes "0", "1", ...
    if not (directory / "label.labels.txt").is_file():
        raise FileNotFoundError("label.labels.txt is missing")
    class_names = tuple(builder.info.features["label"].names)

    arrays: list[np.ndarray] = []
    for split in ("train", "test"):
        # Undecoded records: TFDS' own parsing costs as much time as the decoding of the pixels.
        records = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        arrays += _decode(records, builder.info.features["image"].shape, len(class_names))
    return Images(arrays[0], arrays[1], arrays[2], arrays[3], class_names)


def _decode(records, image_shape: tuple[int, int, int], num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, *image_shape] uint8 and labels [N] int32 of N serialised `tf.train.Example`s, ordered by their id."""
    import cv2
    from tensorflow_datasets.proto import tf_example_pb2

    example: Any = tf_example_pb2.Example  # pyrefly: ignore

    count = len(records)
    images = np.empty((count, *image_shape), np.uint8)
    labels = np.full(count, -1, np.int32)
    for start in range(0, count, 1000):
        for record in records.__getitems__(range(start, min(start + 1000, count))):
            fields = example.FromString(record).features.feature
            position = int(fields["id"].bytes_list.value[0].rpartition(b"_")[2])
            png = np.frombuffer(fields["image"].bytes_list.value[0], np.uint8)
            pixels: Any = cv2.imdecode(png, cv2.IMREAD_COLOR_RGB)
            images[position] = pixels
            labels[position] = fields["label"].int64_list.value[0]
    # A repeated id leaves another position at -1.
    if count == 0 or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"the ids or labels of its {count} records are not those of a complete data set")
    return images, labels
