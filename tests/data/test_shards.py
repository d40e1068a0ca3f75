"""Reading large data sets in array records, from ltjax and from TFDS."""

import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from ltjax import data
from ltjax.data import index, shards
from ltjax.data.prepare.__main__ import main
from ltjax.data.source import newest_version
from ltjax.types import UserError
from tests.data import miniatures

COUNTS, VALIDATION = (6, 4, 2), 2


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Return the folder of all data sets, with a miniature prepared by ltjax."""
    source, data_dir = tmp_path_factory.mktemp("official"), tmp_path_factory.mktemp("prepared")
    miniatures.inat18(source, COUNTS, VALIDATION, size=16)
    assert main(["inat18", f"--source={source}", f"--data_dir={data_dir}"]) == 0
    return data_dir


@pytest.fixture
def copy(prepared, tmp_path, monkeypatch):
    """Return a copy to be damaged: the folder of all data sets, and that of the data set."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(prepared, tmp_path / "data")
    directory = newest_version(tmp_path / "data", "i_naturalist2018")
    directory.chmod(0o755)
    return tmp_path / "data", directory


def same(first, second):
    for files, others in ((first.train_files, second.train_files), (first.test_files, second.test_files)):
        if [files[i] for i in range(len(files))] != [others[i] for i in range(len(others))]:
            return False
    return (first.train_labels == second.train_labels).all() and (first.test_labels == second.test_labels).all()


def test_sets_prepared_by_ltjax_are_read(prepared):
    loaded = data.load("i_naturalist2018", prepared)
    assert np.bincount(loaded.train_labels).tolist() == list(COUNTS)
    assert np.bincount(loaded.test_labels).tolist() == [VALIDATION] * 3
    assert len(loaded.class_names) == 3
    of_each = {label: {miniatures.photo(label, n, 16) for n in range(20)} for label in range(3)}
    contents = [loaded.train_files[i] for i in range(len(loaded.train_files))]
    assert len(set(contents)) == sum(COUNTS)
    assert all(content in of_each[label] for content, label in zip(contents, loaded.train_labels, strict=True))


def test_a_missing_index_is_made_once(copy, prepared, monkeypatch):
    data_dir, directory = copy
    for path in directory.glob("*.index.npz"):
        path.unlink()
    loaded = data.load("i_naturalist2018", data_dir)
    assert same(loaded, data.load("i_naturalist2018", prepared))
    monkeypatch.setattr(shards, "write_index", lambda *_: pytest.fail("made again"))
    assert same(data.load("i_naturalist2018", data_dir), loaded)


def test_an_index_of_other_shards_is_replaced(copy, prepared):
    data_dir, directory = copy
    with np.load(directory / "train.index.npz") as arrays:
        values = dict(arrays)
    values.update(fingerprint=np.asarray("of other files"), labels=values["labels"][::-1])
    np.savez(directory / "train.index.npz", **values)
    assert same(data.load("i_naturalist2018", data_dir), data.load("i_naturalist2018", prepared))


def test_the_index_is_cached_if_the_folder_is_not_writable(copy, tmp_path, monkeypatch):
    data_dir, directory = copy
    (directory / "train.index.npz").unlink()
    write = index.write_index

    def refuse(path, *rest):
        if path.parent == directory:
            raise PermissionError(13, "Permission denied")
        write(path, *rest)

    monkeypatch.setattr(shards, "write_index", refuse)
    first = data.load("i_naturalist2018", data_dir)
    assert list((tmp_path / "cache" / "ltjax").glob("index-*.npz"))
    monkeypatch.setattr(shards, "write_index", lambda *_: pytest.fail("made again"))
    assert same(data.load("i_naturalist2018", data_dir), first)


class ImagenetLt(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder with the features of TFDS' own, which writes records in shuffled order."""

    name = "imagenet_lt"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = dict(
            image=tfds.features.Image(),
            label=tfds.features.ClassLabel(names=["x", "y"]),
            file_name=tfds.features.Text(),
        )
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "validation", "test")}

    def _generate_examples(self, split):
        for number in range(9):
            name = f"{split}_{number}.JPEG"
            content = miniatures.photo(number % 2, number, 16)
            yield name, {"image": content, "label": number % 2, "file_name": name}


def test_sets_written_by_tfds_are_sorted_by_file_name(tmp_path):
    builder = ImagenetLt(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    assert not list(newest_version(tmp_path, "imagenet_lt").glob("*.index.npz"))
    loaded = data.load("imagenet_lt", tmp_path)
    assert loaded.class_names == ("x", "y")
    for files, labels in ((loaded.train_files, loaded.train_labels), (loaded.test_files, loaded.test_labels)):
        assert labels.tolist() == [number % 2 for number in range(9)]
        assert [files[n] for n in range(9)] == [miniatures.photo(n % 2, n, 16) for n in range(9)]


def test_a_missing_data_set_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"imagenet_lt is not in .*python -m ltjax.data.prepare imagenet_lt .*--source"):
        data.load("imagenet_lt", tmp_path)


@pytest.mark.parametrize("spoil", ["features.json", "label.labels.txt", "dataset_info.json"])
def test_a_damaged_folder_is_named(copy, spoil):
    data_dir, directory = copy
    (directory / spoil).unlink()
    with pytest.raises(UserError, match=f"{directory} is damaged or incomplete"):
        data.load("i_naturalist2018", data_dir)


def test_another_format_is_named(copy):
    data_dir, directory = copy
    path = directory / "dataset_info.json"
    path.write_text(path.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="is in the tfrecord format"):
        data.load("i_naturalist2018", data_dir)
