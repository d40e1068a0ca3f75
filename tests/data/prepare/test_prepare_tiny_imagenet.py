"""Preparing Tiny ImageNet from miniature archives in the official layout, and errors in the archives."""

import functools
import os
import shutil
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from ltjax import data
from ltjax.data import tiny_imagenet
from ltjax.data.prepare import tiny_imagenet as preparation
from ltjax.data.prepare.__main__ import SMALL, main
from ltjax.types import UserError

WNIDS = ("n02124075", "n04067472", "n01443537")  # not sorted, as in the official file
TRAIN, TEST, SIZE = 4, 2, 64
ROOT = "tiny-imagenet-200/"
GREY = ("train/n04067472/images/n04067472_2.JPEG", "val/images/val_1.JPEG")
VICTIM = "train/n01443537/images/n01443537_3.JPEG"


def jpeg(rng, size=SIZE, grey=False):
    pixels = rng.integers(256, size=(8, 8) if grey else (8, 8, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", cv2.resize(pixels, (size, size), interpolation=cv2.INTER_CUBIC))[1].tobytes()


def miniature():
    """Return the members of an archive {path below its folder: bytes}."""
    rng = np.random.default_rng(0)
    names = [f"train/{wnid}/images/{wnid}_{i}.JPEG" for wnid in WNIDS for i in range(TRAIN)]
    names += [f"val/images/val_{i}.JPEG" for i in range(len(WNIDS) * TEST)]
    members = {name: jpeg(rng, grey=name in GREY) for name in names}
    members["wnids.txt"] = "\n".join(WNIDS).encode()
    members["words.txt"] = (
        b"n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\nn02124075\tEgyptian cat\nn04067472\treel\n"
    )
    boxes = [f"val_{i}.JPEG\t{WNIDS[(i + 1) % 3]}\t0\t0\t61\t62\n" for i in range(len(WNIDS) * TEST)]
    members["val/val_annotations.txt"] = "".join(boxes).encode()
    members["train/n02124075/n02124075_boxes.txt"] = b"n02124075_0.JPEG\t0\t10\t63\t58\n"
    members["test/images/test_0.JPEG"] = b"not read"
    return members


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(ROOT + name, content)
    return path


def write_folder(path, members):
    for name, content in members.items():
        (path / ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (path / ROOT / name).write_bytes(content)
    return path


MINIATURE = preparation.OFFICIAL._replace(num_classes=3, train_per_class=TRAIN, test_per_class=TEST)


@pytest.fixture(autouse=True)
def expect(monkeypatch):
    """`expect(**fields)`: make the miniature, with these fields, the official archive; by default without fields."""

    def replace(**fields):
        prepare = functools.partial(preparation.prepare, archive=MINIATURE._replace(**fields))
        monkeypatch.setitem(SMALL, "tiny_imagenet", prepare)

    replace()
    return replace


def run(data_dir, source=None):
    return main(["tiny_imagenet", f"--data_dir={data_dir}", *([f"--source={source}"] if source is not None else [])])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a folder with a prepared miniature."""
    base = tmp_path_factory.mktemp("written")
    preparation.prepare(base / "data", write_zip(base / "archive.zip", miniature()), MINIATURE)
    return base / "data"


@pytest.fixture
def images(written):
    return data.load("tiny_imagenet", written)


@pytest.fixture
def refused(tmp_path, capsys):
    """`refused(members)`: prepare, expect an error and no data set, and return the error's line."""

    def refused(members, write=write_zip):
        source = write(tmp_path / "archive", members)
        assert run(tmp_path / "data", source) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and str(source) in err
        with pytest.raises(UserError, match="tiny_imagenet is not in"):
            tiny_imagenet.load("tiny_imagenet", tmp_path / "data")
        return err

    return refused


def decoded(names):
    members = miniature()
    return np.stack([cv2.imdecode(np.frombuffer(members[name], np.uint8), cv2.IMREAD_COLOR_RGB) for name in names])


def raw_records(directory, split):
    builder = tfds.builder_from_directory(directory)
    records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    return sorted(records, key=lambda record: record["id"])


# A good archive.


def test_training_images_are_sorted_by_class_and_number(images):
    names = [f"train/{wnid}/images/{wnid}_{i}.JPEG" for wnid in WNIDS for i in range(TRAIN)]
    np.testing.assert_array_equal(images.train_images, decoded(names))


def test_test_images_are_sorted_by_number(images):
    np.testing.assert_array_equal(images.test_images, decoded([f"val/images/val_{i}.JPEG" for i in range(6)]))


def test_labels_index_the_lines_of_wnids(images):
    assert images.train_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert images.test_labels.tolist() == [1, 2, 0, 1, 2, 0]


def test_types(images):
    assert [array.dtype for array in images[:4]] == [np.uint8, np.int32, np.uint8, np.int32]


def test_a_class_is_named_by_its_first_word(images):
    assert images.class_names == ("Egyptian cat", "reel", "goldfish")


def test_classes_of_one_name_get_their_ids(tmp_path):
    members = miniature()
    members["words.txt"] = b"n01443537\tcrane, bird\nn02124075\tEgyptian cat\nn04067472\tcrane\n"
    assert run(tmp_path / "data", write_zip(tmp_path / "archive", members)) == 0
    images = tiny_imagenet.load("tiny_imagenet", tmp_path / "data")
    assert images.class_names == ("Egyptian cat", "crane (n04067472)", "crane (n01443537)")


def test_a_grey_image_has_three_equal_planes(images):
    grey = images.train_images[TRAIN + 2]
    assert (grey == grey[..., :1]).all() and grey.std() > 0


def test_image_files_are_kept_byte_for_byte(written):
    members = miniature()
    records = raw_records(written / "tiny_imagenet" / "1.0.0", "test")
    assert [record["image"] for record in records] == [members[f"val/images/val_{i}.JPEG"] for i in range(6)]


def test_tfds_reads_the_result(written):
    builder = tfds.builder_from_directory(written / "tiny_imagenet" / "1.0.0")
    assert builder.info.full_name == "tiny_imagenet/1.0.0"
    assert {split: info.num_examples for split, info in builder.info.splits.items()} == {"train": 12, "test": 6}
    assert builder.as_data_source("train")[0].keys() == {"id", "image", "label"}


def test_no_temporary_files_are_left(written):
    assert os.listdir(written) == ["tiny_imagenet"] and os.listdir(written / "tiny_imagenet") == ["1.0.0"]


@pytest.mark.parametrize("inner", ["", ROOT])
def test_a_folder_gives_the_same_as_its_archive(inner, images, tmp_path):
    assert run(tmp_path / "data", write_folder(tmp_path / "unpacked", miniature()) / inner) == 0
    for ours, theirs in zip(tiny_imagenet.load("tiny_imagenet", tmp_path / "data"), images, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_command_prints_the_counts(tmp_path, capfd):
    assert run(tmp_path / "data", write_zip(tmp_path / "archive", miniature())) == 0
    where = tmp_path / "data" / "tiny_imagenet" / "1.0.0"
    assert capfd.readouterr() == (f"prepared tiny_imagenet: 12 training and 6 test images in {where}\n", "")


def test_a_second_run_prints_that_the_set_exists(written, capsys):
    assert run(written) == 0
    assert capsys.readouterr().out.startswith("tiny_imagenet is already prepared: 12 training and 6 test images in ")


def test_the_official_numbers():
    official = preparation.OFFICIAL
    assert official.num_classes * official.train_per_class == 100000
    assert official.num_classes * official.test_per_class == 10000


# A download.


def test_a_download_is_reused(expect, tmp_path):
    source = write_zip(tmp_path / "tiny.zip", miniature())
    expect(url=source.as_uri())
    assert run(tmp_path / "data") == 0
    source.unlink()
    shutil.rmtree(tmp_path / "data" / "tiny_imagenet")
    assert run(tmp_path / "data") == 0


def test_a_truncated_download_is_deleted(expect, tmp_path, capsys):
    source = write_zip(tmp_path / "tiny.zip", miniature())
    os.truncate(source, source.stat().st_size // 2)
    expect(url=source.as_uri())
    assert run(tmp_path / "data") == 2
    assert "it is not a whole zip archive" in capsys.readouterr().err
    assert os.listdir(tmp_path / "data" / "downloads") == []


# Damaged images.


def missing(members):
    del members[VICTIM]


def empty(members):
    members[VICTIM] = b""


def cut_short(members):
    members[VICTIM] = members[VICTIM][:-20]


def half(members):
    members[VICTIM] = members[VICTIM][: len(members[VICTIM]) // 2]


def no_image(members):
    members[VICTIM] = b"\xff\xd8" + b"x" * 500 + b"\xff\xd9"


def another_size(members):
    members[VICTIM] = jpeg(np.random.default_rng(1), size=32)


@pytest.mark.parametrize("write", [write_zip, write_folder], ids=["zip", "folder"])
@pytest.mark.parametrize(
    "spoil, expected",
    [
        (missing, "missing"),
        (empty, "empty"),
        (cut_short, "not a whole JPEG"),
        (half, "not a whole JPEG"),
        (no_image, "not a whole JPEG"),
        (another_size, "32 x 32 pixels, not 64 x 64"),
    ],
)
def test_a_damaged_image_is_named(spoil, expected, write, refused):
    members = miniature()
    spoil(members)
    assert f": 1 of 18 images are missing or damaged: {VICTIM} ({expected});" in refused(members, write)


@pytest.mark.parametrize("file", [VICTIM, "words.txt"])
def test_a_member_of_more_than_256_mib_is_not_read(file, refused, monkeypatch):
    members = miniature()
    members[file] = bytes(2_000_000)
    monkeypatch.setattr(preparation, "MAX_IMAGE_BYTES", 1_999_999)
    assert "it declares more than 1999999 bytes" in refused(members)


def test_damaged_images_are_counted(refused):
    members = {name: content for name, content in miniature().items() if not name.startswith("val/images")}
    assert "6 of 18 images are missing or damaged: val/images/val_0.JPEG (missing)" in refused(members)


def test_at_most_five_damaged_images_are_named(refused):
    members = {name: content for name, content in miniature().items() if not name.startswith("val/images")}
    line = refused(members)
    assert line.count("(missing)") == 5 and " and 1 more;" in line


def test_a_wrong_byte_in_the_archive_is_found(refused):
    def write(path, members):
        write_zip(path, members)
        content = path.read_bytes()
        path.write_bytes(content.replace(members[VICTIM][300:340], bytes(40)))
        return path

    assert f"{VICTIM} (Bad CRC-32" in refused(miniature(), write)


# Another layout.


def without_words(members):
    del members["words.txt"]


def nameless_class(members):
    members["words.txt"] = members["words.txt"].replace(b"n04067472", b"n04067473")


def binary_wnids(members):
    members["wnids.txt"] = b"\xff" * 30


def one_class_too_few(members):
    members["wnids.txt"] = members["wnids.txt"].rpartition(b"\n")[0]


def repeated_class(members):
    members["wnids.txt"] = members["wnids.txt"].replace(b"n01443537", b"n02124075")


def class_that_is_a_path(members):
    members["wnids.txt"] = members["wnids.txt"].replace(b"n01443537", b"../../etc")


def unknown_class(members):
    members["val/val_annotations.txt"] = members["val/val_annotations.txt"].replace(b"n01443537", b"n00000001", 1)


def no_class(members):
    members["val/val_annotations.txt"] = b"val_0.JPEG\n"


def two_classes(members):
    members["val/val_annotations.txt"] += b"val_0.JPEG\tn02124075\t0\t0\t1\t1\n"


def unannotated(members):
    members["val/val_annotations.txt"] = members["val/val_annotations.txt"].partition(b"\n")[2]


def uneven_classes(members):
    members["val/val_annotations.txt"] = members["val/val_annotations.txt"].replace(b"n01443537", b"n02124075", 1)


def image_too_many(members):
    members["train/n01443537/images/n01443537_4.JPEG"] = members[VICTIM]


def class_too_many(members):
    members["train/n00000001/images/n00000001_0.JPEG"] = members[VICTIM]


@pytest.mark.parametrize(
    "spoil, expected",
    [
        (without_words, "it lacks tiny-imagenet-200/words.txt"),
        (nameless_class, "words.txt does not name n04067472"),
        (binary_wnids, "wnids.txt cannot be read"),
        (one_class_too_few, "wnids.txt does not hold 3 different classes"),
        (repeated_class, "wnids.txt does not hold 3 different classes"),
        (class_that_is_a_path, "'../../etc', which is no WordNet id"),
        (unknown_class, "gives 'val_1.JPEG' the class 'n00000001', not in wnids.txt"),
        (no_class, "gives 'val_0.JPEG' the class ''"),
        (two_classes, "gives 'val_0.JPEG' two classes"),
        (unannotated, "val_annotations.txt does not give every class 2 images"),
        (uneven_classes, "val_annotations.txt does not give every class 2 images"),
        (image_too_many, "n01443537_4.JPEG should not be there"),
        (class_too_many, "n00000001_0.JPEG should not be there"),
    ],
)
def test_wrong_contents_are_named(spoil, expected, refused):
    members = miniature()
    spoil(members)
    assert expected in refused(members)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "..\\x", "\\x", "C:\\x", "c:x"])
def test_a_name_that_leads_out_of_the_archive_is_refused(name, refused):
    def write(path, members):
        with zipfile.ZipFile(write_zip(path, members), "a") as archive:
            archive.writestr(name, b"")
        return path

    assert f"the name {name!r} leads out of the archive" in refused(miniature(), write)


def test_nothing_is_unpacked_to_disk(tmp_path, refused):
    def write(path, members):
        with zipfile.ZipFile(write_zip(path, members), "a") as archive:
            archive.writestr("../x", b"")
        return path

    refused(miniature(), write)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["archive", "data"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" * 1000, b"\x1f\x8b\x08" + b"x" * 1000])
def test_a_file_that_is_no_zip_archive_is_named(content, refused):
    def write(path, members):
        path.write_bytes(content)
        return path

    assert "as a zip archive" in refused({}, write)


def test_an_empty_folder_is_an_error(refused):
    def write(path, members):
        path.mkdir()
        return path

    assert "it lacks tiny-imagenet-200/wnids.txt" in refused({}, write)


def test_a_missing_archive_is_named(refused):
    line = refused({}, lambda path, members: path)
    assert "no archive at" in line and "http://cs231n.stanford.edu/tiny-imagenet-200.zip" in line


# What was prepared.


@pytest.fixture
def interrupted(tmp_path):
    """`interrupted(error)`: interrupt the preparation of `<tmp_path>/archive`, return the exit code."""

    def interrupted(error):
        def write_examples(path, iterator):
            Path(path).write_bytes(b"half")
            raise error

        source = write_zip(tmp_path / "archive", miniature())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tfds.core.file_adapters.ArrayRecordFileAdapter, "write_examples", write_examples)
            return run(tmp_path / "data", source)

    return interrupted


@pytest.mark.parametrize(
    "error, code", [(KeyboardInterrupt, 130), (OSError(28, "No space left on device"), 2), (RuntimeError("disk"), 2)]
)
def test_an_interruption_leaves_no_data_set(error, code, interrupted, tmp_path):
    assert interrupted(error) == code
    with pytest.raises(UserError, match="tiny_imagenet is not in"):
        tiny_imagenet.load("tiny_imagenet", tmp_path / "data")


def test_the_run_after_an_interruption_works(interrupted, tmp_path):
    interrupted(KeyboardInterrupt)
    assert run(tmp_path / "data", tmp_path / "archive") == 0


def remove_shard(directory):
    (directory / "tiny_imagenet-test.array_record-00000-of-00001").unlink()


def truncate_shard(directory):
    path = directory / "tiny_imagenet-train.array_record-00000-of-00001"
    os.truncate(path, path.stat().st_size // 2)


def overwrite_an_image(directory):
    path = directory / "tiny_imagenet-train.array_record-00000-of-00001"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 1000] = bytes(1000)
    path.write_bytes(content)


def remove_class_names(directory):
    (directory / "label.labels.txt").unlink()


@pytest.mark.parametrize("damage", [remove_shard, truncate_shard, overwrite_an_image, remove_class_names])
def test_damage_is_reported_in_one_line_with_the_command(damage, written, tmp_path):
    copy = Path(shutil.copytree(written / "tiny_imagenet", tmp_path / "tiny_imagenet")) / "1.0.0"
    damage(copy)
    command = f"python -m ltjax.data.prepare tiny_imagenet --data_dir={tmp_path}"
    with pytest.raises(UserError) as caught:
        tiny_imagenet.load("tiny_imagenet", tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{copy} is damaged or incomplete (") and "\n" not in message
    assert message.endswith(f"): delete that folder, then run `{command}`")
