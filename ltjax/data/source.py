"""What every image source hands on, and where prepared data lies on disk."""

import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from ltjax.system.paths import local
from ltjax.types import UserError


class Images(NamedTuple):
    """A classification data set held in memory: N training and M test images of one size, in a fixed order.

    Position i means the same image on every machine, so that a split can be written down as indices. Labels run from
    0 to `len(class_names) - 1` and index `class_names`.
    """

    train_images: np.ndarray  # [N, H, W, channels], uint8
    train_labels: np.ndarray  # [N], int32
    test_images: np.ndarray  # [M, H, W, channels], uint8
    test_labels: np.ndarray  # [M], int32
    class_names: tuple[str, ...]  # C names


class ImageFiles(Protocol):
    """N encoded images on disk; reading them from several threads at once is fine."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> bytes: ...

    def name(self, index: int) -> str:
        """What to call image number `index` in a message."""
        ...


class Stored(NamedTuple):
    """A classification data set that stays on disk: images of any size, as files or records, decoded when needed.

    As in `Images`, position i means the same image on every machine, and labels index `class_names`.
    """

    train_files: ImageFiles  # N
    train_labels: np.ndarray  # [N], int32
    test_files: ImageFiles  # M
    test_labels: np.ndarray  # [M], int32
    class_names: tuple[str, ...]  # C names


class Subset:
    """Some of the images of `files`, in the order of `indices`."""

    def __init__(self, files: ImageFiles, indices: np.ndarray):
        self._files, self._indices = files, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> bytes:
        return self._files[int(self._indices[index])]

    def name(self, index: int) -> str:
        return self._files.name(int(self._indices[index]))


def first_classes(data: Images | Stored, count: int) -> Images | Stored:
    """The images of classes 0 to `count` - 1, or all where there are no more. Raises: UserError for fewer than two."""
    if count < 2:
        raise UserError(f"config.data.classes = {count}: 2 or more, or 0 for all")
    train, test = (np.flatnonzero(labels < count) for labels in (data.train_labels, data.test_labels))
    kept = dict(
        train_labels=data.train_labels[train], test_labels=data.test_labels[test], class_names=data.class_names[:count]
    )
    if isinstance(data, Stored):
        return data._replace(
            train_files=Subset(data.train_files, train), test_files=Subset(data.test_files, test), **kept
        )
    return data._replace(train_images=data.train_images[train], test_images=data.test_images[test], **kept)


def resolve_data_dir(data_dir: str | os.PathLike | None = None) -> Path:
    """The folder that holds prepared data sets: the argument, else `TFDS_DATA_DIR`, else `~/tensorflow_datasets`."""
    return local(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def newest_version(data_dir: Path, name: str) -> Path | None:
    """The folder `<data_dir>/<name>/<major.minor.patch>` of the highest version; None if there is none.

    An interrupted preparation leaves at most a folder under another name, which is never returned. Raises UserError
    if the folder cannot be listed.
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
    """The shell command that puts data set `name` into `data_dir`, for error messages."""
    return f"python -m ltjax.data.prepare {name} --data_dir={shlex.quote(str(data_dir))}"
