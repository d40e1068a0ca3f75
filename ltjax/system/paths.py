"""Check the paths that users give."""

import os
import re
from pathlib import Path

from ltjax.types import UserError

PATTERNS = "*?[\\"  # Orbax takes a path with one of these for a pattern, and may then find nothing or another folder


def local(path: str | os.PathLike) -> Path:
    """Return a path on this machine, with "~" or "~name" at its start expanded as in a shell.

    Raises:
      UserError: The path is an address such as gs://bucket/run, or the home folder is unknown.
    """
    text = os.fspath(path)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise UserError(f"{text} is an address, and paths are those of this machine: mount it, and name the folder")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text}: no home folder is known for that (set HOME, or write out the path)") from error


def check_checkpoints(folder: Path) -> None:
    """Raise UserError if Orbax could not read checkpoints in a folder."""
    if sign := next((sign for sign in PATTERNS if sign in str(folder.absolute())), None):
        raise UserError(f"cannot keep checkpoints in {folder.absolute()}, for the {sign} in it: name another folder")


def cache_folder() -> Path | None:
    """Return the folder of ltjax's caches; None if this user has no home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ltjax"
    except RuntimeError:
        return None
