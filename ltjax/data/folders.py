"""Folders on disk, links among them followed."""

import os
from collections.abc import Iterator, Set
from pathlib import Path

from ltjax.types import UserError

Identity = tuple[int, int]  # of a folder, whatever links lead there


def identity(folder: str | Path) -> Identity:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def walk(root: str | Path, entered: Set[Identity] = frozenset()) -> Iterator[tuple[str, list[str], list[str]]]:
    """As `os.walk`, in the order of names, each folder once: links may lead back to it. Hidden ones are the caller's.

    entered: folders that are not to be entered, but for `root` itself.
    Raises: UserError for a folder that cannot be listed.
    """

    def fail(error: OSError):
        raise UserError(f"cannot list {error.filename}: {error.strerror}") from error

    seen = set(entered) - {identity(root)}
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        own = identity(folder)
        if own in seen:
            folders.clear()
            continue
        seen.add(own)
        folders.sort()
        yield folder, folders, sorted(files)
