"""Prepare Tiny ImageNet from its official archive."""

import collections
import contextlib
import re
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from posixpath import basename
from typing import Any, NamedTuple

import cv2
import numpy as np

from ltjax.data import progress
from ltjax.data.decode import MAX_IMAGE_BYTES
from ltjax.data.prepare import in_memory
from ltjax.data.prepare.download import download
from ltjax.data.prepare.sources import leads_outside
from ltjax.system.wording import one_line, some
from ltjax.types import UserError

UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError)


class Archive(NamedTuple):
    """The official archive.

    Its `folder` holds `wnids.txt` (the classes' WordNet ids), `words.txt` (their names),
    `train/<wnid>/images/<wnid>_<n>.JPEG`, `val/images/val_<n>.JPEG` and `val/val_annotations.txt`.
    """

    url: str
    folder: str
    num_classes: int
    train_per_class: int
    test_per_class: int
    size: int  # of an image: height and width in pixels


OFFICIAL = Archive(
    url="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    folder="tiny-imagenet-200",
    num_classes=200,
    train_per_class=500,
    test_per_class=50,
    size=64,
)


Split = list[tuple[bytes, int]]  # encoded images with their labels


class ArchiveFiles(NamedTuple):
    """The files of an archive."""

    names: set[str]  # relative to the archive's folder
    read: Callable[[str], bytes]


def prepare(data_dir: Path, source: Path | None = None, archive: Archive = OFFICIAL) -> str:
    """Write Tiny ImageNet below `data_dir` unless it is there, completely or not at all; return a line for the user.

    The splits are `train` and `test`. `test` is the official validation split, because the official test images have
    no labels. Image files are kept byte for byte. Nothing is unpacked to disk.

    `source` is the archive, or the folder that it unpacks to; None downloads it to `<data_dir>/downloads`. No checksum
    of the archive is known, so its contents are checked: the number of classes, of training and of test images of each
    class (those of `archive`), and that every image is a complete JPEG of the right size. UserError if they differ, if
    an existing data set is damaged, the download fails, or `data_dir` cannot be written.
    """

    def make() -> None:
        path = download(archive.url, data_dir / "downloads", _difference) if source is None else source
        if not path.exists():
            raise UserError(
                f"no archive at {path}: expected {basename(archive.url)}, which is published at {archive.url}, or the "
                "folder that it unpacks to"
            )
        try:
            with _open(path, archive) as files:
                class_names, splits = _parse(path.name, files, archive)
        except UserError:
            raise
        except ValueError as problem:
            raise UserError(
                f"{path} does not hold what {basename(archive.url)} should: {problem}; replace it by the archive that "
                f"is published at {archive.url}"
            ) from problem
        _write(archive, data_dir, class_names, splits)

    return in_memory.prepare("tiny_imagenet", data_dir, make)


def _difference(path: Path) -> str:
    """Say how a file differs from a zip archive, whose table of contents is at its end; "" if it does not."""
    return "" if zipfile.is_zipfile(path) else "it is not a whole zip archive"


@contextlib.contextmanager
def _open(path: Path, archive: Archive) -> Generator[ArchiveFiles]:
    """Open a zip archive, or the folder that it unpacks to."""
    if path.is_dir():
        root = path / archive.folder if (path / archive.folder).is_dir() else path
        names = {file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()}
        yield ArchiveFiles(names, lambda name: (root / name).read_bytes())
        return
    with contextlib.ExitStack() as stack:
        try:
            unpacked = stack.enter_context(zipfile.ZipFile(path))
        except UNREADABLE as error:
            raise UserError(
                f"cannot read {path} as a zip archive ({one_line(error)}): it is damaged, cut short or something else; "
                f"expected the file published at {archive.url}"
            ) from error
        for name in unpacked.namelist():
            if leads_outside(name):
                raise ValueError(f"the name {name!r} leads out of the archive")
        prefix = f"{archive.folder}/"
        names = {name.removeprefix(prefix) for name in unpacked.namelist() if name.startswith(prefix)}

        def read(name: str) -> bytes:
            member = unpacked.getinfo(prefix + name)
            if member.file_size > MAX_IMAGE_BYTES:
                raise zipfile.BadZipFile(f"it declares more than {MAX_IMAGE_BYTES} bytes")
            return unpacked.read(member)

        yield ArchiveFiles(names, read)


