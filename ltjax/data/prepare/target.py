"""The folder that a data set is written to."""

import contextlib
import os
import tempfile
from collections.abc import Generator
from pathlib import Path

from ltjax.types import UserError


def require_writable(folder: Path) -> None:
    """Make a folder if it is missing; UserError if files cannot be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another --data_dir") from error


@contextlib.contextmanager
def locked(folder: Path) -> Generator[None]:
    """Lock a folder until the process ends, even by a kill; UserError if another process holds the lock."""
    try:
        import fcntl
    except ImportError:  # not a Unix: no lock
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another run is writing {folder}: wait for it, or stop it") from None
        yield
    finally:
        os.close(descriptor)
