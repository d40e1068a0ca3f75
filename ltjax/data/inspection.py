"""Decode and hash each image file once, and remember the result until the file changes."""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from ltjax.data import decode, identity, progress
from ltjax.data.folders import printable
from ltjax.system import npz
from ltjax.system.files import replacing
from ltjax.system.paths import cache_folder
from ltjax.system.wording import one_line, some
from ltjax.types import UserError


class _Inspected(NamedTuple):
    """The cached inspection of N images."""

    versions: np.ndarray  # uint8 [N, 16], hashes of path, size, times of change and inode
    identities: np.ndarray  # uint8 [N, 16], hashes of the files
    brightest: np.ndarray  # int32 [N], of images of 16 bits a channel; -1 for others


def identities(root: Path, paths: list[str]) -> np.ndarray:
    """Decode every new or changed image once, and return the hash of each file, uint8 [N, 16].

    UserError if images cannot be read.
    """
    versions = _rows([identity.digest(_version(root, path)) for path in paths])
    cache = cache_folder()
    file = cache / f"images-{identity.digest(os.fsencode(root.resolve())).hex()}.npz" if cache else None
    known = _read_cache(file) if file else None
    rows = {} if known is None else {version.tobytes(): row for row, version in enumerate(known.versions)}
    new = [number for number, version in enumerate(versions) if version.tobytes() not in rows]
    identities, brightest = np.empty_like(versions), np.empty(len(paths), np.int32)
    identities[new], brightest[new] = _inspect(root, [paths[number] for number in new], len(paths))
    if known is not None:
        old = np.setdiff1d(np.arange(len(paths)), new)
        chosen = [rows[versions[number].tobytes()] for number in old]
        identities[old], brightest[old] = known.identities[chosen], known.brightest[chosen]
    if file and (new or known is None or len(known.versions) != len(paths)):
        with contextlib.suppress(OSError):  # then they are inspected again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as part, open(part, "wb") as opened:
                np.savez(opened, **_Inspected(versions, identities, brightest)._asdict())
    deep = decode.DeepImages()
    for value in brightest[brightest >= 0]:
        deep.add(int(value))
    if text := deep.note():
        progress.note(f"{root}: {text}")
    return identities


def _version(root: Path, path: str) -> bytes:
    try:
        status = (root / path).stat()
        # Not the time of a file's content alone: two files may have the same, and exchange their names.
        known = status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
        return os.fsencode(path) + "".join(f"\0{number}" for number in known).encode()
    except OSError:  # a broken link, which `_inspect` reports
        return os.fsencode(path)


def _rows(hashes: list[bytes]) -> np.ndarray:
    """Return hashes as uint8 [N, 16]."""
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, identity.SIZE)


def _read_cache(file: Path) -> _Inspected | None:
    """Read the cache; None if there is none, or it is damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        arrays = npz.read(file)
        known = _Inspected(*(arrays[name] for name in _Inspected._fields))
        shape = (len(known.brightest), identity.SIZE)
        if known.versions.shape == known.identities.shape == shape and known.identities.dtype == np.uint8:
            return known
    return None


def _inspect(root: Path, paths: list[str], total: int) -> tuple[np.ndarray, np.ndarray]:
    """Decode and hash N images, of `total` in all: the `identities` and `brightest` of `_Inspected`."""

    def inspect(path: str) -> tuple[bytes, str, int | None]:
        try:
            content = decode.read_file(root / path)
        except OSError as error:
            return bytes(identity.SIZE), error.strerror or one_line(error), None
        except ValueError as error:
            return bytes(identity.SIZE), str(error), None
        return identity.digest(content), *decode.inspect(content)

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # damaged files are named below
    hashes, brightest, damaged = [], [], []
    with progress.bar(transient=True) as bar, ThreadPoolExecutor() as threads:
        inspected = bar.track(threads.map(inspect, paths), total=len(paths), description="checking images")
        for path, (hashed, problem, value) in zip(paths, inspected, strict=True):
            hashes.append(hashed)
            brightest.append(-1 if value is None else value)
            if problem:
                damaged.append(f"{printable(str(root / path))} ({problem})")
    if damaged:
        names = some(damaged, "; ")
        raise UserError(f"{len(damaged)} of {total} images cannot be read: {names}: replace or remove them")
    return _rows(hashes), np.array(brightest, np.int32)
