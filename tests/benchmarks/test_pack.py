"""The pack for a machine without internet: lossless pixels, the same split, the missing wheels."""

import hashlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from benchmarks import pack
from ltjax.data import cifar, splits
from ltjax.data.source import Images
from ltjax.types import UserError

SPLIT = {"imbalance": 100.0, "profile": "exp", "seed": 0}


@pytest.fixture(scope="module")
def images():
    """Return ten classes of 100 training images, shuffled: half noise, half smooth."""
    rng = np.random.default_rng(0)
    noise = rng.integers(256, size=(1020, 32, 32, 3), dtype=np.uint8)
    smooth = (np.add.outer(np.arange(32), np.arange(32))[..., None] * np.array([1, 3, 5]) + 200).astype(np.uint8)
    noise[::2] = smooth
    labels = rng.permutation(np.repeat(np.arange(10, dtype=np.int32), 100))
    names = tuple(f"class {number}" for number in range(10))
    return Images(noise[:1000], labels, noise[1000:], np.arange(20, dtype=np.int32) % 10, names)


@pytest.fixture
def finished(images, tmp_path, monkeypatch):
    """Return `finished(*flags)`: pack those images without wheels, as commit "abc"; return the exit code."""
    monkeypatch.setattr(pack, "fetch_wheels", lambda have, folder, **_: folder.mkdir(parents=True) or [])
    monkeypatch.setattr(cifar, "load", lambda *_: images)
    monkeypatch.setattr(pack, "commit", lambda folder: "abc")
    return lambda *flags: pack.main([f"--out={tmp_path / 'pack'}", *flags])


def test_images_are_restored_exactly(images):
    data = pack.compress_images(images.train_images)
    np.testing.assert_array_equal(pack.decompress_images(data, images.train_images.shape), images.train_images)
    assert len(pack.compress_images(images.train_images[::2])) < images.train_images[::2].nbytes / 100


