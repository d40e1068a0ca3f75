"""Paths as people give them."""

import os
import re
from pathlib import Path

from ltjax.types import UserError

PATTERNS = "*?[\\"  # signs for which Orbax takes a path for a pattern: it may then find nothing, or another folder


def local(path: str | os.PathLike) -> Path:
    """A path on this machine; "~" and "~name" at its start are home folders, as in a shell.

    Raises: UserError for an address such as gs://bucket/run, and where "~" has no folder.
    """
    text = os.fspath(path)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise UserError(f"{text} is an address, and paths are those of this machine: mount it, and name the folder")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text}: no home folder is known for that (set HOME, or write out the path)") from error


def check_checkpoints(folder: Path) -> None:
    """Raises: UserError where checkpoints in a folder could never be read."""
    if found := next((sign for sign in PATTERNS if sign in str(folder.absolute())), None):
        raise UserError(f"cannot keep checkpoints in {folder.absolute()}, for the {found} in it: name another folder")


def cache_folder() -> Path | None:
    """Where ltjax remembers what it has looked at; None where this user has no home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ltjax"
    except RuntimeError:
        return None
