"""Load features that any model has computed: a file instead of a folder of images.

- FILE.npz: `features` [N, D] and `labels` [N], integers or names; if there are any, `split` [N] ("train" or
  "validation"), `files` [N] and `classes` [C], the names of integer labels. Or `train_features`, `train_labels`,
  `validation_features`, `validation_labels`.
- FILE.npy: features [N, D]; beside it `labels.npy`, or `labels.txt` with a line for each row.
- FILE.parquet: a column `label`, perhaps `split` and `file`, and `embedding` (lists of numbers) or `embedding_0`,
  `embedding_1`, ...
- FILE.csv: the same columns but for lists; `labels` and `filenames` are taken for `label` and `file`.

Without a split, a class-balanced part is held out to test on, as for folders of images.
"""

import csv
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ltjax.data.image_folder import choose_test_images
from ltjax.data.progress import note
from ltjax.data.source import Images
from ltjax.data.tables import SYNONYMS
from ltjax.system import npz
from ltjax.system.paths import local
from ltjax.system.wording import one_line, some
from ltjax.types import UserError

TRAIN, TEST = "train", ("validation", "val", "test")  # values of `split`
MOST_CLASSES = 1_000_000  # integer labels up to it


def load(name: str = "features", root: str | os.PathLike | None = None) -> Images:
    """Load a file of features. Rows stay float16 if they are; others become float32.

    Raises:
      UserError: The file is missing or damaged, rows do not fit the labels, or features are not finite or 0.
    """
    if not root:
        raise UserError("features need the file that holds them: --config.data.root=FILE.npz, .npy, .parquet or .csv")
    path = local(root)
    columns = _read(path)
    if {"train_features", "train_labels"} <= set(columns):
        columns = _joined(columns)
    if not {"features", "labels"} <= set(columns):
        raise UserError(f"{path} has {', '.join(columns) or 'nothing'}: needed are features and labels")
    texts = {key: _text(path, key, columns[key]) for key in ("labels", "split", "classes", "files") if key in columns}
    features = _checked(path, np.asarray(columns["features"]), texts["labels"], texts.get("files"))
    for key in ("split", "files"):
        if key in texts and len(texts[key]) != len(features):
            raise UserError(f"{path}: {len(features)} rows of features and {len(texts[key])} of {key}")
    labels, names = _labels(path, texts["labels"], texts.get("classes"))
    return _parts(path, features, labels, texts.get("split"), names)


def _text(path: Path, key: str, values: Any) -> np.ndarray:
    """Return a column of text or integers [N]; bytes are UTF-8."""
    values = np.asarray(values)
    if values.ndim != 1:
        raise UserError(f"{path}: {key} have shape {list(values.shape)}: one value a row is needed")
    try:
        return np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {key} are bytes that are not UTF-8") from error


def rows(file: str | os.PathLike) -> tuple[np.ndarray, list[str]]:
    """Read features without labels: floats [N, 1, 1, D], and a name for each row. UserError as in `load`."""
    path = local(file)
    columns = _read(path, labelled=False)
    if (features := columns.get("features")) is None:
        raise UserError(f"{path} has {', '.join(columns) or 'nothing'}: needed are features")
    files = _text(path, "files", columns["files"]) if "files" in columns else None
    features = _checked(path, np.asarray(features), None, files)
    if files is not None and len(files) != len(features):
        raise UserError(f"{path}: {len(features)} rows of features and {len(files)} of files")
    return features, [f"row {i}" for i in range(len(features))] if files is None else [str(name) for name in files]


def _read(path: Path, labelled: bool = True) -> dict[str, Any]:
    """Read the columns of a file."""
    if path.suffix.lower() not in READERS or not path.is_file():
        raise UserError(f"{path}: no file of features; one of {', '.join(READERS)}")
    try:
        if path.suffix.lower() == ".npy" and not labelled:
            return {"features": np.load(path, mmap_mode="r", allow_pickle=False)}
        return READERS[path.suffix.lower()](path)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, MemoryError, csv.Error) as error:
        raise UserError(f"cannot read the features in {path}: {one_line(error)}") from error


