"""Read npz files that others wrote: nothing is unpickled, and sizes are checked before memory is taken."""

import math
import os
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from ltjax.system.wording import one_line

COMPRESSION = 100  # largest ratio of contents to an archive's size; arrays of numbers stay far below
SMALL = 1 << 30  # bytes that every archive may hold


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read all arrays of a file.

    Raises:
      OSError: The file cannot be opened.
      ValueError: It is damaged, holds objects, or declares more bytes than it can hold.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                check_size(archive, os.fstat(file.fileno()).st_size)
                members = archive.infolist()
                return {member.filename.removesuffix(".npy"): _array(archive, member) for member in members}
        except MemoryError:
            raise
        except Exception as error:  # damage has many exception types
            raise ValueError(f"no intact npz file of numbers: {one_line(error)}") from error


def check_size(archive: zipfile.ZipFile, size: int) -> None:
    """Raise ValueError if the members of an archive declare more bytes than a file of `size` bytes can hold."""
    most = max(SMALL, COMPRESSION * size)
    if sum(member.file_size for member in archive.infolist()) > most:
        raise ValueError(f"it declares more than {most:,} bytes")


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """Read an array, if its header declares no more bytes than the member has."""
    with archive.open(member) as file:
        headers: dict[Any, Callable] = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, _, dtype = headers[np.lib.format.read_magic(file)](file)
        if math.prod(shape) * dtype.itemsize > member.file_size:
            raise ValueError(f"an array of {shape} in {member.file_size} bytes")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)
