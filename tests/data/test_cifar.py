"""Reading a prepared CIFAR: the order of the images, the search for the folder, messages about damage."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from ltjax.data import cifar, source
from ltjax.data.prepare import cifar as preparation
from ltjax.types import UserError

REAL = os.environ.get("TFDS_DATA_DIR")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a folder with a CIFAR-100 of 40 training and 12 test images of noise, and its splits."""
    rng = np.random.default_rng(0)
    splits = {}
    for split, count in (("train", 40), ("test", 12)):
        labels = np.stack([rng.integers(20, size=count), rng.integers(100, size=count)], axis=1).astype(np.uint8)
        splits[split] = preparation.RawSplit(rng.integers(256, size=(count, 32, 32, 3), dtype=np.uint8), labels)
    names = {"coarse_label": [f"group {i}" for i in range(20)], "label": [f"class_{i}" for i in range(100)]}
    data_dir = tmp_path_factory.mktemp("written")
    preparation.write(preparation.CIFAR100, data_dir, names, splits)
    return data_dir, splits


@pytest.fixture
def copy(written, tmp_path):
    """Return a copy of the prepared version, to be damaged."""
    return Path(shutil.copytree(written[0] / "cifar100", tmp_path / "cifar100")) / "3.0.2"


def raw_records(directory, split):
    builder = tfds.builder_from_directory(directory)
    return list(builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES))


def reshard(directory, split, shards):
    """Replace a split's files: one file per list of serialised records."""
    for path in directory.glob(f"cifar100-{split}.*"):
        path.unlink()
    for i, records in enumerate(shards):
        path = directory / f"cifar100-{split}.array_record-{i:05d}-of-{len(shards):05d}"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
    info = json.loads((directory / "dataset_info.json").read_text())
    entry = next(entry for entry in info["splits"] if entry["name"] == split)
    entry["shardLengths"] = [str(len(records)) for records in shards]
    (directory / "dataset_info.json").write_text(json.dumps(info))


def assert_equal(images, splits):
    np.testing.assert_array_equal(images.train_images, splits["train"].images)
    np.testing.assert_array_equal(images.train_labels, splits["train"].labels[:, 1])
    np.testing.assert_array_equal(images.test_images, splits["test"].images)
    np.testing.assert_array_equal(images.test_labels, splits["test"].labels[:, 1])


def failure(data_dir, name="cifar100"):
    with pytest.raises(UserError) as caught:
        cifar.load(name, data_dir)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_exact_pixels_labels_and_types(written):
    images = cifar.load("cifar100", written[0])
    assert_equal(images, written[1])
    assert images.train_images.dtype == np.uint8 and images.train_labels.dtype == np.int32
    assert images.class_names[:2] == ("class_0", "class_1") and len(images.class_names) == 100


def test_images_are_sorted_by_id_for_any_shuffling_and_sharding(written, copy):
    records = raw_records(copy, "train")
    decoders = {"image": tfds.decode.SkipDecoding()}
    on_disk = [record["id"] for record in tfds.builder_from_directory(copy).as_data_source("train", decoders=decoders)]
    assert on_disk != sorted(on_disk)
    reshard(copy, "train", [records[30:], records[:7][::-1], records[7:30]])
    assert_equal(cifar.load("cifar100", copy.parent.parent), written[1])


def test_the_newest_version_is_read(tmp_path):
    for folder in ("2.9.9", "3.0.2", "3.0.10", "incomplete.ABCDEF_3.0.11", "3.0.12.bak"):
        (tmp_path / "cifar10" / folder).mkdir(parents=True)
    assert source.newest_version(tmp_path, "cifar10").name == "3.0.10"


def test_data_dir_is_the_argument_then_the_environment_then_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("TFDS_DATA_DIR", "/from/environment")
    assert source.resolve_data_dir("~/given") == Path("/home/someone/given")
    assert source.resolve_data_dir() == Path("/from/environment")
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert source.resolve_data_dir() == Path("/home/someone/tensorflow_datasets")


