"""Read all images of a prepared data set, `<data_dir>/<name>/<version>`, into memory, without TensorFlow."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ltjax.data import prepared, progress
from ltjax.data.source import Images


def load(name: str, data_dir: Path) -> Images:
    """Read the newest prepared version of a data set with the splits `train` and `test` and one image size.

    Images are in the order of their ids, however the files are shuffled or sharded: record `train_00042` becomes
    training image 42. Grey images become RGB. The EXIF orientation of a JPEG is ignored. UserError if the data set is
    missing or damaged, or if only TensorFlow can read it.
    """
    return prepared.read(name, data_dir, _read)


def _read(builder: Any, directory: Path, class_names: tuple[str, ...]) -> Images:
    import tensorflow_datasets as tfds

    arrays: list[np.ndarray] = []
    with progress.bar(transient=True) as bar:
        for split in ("train", "test"):
            # Raw records, because TFDS' own parsing takes as long as decoding the pixels.
            records = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
            began = time.monotonic()
            task = bar.add_task(f"reading {builder.name} {split}", total=len(records), visible=False)

            def advance(count, task=task, began=began):
                bar.update(task, advance=count, visible=time.monotonic() - began > 2)

            arrays += _decode(records, builder.info.features["image"].shape, len(class_names), advance)
    return Images(arrays[0], arrays[1], arrays[2], arrays[3], class_names)


def _decode(
    records: Any, image_shape: tuple[int, int, int], num_classes: int, advance: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Decode N serialised `tf.train.Example`s, sorted by id, to images [N, *image_shape] uint8 and labels [N] int32.

    `advance` is called with the number of records decoded since the last call.
    """
    import cv2

    count = len(records)
    images = np.empty((count, *image_shape), np.uint8)
    labels = np.full(count, -1, np.int32)

    def decode(chunk: list[bytes]) -> int:
        for record in chunk:
            fields = prepared.fields(record)
            position = int(fields["id"].bytes_list.value[0].rpartition(b"_")[2])
            encoded = np.frombuffer(fields["image"].bytes_list.value[0], np.uint8)
            pixels: Any = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
            if pixels is None or pixels.shape != image_shape:
                raise ValueError(f"record {position} is not an image of {list(image_shape)}")
            images[position] = pixels
            labels[position] = fields["label"].int64_list.value[0]
        return len(chunk)

    chunks = (records.__getitems__(range(start, min(start + 1000, count))) for start in range(0, count, 1000))
    with ThreadPoolExecutor() as threads:
        for decoded in threads.map(decode, chunks):
            advance(decoded)
    # If an id occurs twice, some position is still -1.
    if count == 0 or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"the ids or labels of its {count} records are not those of a complete data set")
    return images, labels
