"""The types that every data set is loaded as, and the location of prepared data."""

import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from ltjax.system.paths import local
from ltjax.types import UserError


class Images(NamedTuple):
    """A classification data set in memory: N training and M test images of one size, in a fixed order.

    Position i is the same image on every machine, so a split can be stored as indices. Labels index `class_names`.

    Attributes:
      train_images: [N, H, W, channels], uint8.
      train_labels: [N], int32.
      test_images: [M, H, W, channels], uint8.
      test_labels: [M], int32.
      class_names: C names.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]


class ImageFiles(Protocol):
    """N encoded images on disk, which several threads may read at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> bytes: ...

    def name(self, index: int) -> str:
        """Return a name for image number `index`, for messages."""
        ...

    def identity(self, index: int) -> bytes:
        """Return 16 bytes that tell image number `index` from all others, wherever its file lies."""
        ...


class Stored(NamedTuple):
    """A classification data set on disk: images of any size, as files or records, decoded when needed.

    As in `Images`, position i is the same image on every machine, and labels index `class_names`.

    Attributes:
      train_files: N images.
      train_labels: [N], int32.
      test_files: M images.
      test_labels: [M], int32.
      class_names: C names.
    """

    train_files: ImageFiles
    train_labels: np.ndarray
    test_files: ImageFiles
    test_labels: np.ndarray
    class_names: tuple[str, ...]


class Subset:
    """The images `indices` of `files`, in that order."""

    def __init__(self, files: ImageFiles, indices: np.ndarray):
        self._files, self._indices = files, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> bytes:
        return self._files[int(self._indices[index])]

    def name(self, index: int) -> str:
        return self._files.name(int(self._indices[index]))

    def identity(self, index: int) -> bytes:
        return self._files.identity(int(self._indices[index]))


def first_classes(data: Images | Stored, count: int) -> Images | Stored:
    """Keep the images of classes 0 to `count` - 1, or all if there are fewer classes. UserError if it is below 2."""
    if count < 2:
        raise UserError(f"config.data.classes = {count}: 2 or more, or 0 for all")
    train, test = (np.flatnonzero(labels < count) for labels in (data.train_labels, data.test_labels))
    train_labels, test_labels, class_names = data.train_labels[train], data.test_labels[test], data.class_names[:count]
    if isinstance(data, Images):
        return Images(data.train_images[train], train_labels, data.test_images[test], test_labels, class_names)
    train_files, test_files = Subset(data.train_files, train), Subset(data.test_files, test)
    return Stored(train_files, train_labels, test_files, test_labels, class_names)


def resolve_data_dir(data_dir: str | os.PathLike | None = None) -> Path:
    """Return the folder of prepared data sets: the argument, else `TFDS_DATA_DIR`, else `~/tensorflow_datasets`."""
    return local(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def newest_version(data_dir: Path, name: str) -> Path | None:
    """Return the folder `<data_dir>/<name>/<major.minor.patch>` of the highest version; None if there is none.

    Folders of interrupted preparations have other names. UserError if the folder cannot be listed.
    """
    directory = data_dir / name
    try:
        versions = [path for path in directory.iterdir() if re.fullmatch(r"\d+\.\d+\.\d+", path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"cannot list {directory}: {error.strerror}") from error
    return max(versions, key=lambda path: tuple(map(int, path.name.split("."))), default=None)


def prepare_command(name: str, data_dir: str | os.PathLike) -> str:
    """Return the shell command that prepares data set `name` in `data_dir`, for error messages."""
    return f"python -m ltjax.data.prepare {name} --data_dir={shlex.quote(str(data_dir))}"
