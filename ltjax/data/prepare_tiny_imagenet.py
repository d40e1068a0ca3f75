"""What `python -m ltjax.data.prepare tiny_imagenet` does: from the official archive to array records."""

import collections
import contextlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from ltjax.data import progress, records
from ltjax.data.download import basename, download
from ltjax.types import UserError, one_line

UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError)


class Archive(NamedTuple):
    """The official archive and what lies in it, under `folder`: `wnids.txt` (the classes' WordNet ids), `words.txt`
    (their names), `train/<wnid>/images/<wnid>_<n>.JPEG`, `val/images/val_<n>.JPEG` and `val/val_annotations.txt`.
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


class Split(NamedTuple):
    """N images, as the bytes of their files, and their labels."""

    images: list[bytes]
    labels: list[int]


class Files(NamedTuple):
    """The files of an archive: their names below the archive's folder, and how to read one."""

    names: set[str]
    read: Callable[[str], bytes]


def prepare(data_dir: Path, source: Path | None = None, archive: Archive = OFFICIAL) -> str:
    """Writes Tiny ImageNet below `data_dir` unless it is there; returns a sentence that says which.

    The splits are `train` and `test`, which is the official validation split: the official test images have no labels.
    The files of the images are kept byte for byte. Either the whole data set appears under its final name or nothing
    does, and nothing is ever unpacked to disk.

    No checksum of the archive is known to us, so its contents are checked instead: that it names exactly as many
    classes as it should, that each has exactly as many training and test images as it should, and that every image is
    a whole JPEG of the right size.

    Args:
      data_dir: the folder of all prepared data sets; made if missing.
      source: the archive on disk, or the folder that it unpacks to. Without it the archive is downloaded to
        `<data_dir>/downloads`.
      archive: the numbers that are checked.

    Raises:
      UserError: what is there already is damaged, the archive is missing, incomplete, damaged or another one, the
        download failed, or `data_dir` cannot be written.
    """

    def make() -> None:
        path = download(archive.url, data_dir / "downloads", _difference) if source is None else source
        if not path.exists():
            raise UserError(
                f"no archive at {path}: expected {basename(archive.url)}, which is published at {archive.url}, or the "
                "folder that it unpacks to"
            )
        with _open(path, archive) as files:
            class_names, splits = _parse(path, files, archive)
        _write(archive, data_dir, class_names, splits)

    return records.prepare("tiny_imagenet", data_dir, make)


def _difference(path: Path) -> str:
    """In what a file differs from any zip archive; empty if in nothing. The list of contents is at its end."""
    return "" if zipfile.is_zipfile(path) else "it is not a whole zip archive"


def _wrong(path: Path, problem: str, archive: Archive) -> UserError:
    return UserError(
        f"{path} does not hold what {basename(archive.url)} should: {problem}; replace it by the archive that is "
        f"published at {archive.url}"
    )


