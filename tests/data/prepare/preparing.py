"""Prepare miniatures of iNaturalist 2018 and read the results."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from ltjax.data.prepare import shards
from ltjax.data.prepare.__main__ import main

NAME = "i_naturalist2018"
VERSION = "1.0.0"


def run(source, data_dir, *flags):
    return main(["inat18", f"--source={source}", f"--data_dir={data_dir}", *flags])


def directory(data_dir):
    return data_dir / NAME / VERSION


def incomplete(data_dir):
    return data_dir / NAME / f"{VERSION}.incomplete"


def records(folder, split):
    """Return the records of a split in the order of the shards."""
    builder = tfds.builder_from_directory(folder)
    return list(builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()}))


def raw(folder):
    """Return the serialised records, the arrays of the indices, and the shard lengths, each by split."""
    builder = tfds.builder_from_directory(folder)
    method = tfds.decode.DeserializeMethod.RAW_BYTES
    serialised = {
        split: list(builder.as_data_source(split, deserialize_method=method)) for split in builder.info.splits
    }
    indices = {
        split: {k: v.tolist() for k, v in np.load(folder / f"{split}.index.npz").items()} for split in serialised
    }
    return serialised, indices, {split: info.shard_lengths for split, info in builder.info.splits.items()}


def error_line(capsys):
    """Return the one line on stderr besides the warning about the miniature's size."""
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: these are not")]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def run_with_small_shards(source, data_dir):
    """Prepare with two images in a shard; return the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_IMAGES", 2)
        assert run(source, data_dir) == 0
    return directory(data_dir)


def originals(source):
    """Return {id: content} of the images in a miniature's archive."""
    with tarfile.open(source / "train_val2018.tar.gz") as tar:
        return {Path(member.name).stem: tar.extractfile(member).read() for member in tar}
