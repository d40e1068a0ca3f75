"""Prepared data sets, `<data_dir>/<name>/<version>`: array records as TFDS lays them out, without TensorFlow."""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ltjax.data import prepared, progress
from ltjax.data.source import Images, newest_version
from ltjax.types import UserError, one_line


def load(name: str, data_dir: Path) -> Images:
    """Reads the newest prepared version of a data set with the splits `train` and `test` and one size of images.

    Images stand in the order of their ids, however the files were shuffled or sharded: record `train_00042` becomes
    training image 42. Grey images are read as colour, and orientations noted in a JPEG are not heeded.

    Raises: UserError for a data set that is not there, damaged files, or files that only TensorFlow reads.
    """
    return prepared.read(name, data_dir, _read)


def _read(builder: Any, directory: Path, class_names: tuple[str, ...]) -> Images:
    import tensorflow_datasets as tfds

    arrays: list[np.ndarray] = []
    with progress.bar(transient=True) as bar:
        for split in ("train", "test"):
            # Undecoded records: TFDS' own parsing costs as much time as the decoding of the pixels.
            records = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
            began = time.monotonic()
            task = bar.add_task(f"reading {builder.name} {split}", total=len(records), visible=False)

            def advance(count, task=task, began=began):
                bar.update(task, advance=count, visible=time.monotonic() - began > 2)

            arrays += _decode(records, builder.info.features["image"].shape, len(class_names), advance)
    return Images(arrays[0], arrays[1], arrays[2], arrays[3], class_names)


def _decode(
    records, image_shape: tuple[int, int, int], num_classes: int, advance: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, *image_shape] uint8 and labels [N] int32 of N serialised `tf.train.Example`s, ordered by their id."""
    import cv2
    from tensorflow_datasets.proto import tf_example_pb2

    example: Any = tf_example_pb2.Example  # pyrefly: ignore

    count = len(records)
    images = np.empty((count, *image_shape), np.uint8)
    labels = np.full(count, -1, np.int32)

    def decode(chunk: list[bytes]) -> int:
        for record in chunk:
            fields = example.FromString(record).features.feature
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
    # A repeated id leaves another position at -1.
    if count == 0 or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"the ids or labels of its {count} records are not those of a complete data set")
    return images, labels


def prepare(name: str, data_dir: Path, make: Callable[[], None]) -> str:
    """Has `make` write a data set below `data_dir` unless it is there; returns a sentence that says which.

    Raises: UserError where what is there already is damaged, or `data_dir` cannot be written; and what `make` raises.
    """
    done = f"{name} is already prepared"
    if newest_version(data_dir, name) is None:
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=data_dir):
                pass
        except OSError as error:
            raise UserError(f"cannot write to {data_dir} ({error.strerror}): choose another --data_dir") from error
        make()
        done = f"prepared {name}"
    images = load(name, data_dir)  # all of it: the files are read back
    counts = f"{len(images.train_labels)} training and {len(images.test_labels)} test images"
    return f"{done}: {counts} in {newest_version(data_dir, name)}"


def write(
    builder: Any,
    data_dir: Path,
    class_names: Mapping[str, list[str]],
    splits: Mapping[str, Iterable[Mapping[str, object]]],
    total: int,
) -> None:
    """Writes `<data_dir>/<name>/<version>`, whole or not at all, by way of a TFDS builder.

    The builder's description, features, version and shuffling are kept; only its source is replaced. TFDS writes to a
    folder of another name and renames it at the end.

    Args:
      builder: a `tfds.core.GeneratorBasedBuilder` class.
      data_dir: the folder of all prepared data sets.
      class_names: {label feature: its names}.
      splits: {split: its examples, {feature: value} with images encoded already}.
      total: how many examples there are in all splits, for the progress bar.

    Raises:
      UserError: the files cannot be written.
    """
    import tensorflow_datasets as tfds

    with progress.bar() as bar, tempfile.TemporaryDirectory() as unused:
        task = bar.add_task(f"writing {builder.name}", total=total)

        class FromArchive(builder, skip_registration=True):
            __module__ = builder.__module__  # where TFDS looks for what belongs to the data set
            name = builder.name

            def _split_generators(self, dl_manager):
                for feature, names in class_names.items():
                    self.info.features[feature].names = names
                return {split: self._generate_examples(examples) for split, examples in splits.items()}

            def _generate_examples(self, examples):
                for item in enumerate(examples):
                    yield item
                    bar.advance(task)

        tfds.disable_progress_bar()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                FromArchive(data_dir=data_dir, file_format="array_record").download_and_prepare(
                    download_dir=unused, download_config=tfds.download.DownloadConfig(try_download_gcs=False)
                )
        except (OSError, RuntimeError) as error:  # array_record reports a full disk as a RuntimeError
            raise UserError(f"cannot write {builder.name} to {data_dir}: {one_line(error)}") from error