@contextlib.contextmanager
def _open(path: Path, archive: Archive) -> Iterator[Files]:
    """The files of a zip archive, or of the folder that it unpacks to."""
    if path.is_dir():
        root = path / archive.folder if (path / archive.folder).is_dir() else path
        names = {file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()}
        yield Files(names, lambda name: (root / name).read_bytes())
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
            if re.match(r"[/\\]|[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
                raise _wrong(path, f"the name {name!r} leads out of the archive", archive)
        prefix = f"{archive.folder}/"
        names = {name.removeprefix(prefix) for name in unpacked.namelist() if name.startswith(prefix)}
        yield Files(names, lambda name: unpacked.read(prefix + name))


def _parse(path: Path, files: Files, archive: Archive) -> tuple[list[str], dict[str, Split]]:
    """Class names and the splits by name, checked. Raises: UserError naming what is missing, damaged or too much."""

    def lines(name: str) -> list[str]:
        if name not in files.names:
            raise _wrong(path, f"it lacks {archive.folder}/{name}", archive)
        try:
            return [line.strip() for line in files.read(name).decode().splitlines() if line.strip()]
        except (*UNREADABLE, UnicodeDecodeError) as error:
            raise _wrong(path, f"{name} cannot be read ({one_line(error)})", archive) from error

    wnids = lines("wnids.txt")
    if not len(set(wnids)) == len(wnids) == archive.num_classes:
        raise _wrong(path, f"wnids.txt does not hold {archive.num_classes} different classes", archive)
    if strange := [wnid for wnid in wnids if not re.fullmatch(r"n\d{8}", wnid)]:
        raise _wrong(path, f"wnids.txt holds {strange[0]!r}, which is no WordNet id", archive)
    class_names = _class_names(wnids, lines("words.txt"))
    if "" in class_names:
        raise _wrong(path, f"words.txt does not name {wnids[class_names.index('')]}", archive)

    places = {wnid: place for place, wnid in enumerate(wnids)}
    labels: dict[str, int] = {}
    for line in lines("val/val_annotations.txt"):
        file, wnid, *_ = [*line.split("\t"), ""]
        if wnid not in places:
            raise _wrong(path, f"val_annotations.txt gives {file!r} the class {wnid!r}, not in wnids.txt", archive)
        if labels.setdefault(file, places[wnid]) != places[wnid]:
            raise _wrong(path, f"val_annotations.txt gives {file!r} two classes", archive)

    wanted = {
        "train": {
            f"train/{wnid}/images/{wnid}_{i}.JPEG": places[wnid]
            for wnid in wnids
            for i in range(archive.train_per_class)
        },
        "test": {
            f"val/images/val_{i}.JPEG": labels.get(f"val_{i}.JPEG", -1)
            for i in range(archive.num_classes * archive.test_per_class)
        },
    }
    known = wanted["train"].keys() | wanted["test"].keys()
    found = {name for name in files.names if name.startswith(("train/", "val/")) and name.endswith(".JPEG")}
    if extra := sorted(found - known):
        raise _wrong(path, f"{_some(extra)} should not be there", archive)
    counts = collections.Counter(wanted["test"].values())
    if any(counts[place] != archive.test_per_class for place in range(archive.num_classes)):
        raise _wrong(path, f"val_annotations.txt does not give every class {archive.test_per_class} images", archive)
    images = _read_images(path, files, known, archive)
    splits = {split: Split([images[name] for name in own], list(own.values())) for split, own in wanted.items()}
    return class_names, splits


def _class_names(wnids: list[str], lines: list[str]) -> list[str]:
    """The first of each class's words, with the WordNet id where two classes share it; empty where there is none."""
    words = dict(line.split("\t", 1) for line in lines if "\t" in line)
    names = [words.get(wnid, "").split(",")[0].strip() for wnid in wnids]
    repeated = {name for name in names if name and names.count(name) > 1}
    return [f"{name} ({wnid})" if name in repeated else name for name, wnid in zip(names, wnids, strict=True)]


def _some(items: list[str]) -> str:
    """Up to five of them in words."""
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def _read_images(path: Path, files: Files, names: set[str], archive: Archive) -> dict[str, bytes]:
    """The contents of the image files, each decoded once to see that it can be."""
    images, problems = {}, []
    with progress.bar() as bar:
        for name in bar.track(sorted(names), description=f"checking {path.name}"):
            try:
                images[name] = files.read(name) if name in files.names else None
                problem = _problem(images[name], archive.size)
            except UNREADABLE as error:
                problem = one_line(error)
            if problem:
                problems.append(f"{name} ({problem})")
    if problems:
        raise _wrong(path, f"{len(problems)} of {len(names)} images are missing or damaged: {_some(problems)}", archive)
    return images


def _problem(content: bytes | None, size: int) -> str:
    """What is wrong with the file of an image; empty if nothing.

    A JPEG cut short may still decode, with a grey rest; but then no end marker follows the last start of a scan.
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
    """Writes `<data_dir>/tiny_imagenet/1.0.0` in the order of the splits' images, which their ids keep."""
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
        for index, (image, label) in enumerate(zip(*splits[split], strict=True)):
            yield {"id": f"{split}_{index:05d}", "image": image, "label": label}

    total = sum(len(split.images) for split in splits.values())
    records.write(TinyImagenet, data_dir, {"label": class_names}, {split: examples(split) for split in splits}, total)
