"""Writes a data set to disk once, in the form that TensorFlow Datasets would, without TensorFlow.

    python -m ltjax.data.prepare cifar100                                # downloads the official archive
    python -m ltjax.data.prepare cifar100 --source=cifar-100-binary.tar.gz --data_dir=/data

The result, `<data_dir>/<name>/<version>`, is read by `ltjax.data` and by `tfds.builder_from_directory` alike.
"""

import argparse
import contextlib
import functools
import hashlib
import http.client
import io
import lzma
import sys
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ltjax.data import cifar
from ltjax.data.source import newest_version, resolve_data_dir
from ltjax.types import UserError, one_line


class LabelFile(NamedTuple):
    """A label of each record: its name as a feature, the archive's file of class names, how many those are."""

    feature: str
    file: str
    num_classes: int


class CifarArchive(NamedTuple):
    """The official binary archive of a CIFAR, and what lies in it under `folder`.

    A record is one byte for each of `labels`, in that order, then 3072 bytes of pixels: the red, the green and the
    blue plane, row by row. `size` (bytes) and `sha256` are those that TensorFlow Datasets 4.9.10 registers for `url`.
    """

    name: str
    url: str
    size: int
    sha256: str
    folder: str
    splits: dict[str, tuple[str, ...]]
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
    labels=(
        LabelFile("coarse_label", "coarse_label_names.txt", 20),
        LabelFile("label", "fine_label_names.txt", 100),
    ),
)


class Split(NamedTuple):
    """N images and the labels of each, one column per `CifarArchive.labels`."""

    images: np.ndarray  # [N, 32, 32, 3], uint8, RGB
    labels: np.ndarray  # [N, L], uint8


def prepare_cifar(archive: CifarArchive, data_dir: Path, source: Path | None = None) -> str:
    """Writes a CIFAR below `data_dir` unless it is there; returns a sentence that says which.

    Either the whole data set appears under its final name or nothing does.

    Args:
      archive: `CIFAR10` or `CIFAR100`.
      data_dir: the folder of all prepared data sets; made if missing.
      source: an archive on disk. Any archive with the official layout will do, but one that is not the official file
        byte for byte is remarked upon on stderr. Without it the official one is downloaded to `<data_dir>/downloads`.

    Raises:
      UserError: what is there already is damaged, the archive is missing, damaged or another one, the download
        failed, or `data_dir` cannot be written.
    """
    directory = newest_version(data_dir, archive.name)
    if directory is not None:
        return f"{archive.name} is already prepared: {_count(archive.name, data_dir)} in {directory}"
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=data_dir):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {data_dir} ({error.strerror}): choose another --data_dir") from error

    if source is None:
        source = _download(archive, data_dir / "downloads")
    elif not source.is_file():
        raise UserError(f"no archive at {source}: expected {_basename(archive)}, which is published at {archive.url}")
    elif difference := _difference(archive, source):
        print(f"warning: {source} is not the official {_basename(archive)} ({difference})", file=sys.stderr)

    class_names, splits = _parse(archive, source)
    try:
        _write(archive, data_dir, class_names, splits)
    except (OSError, RuntimeError) as error:  # array_record reports a full disk as a RuntimeError
        raise UserError(f"cannot write {archive.name} to {data_dir}: {one_line(error)}") from error
    directory = newest_version(data_dir, archive.name)
    return f"prepared {archive.name}: {_count(archive.name, data_dir)} in {directory}"


def _basename(archive: CifarArchive) -> str:
    return archive.url.rpartition("/")[2]


def _count(name: str, data_dir: Path) -> str:
    """How many images a prepared CIFAR holds, found by reading all of it."""
    images = cifar.load(name, data_dir)
    return f"{len(images.train_labels)} training and {len(images.test_labels)} test images"


def _difference(archive: CifarArchive, path: Path) -> str:
    """In what a file differs from the official archive; empty if in nothing."""
    size = path.stat().st_size
    if size != archive.size:
        return f"its size is {size} bytes, not {archive.size}"
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if sha256 == archive.sha256 else f"its SHA-256 is {sha256}, not {archive.sha256}"


def _progress(*columns: ProgressColumn) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"), BarColumn(), *columns, console=console, disable=not console.is_terminal
    )


