"""Preparing CIFAR from miniature archives in the official layout, and errors in the archives."""

import functools
import hashlib
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from ltjax.data import cifar
from ltjax.data.prepare import cifar as preparation
from ltjax.data.prepare.__main__ import SMALL, main
from ltjax.types import UserError

NAMES = ("cifar10", "cifar100")
FIRST = {"cifar10": "cifar-10-batches-bin/data_batch_1.bin", "cifar100": "cifar-100-binary/train.bin"}


def noise(rng, count, highest_labels):
    """Return images [count, 32, 32, 3], labels [count, L], and both as the bytes of an archive's file."""
    images = rng.integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
    labels = np.stack([rng.integers(highest, size=count) for highest in highest_labels], axis=1).astype(np.uint8)
    data = b"".join(
        label.tobytes() + image[..., 0].tobytes() + image[..., 1].tobytes() + image[..., 2].tobytes()
        for image, label in zip(images, labels, strict=True)
    )
    return images, labels, data


def miniature(name):
    """Return the members of an archive {path: bytes}, and the splits {"train" or "test": (images, labels)} in it."""
    rng = np.random.default_rng(0)
    splits = {}
    if name == "cifar10":
        batches = [noise(rng, 3 + i, (10,)) for i in range(5)]
        members = {f"cifar-10-batches-bin/data_batch_{i + 1}.bin": batch[2] for i, batch in enumerate(batches)}
        splits["train"] = tuple(np.concatenate([batch[i] for batch in batches]) for i in range(2))
        *splits["test"], members["cifar-10-batches-bin/test_batch.bin"] = noise(rng, 4, (10,))
        members["cifar-10-batches-bin/batches.meta.txt"] = b"".join(b"class %d\n" % i for i in range(10)) + b"\n"
        members["cifar-10-batches-bin/readme.html"] = b"not read"
    else:
        members = {}
        *splits["train"], members["cifar-100-binary/train.bin"] = noise(rng, 20, (20, 100))
        *splits["test"], members["cifar-100-binary/test.bin"] = noise(rng, 6, (20, 100))
        members["cifar-100-binary/coarse_label_names.txt"] = b"".join(b"group %d\n" % i for i in range(20))
        members["cifar-100-binary/fine_label_names.txt"] = b"".join(b"class %d\n" % i for i in range(100))
    return members, splits


