"""Load the user's own images: `ROOT/train/<class>/*.jpg` and optionally `ROOT/validation/<class>/*.jpg`.

Without a folder `validation` (or `val`, `test`), a class-balanced part of the training images is held out. Notes on
stderr say what is left out and what is held out.
"""

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import jax
import numpy as np

from ltjax.data import decode, folders, identity, progress
from ltjax.data.source import Stored, Subset
from ltjax.data.splits import long_tailed_split
from ltjax.system import npz
from ltjax.system.files import replacing
from ltjax.system.paths import cache_folder, local
from ltjax.types import UserError, form_only, one_line, some

# Endings of images. Files with other endings are images if their first bytes are those of one.
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")
SUFFIXES += (".ppm", ".pgm", ".pbm", ".pnm", ".gif", ".avif", ".jp2")
HELD_OUT = ("validation", "val", "test")
SIMILAR_NAMES = (*HELD_OUT, "valid", "testing", "dev", "eval")  # other programs' names for validation, in any case
FEW = 5  # test images of each class, too few for a reliable accuracy


class Files:
    """Image files, by their paths relative to a root."""

    def __init__(self, root: Path, paths: list[str], identities: np.ndarray):
        self._root, self._paths, self._identities = root, paths, identities

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> bytes:
        return decode.read_file(self._root / self._paths[index])

    def name(self, index: int) -> str:
        return _printable(str(self._root / self._paths[index]))

    def identity(self, index: int) -> bytes:
        return self._identities[index].tobytes()


def load(name: str = "image_folder", root: str | os.PathLike | None = None) -> Stored:
    """Find the images below `root`; the classes are the folders of `root/train`, in alphabetical order.

    Images lie in a class's folder or deeper, and may be of any kind that OpenCV decodes, whatever their ending. A note
    counts the files of other kinds. Hidden files, hidden folders and `__MACOSX` are left out, and counted in a note.
    Symbolic links are followed, but each folder counts once. Every image is decoded and hashed once, which is
    remembered until the files change. Without a validation folder, each class gives a fifth of the smallest class, at
    most 20 images; the choice is the same every time.

    Raises:
      UserError: A folder is missing, a class has no images, validation has other classes than training, or images
        cannot be read.
    """
    if not root:
        raise UserError(
            "image_folder needs the folder of the images: --config.data.root=DIR, with DIR/train/<class>/*.jpg"
        )
    root = local(root)
    if not (root / "train").is_dir():
        raise UserError(f"no folder {root / 'train'}: expected {root}/train/<class>/*.jpg, one folder a class")
    class_names = _classes(root / "train")
    if len(class_names) < 2:
        raise UserError(f"{root / 'train'} has {len(class_names)} folder(s): a classifier needs two classes or more")
    test_folder = next((part for part in HELD_OUT if (root / part).is_dir()), None)
    titles = tuple(map(_printable, class_names))
    train_paths, train_labels = _find(root, "train", class_names)
    test_paths, test_labels = _find(root, test_folder, class_names) if test_folder else ([], np.empty(0, np.int32))
    counts = np.bincount(train_labels, minlength=len(class_names))
    if empty := [titles[c] for c in np.flatnonzero(counts == 0)]:
        raise UserError(f"{root / 'train'}: no images that can be decoded in {some(empty)}")
    identities = _identities(root, train_paths + test_paths)
    _note_ignored(root, test_folder)
    train = Files(root, train_paths, identities[: len(train_paths)])
    if not test_folder:
        kept, test = hold_out(str(root), train_labels, titles, f"folder {', '.join(HELD_OUT)}")
        parts = Subset(train, kept), train_labels[kept], Subset(train, test), train_labels[test]
        return Stored(*parts, titles)
    if lacking := [title for label, title in enumerate(titles) if label not in test_labels]:
        note(f"{root / test_folder} has no images of {some(lacking)}: their accuracy will be unknown")
    test = Files(root, test_paths, identities[len(train_paths) :])
    return Stored(train, train_labels, test, test_labels, titles)


