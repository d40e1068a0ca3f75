"""Write a data set that fits in memory, with a builder of TensorFlow Datasets but without TensorFlow."""

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ltjax.data import progress, records
from ltjax.data.source import newest_version
from ltjax.system.wording import one_line
from ltjax.types import UserError


def require_writable(folder: Path) -> None:
    """Make a folder if it is missing; UserError if files cannot be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another --data_dir") from error


def prepare(name: str, data_dir: Path, make: Callable[[], None]) -> str:
    """Let `make` write a data set below `data_dir` unless it is there; read it back and return a line for the user.

    UserError if an existing data set is damaged or `data_dir` cannot be written.
    """
    done = f"{name} is already prepared"
    if newest_version(data_dir, name) is None:
        require_writable(data_dir)
        make()
        done = f"prepared {name}"
    images = records.load(name, data_dir)
    counts = f"{len(images.train_labels)} training and {len(images.test_labels)} test images"
    return f"{done}: {counts} in {newest_version(data_dir, name)}"


def write(
    builder: Any,
    data_dir: Path,
    class_names: Mapping[str, list[str]],
    splits: Mapping[str, Iterable[Mapping[str, object]]],
    total: int,
) -> None:
    """Write `<data_dir>/<name>/<version>`, completely or not at all.

    The description, features, version and shuffling are those of `builder`, a `tfds.core.GeneratorBasedBuilder` class.
    TFDS writes to a temporary folder and renames it at the end. UserError if the files cannot be written.

    Args:
      builder: the class whose source of examples is replaced.
      data_dir: the folder of all prepared data sets.
      class_names: {label feature: names of its classes}.
      splits: {split: examples}, each example {feature: value} with encoded images.
      total: number of examples in all splits, for the progress bar.
    """
    import tensorflow_datasets as tfds

    with progress.bar() as bar, tempfile.TemporaryDirectory() as unused:
        task = bar.add_task(f"writing {builder.name}", total=total)

        class FromArchive(builder, skip_registration=True):
            __module__ = builder.__module__  # where TFDS looks for files of the data set
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
