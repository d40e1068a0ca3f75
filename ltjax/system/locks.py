"""Lock a file or folder against other processes."""

import contextlib
import os
from collections.abc import Generator
from pathlib import Path

from ltjax.types import UserError


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Generator[None]:
    """Lock an existing file or folder during the block. Raise UserError(busy) if it is locked.

    A kill ends the lock, too. There is no lock if the system is not Unix, or if the file system has none.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # NFS locks only writable files
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(busy) from error
        yield
    finally:
        os.close(descriptor)