def write_tar(path, members, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def archive(name, tmp_path):
    return write_tar(tmp_path / "archive.tar.gz", miniature(name)[0])


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "data"


def run(name, data_dir, source=None):
    return main([name, f"--data_dir={data_dir}"] + ([f"--source={source}"] if source else []))


def error_line(capsys, data_dir=None):
    """Return the one error line on stderr; a warning about the archive may precede it."""
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert out == "" and len(lines) == 1 and lines[0].startswith("error: ")
    if data_dir is not None:
        for name in NAMES:
            with pytest.raises(UserError, match=f"{name} is not in"):
                cifar.load(name, data_dir)
    return lines[0]


def test_exact_pixels_labels_and_class_names(name, archive, data_dir, capfd):
    assert run(name, data_dir, archive) == 0
    out, err = capfd.readouterr()
    splits = miniature(name)[1]
    num_train, num_test = len(splits["train"][0]), len(splits["test"][0])
    where = data_dir / name / "3.0.2"
    assert out == f"prepared {name}: {num_train} training and {num_test} test images in {where}\n"
    assert err.startswith(f"warning: {archive} is not the official cifar-") and err.count("\n") == 1

    images = cifar.load(name, data_dir)
    np.testing.assert_array_equal(images.train_images, splits["train"][0])
    np.testing.assert_array_equal(images.train_labels, splits["train"][1][:, -1])
    np.testing.assert_array_equal(images.test_images, splits["test"][0])
    np.testing.assert_array_equal(images.test_labels, splits["test"][1][:, -1])
    assert images.class_names == tuple(f"class {i}" for i in range(len(images.class_names)))
    assert len(images.class_names) == int(name.removeprefix("cifar"))
    assert os.listdir(data_dir) == [name] and os.listdir(data_dir / name) == ["3.0.2"]


def test_tfds_reads_the_result_like_its_own(name, archive, data_dir):
    assert run(name, data_dir, archive) == 0
    splits = miniature(name)[1]
    builder = tfds.builder_from_directory(data_dir / name / "3.0.2")
    packaged = tfds.builder_cls(name)
    assert builder.info.full_name == f"{name}/{packaged.VERSION}"
    assert builder.info.description.startswith(("The CIFAR-10 dataset", "This dataset is just like the CIFAR-10"))
    assert f'"moduleName": "{packaged.__module__}"' in (data_dir / name / "3.0.2" / "dataset_info.json").read_text()
    features = {"id", "image", "label"} | ({"coarse_label"} if name == "cifar100" else set())
    files = {"dataset_info.json", "features.json"}
    files |= {f"{feature}.labels.txt" for feature in features if "label" in feature}
    files |= {f"{name}-{split}.array_record-00000-of-00001" for split in splits}
    assert set(os.listdir(data_dir / name / "3.0.2")) == files
    for split, (_, labels) in splits.items():
        records = list(builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()}))
        records.sort(key=lambda record: record["id"])
        assert all(record.keys() == features for record in records)
        assert [record["id"].decode() for record in records] == [f"{split}_{i:05d}" for i in range(len(labels))]
        assert [record["label"] for record in records] == labels[:, -1].tolist()
        if name == "cifar100":
            assert [record["coarse_label"] for record in records] == labels[:, 0].tolist()


def test_a_member_of_more_than_256_mib_is_not_read(tmp_path, data_dir, monkeypatch, capsys):
    members = miniature("cifar100")[0]
    archive = write_tar(tmp_path / "archive.tar.gz", {**members, "cifar-100-binary/train.bin": bytes(100_000)})
    monkeypatch.setattr(preparation, "MAX_IMAGE_BYTES", 99_999)
    assert run("cifar100", data_dir, archive) == 2
    assert "cifar-100-binary/train.bin declares 100000 bytes, more than 99999" in error_line(capsys)


def test_a_prepared_set_imports_no_other_modules(archive, name, data_dir, tmp_path, monkeypatch):
    """TFDS imports the module of a feature that it does not know."""
    assert run(name, data_dir, archive) == 0
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    file = next(data_dir.glob("*/*/features.json"))
    file.write_text(file.read_text().replace("tensorflow_datasets.core.features.text_feature.Text", "evil.Text"))
    with pytest.raises(UserError, match=r"features\.json names 'evil\.Text', and only features of TFDS are read"):
        cifar.load(name, data_dir)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("mode", ["w", "w:xz"])
def test_a_repacked_archive_is_read(mode, tmp_path, data_dir):
    members = {f"./{path}": data for path, data in miniature("cifar100")[0].items()}
    assert run("cifar100", data_dir, write_tar(tmp_path / "repacked", members, mode)) == 0
    assert len(cifar.load("cifar100", data_dir).train_labels) == 20


def test_a_second_run_changes_nothing(name, archive, data_dir, capsys):
    assert run(name, data_dir, archive) == 0
    before = {path: path.stat().st_mtime_ns for path in sorted(data_dir.rglob("*"))}
    capsys.readouterr()
    assert run(name, data_dir) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{name} is already prepared: ") and err == ""
    assert {path: path.stat().st_mtime_ns for path in sorted(data_dir.rglob("*"))} == before


def test_a_second_run_finds_damage(archive, name, data_dir, capsys):
    assert run(name, data_dir, archive) == 0
    (data_dir / name / "3.0.2" / f"{name}-test.array_record-00000-of-00001").unlink()
    capsys.readouterr()
    assert run(name, data_dir, archive) == 2
    assert "delete that folder" in error_line(capsys)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError("disk")])
