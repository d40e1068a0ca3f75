"""Places-LT from miniatures in the official layouts, and errors in the lists."""

import pytest
import tensorflow_datasets as tfds

from ltjax.data.prepare import places_lt
from ltjax.data.prepare.__main__ import main
from tests.data import miniatures

SPLITS = ("train", "validation", "test")


def run(source, data_dir):
    return main(["places_lt", f"--source={source}", f"--data_dir={data_dir}"])


def builder(data_dir):
    return tfds.builder_from_directory(data_dir / "places_lt" / "1.0.0")


def contents(data_dir):
    """Return {split: {file_name: (label, image)}} of the prepared data set."""
    decoders = {"image": tfds.decode.SkipDecoding()}
    return {
        split: {
            record["file_name"].decode(): (int(record["label"]), record["image"])
            for record in builder(data_dir).as_data_source(split, decoders=decoders)
        }
        for split in SPLITS
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    base = tmp_path_factory.mktemp("prepared")
    assert run(miniatures.places_lt(base / "source"), base / "data") == 0
    return base / "data"


@pytest.fixture
def refused(tmp_path, capsys):
    """`refused(source)`: prepare, expect an error, and return its line."""

    def refused(source):
        assert run(source, tmp_path / "data") == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
        assert len(lines) == 1 and not (tmp_path / "data" / "places_lt" / "1.0.0").exists()
        return lines[0]

    return refused


def test_each_split_holds_its_images_with_their_labels(prepared):
    splits = contents(prepared)
    assert {split: len(images) for split, images in splits.items()} == {"train": 21, "validation": 9, "test": 9}
    assert splits["train"]["airfield/00000001.jpg"] == (0, miniatures.photo(0, 0))
    assert splits["train"]["apartment_building-outdoor/00000022.jpg"] == (8, miniatures.photo(8, 3))
    assert splits["validation"]["airfield/00000022.jpg"] == (0, miniatures.photo(0, 3))
    assert splits["test"]["Places365_val_00000097.jpg"] == (8, miniatures.photo(8, 1000))


def test_categories_are_in_the_official_order(prepared):
    names = builder(prepared).info.features["label"].names
    assert len(names) == 365 and names[:2] + names[8:9] == ["airfield", "airplane_cabin", "apartment_building/outdoor"]


def test_tfds_reads_the_result(prepared):
    info = builder(prepared).info
    assert info.full_name == "places_lt/1.0.0" and set(info.features) == {"image", "label", "file_name"}


@pytest.mark.parametrize("extracted", [False, True], ids=["archive", "folder"])
@pytest.mark.parametrize("lists", ["easyformat", "standard"])
@pytest.mark.parametrize("layout", ["easyformat", "standard"])
def test_all_layouts_give_the_same_records(layout, lists, extracted, prepared, tmp_path):
    source = miniatures.places_lt(tmp_path / "source", layout=layout, lists=lists, extracted=extracted)
    assert run(source, tmp_path / "data") == 0
    assert contents(tmp_path / "data") == contents(prepared)


def test_the_source_may_be_the_parent_of_train_and_val(prepared, tmp_path):
    source = miniatures.places_lt(tmp_path / "source", extracted=True)
    for path in source.glob("*.txt"):
        path.rename(source / "places365_standard" / path.name)
    assert run(source / "places365_standard", tmp_path / "data") == 0
    assert contents(tmp_path / "data") == contents(prepared)


def test_lists_may_have_a_leading_folder(prepared, tmp_path):
    source = miniatures.places_lt(tmp_path / "source")
    for path in source.glob("*.txt"):
        lines = path.read_text().splitlines()
        path.write_text("".join(f"places365_standard/{line}\n" for line in lines))
    assert run(source, tmp_path / "data") == 0
    assert contents(tmp_path / "data") == contents(prepared)


def categories_file(source, change=lambda lines: lines):
    lines = [f"/{name[0]}/{name} {label}" for label, name in enumerate(miniatures.places())]
    (source / "categories_places365.txt").write_text("".join(line + "\n" for line in change(lines)))


def test_the_official_categories_file_is_read(prepared, tmp_path):
    source = miniatures.places_lt(tmp_path / "source")
    categories_file(source)
    assert run(source, tmp_path / "data") == 0
    assert contents(tmp_path / "data") == contents(prepared)
    assert builder(tmp_path / "data").info.features["label"].names == miniatures.places()


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda lines: lines[:-1], "does not name 365 different categories"),
        (lambda lines: lines[1:2] + lines[:1] + lines[2:], "line 1: expected `/a/airfield 0`"),
        (lambda lines: ["airfield 0", *lines[1:]], "line 1: expected `/a/airfield 0`"),
    ],
)
def test_a_wrong_categories_file_is_explained(change, expected, tmp_path, refused):
    source = miniatures.places_lt(tmp_path / "source")
    categories_file(source, change)
    assert expected in refused(source)