@pytest.mark.parametrize("folder", ["nowhere", "file", "cifar10 only", "interrupted"])
def test_a_missing_data_set_names_the_folder_and_the_command(folder, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "cifar10 only" / "cifar10" / "3.0.2").mkdir(parents=True)
    (tmp_path / "interrupted" / "cifar100" / "incomplete.ABCDEF_3.0.2").mkdir(parents=True)
    message = failure(tmp_path / folder)
    assert f"cifar100 is not in {tmp_path / folder}:" in message
    quoted = f"'{tmp_path / folder}'" if " " in folder else tmp_path / folder
    assert f"`python -m ltjax.data.prepare cifar100 --data_dir={quoted}`" in message


def remove_shard(directory):
    (directory / "cifar100-test.array_record-00000-of-00001").unlink()


def truncate_shard(directory):
    path = directory / "cifar100-train.array_record-00000-of-00001"
    os.truncate(path, path.stat().st_size // 2)


def empty_shard(directory):
    os.truncate(directory / "cifar100-train.array_record-00000-of-00001", 0)


def remove_info(directory):
    (directory / "dataset_info.json").unlink()


def truncate_info(directory):
    os.truncate(directory / "dataset_info.json", 100)


def remove_features(directory):
    (directory / "features.json").unlink()


def remove_class_names(directory):
    (directory / "label.labels.txt").unlink()


def remove_class_name(directory):
    (directory / "label.labels.txt").write_text("class_0\n")


def repeat_record(directory):
    records = raw_records(directory, "train")
    reshard(directory, "train", [records[1:] + records[1:2]])


def omit_record(directory):
    records = raw_records(directory, "train")
    reshard(directory, "train", [[record for record in records if b"train_00003" not in record]])


def empty_folder(directory):
    shutil.rmtree(directory)
    directory.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        remove_shard,
        truncate_shard,
        empty_shard,
        remove_info,
        truncate_info,
        remove_features,
        remove_class_names,
        remove_class_name,
        repeat_record,
        omit_record,
        empty_folder,
    ],
)
def test_damage_is_reported_in_one_line_with_the_command(damage, copy):
    damage(copy)
    message = failure(copy.parent.parent)
    assert message.startswith(f"{copy} is damaged or incomplete (")
    command = f"python -m ltjax.data.prepare cifar100 --data_dir={copy.parent.parent}"
    assert message.endswith(f"): delete that folder, then run `{command}`")


def test_a_format_that_only_tensorflow_reads_is_named(copy):
    info = (copy / "dataset_info.json").read_text()
    (copy / "dataset_info.json").write_text(info.replace("array_record", "tfrecord"))
    assert "tfrecord format" in failure(copy.parent.parent)


def test_import_is_cheap_and_loading_is_silent(written):
    code = (
        "import sys, ltjax.data.cifar as cifar\n"
        "assert not {'tensorflow_datasets', 'array_record'} & sys.modules.keys()\n"
        f"cifar.load('cifar100', {str(written[0])!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(not REAL or not (Path(REAL) / "cifar100").is_dir(), reason="TFDS_DATA_DIR does not hold cifar100")
def test_real_cifar100():
    images = cifar.load("cifar100")
    assert images.train_images.shape == (50000, 32, 32, 3) and images.test_images.shape == (10000, 32, 32, 3)
    assert (np.bincount(images.train_labels, minlength=100) == 500).all()
    assert (np.bincount(images.test_labels, minlength=100) == 100).all()
    assert images.class_names[0] == "apple" and images.class_names[99] == "worm"
    # The mean of the training pixels, as published with many implementations: (0.5071, 0.4865, 0.4409).
    np.testing.assert_allclose(images.train_images.mean((0, 1, 2)) / 255, (0.5071, 0.4865, 0.4409), atol=1e-4)
