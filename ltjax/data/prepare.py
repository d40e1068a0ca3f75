"""Writes a data set to disk once, in the form that TensorFlow Datasets would, without TensorFlow.

    python -m ltjax.data.prepare cifar100                                # downloads the official archive
    python -m ltjax.data.prepare cifar100 --source=cifar-100-binary.tar.gz --data_dir=/data
    python -m ltjax.data.prepare tiny_imagenet
    python -m ltjax.data.prepare inat18 --source=FOLDER                  # likewise imagenet_lt and places_lt

The result, `<data_dir>/<name>/<version>`, is read by `ltjax.data` and by `tfds.builder_from_directory` alike.
"""

import argparse
import functools
import hashlib
import io
import lzma
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from ltjax.data import prepare_imagenet_lt, prepare_inat18, prepare_places_lt, prepare_tiny_imagenet, records
from ltjax.data.download import basename, download
from ltjax.data.source import resolve_data_dir
from ltjax.system.paths import local
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
        _write(archive, data_dir, *_parse(archive, path))

    return records.prepare(archive.name, data_dir, make)


def _difference(archive: CifarArchive, path: Path) -> str:
    """In what a file differs from the official archive; empty if in nothing."""
    size = path.stat().st_size
    if size != archive.size:
        return f"its size is {size} bytes, not {archive.size}"
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if sha256 == archive.sha256 else f"its SHA-256 is {sha256}, not {archive.sha256}"


def _parse(archive: CifarArchive, path: Path) -> tuple[dict[str, list[str]], dict[str, Split]]:
    """Class names by feature and the splits by name, read from an archive; UserError where its layout is another."""

    def wrong(problem: str) -> UserError:
        return UserError(
            f"{path} does not have the layout of {basename(archive.url)}: {problem}; expected the file published at "
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

    The images are encoded here, since TFDS would need TensorFlow for it.
    """
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
    written = {split: examples(split) for split in splits}
    records.write(tfds.builder_cls(archive.name), data_dir, class_names, written, total)


# What to call for each data set: `(data_dir, source) -> the sentence to print`.
DATASETS: dict[str, Callable[[Path, Path | None], str]] = {
    "cifar10": functools.partial(prepare_cifar, CIFAR10),
    "cifar100": functools.partial(prepare_cifar, CIFAR100),
    "tiny_imagenet": prepare_tiny_imagenet.prepare,
}

# The same for sets that are too large for memory and cannot be downloaded: `(data_dir, source, skip_damaged) -> ...`.
LARGE: dict[str, Callable[[Path, Path | None, bool], str]] = {
    "imagenet_lt": prepare_imagenet_lt.prepare,
    "places_lt": prepare_places_lt.prepare,
    "inat18": prepare_inat18.prepare,
    "i_naturalist2018": prepare_inat18.prepare,
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see `{self.prog} --help`)")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 after one line `error: ...` on stderr."""
    parser = _Parser(prog="python -m ltjax.data.prepare", description="Writes a data set to disk, once.")
    parser.add_argument("dataset", metavar="DATASET", help=", ".join([*DATASETS, *LARGE]))
    parser.add_argument(
        "--source",
        metavar="ARCHIVE",
        help=(
            "an archive on disk instead of a download (of tiny_imagenet also the folder it unpacks to); "
            f"of {', '.join(LARGE)} the folder that holds the official archives, or what they unpack to, and lists"
        ),
    )
    parser.add_argument(
        "--data_dir", metavar="DIR", help="where to write (default: $TFDS_DATA_DIR, else ~/tensorflow_datasets)"
    )
    parser.add_argument(
        "--skip_damaged",
        action="store_true",
        help=f"of {', '.join(LARGE)}: leave out images that are missing or damaged, and list them in skipped.txt",
    )
    try:
        args = parser.parse_args(argv)
        if args.dataset not in DATASETS | LARGE:
            raise UserError(f"unknown data set {args.dataset!r}: choose one of {', '.join([*DATASETS, *LARGE])}")
        data_dir, source = resolve_data_dir(args.data_dir), local(args.source) if args.source else None
        if args.dataset in LARGE:
            print(LARGE[args.dataset](data_dir, source, args.skip_damaged))
        elif args.skip_damaged:
            raise UserError(f"--skip_damaged is for {', '.join(LARGE)}: leave it out for {args.dataset}")
        else:
            print(DATASETS[args.dataset](data_dir, source))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"error: {interrupt or 'interrupted, nothing was prepared'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