def _download(archive: CifarArchive, folder: Path) -> Path:
    """The official archive in `folder`, downloaded unless it is there."""
    path = folder / _basename(archive)
    if path.is_file() and not _difference(archive, path):
        return path
    part = path.with_name(path.name + ".part")
    try:
        folder.mkdir(exist_ok=True)
        with (
            urllib.request.urlopen(archive.url, timeout=60) as response,
            open(part, "wb") as file,
            _progress(DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as progress,
        ):
            task = progress.add_task(path.name, total=archive.size)
            while chunk := response.read(1 << 20):
                file.write(chunk)
                progress.advance(task, len(chunk))
        if difference := _difference(archive, part):
            raise UserError(
                f"what {archive.url} sent is not the official archive ({difference}): try again, or fetch the archive "
                "by other means and pass it as --source=FILE"
            )
        part.replace(path)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"cannot download {archive.url} to {folder} ({one_line(error)}): try again, or fetch the archive by other "
            "means and pass it as --source=FILE"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return path


def _parse(archive: CifarArchive, path: Path) -> tuple[dict[str, list[str]], dict[str, Split]]:
    """Class names by feature and the splits by name, read from an archive; UserError where its layout is another."""

    def wrong(problem: str) -> UserError:
        return UserError(
            f"{path} does not have the layout of {_basename(archive)}: {problem}; expected the file published at "
            f"{archive.url}"
        )

    split_files = [file for files in archive.splits.values() for file in files]
    wanted = {f"{archive.folder}/{file}" for file in [*split_files, *(label.file for label in archive.labels)]}
    members = _read_members(path, wanted, archive)
    if missing := sorted(wanted - members.keys()):
        raise wrong(f"it lacks {', '.join(missing)}")

    class_names = {}
    for label in archive.labels:
        try:
            lines = members[f"{archive.folder}/{label.file}"].decode().splitlines()
        except UnicodeDecodeError:
            raise wrong(f"{label.file} is not text") from None
        names = [line.strip() for line in lines if line.strip()]
        if not len(set(names)) == len(names) == label.num_classes:
            raise wrong(f"{label.file} does not hold {label.num_classes} different class names")
        class_names[label.feature] = names

    splits = {}
    num_labels = len(archive.labels)
    record_size = num_labels + 3 * 32 * 32
    for split, files in archive.splits.items():
        for file in files:
            size = len(members[f"{archive.folder}/{file}"])
            if size == 0 or size % record_size:
                raise wrong(f"{file} has {size} bytes, which is not a whole number of records of {record_size} bytes")
        data = b"".join(members.pop(f"{archive.folder}/{file}") for file in files)
        records = np.frombuffer(data, np.uint8).reshape(-1, record_size)
        labels = records[:, :num_labels]
        for label, highest in zip(archive.labels, labels.max(axis=0), strict=True):
            if highest >= label.num_classes:
                raise wrong(f"it has a {label.feature} {highest}, where there are {label.num_classes} classes")
        planes = records[:, num_labels:].reshape(-1, 3, 32, 32)
        splits[split] = Split(planes.transpose(0, 2, 3, 1), labels)
    return class_names, splits


def _read_members(path: Path, wanted: set[str], archive: CifarArchive) -> dict[str, bytes]:
    """The contents of those regular files of a tar archive whose names are wanted. Nothing is written to disk."""
    members = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                content = tar.extractfile(member) if name in wanted and member.isfile() else None
                if content is not None:
                    members[name] = content.read()
            stream: Any = tar.fileobj
            stream.seek(0, io.SEEK_END)  # compressed files keep their checksum at the end
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise UserError(
            f"cannot read {path} as a tar archive ({one_line(error)}): it is damaged, cut short or something else; "
            f"expected the file published at {archive.url}"
        ) from error
    return members


def _write(archive: CifarArchive, data_dir: Path, class_names: dict[str, list[str]], splits: dict[str, Split]) -> None:
    """Writes `<data_dir>/<name>/<version>` by way of TFDS' own builder of that name.

    The builder's description, features, version and shuffling are kept; only its source is replaced, and the PNG
    encoder, for which it would need TensorFlow. TFDS writes to a folder of another name and renames it at the end.
    """
    import tensorflow_datasets as tfds

    packaged: Any = tfds.builder_cls(archive.name)

    def examples(split: str, advance: Callable[[], None]) -> Iterator[tuple[int, dict[str, object]]]:
        for index, (image, labels) in enumerate(zip(*splits[split], strict=True)):
            bgr = image[..., ::-1]
            encoded, png = cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 6])
            if not encoded:
                raise RuntimeError("OpenCV could not encode a PNG")
            example: dict[str, object] = {"id": f"{split}_{index:05d}", "image": png.tobytes()}
            for label, value in zip(archive.labels, labels, strict=True):
                example[label.feature] = int(value)
            yield index, example
            advance()

    with _progress(MofNCompleteColumn(), TimeRemainingColumn()) as progress, tempfile.TemporaryDirectory() as unused:
        task = progress.add_task(f"writing {archive.name}", total=sum(len(split.images) for split in splits.values()))
        advance = functools.partial(progress.advance, task)

        class FromArchive(packaged, skip_registration=True):
            __module__ = packaged.__module__  # where TFDS looks for what belongs to the data set
            name = archive.name

            def _split_generators(self, dl_manager):
                for feature, names in class_names.items():
                    self.info.features[feature].names = names
                return {split: examples(split, advance) for split in splits}

        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):
            FromArchive(data_dir=data_dir, file_format="array_record").download_and_prepare(
                download_dir=unused, download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )


# What to call for each data set: `(data_dir, source) -> the sentence to print`.
DATASETS: dict[str, Callable[[Path, Path | None], str]] = {
    "cifar10": functools.partial(prepare_cifar, CIFAR10),
    "cifar100": functools.partial(prepare_cifar, CIFAR100),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see `{self.prog} --help`)")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 after one line `error: ...` on stderr."""
    parser = _Parser(prog="python -m ltjax.data.prepare", description="Writes a data set to disk, once.")
    parser.add_argument("dataset", metavar="DATASET", help=", ".join(DATASETS))
    parser.add_argument("--source", metavar="ARCHIVE", help="an archive on disk instead of a download")
    parser.add_argument(
        "--data_dir", metavar="DIR", help="where to write (default: $TFDS_DATA_DIR, else ~/tensorflow_datasets)"
    )
    try:
        args = parser.parse_args(argv)
        if args.dataset not in DATASETS:
            raise UserError(f"unknown data set {args.dataset!r}: choose one of {', '.join(DATASETS)}")
        source = Path(args.source).expanduser() if args.source else None
        print(DATASETS[args.dataset](resolve_data_dir(args.data_dir), source))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted, nothing was prepared", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
