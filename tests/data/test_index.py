"""The index of a split's shards."""

import hashlib

import numpy as np
import pytest

from ltjax.data import identity, index


@pytest.fixture
def shards(tmp_path):
    paths = [tmp_path / "b", tmp_path / "a"]
    paths[0].write_bytes(b"123")
    paths[1].write_bytes(b"12345")
    return paths


@pytest.fixture
def written(tmp_path, shards):
    index.write_index(tmp_path / "train.index.npz", index.make_index([5, 6, 7], ["n10_2", "n9_1", "n10_10"]), shards)
    return dict(np.load(tmp_path / "train.index.npz"))


def test_the_fingerprint_hashes_sorted_names_and_sizes(shards):
    expected = hashlib.sha256(b"a 5\nb 3").hexdigest()
    assert index.shards_fingerprint(shards) == index.shards_fingerprint(shards[::-1]) == expected


def test_records_are_sorted_by_key(written):
    assert written["records"].tolist() == [2, 0, 1]


def test_labels_are_sorted_by_key(written):
    assert written["labels"].tolist() == [7, 5, 6]


def test_an_image_is_identified_by_its_key(written, shards):
    names = [b"n10_10", b"n10_2", b"n9_1"]
    assert [row.tobytes() for row in written["identities"]] == [identity.digest(name) for name in names]


def test_an_index_of_an_older_version_is_made_again(written, tmp_path, shards):
    del written["identities"]
    np.savez(tmp_path / "train.index.npz", **written)
    assert index.read_index(tmp_path / "train.index.npz", shards) is None


def test_types(written, shards):
    assert written["labels"].dtype == np.int32 and written["records"].dtype == np.int64
    assert written["fingerprint"].shape == () and str(written["fingerprint"]) == index.shards_fingerprint(shards)


def test_writing_an_index_leaves_no_temporary_file(written, tmp_path):
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "train.index.npz"}