def test_an_interruption_leaves_no_data_set_and_the_next_run_works(error, archive, name, data_dir, capsys):
    encode, calls = preparation.cv2.imencode, []

    def fails_at_the_fifth(*args):
        calls.append(args)
        if len(calls) == 5:
            raise error
        return encode(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation.cv2, "imencode", fails_at_the_fifth)
        assert run(name, data_dir, archive) == (130 if error is KeyboardInterrupt else 2)
    error_line(capsys, data_dir)
    assert run(name, data_dir, archive) == 0
    cifar.load(name, data_dir)


def test_an_interruption_during_writing_leaves_no_data_set(archive, name, data_dir, capsys):
    def write_examples(path, iterator):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        adapter = tfds.core.file_adapters.ArrayRecordFileAdapter
        patch.setattr(adapter, "write_examples", write_examples)
        assert run(name, data_dir, archive) == 130
    error_line(capsys, data_dir)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["cifar1000"], "unknown data set 'cifar1000': choose one of cifar10, cifar100"),
        ([], "DATASET"),
        (["cifar10", "--sauce=x"], "--sauce=x"),
    ],
)
def test_a_wrong_command_is_explained(arguments, expected, capsys):
    assert main(arguments) == 2
    assert expected in error_line(capsys)


def test_a_missing_archive_is_named(name, data_dir, tmp_path, capsys):
    assert run(name, data_dir, tmp_path / "nothing.tar.gz") == 2
    line = error_line(capsys, data_dir)
    assert f"no archive at {tmp_path / 'nothing.tar.gz'}" in line and "https://www.cs.toronto.edu/~kriz/" in line


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" * 1000, b"\x1f\x8b\x08" + b"x" * 1000])
def test_a_file_that_is_no_tar_archive_is_named(content, name, data_dir, tmp_path, capsys):
    path = tmp_path / "photo.zip"
    path.write_bytes(content)
    assert run(name, data_dir, path) == 2
    assert f"cannot read {path} as a tar archive" in error_line(capsys, data_dir)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("part", [0.03, 0.5, 0.8])
def test_a_truncated_archive_is_named(mode, part, data_dir, tmp_path, capsys):
    path = write_tar(tmp_path / "archive", miniature("cifar100")[0], mode)
    os.truncate(path, int(path.stat().st_size * part))
    assert run("cifar100", data_dir, path) == 2
    assert str(path) in error_line(capsys, data_dir)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_wrong_byte_in_a_compressed_archive_is_named(mode, data_dir, tmp_path, capsys):
    path = write_tar(tmp_path / "archive", miniature("cifar100")[0], mode)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert run("cifar100", data_dir, path) == 2
    assert f"cannot read {path} as a tar archive" in error_line(capsys, data_dir)


def test_the_archive_of_the_other_cifar_is_an_error(name, archive, data_dir, capsys):
    other = NAMES[1 - NAMES.index(name)]
    assert run(other, data_dir, archive) == 2
    assert "it lacks cifar-" in error_line(capsys, data_dir)


def without_member(members, name):
    del members[FIRST[name]]


def ragged(members, name):
    members[FIRST[name]] += b"\0"


def without_records(members, name):
    members[FIRST[name]] = b""


def label_out_of_range(members, name):
    members[FIRST[name]] = b"\xc8\xc8" + members[FIRST[name]][2:]


def one_class_name_too_few(members, name):
    path = next(path for path in members if path.endswith(".txt"))
    members[path] = members[path].split(b"\n", 1)[1]


def repeated_class_name(members, name):
    path = next(path for path in members if path.endswith(".txt"))
    members[path] = members[path].replace(b" 1\n", b" 2\n")


def binary_class_names(members, name):
    path = next(path for path in members if path.endswith(".txt"))
    members[path] = b"\xff" * 100


