"""Sidecars of prepared splits: labels and record numbers in an order that neither shuffling nor sharding changes."""

import hashlib
import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def shards_fingerprint(paths: Iterable[Path]) -> str:
    """SHA-256, in hex, of the names and sizes in bytes of a split's shards: whether an index still belongs to them."""
    lines = sorted(f"{path.name} {path.stat().st_size}" for path in paths)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def write_index(path: Path, labels: Sequence[int] | np.ndarray, keys: Sequence[Any], paths: Iterable[Path]) -> None:
    """Writes the index of a split of N records as an npz file, whole or not at all.

    Its arrays are `labels` [N] int32 and `records` [N] int64, the record numbers in the split's concatenated shards,
    both in canonical order, which is that of the sorted keys; and `fingerprint`, that of the shards.

    Args:
      path: where to, `<split>.index.npz` beside the shards.
      labels: of each record, in the order of the records.
      keys: what each record is known by (`file_name` or `id`), all different, in the order of the records.
      paths: the split's shards.
    """
    records = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        ordered = np.asarray(labels, np.int32)[records]
        np.savez(file, labels=ordered, records=records, fingerprint=np.array(shards_fingerprint(paths)))
    os.replace(part, path)


def read_index(path: Path, paths: Sequence[Path]) -> tuple[np.ndarray, np.ndarray] | None:
    """Labels int32 [N] and record numbers int64 [N]; None where there is no index of just these files."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["fingerprint"]) == shards_fingerprint(paths):
                return arrays["labels"], arrays["records"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # missing or damaged: it is made again
    return None