def test_test_images_of_places365_and_other_files_are_ignored(prepared, tmp_path):
    def spoil(images):
        images["places365_standard/test/Places365_test_00000001.jpg"] = b"not read"
        images["places365_standard/train/airfield/notes.txt"] = b"not read"

    assert run(miniatures.places_lt(tmp_path / "source", spoil=spoil), tmp_path / "data") == 0
    assert contents(tmp_path / "data") == contents(prepared)


@pytest.mark.parametrize(
    "split, line, expected",
    [
        ("train", "train/airfield/00000099.jpg 1", "has the label 1, but its category is number 0"),
        ("test", "val/airfield/Places365_val_00000999.jpg 1", "has the label 1, but its category is number 0"),
        ("train", "train/moon/00000099.jpg 0", "such as train/airfield/00000001.jpg, found 'train/moon/00000099.jpg'"),
        ("train", "train/airfield/Places365_val_00000999.jpg 0", "such as train/airfield/00000001.jpg"),
        ("test", "val/airfield/00000999.jpg 0", "such as val/airfield/Places365_val_00000435.jpg"),
        ("train", "train/airfield/00000001.jpg 0", "is listed a second time"),
        ("val", "data_256/a/airfield/00000001.jpg 0", "is listed a second time"),
        ("val", "train/airfield/00000099.jpg 365", "the label 365 is out of range"),
    ],
)
def test_a_wrong_line_is_named(split, line, expected, tmp_path, refused):
    source = miniatures.places_lt(tmp_path / "source")
    with open(source / f"Places_LT_{split}.txt", "a") as file:
        file.write(line + "\n")
    number = len((source / f"Places_LT_{split}.txt").read_text().splitlines())
    message = refused(source)
    assert f"Places_LT_{split}.txt, line {number}: " in message and expected in message


def test_an_image_in_two_folders_of_one_category_is_an_error(tmp_path, refused):
    def spoil(images):
        first = next(iter(images))
        images["places365_standard/more/a/airfield/00000001.jpg"] = images[first]

    assert "airfield/00000001.jpg is there twice" in refused(miniatures.places_lt(tmp_path / "source", spoil=spoil))


@pytest.mark.parametrize(
    "missing, expected",
    [
        ("Places_LT_test.txt", "the list of the test split: expected Places_LT_test.txt"),
        ("train_256_places365standard.tar", "the training images: expected places365standard_easyformat.tar"),
        ("val_256.tar", "the validation images of Places365: expected val_256.tar"),
    ],
)
def test_a_missing_file_is_named(missing, expected, tmp_path, refused):
    source = miniatures.places_lt(tmp_path / "source", layout="standard")
    (source / missing).unlink()
    assert expected in refused(source)


def test_both_spellings_of_a_category_give_the_same_key():
    names = miniatures.places()
    labels = {name.replace("/", "-") for name in names}
    for name in names:
        key = f"{name.replace('/', '-')}/00000001.jpg"
        assert places_lt._key(f"data_256/{name[0]}/{name}/00000001.jpg", labels) == key
        assert places_lt._key(f"train/{name.replace('/', '-')}/00000001.jpg", labels) == key


def test_the_official_numbers():
    assert places_lt.OFFICIAL == {"train": 62500, "validation": 7300, "test": 36500}
