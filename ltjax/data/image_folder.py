"""Anybody's own images, straight from disk: `ROOT/train/<class>/*.jpg` and perhaps `ROOT/validation/<class>/*.jpg`.

Without a folder for validation (or `val`, `test`), a class-balanced part of the training images is held out for it.
What is passed over, and what is held out, is said on stderr.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from ltjax.data import decode, folders, progress
from ltjax.data.source import Stored, Subset
from ltjax.data.splits import long_tailed_split
from ltjax.system.paths import cache_folder, local
from ltjax.types import UserError, one_line

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
HELD_OUT = ("validation", "val", "test")
MEANT = (*HELD_OUT, "valid", "testing", "dev", "eval")  # in whatever case: for validation, as other programs call it
NAMES_SHOWN = 5
FEW = 5  # test images of each class, of which an accuracy says little


class Files:
    """Images as files, in the order of their paths below a root."""

    def __init__(self, root: Path, paths: list[str]):
        self._root, self._paths = root, paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> bytes:
        return (self._root / self._paths[index]).read_bytes()

    def name(self, index: int) -> str:
        return _shown(str(self._root / self._paths[index]))


def load(name: str = "image_folder", root: str | os.PathLike | None = None) -> Stored:
    """Finds the images below `root`; classes are the folders of `root/train`, in alphabetical order.

    Image files lie in a class's folder or deeper; files of other kinds, hidden ones and `__MACOSX` are passed over, and
    each folder counts once, whatever links lead there. Every image is decoded once to see that it is whole, which is
    remembered until the files change. Held out where there is no folder for it: a fifth of the smallest class, but at
    most 20 images, of each class; which ones is the same every time.

    Raises: UserError where there is no such folder, a class has no images, validation has other classes than training,
      or images cannot be read: their number, and the first of their names.
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
    held = next((part for part in HELD_OUT if (root / part).is_dir()), None)
    shown = tuple(map(_shown, class_names))
    train_paths, train_labels = _find(root, "train", class_names)
    test_paths, test_labels = _find(root, held, class_names) if held else ([], np.empty(0, np.int32))
    counts = np.bincount(train_labels, minlength=len(class_names))
    if empty := [shown[c] for c in np.flatnonzero(counts == 0)]:
        raise UserError(f"{root / 'train'}: no images in {_listed(empty)}; known kinds: {', '.join(SUFFIXES)}")
    _check(root, train_paths + test_paths)
    _say_passed_over(root, held)
    train = Files(root, train_paths)
    if held:
        if lacking := [name for label, name in enumerate(shown) if label not in test_labels]:
            _note(f"{root / held} has no images of {_listed(lacking)}: nothing will be known of their accuracy")
        return Stored(train, train_labels, Files(root, test_paths), test_labels, shown)
    smallest = int(counts.min())
    if smallest < 2:
        single = _listed([shown[c] for c in np.flatnonzero(counts < 2)])
        raise UserError(f"{root}: one image in {single}, so none can be held out; make a folder {root}/validation")
    each = min(20, max(1, smallest // 5))
    few = "" if each > FEW else ", which is few for a figure: make one where you have more images"
    held = f"{each} image(s) of each class are held out of train to test on"
    _note(f"{root} has no folder {', '.join(HELD_OUT)}: {held}{few}")
    split = long_tailed_split(train_labels, len(class_names), imbalance=1, profile="natural", holdout=each)
    return Stored(
        Subset(train, split.train),
        train_labels[split.train],
        Subset(train, split.holdout),
        train_labels[split.holdout],
        shown,
    )


def _classes(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and _counts(path.name)))


def _counts(name: str) -> bool:
    """Whether a file or folder of that name is anybody's: `__MACOSX` is what macOS packs beside the folders."""
    return not name.startswith(".") and name != "__MACOSX"


def _is_image(name: str) -> bool:
    return _counts(name) and name.lower().endswith(SUFFIXES)


def _find(root: Path, part: str, class_names: tuple[str, ...]) -> tuple[list[str], np.ndarray]:
    """Paths below `root` of all images of a part, sorted, and their labels."""
    own = _classes(root / part)
    if foreign := sorted(set(own) - set(class_names)):
        known = _listed([_shown(name) for name in foreign])
        raise UserError(f"{root / part} has classes that {root / 'train'} lacks: {known}")
    # a link out of a class, to all of the classes or to another one, would give it their images
    outside = {folders.identity(folder) for folder in (root, root / part, *(root / part / name for name in own))}
    paths, labels = [], []
    for label, name in enumerate(class_names):
        found = []
        for folder, below, files in folders.walk(root / part / name, outside) if name in own else ():
            below[:] = [name for name in below if _counts(name)]
            found += [os.path.relpath(os.path.join(folder, file), root) for file in files if _is_image(file)]
        paths += sorted(found)
        labels += [label] * len(found)
    if not paths:
        raise UserError(f"no images in {root / part}: expected {root / part}/<class>/*.jpg")
    return paths, np.asarray(labels, np.int32)


def _say_passed_over(root: Path, held: str | None) -> None:
    """Folders that may be meant for validation and are not read, and images that lie beside the classes."""
    read = {folders.identity(root / part) for part in ("train", held) if part}
    for path in sorted(root.iterdir()):
        if path.is_dir() and path.name.lower() in MEANT and folders.identity(path) not in read:
            instead = f"{held} is" if held else "for validation, call it validation"
            _note(f"{path} is not read: {instead}")
    for part in filter(None, ("train", held)):
        if strays := [_shown(path.name) for path in sorted((root / part).iterdir()) if _is_image(path.name)]:
            where = f"right in {root / part}, in no class's folder"
            _note(f"{len(strays)} image(s) {where}, are passed over: {_listed(strays)}")


def _note(text: str) -> None:
    if jax.process_index() == 0:
        print(f"note: {text}", file=sys.stderr)


def _shown(name: str) -> str:
    """A file's name as text that can be printed, whatever its bytes are."""
    return os.fsencode(name).decode(errors="replace")


def _check(root: Path, files: list[str]) -> None:
    """Decode every image once. Raises: UserError naming those that cannot be read."""
    digest = hashlib.sha256(os.fsencode(root.resolve()))
    for path in files:
        try:
            found = (root / path).stat()
            seen = f"{found.st_size}\0{found.st_mtime_ns}"
        except OSError:
            seen = ""  # a broken link, which is named below
        digest.update(os.fsencode(path) + f"\0{seen}\n".encode())
    cache = cache_folder()
    checked = cache / f"images-{digest.hexdigest()[:32]}" if cache else None
    if checked and checked.exists():
        return
    damaged = _damaged(files, lambda path: (root / path).read_bytes())
    if damaged:
        names = "; ".join(f"{_shown(str(root / path))} ({why})" for path, why in damaged[:NAMES_SHOWN])
        more = f"; and {len(damaged) - NAMES_SHOWN} more" if len(damaged) > NAMES_SHOWN else ""
        raise UserError(f"{len(damaged)} of {len(files)} images cannot be read: {names}{more}: replace or remove them")
    if checked is None:
        return
    try:
        checked.parent.mkdir(parents=True, exist_ok=True)
        checked.touch()
    except OSError:
        pass  # then they are checked again next time


def _damaged(paths: list[str], read: Callable[[str], bytes]) -> list[tuple[str, str]]:
    def problem(path: str) -> str:
        try:
            return decode.problem(read(path))
        except OSError as error:
            return error.strerror or one_line(error)

    with progress.bar(transient=True) as bar, ThreadPoolExecutor() as threads:
        task = bar.add_task("checking images", total=len(paths))
        found = []
        for path, why in zip(paths, threads.map(problem, paths), strict=True):
            bar.advance(task)
            if why:
                found.append((path, why))
    return found


def _listed(names: list[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (
        f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    )
