"""Open large prepared data sets, `<data_dir>/<name>/<version>`; images stay in their array records.

TFDS or `python -m ltjax.data.prepare` wrote them. Reading needs no TensorFlow.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from ltjax.data import prepared, progress
from ltjax.data.index import Index, make_index, read_index, shards_fingerprint, write_index
from ltjax.data.source import Stored, resolve_data_dir
from ltjax.system.paths import cache_folder
from ltjax.system.wording import one_line
from ltjax.types import UserError

SPLITS = {  # {data set: (training split, test split)}
    "imagenet_lt": ("train", "test"),
    "places_lt": ("train", "test"),
    "i_naturalist2018": ("train", "validation"),
}
KEYS = ("file_name", "filename", "id")  # features that name an image; their order is the same on all machines
CHUNK = 512  # records per read when all are read


class Records:
    """The images of a split, in the order of its index."""

    def __init__(self, source: Any, index: Index, directory: Path, split: str):
        self._source, self._index, self._directory, self._split = source, index, directory, split

    def __len__(self) -> int:
        return len(self._index.records)

    def __getitem__(self, index: int) -> bytes:
        try:
            return prepared.fields(self._source[int(self._index.records[index])])["image"].bytes_list.value[0]
        except Exception as error:  # array_record and protobuf each raise their own kinds
            raise UserError(f"{self.name(index)} cannot be read ({one_line(error)})") from error

    def name(self, index: int) -> str:
        return f"record {self._index.records[index]} of split {self._split!r} in {self._directory}"

    def identity(self, index: int) -> bytes:
        """Return the hash of the image's name, which its data set gives to no other image."""
        return self._index.identities[index].tobytes()


def load(name: str, data_dir: str | os.PathLike | None = None) -> Stored:
    """Open `name`, one of `SPLITS`; images are in the order of their file names or ids.

    Labels come from the index beside the records. If there is none, as with TFDS, one pass over the records makes it
    and stores it there, or in `~/.cache/ltjax` if that folder is not writable. UserError if the data set is
    missing or damaged, or only TensorFlow can read it.
    """
    return prepared.read(name, resolve_data_dir(data_dir), _open, flags=" --source=...")


def _open(builder: Any, directory: Path, class_names: tuple[str, ...]) -> Stored:
    import tensorflow_datasets as tfds

    parts: list[Any] = []
    for split in SPLITS[directory.parent.name]:
        if split not in builder.info.splits:
            raise ValueError(f"it lacks the split {split!r}")
        source = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        paths = [Path(path) for path in builder.info.splits[split].filepaths]
        index = _index(directory, split, source, paths)
        labels = index.labels
        if len(labels) != len(source):
            raise ValueError(f"its index has {len(labels)} images of split {split!r}, not {len(source)}")
        if labels.min() < 0 or labels.max() >= len(class_names):
            raise ValueError(f"split {split!r} has labels up to {labels.max()}, of {len(class_names)} classes")
        parts += [Records(source, index, directory, split), labels]
    return Stored(parts[0], parts[1], parts[2], parts[3], class_names)


def _index(directory: Path, split: str, source: Any, paths: list[Path]) -> Index:
    """Read the index of a split, or make it."""
    cache = cache_folder()
    candidates = [directory / f"{split}.index.npz"]
    candidates += [cache / f"index-{shards_fingerprint(paths)[:32]}.npz"] if cache else []
    for path in candidates:
        if (stored := read_index(path, paths)) is not None:
            return stored
    labels, keys = np.empty(len(source), np.int32), []
    with progress.bar(transient=True) as bar:
        task = bar.add_task(f"reading the labels of {directory.parent.name} {split}", total=len(source))
        for start in range(0, len(source), CHUNK):
            chunk = range(start, min(start + CHUNK, len(source)))
            for number, record in zip(chunk, source.__getitems__(chunk), strict=True):
                fields = prepared.fields(record)
                labels[number] = fields["label"].int64_list.value[0]
                keys.append(_key(fields, number))
            bar.advance(task, len(chunk))
    index = make_index(labels, keys, split)
    for path in candidates:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_index(path, index, paths)
            break
        except OSError:
            continue  # the folder is not writable
    return index


def _key(fields: Any, number: int) -> Any:
    for key in KEYS:
        if key in fields:
            value = fields[key]
            return value.bytes_list.value[0] if value.bytes_list.value else value.int64_list.value[0]
    return number
