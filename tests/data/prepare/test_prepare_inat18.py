"""iNaturalist 2018 from miniatures in the official layout, and errors in the annotations."""

import gzip

import pytest
import tensorflow_datasets as tfds

from ltjax.data.prepare import inat18
from ltjax.data.prepare.__main__ import main
from ltjax.data.prepare.one_pass import VERSION, features
from tests.data import miniatures

NAME = "i_naturalist2018"


def run(source, data_dir, name="inat18"):
    return main([name, f"--source={source}", f"--data_dir={data_dir}"])


def builder(data_dir):
    return tfds.builder_from_directory(data_dir / NAME / "1.0.0")


def contents(data_dir):
    """Return {split: {id: (label, supercategory, image)}} of the prepared data set."""
    decoders = {"image": tfds.decode.SkipDecoding()}
    return {
        split: {
            record["id"].decode(): (int(record["label"]), int(record["supercategory"]), record["image"])
            for record in builder(data_dir).as_data_source(split, decoders=decoders)
        }
        for split in ("train", "validation")
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    base = tmp_path_factory.mktemp("prepared")
    assert run(miniatures.inat18(base / "source"), base / "data") == 0
    return base / "data"


@pytest.fixture
def refused(tmp_path, capsys):
    """`refused(**changes)`: prepare a changed miniature, expect an error, and return its line."""

    def refused(change=lambda source: None, **options):
        source = miniatures.inat18(tmp_path / "source", **options)
        change(source)
        assert run(source, tmp_path / "data") == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
        assert len(lines) == 1 and not (tmp_path / "data" / NAME / "1.0.0").exists()
        return lines[0]

    return refused


def test_labels_are_category_ids(prepared):
    splits = contents(prepared).values()
    images = {image: label for split in splits for label, _, image in split.values()}
    expected = {miniatures.photo(label, i): label for label, count in enumerate((4, 3, 2)) for i in range(count)}
    assert images == expected | {miniatures.photo(label, 1000): label for label in range(3)}


def test_supercategories_have_the_numbers_of_tfds(prepared):
    names = builder(prepared).info.features["supercategory"].names
    splits = contents(prepared).values()
    supercategories = {label: names[group] for split in splits for label, group, _ in split.values()}
    assert supercategories == {0: "Aves", 1: "Plantae", 2: "Insecta"}


@pytest.mark.parametrize("name", ["inat18", NAME])
def test_both_names_write_the_data_set_under_its_tfds_name(name, prepared, tmp_path):
    source = miniatures.inat18(tmp_path / "source")
    assert run(source, tmp_path / "data", name) == 0
    assert contents(tmp_path / "data") == contents(prepared)


def bare_tar(source):
    path = source / "train_val2018.tar.gz"
    (source / "train_val2018.tar").write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()


@pytest.mark.parametrize("extracted, change", [(True, lambda source: None), (False, bare_tar)], ids=["folder", "tar"])
def test_all_layouts_give_the_same_records(extracted, change, prepared, tmp_path):
    source = miniatures.inat18(tmp_path / "source", extracted=extracted)
    change(source)
    assert run(source, tmp_path / "data") == 0
    assert contents(tmp_path / "data") == contents(prepared)


@pytest.mark.parametrize("extracted", [False, True])
def test_categories_json_names_the_species(extracted, tmp_path):
    source = miniatures.inat18(tmp_path / "source", extracted=extracted, categories=True)
    assert run(source, tmp_path / "data") == 0
    assert builder(tmp_path / "data").info.features["label"].names == ["Species 0", "Species 1", "Species 2"]


def test_without_categories_json_the_annotations_name_the_species(prepared):
    assert builder(prepared).info.features["label"].names == ["0", "1", "2"]


def test_the_official_number_of_species_gets_the_names_of_tfds(tmp_path):
    species = [{"id": i, "name": str(i), "supercategory": "Aves"} for i in range(inat18.NUM_CLASSES)]
    names = inat18._class_names(tmp_path, {}, species)
    assert names == tfds.builder_cls(NAME)(data_dir=tmp_path, file_format="array_record").info.features["label"].names


def test_features_equal_those_of_tfds(tmp_path):
    theirs = tfds.builder_cls(NAME)(data_dir=tmp_path, file_format="array_record").info.features
    names = {"label": theirs["label"].names, "supercategory": theirs["supercategory"].names}
    assert features("id", names).to_json() == theirs.to_json()


def test_version_and_official_numbers(tmp_path):
    spec = inat18.read_spec(miniatures.inat18(tmp_path))
    assert (spec.name, VERSION) == (NAME, str(tfds.builder_cls(NAME).VERSION))
    assert spec.official == {"train": 437513, "validation": 24426} and inat18.NUM_CLASSES == 8142


def unknown_category(annotations):
    annotations["train"]["annotations"][0]["category_id"] = 3


def category_that_is_no_number(annotations):
    annotations["train"]["annotations"][0]["category_id"] = None


def gap_in_categories(annotations):
    annotations["train"]["categories"][2]["id"] = 5


def unknown_supercategory(annotations):
    annotations["train"]["categories"][0]["supercategory"] = "Cars"


def two_annotations(annotations):
    annotations["train"]["annotations"].append(dict(annotations["train"]["annotations"][0]))


def no_annotation(annotations):
    annotations["val"]["annotations"].pop()


def annotation_of_nothing(annotations):
    annotations["val"]["images"].pop()


def image_twice(annotations):
    images = annotations["train"]["images"]
    images[1]["file_name"] = images[0]["file_name"]


def image_in_both(annotations):
    annotations["val"]["images"][0]["file_name"] = annotations["train"]["images"][0]["file_name"]


def no_images(annotations):
    del annotations["val"]["images"]


def number_for_a_name(annotations):
    annotations["val"]["images"][0]["file_name"] = 1


@pytest.mark.parametrize(
    "edit, expected",
    [
        (unknown_category, "has the unknown category 3: there are 3"),
        (category_that_is_no_number, "has the unknown category None"),
        (gap_in_categories, "expected categories with the ids 0, 1, 2"),
        (unknown_supercategory, "unknown supercategory 'Cars'"),
        (two_annotations, "has two annotations"),
        (no_annotation, "has no annotation"),
        (annotation_of_nothing, "there is no image with the id"),
        (image_twice, "is there twice"),
        (image_in_both, "belongs to the training split already"),
        (number_for_a_name, "does not have the layout of the official annotations (AttributeError"),
        (no_images, "val2018.json.tar.gz does not have the layout of the official annotations (KeyError: 'images')"),
    ],
)
def test_wrong_annotations_are_explained(edit, expected, refused):
    assert expected in refused(edit=edit)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"', b"\xff\xfe\xff", b"[" * 200_000], ids=range(6))
def test_a_file_without_annotations_is_named(content, refused):
    assert "train2018.json" in refused(lambda source: (source / "train2018.json").write_bytes(content), extracted=True)


@pytest.mark.parametrize(
    "content", [b"{", b'{"a": 1}', b'[{"id": 0, "name": "a"}]', b'[{"id": 0}, {"id": 1}, {"id": 2}]']
)
def test_a_wrong_categories_json_is_named(content, refused):
    assert "categories.json" in refused(
        lambda source: (source / "categories.json").write_bytes(content), extracted=True
    )


@pytest.mark.parametrize(
    "missing, expected",
    [
        ("train_val2018.tar.gz", "the images: expected train_val2018.tar,"),
        ("train2018.json.tar.gz", "the annotations of the train split: expected train2018.json,"),
        ("val2018.json.tar.gz", "the annotations of the validation split: expected val2018.json,"),
    ],
)
def test_a_missing_file_is_named(missing, expected, refused):
    assert expected in refused(lambda source: (source / missing).unlink())


def test_an_archive_without_a_json_file_is_named(refused):
    def change(source):
        miniatures.write_tar(source / "train2018.json.tar.gz", {"readme.txt": b"x"}, "w:gz")

    assert "holds no JSON file" in refused(change)
