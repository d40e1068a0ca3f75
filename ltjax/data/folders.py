"""Walk folders and follow symbolic links: all files, or the images."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

from ltjax.data import decode
from ltjax.system.wording import some
from ltjax.types import UserError

# Endings of images. Files with other endings are images if their first bytes are those of one.
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")
SUFFIXES += (".ppm", ".pgm", ".pbm", ".pnm", ".gif", ".avif", ".jp2")
Inode = tuple[int, int]  # device and inode of a folder, the same through any link


def inode(folder: str | Path) -> Inode:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def fail(error: OSError) -> None:
    """Raise UserError for a folder that cannot be listed."""
    raise UserError(f"cannot list {error.filename}: {error.strerror}") from error


def walk(root: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk like `os.walk`, sorted by name, following links but entering each folder once.

    Hidden folders and files are included. UserError if a folder cannot be listed.
    """
    seen: set[Inode] = set()
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        if inode(folder) in seen:
            folders.clear()
            continue
        seen.add(inode(folder))
        folders.sort()
        yield folder, folders, sorted(files)


def is_user_data(name: str) -> bool:
    """Return whether a name is user data, neither hidden nor the `__MACOSX` that macOS adds to archives."""
    return not name.startswith(".") and name != "__MACOSX"


def is_image(path: str) -> bool:
    """Return whether a file is an image, by its ending or else by its first bytes. Decoding may still fail."""
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
    """The files and folders that `images_below` leaves out."""

    def __init__(self):
        self.endings: Counter[str] = Counter()  # of files that are no images
        self._hidden: list[str] = []  # names of files and folders

    def add(self, name: str) -> None:
        """Add a file that is no image, or a hidden file or folder."""
        if is_user_data(name):
            self.endings[os.path.splitext(name)[1]] += 1
        else:
            self._hidden.append(name)

    def update(self, other: "LeftOut") -> None:
        """Add those of another one."""
        self.endings += other.endings
        self._hidden += other._hidden

    def kinds(self) -> str:
        """Count the files that are no images, by their endings: ".txt (10), .db (2)"."""
        most_first = sorted(self.endings.items(), key=lambda item: (-item[1], item[0]))
        return some([f"{printable(ending) or 'without an ending'} ({count})" for ending, count in most_first])

    def notes(self) -> list[str]:
        """Count them: "12 file(s) are no images that can be decoded and are left out: .txt (10), .db (2)"."""
        notes = []
        if self.endings:
            total = self.endings.total()
            notes.append(f"{total} file(s) are no images that can be decoded and are left out: {self.kinds()}")
        if self._hidden:
            names = some(sorted({printable(name) for name in self._hidden}))
            notes.append(f"{len(self._hidden)} hidden file(s) or folder(s) are left out: {names}")
        return notes


def images_below(
    root: str,
    left_out: LeftOut,
    *,
    excluded: Set[Inode] = frozenset(),
    order: Callable[[str], Any] = str,
    cannot_list: Callable[[OSError], None] = fail,
) -> Iterator[str]:
    """Yield the paths of all images in a folder and below it. Links are followed; each folder counts once.

    Args:
      left_out: Collects the other files, and hidden files and folders.
      excluded: Folders that are not entered, except `root`.
      order: Key of a name, to sort the files and folders of a folder.
      cannot_list: Called for a folder that cannot be listed.
    """
    seen = set(excluded) - {inode(root)}

    def entries(folder: str) -> Iterator[os.DirEntry[str]]:
        try:
            if (known := inode(folder)) in seen:
                return iter(())
            seen.add(known)
            return iter(sorted(os.scandir(folder), key=lambda entry: order(entry.name)))
        except OSError as error:
            cannot_list(error)
            return iter(())

    open_folders = [entries(root)]
    while open_folders:
        entry = next(open_folders[-1], None)
        if entry is None:
            open_folders.pop()
        elif not is_user_data(entry.name):
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


def printable(name: str) -> str:
    """Replace the bytes of a file name that are not UTF-8."""
    return os.fsencode(name).decode(errors="replace")