@pytest.mark.parametrize(
    "spoil, expected",
    [
        (without_member, "it lacks {first}"),
        (ragged, "not a whole number of records"),
        (without_records, "{file} has 0 bytes"),
        (label_out_of_range, "label 200, but there are"),
        (one_class_name_too_few, "0 different class names"),
        (repeated_class_name, "0 different class names"),
        (binary_class_names, "is not text"),
    ],
)
def test_wrong_contents_are_named(spoil, expected, name, data_dir, tmp_path, capsys):
    members = miniature(name)[0]
    spoil(members, name)
    path = write_tar(tmp_path / "archive.tar.gz", members)
    assert run(name, data_dir, path) == 2
    line = error_line(capsys, data_dir)
    assert expected.format(first=FIRST[name], file=FIRST[name].split("/")[1]) in line and str(path) in line


def test_a_link_is_not_followed(data_dir, tmp_path, capsys):
    members = miniature("cifar100")[0]
    del members["cifar-100-binary/train.bin"]
    path = write_tar(tmp_path / "archive.tar", members, "w")
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("cifar-100-binary/train.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "test.bin"
        tar.addfile(link)
    assert run("cifar100", data_dir, path) == 2
    assert "it lacks cifar-100-binary/train.bin" in error_line(capsys, data_dir)


def test_an_unwritable_folder_is_named(name, archive, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run(name, tmp_path / "file" / "data", archive) == 2
    assert f"cannot write to {tmp_path / 'file' / 'data'}" in error_line(capsys)


@pytest.fixture
def served(archive, name, monkeypatch):
    """`served(**fields)`: make the miniature the official archive, with these fields changed."""

    def replace(**fields):
        data = archive.read_bytes()
        official = {"url": archive.as_uri(), "size": len(data), "sha256": hashlib.sha256(data).hexdigest()} | fields
        real = {"cifar10": preparation.CIFAR10, "cifar100": preparation.CIFAR100}[name]
        monkeypatch.setitem(SMALL, name, functools.partial(preparation.prepare, real._replace(**official)))

    return replace


def test_a_download_is_reused(served, name, archive, data_dir, capsys):
    served()
    assert run(name, data_dir) == 0
    assert capsys.readouterr().err == ""
    assert os.listdir(data_dir / "downloads") == [archive.name]
    num_train = len(cifar.load(name, data_dir).train_labels)

    (data_dir / name).rename(data_dir / "elsewhere")
    archive.unlink()
    assert run(name, data_dir) == 0
    assert len(cifar.load(name, data_dir).train_labels) == num_train


def test_the_official_archive_from_disk_gives_no_warning(served, name, archive, data_dir, capsys):
    served()
    assert run(name, data_dir, archive) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("fields, expected", [({"sha256": "0" * 64}, "its SHA-256 is"), ({"size": 1}, "its size is")])
def test_a_wrong_download_is_deleted(fields, expected, served, name, data_dir, capsys):
    served(**fields)
    assert run(name, data_dir) == 2
    line = error_line(capsys, data_dir)
    assert expected in line and "--source=FILE" in line
    assert os.listdir(data_dir / "downloads") == []


def test_a_failed_download_names_the_url(served, name, data_dir, monkeypatch, capsys):
    monkeypatch.setenv("no_proxy", "*")
    served(url="http://127.0.0.1:9/cifar.tar.gz")
    assert run(name, data_dir) == 2
    line = error_line(capsys, data_dir)
    assert "cannot download http://127.0.0.1:9/cifar.tar.gz" in line and "--source=FILE" in line


@pytest.mark.parametrize("official", [preparation.CIFAR10, preparation.CIFAR100], ids=NAMES)
def test_size_and_hash_equal_those_of_tfds(official):
    registered = tfds.builder_cls(official.name).url_infos[official.url]
    assert (official.size, official.sha256) == (registered.size, registered.checksum)
