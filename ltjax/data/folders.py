"""Walk folders and follow symbolic links."""

import os
from collections.abc import Iterator, Set
from pathlib import Path

from ltjax.types import UserError

Identity = tuple[int, int]  # device and inode of a folder, the same through any link


def identity(folder: str | Path) -> Identity:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def fail(error: OSError) -> None:
    """Raise UserError for a folder that cannot be listed."""
    raise UserError(f"cannot list {error.filename}: {error.strerror}") from error


def walk(root: str | Path, excluded: Set[Identity] = frozenset()) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk like `os.walk`, sorted by name, following links but entering each folder once.

    Hidden folders and files are included, `excluded` folders are not, except `root` itself. UserError if a folder
    cannot be listed.
    """
    seen = set(excluded) - {identity(root)}
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        if identity(folder) in seen:
            folders.clear()
            continue
        seen.add(identity(folder))
        folders.sort()
        yield folder, folders, sorted(files)