def _joined(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Join the arrays of training and validation, if there are any of validation."""
    parts = [part for part in (TRAIN, *TEST) if {f"{part}_features", f"{part}_labels"} <= set(columns)]
    joined = {key: np.concatenate([columns[f"{part}_{key}"] for part in parts]) for key in ("features", "labels")}
    counts = [len(columns[f"{part}_labels"]) for part in parts]
    split = {"split": np.repeat(np.array(parts), counts)} if len(parts) > 1 else {}
    return {**joined, **split, **{key: columns[key] for key in ("classes",) if key in columns}}


def _checked(path: Path, features: np.ndarray, labels: np.ndarray | None, files: Any) -> np.ndarray:
    """Return features as floats [N, 1, 1, D]; UserError if they cannot be trained on."""
    if features.ndim != 2 or not features.size or features.dtype.kind not in "fiu":
        raise UserError(f"{path}: features are {features.dtype} {list(features.shape)}: numbers [N, D] are needed")
    if labels is not None and labels.shape != features.shape[:1]:
        raise UserError(f"{path}: {len(features)} rows of features and labels of shape {list(labels.shape)}")
    if features.dtype != np.float16:
        features = features.astype(np.float32)
    for what, wrong in (("is not finite", ~np.isfinite(features).all(1)), ("is all zeros", ~features.any(1))):
        rows = np.flatnonzero(wrong)
        if len(rows):
            named = [f"row {row}" + (f" ({files[row]})" if files is not None else "") for row in rows[:6]]
            raise UserError(f"{path}: {len(rows)} of {len(features)} features: {some(named)} {what}: remove these rows")
    return features[:, None, None, :]


def _labels(path: Path, labels: np.ndarray, classes: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return labels int32 [N], and the names of the classes."""
    if labels.dtype.kind in "US":
        names, numbers = np.unique(labels.astype(str), return_inverse=True)
        if classes is not None:
            known = {str(name): c for c, name in enumerate(classes)}
            if unknown := sorted(set(names.tolist()) - set(known)):
                raise UserError(f"{path}: labels that `classes` lacks: {some(unknown)}")
            return np.array([known[name] for name in names], np.int32)[numbers], tuple(known)
        return numbers.astype(np.int32), tuple(names.tolist())
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > MOST_CLASSES:
        raise UserError(f"{path}: labels are {labels.dtype}: integers from 0 up, or names")
    count = int(labels.max()) + 1
    names = tuple(f"class {c}" for c in range(count)) if classes is None else tuple(str(name) for name in classes)
    if len(names) < count:
        raise UserError(f"{path}: labels up to {count - 1}, but `classes` has {len(names)} names")
    return labels.astype(np.int32), names


def _parts(
    path: Path, features: np.ndarray, labels: np.ndarray, split: np.ndarray | None, names: tuple[str, ...]
) -> Images:
    """Divide the rows into training and test."""
    if split is None:
        train, test = choose_test_images(str(path), labels, names, "column `split`")
    else:
        values = np.char.lower(split.astype(str))
        train, test = np.flatnonzero(values == TRAIN), np.flatnonzero(np.isin(values, TEST))
        if other := sorted(set(values.tolist()) - {TRAIN, *TEST}):
            left_out = int((~np.isin(values, (TRAIN, *TEST))).sum())
            note(f"{path}: {left_out} row(s) of split {some(other)} are left out: known are {TRAIN} and {TEST[0]}")
        if not len(train) or not len(test):
            raise UserError(f"{path}: {len(train)} rows of split {TRAIN}, {len(test)} of {TEST[0]}: both are needed")
    counts = np.bincount(labels[train], minlength=len(names))
    if (counts == 0).any():
        raise UserError(f"{path}: no training row of {some([names[c] for c in np.flatnonzero(counts == 0)])}")
    if len(names) < 2:
        raise UserError(f"{path} has {len(names)} class: a classifier needs two classes or more")
    return Images(features[train], labels[train], features[test], labels[test], names)


# Files -> {"features", "labels", "split", "files", "classes": array}.


def _read_npy(path: Path) -> dict[str, Any]:
    features = np.load(path, mmap_mode="r", allow_pickle=False)
    arrays, text = path.with_name("labels.npy"), path.with_name("labels.txt")
    if arrays.is_file():
        labels = np.load(arrays, mmap_mode="r", allow_pickle=False)
    elif text.is_file():
        labels = _typed(text.read_text().splitlines())
    else:
        raise UserError(f"{path}: no {arrays.name} and no {text.name} beside it")
    return {"features": features, "labels": labels}


def _typed(values: list[str]) -> np.ndarray:
    """Return integers if all values are integers, else text."""
    return np.array(values, int) if all(re.fullmatch(r"\d{1,9}", value) for value in values) else np.array(values)


def _read_csv(path: Path) -> dict[str, Any]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        header, *rows = csv.reader(file)
    rows = [row for row in rows if row]
    if uneven := [number for number, row in enumerate(rows, 2) if len(row) != len(header)]:
        raise ValueError(f"line {uneven[0]} has another number of columns than the header, which has {len(header)}")
    columns = {SYNONYMS.get(name, name): [row[i] for row in rows] for i, name in enumerate(header)}
    features = np.array([columns[name] for name in _numbered(columns)], np.float32).T
    return _named(columns, features, _typed)


def _read_parquet(path: Path) -> dict[str, Any]:
    try:
        import pyarrow.parquet  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow: pip install 'ltjax[parquet]', or save it as .npz") from error
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise ValueError(one_line(error)) from error
    columns = {SYNONYMS.get(name, name): table[name].combine_chunks() for name in table.column_names}
    if "embedding" in columns:
        lists = columns["embedding"]
        lengths = np.unique(np.diff(np.asarray(lists.offsets))) if hasattr(lists, "offsets") else [lists.type.list_size]
        if len(lengths) != 1:
            raise ValueError(f"embeddings of {len(lengths)} lengths, from {lengths[0]} to {lengths[-1]}")
        features = lists.flatten().to_numpy(zero_copy_only=False).reshape(len(lists), int(lengths[0]))
    else:
        numbered = [columns[name].to_numpy(zero_copy_only=False) for name in _numbered(columns)]
        features = np.stack(numbered, 1)

    def values(column: Any) -> np.ndarray:
        listed = column.to_pylist()
        return np.array(listed) if all(isinstance(value, int) for value in listed) else np.array(list(map(str, listed)))

    return _named(columns, features, values)


def _numbered(columns: Mapping[str, Any]) -> list[str]:
    """Return embedding_0, embedding_1, ... in the order of their numbers."""
    names = [name for name in columns if re.fullmatch(r"embedding_\d+", name)]
    if not names:
        raise ValueError(f"no column embedding_0 among {some(list(columns))}")
    return sorted(names, key=lambda name: int(name.partition("_")[2]))


def _named(columns: Mapping[str, Any], features: np.ndarray, values: Callable[[Any], np.ndarray]) -> dict[str, Any]:
    keys = {"labels": "label", "split": "split", "files": "file"}
    return {"features": features, **{key: values(columns[name]) for key, name in keys.items() if name in columns}}


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ".npz": npz.read,
    ".npy": _read_npy,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
