"""npz files that others wrote are read without pickles and without more memory than they can fill."""

import io
import zipfile

import numpy as np
import pytest

from ltjax.system import npz


def test_arrays_come_back(tmp_path):
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.array(["x", "yz"])}
    np.savez(tmp_path / "a.npz", **arrays)
    read = npz.read(tmp_path / "a.npz")
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)


def test_objects_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array([{}], object))
    with pytest.raises(ValueError, match="no intact npz file of numbers"):
        npz.read(tmp_path / "a.npz")


def test_a_header_may_not_declare_more_than_the_member_holds(tmp_path):
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, dict(descr="<f8", fortran_order=False, shape=(10**12,)))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", content.getvalue() + bytes(8))
    with pytest.raises(ValueError, match=r"an array of \(1000000000000,\)"):
        npz.read(tmp_path / "a.npz")


def test_a_file_may_not_declare_more_than_a_hundred_times_its_size(monkeypatch, tmp_path):
    monkeypatch.setattr(npz, "SMALL", 1000)
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(10**6))
    with pytest.raises(ValueError, match="it declares more than"):
        npz.read(tmp_path / "a.npz")


def test_a_damaged_file_is_a_value_error(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.arange(100))
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content[:-30])
    with pytest.raises(ValueError, match="no intact npz file of numbers"):
        npz.read(tmp_path / "a.npz")
