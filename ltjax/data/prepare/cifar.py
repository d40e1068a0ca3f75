"""Prepare CIFAR-10 and CIFAR-100 from their official binary archives."""

import functools
import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from posixpath import basename
from typing import Any, NamedTuple

import cv2
import numpy as np

from ltjax.data.decode import MAX_IMAGE_BYTES
from ltjax.data.prepare import in_memory
from ltjax.data.prepare.download import download
from ltjax.data.prepare.sources import READ_ERRORS
from ltjax.system.files import file_sha256
from ltjax.system.wording import one_line
from ltjax.types import UserError


class LabelFile(NamedTuple):
    """One label of a record."""

    feature: str  # its name in the prepared data set
    file: str  # of class names, in the archive
    num_classes: int


class CifarArchive(NamedTuple):
    """An official binary archive.

    A record is one byte for each of `labels`, in that order, then 3072 bytes of pixels: the red, the green and the
    blue plane, row by row. `size` (bytes) and `sha256` are those that TensorFlow Datasets 4.9.10 registers for `url`.
    """

    name: str
    url: str
    size: int
    sha256: str
    folder: str  # in the archive; it holds all the files below
    splits: dict[str, tuple[str, ...]]  # {split: files of records}
    labels: tuple[LabelFile, ...]


CIFAR10 = CifarArchive(
    name="cifar10",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    size=170052171,
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    folder="cifar-10-batches-bin",
    splits={"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
    labels=(LabelFile("label", "batches.meta.txt", 10),),
)
CIFAR100 = CifarArchive(
    name="cifar100",
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    size=168513733,
    sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    folder="cifar-100-binary",
    splits={"train": ("train.bin",), "test": ("test.bin",)},
    labels=(LabelFile("coarse_label", "coarse_label_names.txt", 20), LabelFile("label", "fine_label_names.txt", 100)),
)


class RawSplit(NamedTuple):
    """N images and their labels, one column per `CifarArchive.labels`."""

    images: np.ndarray  # [N, 32, 32, 3], uint8, RGB
    labels: np.ndarray  # [N, L], uint8


def prepare(archive: CifarArchive, data_dir: Path, source: Path | None = None) -> str:
    """Write a CIFAR below `data_dir` unless it is there, completely or not at all; return a line for the user.

    `source` is an archive with the official layout; stderr gets a warning if it is not the official file byte for byte.
    None downloads the official archive to `<data_dir>/downloads`. UserError if an existing data set is damaged, the
    archive is missing, damaged or not a CIFAR, the download fails, or `data_dir` cannot be written.
    """

    def make() -> None:
        path = source
        if path is None:
            path = download(archive.url, data_dir / "downloads", functools.partial(_difference, archive))
        elif not path.is_file():
            raise UserError(
                f"no archive at {path}: expected {basename(archive.url)}, which is published at {archive.url}"
            )
        elif difference := _difference(archive, path):
            print(f"warning: {path} is not the official {basename(archive.url)} ({difference})", file=sys.stderr)
        write(archive, data_dir, *_parse(archive, path))

    return in_memory.prepare(archive.name, data_dir, make)


def _difference(archive: CifarArchive, path: Path) -> str:
    """Say how a file differs from the official archive; "" if it does not."""
    size = path.stat().st_size
    if size != archive.size:
        return f"its size is {size} bytes, not {archive.size}"
    digest = file_sha256(path)
    return "" if digest == archive.sha256 else f"its SHA-256 is {digest}, not {archive.sha256}"


def _parse(archive: CifarArchive, path: Path) -> tuple[dict[str, list[str]], dict[str, RawSplit]]:
    """Return {label feature: class names} and {split: its images and labels}."""
    record_files = [file for files in archive.splits.values() for file in files]
    files = {*record_files, *(label.file for label in archive.labels)}
    contents = _read_files(path, files, archive)
    try:
        if missing := sorted(f"{archive.folder}/{file}" for file in files - contents.keys()):
            raise ValueError(f"it lacks {', '.join(missing)}")
        class_names = {label.feature: _class_names(label, contents[label.file]) for label in archive.labels}
        splits = {split: _split(archive, files, contents) for split, files in archive.splits.items()}
    except ValueError as problem:
        raise UserError(
            f"{path} does not have the layout of {basename(archive.url)}: {problem}; expected the file published at "
            f"{archive.url}"
        ) from None
    return class_names, splits


def _class_names(label: LabelFile, content: bytes) -> list[str]:
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{label.file} is not text") from None
    names = [line.strip() for line in lines if line.strip()]
    if not len(set(names)) == len(names) == label.num_classes:
        raise ValueError(f"{label.file} does not hold {label.num_classes} different class names")
    return names


def _split(archive: CifarArchive, files: tuple[str, ...], contents: dict[str, bytes]) -> RawSplit:
    num_labels = len(archive.labels)
    record_size = num_labels + 3 * 32 * 32
    for file in files:
        size = len(contents[file])
        if size == 0 or size % record_size:
            raise ValueError(f"{file} has {size} bytes, which is not a whole number of records of {record_size} bytes")
    data = b"".join(contents.pop(file) for file in files)
    records = np.frombuffer(data, np.uint8).reshape(-1, record_size)
    labels = records[:, :num_labels]
    for label, highest in zip(archive.labels, labels.max(axis=0), strict=True):
        if highest >= label.num_classes:
            raise ValueError(f"it has a {label.feature} {highest}, but there are {label.num_classes} classes")
    planes = records[:, num_labels:].reshape(-1, 3, 32, 32)
    return RawSplit(planes.transpose(0, 2, 3, 1), labels)


def _read_files(path: Path, files: set[str], archive: CifarArchive) -> dict[str, bytes]:
    """Read regular files of the archive's folder without unpacking to disk; skip the missing ones."""
    contents = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                folder, _, file = member.name.removeprefix("./").partition("/")
                wanted = folder == archive.folder and file in files and member.isfile()
                if wanted and member.size > MAX_IMAGE_BYTES:
                    raise UserError(
                        f"{path}: {member.name} declares {member.size} bytes, more than {MAX_IMAGE_BYTES}: expected "
                        f"the file published at {archive.url}"
                    )
                if wanted and (stream := tar.extractfile(member)) is not None:
                    contents[file] = stream.read()
            raw: Any = tar.fileobj
            raw.seek(0, io.SEEK_END)  # the checksum of a compressed file is at its end
    except READ_ERRORS as error:
        raise UserError(
            f"cannot read {path} as a tar archive ({one_line(error)}): it is damaged, cut short or something else; "
            f"expected the file published at {archive.url}"
        ) from error
    return contents


def write(
    archive: CifarArchive, data_dir: Path, class_names: dict[str, list[str]], splits: dict[str, RawSplit]
) -> None:
    """Write `<data_dir>/<name>/<version>` with TFDS' own builder; encode the images here, without TensorFlow."""
    import tensorflow_datasets as tfds

    def examples(split: str) -> Iterator[dict[str, object]]:
        for index, (image, labels) in enumerate(zip(*splits[split], strict=True)):
            bgr = image[..., ::-1]
            encoded, png = cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 6])
            if not encoded:
                raise RuntimeError("OpenCV could not encode a PNG")
            example: dict[str, object] = {"id": f"{split}_{index:05d}", "image": png.tobytes()}
            for label, value in zip(archive.labels, labels, strict=True):
                example[label.feature] = int(value)
            yield example

    total = sum(len(split.images) for split in splits.values())
    in_memory.write(tfds.builder_cls(archive.name), data_dir, class_names, {s: examples(s) for s in splits}, total)