def _parse(title: str, files: ArchiveFiles, archive: Archive) -> tuple[list[str], dict[str, Split]]:
    """Read class names and splits; ValueError if a file or image is missing, damaged or superfluous."""
    wnids = _lines(files, archive, "wnids.txt")
    if not len(set(wnids)) == len(wnids) == archive.num_classes:
        raise ValueError(f"wnids.txt does not hold {archive.num_classes} different classes")
    if invalid := [wnid for wnid in wnids if not re.fullmatch(r"n\d{8}", wnid)]:
        raise ValueError(f"wnids.txt holds {invalid[0]!r}, which is no WordNet id")
    class_names = _class_names(wnids, _lines(files, archive, "words.txt"))
    if "" in class_names:
        raise ValueError(f"words.txt does not name {wnids[class_names.index('')]}")

    test_labels = _test_labels(files, archive, wnids)
    train_indices = range(archive.train_per_class)
    test_files = [f"val_{i}.JPEG" for i in range(archive.num_classes * archive.test_per_class)]
    labels = {  # by split and image file
        "train": {f"train/{w}/images/{w}_{i}.JPEG": label for label, w in enumerate(wnids) for i in train_indices},
        "test": {f"val/images/{file}": test_labels.get(file, -1) for file in test_files},
    }
    expected = labels["train"].keys() | labels["test"].keys()
    present = {name for name in files.names if name.startswith(("train/", "val/")) and name.endswith(".JPEG")}
    if extra := sorted(present - expected):
        raise ValueError(f"{some(extra)} should not be there")
    counts = collections.Counter(labels["test"].values())
    if any(counts[label] != archive.test_per_class for label in range(archive.num_classes)):
        raise ValueError(f"val_annotations.txt does not give every class {archive.test_per_class} images")
    images = _read_images(title, files, expected, archive.size)
    splits = {split: [(images[name], label) for name, label in of.items()] for split, of in labels.items()}
    return class_names, splits


def _lines(files: ArchiveFiles, archive: Archive, name: str) -> list[str]:
    if name not in files.names:
        raise ValueError(f"it lacks {archive.folder}/{name}")
    try:
        return [line.strip() for line in files.read(name).decode().splitlines() if line.strip()]
    except (*UNREADABLE, UnicodeDecodeError) as error:
        raise ValueError(f"{name} cannot be read ({one_line(error)})") from error


def _test_labels(files: ArchiveFiles, archive: Archive, wnids: list[str]) -> dict[str, int]:
    """Return {file name: label} of the test images."""
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    labels: dict[str, int] = {}
    for line in _lines(files, archive, "val/val_annotations.txt"):
        file, wnid, *_ = [*line.split("\t"), ""]
        if wnid not in label_of:
            raise ValueError(f"val_annotations.txt gives {file!r} the class {wnid!r}, not in wnids.txt")
        if labels.setdefault(file, label_of[wnid]) != label_of[wnid]:
            raise ValueError(f"val_annotations.txt gives {file!r} two classes")
    return labels


def _class_names(wnids: list[str], lines: list[str]) -> list[str]:
    """Return the first word of each class, plus the WordNet id if two classes share it; "" if a class has none."""
    words = dict(line.split("\t", 1) for line in lines if "\t" in line)
    names = [words.get(wnid, "").split(",")[0].strip() for wnid in wnids]
    repeated = {name for name in names if name and names.count(name) > 1}
    return [f"{name} ({wnid})" if name in repeated else name for name, wnid in zip(names, wnids, strict=True)]


def _read_images(title: str, files: ArchiveFiles, names: set[str], size: int) -> dict[str, bytes]:
    """Read the image files; decode each once as a check."""
    images, problems = {}, []
    with progress.bar() as bar:
        for name in bar.track(sorted(names), description=f"checking {title}"):
            try:
                images[name] = files.read(name) if name in files.names else None
                problem = _problem(images[name], size)
            except UNREADABLE as error:
                problem = one_line(error)
            if problem:
                problems.append(f"{name} ({problem})")
    if problems:
        raise ValueError(f"{len(problems)} of {len(names)} images are missing or damaged: {some(problems)}")
    return images


def _problem(content: bytes | None, size: int) -> str:
    """Return the error of an image file, "" for none.

    A truncated JPEG may still decode, with a grey rest. Then no end marker follows the last start of a scan.
    """
    if content is None:
        return "missing"
    if not content:
        return "empty"
    if not content.startswith(b"\xff\xd8") or content.rfind(b"\xff\xd9") <= content.rfind(b"\xff\xda"):
        return "not a whole JPEG"
    pixels: Any = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        return "not a whole JPEG"
    height, width, _ = pixels.shape
    return "" if height == width == size else f"{width} x {height} pixels, not {size} x {size}"


def _write(archive: Archive, data_dir: Path, class_names: list[str], splits: dict[str, Split]) -> None:
    """Write `<data_dir>/tiny_imagenet/1.0.0`; the ids keep the order of the images."""
    import tensorflow_datasets as tfds

    class TinyImagenet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "tiny_imagenet"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "id": tfds.features.Text(),
                "image": tfds.features.Image(shape=(archive.size, archive.size, 3), encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description=(
                    f"Tiny ImageNet: {archive.num_classes} classes of ImageNet at {archive.size} x {archive.size} "
                    "pixels. The test split is the official validation split."
                ),
                homepage=archive.url,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

    def examples(split: str) -> Iterator[dict[str, object]]:
        for index, (image, label) in enumerate(splits[split]):
            yield {"id": f"{split}_{index:05d}", "image": image, "label": label}

    total = sum(map(len, splits.values()))
    in_memory.write(TinyImagenet, data_dir, {"label": class_names}, {split: examples(split) for split in splits}, total)
