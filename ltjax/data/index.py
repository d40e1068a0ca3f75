"""The index of a prepared split: labels and record numbers, in an order that no shuffling or sharding changes."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ltjax.data import identity
from ltjax.system import npz
from ltjax.system.files import replacing


def shards_fingerprint(paths: Iterable[Path]) -> str:
    """Hash the names and sizes of a split's shards (SHA-256, hex), to tell whether an index belongs to them."""
    lines = sorted(f"{path.name} {path.stat().st_size}" for path in paths)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class Index(NamedTuple):
    """The images of a split of N records, sorted by key.

    Attributes:
      labels: int32 [N].
      records: int64 [N], record numbers in the concatenated shards.
      identities: uint8 [N, 16], hashes of the keys.
    """

    labels: np.ndarray
    records: np.ndarray
    identities: np.ndarray


def make_index(labels: Sequence[int] | np.ndarray, keys: Sequence[Any], split: str = "") -> Index:
    """Sort a split's records by key.

    Args:
      labels: [N], in the order of the records.
      keys: N different `file_name`s or `id`s.
      split: Name of the split, which tells its numbers from those of another split.
    """
    records = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    names = [_name(keys[record], split) for record in records]
    identities = np.frombuffer(b"".join(map(identity.digest, names)), np.uint8).reshape(-1, identity.SIZE)
    return Index(np.asarray(labels, np.int32)[records], records, identities)


def _name(key: Any, split: str) -> bytes:
    if isinstance(key, int):
        return f"{split} {key}".encode()
    return key if isinstance(key, bytes) else str(key).encode()


def write_index(path: Path, index: Index, paths: Iterable[Path]) -> None:
    """Write the index of a split as an npz file, atomically, with the fingerprint of the split's shards `paths`."""
    with replacing(path) as part, open(part, "wb") as file:
        np.savez(file, **index._asdict(), fingerprint=np.array(shards_fingerprint(paths)))


def read_index(path: Path, paths: Sequence[Path]) -> Index | None:
    """Read an index; None if there is no index of exactly these shards."""
    try:
        arrays = npz.read(path)
        if str(arrays["fingerprint"]) == shards_fingerprint(paths):
            return Index(*(arrays[name] for name in Index._fields))
    except (OSError, ValueError, KeyError):
        pass  # missing, damaged, or of an older version: the caller makes it again
    return None