def hold_out(what: str, labels: np.ndarray, titles: tuple[str, ...], instead: str) -> tuple[np.ndarray, np.ndarray]:
    """Choose images to test on: a fifth of the smallest class, at most 20, of each class, the same every time.

    Args:
      what: Names the data set in messages.
      labels: [N].
      titles: Names of the classes.
      instead: What would name images to test on, for messages.

    Returns:
      The indices of training and test images, sorted by class.
    """
    counts = np.bincount(labels, minlength=len(titles))
    smallest = int(counts.min())
    if smallest < 2:
        single = some([titles[c] for c in np.flatnonzero(counts < 2)])
        raise UserError(f"{what}: one image in {single}, so none can be held out: make a {instead}")
    each = min(20, max(1, smallest // 5))
    few = "" if each > FEW else ", too few for a reliable accuracy: make one if you have more images"
    note(f"{what} has no {instead}: {each} image(s) of each class are held out of train to test on{few}")
    split = long_tailed_split(labels, len(titles), imbalance=1, profile="natural", holdout=each)
    return split.train, split.holdout


def _classes(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and _is_user_data(path.name)))


def _is_user_data(name: str) -> bool:
    """Whether a name is user data, neither hidden nor the `__MACOSX` that macOS adds to archives."""
    return not name.startswith(".") and name != "__MACOSX"


def is_image(path: str) -> bool:
    """Whether a file is an image, by its ending or else by its first bytes. Decoding may still fail."""
    if path.lower().endswith(SUFFIXES):
        return True
    try:
        if not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            return decode.looks_like_image(file.read(32))
    except OSError:
        return False


class LeftOut:
    """Collects what `images_below` leaves out."""

    def __init__(self):
        self._endings: Counter[str] = Counter()  # of files that are no images
        self._hidden: list[str] = []  # names of files and folders

    def add(self, name: str) -> None:
        """Add a file that is no image, or a hidden file or folder."""
        if _is_user_data(name):
            self._endings[os.path.splitext(name)[1]] += 1
        else:
            self._hidden.append(name)

    def notes(self) -> list[str]:
        """Count them: "12 file(s) are no images that can be decoded and are left out: .txt (10), .db (2)"."""
        notes = []
        if self._endings:
            most_first = sorted(self._endings.items(), key=lambda item: (-item[1], item[0]))
            kinds = [f"{_printable(ending) or 'without an ending'} ({count})" for ending, count in most_first]
            total = self._endings.total()
            notes.append(f"{total} file(s) are no images that can be decoded and are left out: {some(kinds)}")
        if self._hidden:
            names = some(sorted({_printable(name) for name in self._hidden}))
            notes.append(f"{len(self._hidden)} hidden file(s) or folder(s) are left out: {names}")
        return notes


def images_below(
    root: str,
    left_out: LeftOut,
    *,
    excluded: Set[folders.Identity] = frozenset(),
    order: Callable[[str], Any] = str,
    cannot_list: Callable[[OSError], None] = folders.fail,
) -> Iterator[str]:
    """Yield the paths of all images in a folder and below it. Links are followed; each folder counts once.

    Args:
      root: The folder.
      left_out: Collects the other files, and hidden files and folders.
      excluded: Folders that are not entered, except `root`.
      order: Key of a name, to sort the files and folders of a folder.
      cannot_list: Called for a folder that cannot be listed.
    """
    seen = set(excluded) - {folders.identity(root)}

    def entries(folder: str) -> Iterator[os.DirEntry[str]]:
        try:
            if (identity := folders.identity(folder)) in seen:
                return iter(())
            seen.add(identity)
            return iter(sorted(os.scandir(folder), key=lambda entry: order(entry.name)))
        except OSError as error:
            cannot_list(error)
            return iter(())

    open_folders = [entries(root)]
    while open_folders:
        entry = next(open_folders[-1], None)
        if entry is None:
            open_folders.pop()
        elif not _is_user_data(entry.name):
            left_out.add(entry.name)
        elif _is_folder(entry):
            open_folders.append(entries(entry.path))
        elif is_image(entry.path):
            yield entry.path
        else:
            left_out.add(entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; if its name is an image's, reading it fails later
        return False


def _find(root: Path, part: str, class_names: tuple[str, ...]) -> tuple[list[str], np.ndarray]:
    """Return the sorted paths, relative to `root`, of all images of a part, and their labels."""
    present = _classes(root / part)
    if unknown := sorted(set(present) - set(class_names)):
        names = some([_printable(name) for name in unknown])
        remark = form_only(unknown, sorted(set(class_names) - set(present)))
        raise UserError(f"{root / part} has classes that {root / 'train'} lacks: {names}{remark}")
    left_out = LeftOut()
    for path in sorted((root / part).iterdir()):
        if path.is_dir() and not _is_user_data(path.name):
            left_out.add(path.name)
    # Do not follow links from one class to another or to a parent folder.
    excluded = {folders.identity(folder) for folder in (root, root / part, *(root / part / name for name in present))}
    paths, labels = [], []
    for label, name in enumerate(class_names):
        found = images_below(str(root / part / name), left_out, excluded=excluded) if name in present else ()
        images = sorted(os.path.relpath(path, root) for path in found)
        paths += images
        labels += [label] * len(images)
    if not paths:
        raise UserError(f"no images in {root / part}: expected {root / part}/<class>/*.jpg")
    for text in left_out.notes():
        note(f"{root / part}: {text}")
    return paths, np.asarray(labels, np.int32)


def _note_ignored(root: Path, test_folder: str | None) -> None:
    """Note folders that look like validation but are not read, and images outside the classes' folders."""
    parts = [part for part in ("train", test_folder) if part]
    reason = f"{test_folder} is" if test_folder else "rename it to validation to use it"
    read = {folders.identity(root / part) for part in parts}
    for path in sorted(root.iterdir()):
        if path.is_dir() and path.name.lower() in SIMILAR_NAMES and folders.identity(path) not in read:
            note(f"{path} is not read: {reason}")
    for part in parts:
        files = [path for path in sorted((root / part).iterdir()) if _is_user_data(path.name) and path.is_file()]
        if strays := [_printable(path.name) for path in files if is_image(str(path))]:
            note(f"{len(strays)} image(s) in {root / part}, outside the classes' folders, are ignored: {some(strays)}")


def note(text: str) -> None:
    if jax.process_index() == 0:
        print(f"note: {text}", file=sys.stderr)


def _printable(name: str) -> str:
    """Replace the bytes of a file name that are not UTF-8."""
    return os.fsencode(name).decode(errors="replace")


class _Inspected(NamedTuple):
    """What is remembered of N images."""

    versions: np.ndarray  # uint8 [N, 16], hashes of path, size, times of change and inode
    identities: np.ndarray  # uint8 [N, 16], hashes of the files
    brightest: np.ndarray  # int32 [N], of images of 16 bits a channel; -1 for others


def _identities(root: Path, paths: list[str]) -> np.ndarray:
    """Decode every new or changed image once, and return the hash of each file, uint8 [N, 16].

    UserError if images cannot be read.
    """
    versions = _hashes([_version(root, path) for path in paths])
    cache = cache_folder()
    file = cache / f"images-{identity.digest(os.fsencode(root.resolve())).hex()}.npz" if cache else None
    known = _read_cache(file) if file else None
    rows = {} if known is None else {version.tobytes(): row for row, version in enumerate(known.versions)}
    new = [number for number, version in enumerate(versions) if version.tobytes() not in rows]
    identities, brightest = np.empty_like(versions), np.empty(len(paths), np.int32)
    identities[new], brightest[new] = _inspect(root, [paths[number] for number in new], len(paths))
    if known is not None:
        old = np.setdiff1d(np.arange(len(paths)), new)
        chosen = [rows[versions[number].tobytes()] for number in old]
        identities[old], brightest[old] = known.identities[chosen], known.brightest[chosen]
    if file and (new or known is None or len(known.versions) != len(paths)):
        with contextlib.suppress(OSError):  # then they are inspected again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as part, open(part, "wb") as opened:
                np.savez(opened, **_Inspected(versions, identities, brightest)._asdict())
    deep = decode.DeepImages()
    for value in brightest[brightest >= 0]:
        deep.add(int(value))
    if text := deep.note():
        note(f"{root}: {text}")
    return identities


def _version(root: Path, path: str) -> bytes:
    try:
        status = (root / path).stat()
        # Not the time of a file's content alone: two files may have the same, and exchange their names.
        known = status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
        return os.fsencode(path) + "".join(f"\0{number}" for number in known).encode()
    except OSError:  # a broken link, which `_inspect` reports
        return os.fsencode(path)


def _hashes(contents: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(map(identity.digest, contents)), np.uint8).reshape(-1, identity.SIZE)


def _read_cache(file: Path) -> _Inspected | None:
    """Read what is remembered; None if there is nothing, or it is damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        arrays = npz.read(file)
        known = _Inspected(*(arrays[name] for name in _Inspected._fields))
        shape = (len(known.brightest), identity.SIZE)
        if known.versions.shape == known.identities.shape == shape and known.identities.dtype == np.uint8:
            return known
    return None


def _inspect(root: Path, paths: list[str], total: int) -> tuple[np.ndarray, np.ndarray]:
    """Decode and hash N images, of `total` in all.

    Returns:
      The hashes uint8 [N, 16], and the brightest values int32 [N], see `_Inspected`.
    """

    def inspect(path: str) -> tuple[bytes, str, int | None]:
        try:
            content = decode.read_file(root / path)
        except OSError as error:
            return bytes(identity.SIZE), error.strerror or one_line(error), None
        except ValueError as error:
            return bytes(identity.SIZE), str(error), None
        return identity.digest(content), *decode.inspect(content)

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # damaged files are named below
    hashes, brightest, damaged = [], [], []
    with progress.bar(transient=True) as bar, ThreadPoolExecutor() as threads:
        inspected = bar.track(threads.map(inspect, paths), total=len(paths), description="checking images")
        for path, (hashed, problem, value) in zip(paths, inspected, strict=True):
            hashes.append(hashed)
            brightest.append(-1 if value is None else value)
            if problem:
                damaged.append(f"{_printable(str(root / path))} ({problem})")
    if damaged:
        names = some(damaged, "; ")
        raise UserError(f"{len(damaged)} of {total} images cannot be read: {names}: replace or remove them")
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, identity.SIZE), np.array(brightest, np.int32)
