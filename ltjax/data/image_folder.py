"""Load the user's own images: `ROOT/train/<class>/*.jpg` and optionally `ROOT/validation/<class>/*.jpg`.

Without a folder `validation` (or `val`, `test`), a class-balanced part of the training images is held out. Notes on
stderr say what is ignored and what is held out.
"""

import contextlib
import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from ltjax.data import decode, folders, progress
from ltjax.data.source import Stored, Subset, some
from ltjax.data.splits import long_tailed_split
from ltjax.system.paths import cache_folder, local
from ltjax.types import UserError, one_line

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
HELD_OUT = ("validation", "val", "test")
SIMILAR_NAMES = (*HELD_OUT, "valid", "testing", "dev", "eval")  # other programs' names for validation, in any case
FEW = 5  # test images of each class, too few for a reliable accuracy


class Files:
    """Image files, by their paths relative to a root."""

    def __init__(self, root: Path, paths: list[str]):
        self._root, self._paths = root, paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> bytes:
        return (self._root / self._paths[index]).read_bytes()

    def name(self, index: int) -> str:
        return _printable(str(self._root / self._paths[index]))


def load(name: str = "image_folder", root: str | os.PathLike | None = None) -> Stored:
    """Find the images below `root`; the classes are the folders of `root/train`, in alphabetical order.

    Images lie in a class's folder or deeper. Files of other kinds, hidden files and `__MACOSX` are ignored. Symbolic
    links are followed, but each folder counts once. Every image is decoded once as a check, which is remembered until
    the files change. Without a validation folder, each class gives a fifth of the smallest class, at most 20 images;
    the choice is the same every time. UserError if a folder is missing, a class has no images, validation has other
    classes than training, or images cannot be read.
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
        raise UserError(f"{root / 'train'}: no images in {some(empty)}; known kinds: {', '.join(SUFFIXES)}")
    _check(root, train_paths + test_paths)
    _note_ignored(root, test_folder)
    train = Files(root, train_paths)
    if not test_folder:
        return _hold_out(root, train, train_labels, titles, counts)
    if lacking := [title for label, title in enumerate(titles) if label not in test_labels]:
        _note(f"{root / test_folder} has no images of {some(lacking)}: their accuracy will be unknown")
    return Stored(train, train_labels, Files(root, test_paths), test_labels, titles)


def _hold_out(root: Path, files: Files, labels: np.ndarray, titles: tuple[str, ...], counts: np.ndarray) -> Stored:
    """Split the training images."""
    smallest = int(counts.min())
    if smallest < 2:
        single = some([titles[c] for c in np.flatnonzero(counts < 2)])
        raise UserError(f"{root}: one image in {single}, so none can be held out; make a folder {root}/validation")
    each = min(20, max(1, smallest // 5))
    few = "" if each > FEW else ", too few for a reliable accuracy: make one if you have more images"
    held_out = f"{each} image(s) of each class are held out of train to test on"
    _note(f"{root} has no folder {', '.join(HELD_OUT)}: {held_out}{few}")
    split = long_tailed_split(labels, len(titles), imbalance=1, profile="natural", holdout=each)
    train, test = split.train, split.holdout
    return Stored(Subset(files, train), labels[train], Subset(files, test), labels[test], titles)


def _classes(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and _is_user_data(path.name)))


def _is_user_data(name: str) -> bool:
    """Whether a name is user data, neither hidden nor the `__MACOSX` that macOS adds to archives."""
    return not name.startswith(".") and name != "__MACOSX"


def _is_image(name: str) -> bool:
    return _is_user_data(name) and name.lower().endswith(SUFFIXES)


def _find(root: Path, part: str, class_names: tuple[str, ...]) -> tuple[list[str], np.ndarray]:
    """Return the sorted paths, relative to `root`, of all images of a part, and their labels."""
    present = _classes(root / part)
    if unknown := sorted(set(present) - set(class_names)):
        names = some([_printable(name) for name in unknown])
        raise UserError(f"{root / part} has classes that {root / 'train'} lacks: {names}")
    # Do not follow links from one class to another or to a parent folder.
    excluded = {folders.identity(folder) for folder in (root, root / part, *(root / part / name for name in present))}
    paths, labels = [], []
    for label, name in enumerate(class_names):
        images = []
        for folder, subfolders, files in folders.walk(root / part / name, excluded) if name in present else ():
            subfolders[:] = [name for name in subfolders if _is_user_data(name)]
            images += [os.path.relpath(os.path.join(folder, file), root) for file in files if _is_image(file)]
        paths += sorted(images)
        labels += [label] * len(images)
    if not paths:
        raise UserError(f"no images in {root / part}: expected {root / part}/<class>/*.jpg")
    return paths, np.asarray(labels, np.int32)


def _note_ignored(root: Path, test_folder: str | None) -> None:
    """Note folders that look like validation but are not read, and images outside the classes' folders."""
    parts = [part for part in ("train", test_folder) if part]
    reason = f"{test_folder} is" if test_folder else "rename it to validation to use it"
    read = {folders.identity(root / part) for part in parts}
    for path in sorted(root.iterdir()):
        if path.is_dir() and path.name.lower() in SIMILAR_NAMES and folders.identity(path) not in read:
            _note(f"{path} is not read: {reason}")
    for part in parts:
        if strays := [_printable(path.name) for path in sorted((root / part).iterdir()) if _is_image(path.name)]:
            _note(f"{len(strays)} image(s) in {root / part}, outside the classes' folders, are ignored: {some(strays)}")


def _note(text: str) -> None:
    if jax.process_index() == 0:
        print(f"note: {text}", file=sys.stderr)


def _printable(name: str) -> str:
    """Replace the bytes of a file name that are not UTF-8."""
    return os.fsencode(name).decode(errors="replace")


def _check(root: Path, files: list[str]) -> None:
    """Decode every image once; UserError if some cannot be read."""
    digest = hashlib.sha256(os.fsencode(root.resolve()))
    for path in files:
        try:
            status = (root / path).stat()
            version = f"{status.st_size}\0{status.st_mtime_ns}"
        except OSError:
            version = ""  # a broken link, which is reported below
        digest.update(os.fsencode(path) + f"\0{version}\n".encode())
    cache = cache_folder()
    marker = cache / f"images-{digest.hexdigest()[:32]}" if cache else None
    if marker and marker.exists():
        return
    if damaged := _damaged(root, files):
        names = some([f"{_printable(str(root / path))} ({why})" for path, why in damaged], "; ")
        raise UserError(f"{len(damaged)} of {len(files)} images cannot be read: {names}: replace or remove them")
    if marker:
        with contextlib.suppress(OSError):  # then they are checked again next time
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()


def _damaged(root: Path, paths: list[str]) -> list[tuple[str, str]]:
    """Return the path of each damaged image, and what is wrong with it."""

    def problem(path: str) -> str:
        try:
            return decode.problem((root / path).read_bytes())
        except OSError as error:
            return error.strerror or one_line(error)

    with progress.bar(transient=True) as bar, ThreadPoolExecutor() as threads:
        problems = bar.track(threads.map(problem, paths), total=len(paths), description="checking images")
        return [(path, why) for path, why in zip(paths, problems, strict=True) if why]
