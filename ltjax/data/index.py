"""Labels of the images in array records, kept beside them, so that counting classes costs no pass over the images."""

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def shards_fingerprint(paths: Sequence[Path]) -> str:
    """A SHA-256 of the names and sizes of a split's files: an index of other files is not this split's."""
    lines = sorted(f"{path.name} {path.stat().st_size}" for path in paths)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def write_index(path: Path, labels: np.ndarray, keys: Sequence[Any], paths: Sequence[Path]) -> None:
    """Keep the labels [N] of records 0 to N - 1 in the order of their keys (file names or ids), whole or not at all."""
    order = np.asarray(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    temporary = path.with_name(path.name + ".tmp.npz")
    np.savez(
        temporary,
        labels=np.asarray(labels, np.int32)[order],
        records=order,
        fingerprint=np.asarray(shards_fingerprint(paths)),
    )
    temporary.replace(path)


def read_index(path: Path, paths: Sequence[Path]) -> tuple[np.ndarray, np.ndarray] | None:
    """Labels int32 [N] and record numbers int64 [N]; None where there is no index of just these files."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["fingerprint"]) == shards_fingerprint(paths):
                return arrays["labels"], arrays["records"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # missing or damaged: it is made again
    return None