def test_unpacked_images_give_the_same_split_and_are_black_elsewhere(images, finished, tmp_path):
    assert finished() == 0
    assert pack.main([f"--unpack={tmp_path / 'pack'}", f"--to={tmp_path / 'to'}"]) == 0
    actual = cifar._read_npz(tmp_path / "to" / "data" / "cifar100.npz")
    ours, theirs = (splits.long_tailed_split(i.train_labels, 10, **SPLIT) for i in (actual, images))
    np.testing.assert_array_equal(ours.train, theirs.train)
    held = splits.long_tailed_split(images.train_labels, 10, imbalance=9.0, seed=0, holdout=10)
    shown = np.union1d(ours.train, held.holdout)
    np.testing.assert_array_equal(actual.train_images[shown], images.train_images[shown])
    assert not np.delete(actual.train_images, shown, axis=0).any()
    for a, b in zip(actual[1:4], images[1:4], strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
    assert actual.class_names == images.class_names


def test_the_npz_is_read_without_tfds_and_opencv(images, tmp_path):
    np.savez(tmp_path / "cifar100.npz", **images._asdict())
    code = (
        "import sys, hashlib\n"
        "sys.modules.update(cv2=None, tensorflow_datasets=None)\n"
        "import ltjax.train\n"
        "from ltjax.data import load\n"
        f"print(hashlib.sha256(load('cifar100', {str(tmp_path)!r}).train_images.tobytes()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=pack.ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (hashlib.sha256(images.train_images.tobytes()).hexdigest(), "")


@pytest.mark.parametrize("damage", ["cut short", "field missing", "wrong labels", "no numpy file"])
def test_a_damaged_npz_is_one_line(images, tmp_path, damage):
    path = tmp_path / "cifar100.npz"
    fields = images._asdict()
    if damage == "field missing":
        del fields["test_labels"]
    if damage == "wrong labels":
        fields["train_labels"] = fields["train_labels"] + 10
    np.savez(path, **fields)
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-1000])
    if damage == "no numpy file":
        path.write_bytes(b"hello")
    with pytest.raises(UserError, match="is damaged or incomplete") as caught:
        cifar.load("cifar100", tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_pack_is_refused(finished, tmp_path, capsys):
    finished()
    path = tmp_path / "pack" / "images.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert pack.main([f"--unpack={tmp_path / 'pack'}", f"--to={tmp_path / 'to'}"]) == 2
    assert "images.npz is damaged or incomplete" in capsys.readouterr().err
    assert not (tmp_path / "to" / "data" / "cifar100.npz").exists()


def test_too_large_a_pack_fails_and_cannot_be_unpacked(finished, tmp_path, capsys):
    assert finished("--limit_mb=0.5") == 2
    assert "above --limit_mb=0.5" in capsys.readouterr().err
    assert pack.main([f"--unpack={tmp_path / 'pack'}", f"--to={tmp_path / 'to'}"]) == 2
    assert "holds no finished pack" in capsys.readouterr().err


def test_archived_runs_do_not_count(finished, tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    (checkout / "results").mkdir(parents=True)
    (checkout / "run.py").write_bytes(b"0123456789")
    (checkout / "results" / "weights.safetensors").write_bytes(bytes(1000))
    subprocess.run(["git", "-C", str(checkout), "init", "-q"], check=True)
    monkeypatch.setattr(pack, "ROOT", checkout)
    assert finished() == 0
    assert pack.read_pack(tmp_path / "pack")["bytes"]["checkout"] == 10


def test_a_pack_for_another_python_is_refused(finished, tmp_path, capsys):
    finished("--python=3.0")
    assert pack.main([f"--unpack={tmp_path / 'pack'}", f"--to={tmp_path / 'to'}"]) == 2
    assert "is for Python 3.0" in capsys.readouterr().err


def test_a_copy_without_git_knows_its_commit_and_changes(finished, tmp_path, monkeypatch):
    from ltjax.runs import results

    finished()
    monkeypatch.undo()
    monkeypatch.setattr(results, "git_commit", lambda: None)
    assert pack.commit(tmp_path / "pack") == "abc"
    monkeypatch.setattr(pack, "code_digest", lambda: "something else")
    assert pack.commit(tmp_path / "pack") == "abc-changed"


@pytest.fixture
def index(monkeypatch):
    """Return a package index instead of pip: {name: (version, dependencies)}; it records the requests."""
    known = {
        "ml-collections": ("1.1.0", ["PyYAML", "absl-py", 'dataclasses; python_version < "3.7"']),
        "tensorboardX": ("2.6.5", ["protobuf>=3.20", 'imageio; extra == "video"']),
        "flax": ("0.12.12", ["jax>=0.8.1"]),
        "simplejpeg": ("1.9.0", ["numpy"]),
        "protobuf": ("7.0", []),
    }
    asked = []

    def download(requirement, folder, **_):
        name = next(name for name in known if requirement.startswith(name))
        version, needs = known[name]
        path = folder / f"{name}-{version}-py3-none-any.whl"
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines))
        asked.append(requirement)
        return path

    monkeypatch.setattr(pack, "_download", download)
    return asked


def test_missing_and_old_wheels_are_packed_with_their_dependencies(index, tmp_path):
    here = (
        "absl_py,clu,flax,jax,jinja2,matplotlib,numpy,opencv-python-headless,optax,orbax.checkpoint,pillow,rich,"
        "safetensors,pytest,PyYAML,protobuf==3.19"
    )
    common = dict(python="3.12", platform="manylinux_2_28_x86_64")
    names = pack.fetch_wheels(pack.parse_have(here), tmp_path / "missing", carry=(), **common)
    assert [name.partition("-")[0] for name in names] == ["ml", "protobuf", "simplejpeg", "tensorboardX"]
    assert not any("opencv" in requirement or "datasets" in requirement for requirement in index)
    names = pack.fetch_wheels(pack.parse_have(here), tmp_path / "carried", carry=("flax",), **common)
    assert "flax-0.12.12-py3-none-any.whl" in names
    assert "flax>=0.12.9" in index  # the marker was that of the Python there


def test_packages_there_are_read_from_a_list_or_a_file(tmp_path):
    expected = {"jax": "0.11.2", "ml-dtypes": None}
    (tmp_path / "freeze.txt").write_text("jax==0.11.2\nML_dtypes\n")
    assert pack.parse_have("jax==0.11.2, ML_dtypes") == pack.parse_have(str(tmp_path / "freeze.txt")) == expected
    names = [f"package-{number}" for number in range(300)]  # more than a file's name can hold
    assert list(pack.parse_have(",".join(names))) == names
