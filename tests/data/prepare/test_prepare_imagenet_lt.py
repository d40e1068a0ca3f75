"""ImageNet-LT from miniatures in the official layouts, and errors in the lists."""

import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from ltjax.data.prepare import imagenet_lt
from ltjax.data.prepare.__main__ import main
from ltjax.data.prepare.one_pass import VERSION, features
from tests.data import miniatures

SPLITS = ("train", "validation", "test")


def run(source, data_dir):
    return main(["imagenet_lt", f"--source={source}", f"--data_dir={data_dir}"])


def contents(data_dir):
    """Return {split: {file_name: (label, image)}} of the prepared data set."""
    builder = tfds.builder_from_directory(data_dir / "imagenet_lt" / "1.0.0")
    decoders = {"image": tfds.decode.SkipDecoding()}
    return {
        split: {
            record["file_name"].decode(): (int(record["label"]), record["image"])
            for record in builder.as_data_source(split, decoders=decoders)
        }
        for split in SPLITS
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return miniatures.imagenet_lt(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("prepared")
    assert run(source, data_dir) == 0
    return contents(data_dir)


@pytest.fixture
def refused(tmp_path, capsys):
    """`refused(source)`: prepare, expect an error, and return its line."""

    def refused(source):
        assert run(source, tmp_path / "data") == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
        assert len(lines) == 1 and not (tmp_path / "data" / "imagenet_lt" / "1.0.0").exists()
        return lines[0]

    return refused


def listed(source, split):
    lines = (source / f"ImageNet_LT_{split}.txt").read_text().splitlines()
    return {line.split()[0].rpartition("/")[2]: int(line.split()[1]) for line in lines}


def test_each_split_holds_the_images_and_labels_of_its_list(source, prepared):
    for split, file in zip(SPLITS, ("train", "val", "test"), strict=True):
        assert {name: label for name, (label, _) in prepared[split].items()} == listed(source, file)


def test_images_equal_the_archives(source, prepared):
    with tarfile.open(source / "ILSVRC2012_img_train.tar") as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                files = {name: inner.extractfile(name).read() for name in inner.getnames()}
            images = {**prepared["train"], **prepared["validation"]}
            images = {name: image for name, (_, image) in images.items() if name.startswith(member.name[:9])}
            assert images and images.items() < files.items()  # the archive also has an image that is in no list
    with tarfile.open(source / "ILSVRC2012_img_val.tar") as tar:
        assert {name: image for name, (_, image) in prepared["test"].items()} == {
            name: tar.extractfile(name).read() for name in tar.getnames()
        }


def nested_validation(source):
    """Move the validation images to folders by class."""
    for name, label in listed(source, "test").items():
        folder = source / "val" / miniatures.wnids()[label]
        folder.mkdir(exist_ok=True)
        (source / "val" / name).rename(folder / name)


def kaggle(source):
    """Move the folders to their places in Kaggle's archive, beside annotations of the same names."""
    (source / "ILSVRC/Data/CLS-LOC").mkdir(parents=True)
    (source / "ILSVRC/Annotations/CLS-LOC/train/n01440764").mkdir(parents=True)
    for folder in ("train", "val"):
        (source / folder).rename(source / "ILSVRC/Data/CLS-LOC" / folder)


def half_unpacked(source):
    """Pack the images of each class like the members of the outer archive."""
    for folder in list((source / "train").iterdir()):
        members = {path.name: path.read_bytes() for path in folder.iterdir()}
        miniatures.write_tar(source / "train" / f"{folder.name}.tar", members)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def lists_by_class(source):
    path = source / "ImageNet_LT_test.txt"
    labels = listed(source, "test")
    miniatures.write_list(path, {f"val/{miniatures.wnids()[k]}/{name}": k for name, k in labels.items()})


@pytest.mark.parametrize("change", [lambda source: None, nested_validation, kaggle, half_unpacked, lists_by_class])
def test_extracted_folders_give_the_same_as_the_archives(change, prepared, tmp_path):
    source = miniatures.imagenet_lt(tmp_path / "source", extracted=True)
    change(source)
    assert run(source, tmp_path / "data") == 0
    assert contents(tmp_path / "data") == prepared


def test_features_equal_those_of_tfds(tmp_path):
    theirs = tfds.builder_cls("imagenet_lt")(data_dir=tmp_path, file_format="array_record").info
    ours = features("file_name", {"label": miniatures.wnids()})
    assert ours.to_json() == theirs.features.to_json()
    assert ours["label"].names == theirs.features["label"].names


def test_version_and_official_numbers_equal_those_of_tfds(source, tmp_path):
    spec = imagenet_lt.read_spec(source)
    assert (spec.name, VERSION) == ("imagenet_lt", str(tfds.builder_cls("imagenet_lt").VERSION))
    assert spec.official == {"train": 115846, "validation": 20000, "test": 50000}


def test_the_index_is_sorted_by_file_name(tmp_path, source):
    assert run(source, tmp_path) == 0
    labels = np.load(tmp_path / "imagenet_lt" / "1.0.0" / "test.index.npz")["labels"]
    expected = listed(source, "test")
    assert labels.tolist() == [expected[name] for name in sorted(expected)]


@pytest.mark.parametrize(
    "missing, expected",
    [
        ("ImageNet_LT_val.txt", "the list of the validation split: expected ImageNet_LT_val.txt"),
        ("ILSVRC2012_img_train.tar", "the training images: expected ILSVRC2012_img_train.tar"),
        ("ILSVRC2012_img_val.tar", "the test images: expected ILSVRC2012_img_val.tar"),
    ],
)
def test_a_missing_file_is_named(missing, expected, tmp_path, refused):
    source = miniatures.imagenet_lt(tmp_path / "source")
    (source / missing).unlink()
    assert expected in refused(source)


@pytest.mark.parametrize(
    "split, line, expected",
    [
        ("train", "train/n01440764/n01440764_190.JPEG 1", "n01440764 is number 0 of the sorted WordNet ids"),
        ("train", "train/n01440764/n01440764_190.JPEG 1000", "the label 1000 is out of range"),
        ("train", "train/n00000001/n00000001_190.JPEG 0", "expected the path of an image such as n01440764_190.JPEG"),
        ("train", "train/n01440764/n01440764_1.JPEG 0", "n01440764_1.JPEG is listed a second time"),
        ("val", "train/n01440764/n01440764_1.JPEG 0", "n01440764_1.JPEG is listed a second time"),
        ("test", "val/ILSVRC2012_val_00000446.JPEG 360", "its class n02445715 is number 361"),
        ("test", "val/ILSVRC2012_val_00050001.JPEG 0", "such as ILSVRC2012_val_00000446.JPEG, found"),
        ("test", "val/x.JPEG 0", "such as ILSVRC2012_val_00000446.JPEG, found 'val/x.JPEG'"),
    ],
)
def test_a_wrong_line_is_named(split, line, expected, tmp_path, refused):
    source = miniatures.imagenet_lt(tmp_path / "source")
    with open(source / f"ImageNet_LT_{split}.txt", "a") as file:
        file.write(line + "\n")
    number = len((source / f"ImageNet_LT_{split}.txt").read_text().splitlines())
    message = refused(source)
    assert f"ImageNet_LT_{split}.txt, line {number}: " in message and expected in message


def test_an_image_missing_from_the_archives_is_named(tmp_path, refused):
    source = miniatures.imagenet_lt(tmp_path / "source")
    with open(source / "ImageNet_LT_train.txt", "a") as file:
        file.write("train/n01440764/n01440764_190.JPEG 0\n")
    assert "1 of 19 images of imagenet_lt are missing or damaged: n01440764_190.JPEG (missing)" in refused(source)
