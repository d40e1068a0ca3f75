"""The index of a prepared split: labels and record numbers, in an order that no shuffling or sharding changes."""

import hashlib
import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def shards_fingerprint(paths: Iterable[Path]) -> str:
    """Hash the names and sizes of a split's shards (SHA-256, hex), to tell whether an index belongs to them."""
    lines = sorted(f"{path.name} {path.stat().st_size}" for path in paths)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def write_index(path: Path, labels: Sequence[int] | np.ndarray, keys: Sequence[Any], paths: Iterable[Path]) -> None:
    """Write the index of a split of N records as an npz file, atomically.

    Its arrays are `labels` [N] int32 and `records` [N] int64, the record numbers in the concatenated shards, both
    sorted by key; and `fingerprint`, that of the shards. The arguments `labels` and `keys` (N different `file_name`s or
    `id`s) are in the order of the records; `paths` are the split's shards.
    """
    records = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        ordered = np.asarray(labels, np.int32)[records]
        np.savez(file, labels=ordered, records=records, fingerprint=np.array(shards_fingerprint(paths)))
    os.replace(part, path)


def read_index(path: Path, paths: Sequence[Path]) -> tuple[np.ndarray, np.ndarray] | None:
    """Return labels int32 [N] and record numbers int64 [N]; None if there is no index of exactly these shards."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["fingerprint"]) == shards_fingerprint(paths):
                return arrays["labels"], arrays["records"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # missing or damaged: the caller makes it again
    return None
