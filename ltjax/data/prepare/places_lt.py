"""Prepare Places-LT: `python -m ltjax.data.prepare places_lt --source=FOLDER`.

FOLDER holds places365standard_easyformat.tar, or train_256_places365standard.tar and val_256.tar, or what they unpack
to, and the lists Places_LT_train.txt, Places_LT_val.txt and Places_LT_test.txt by Liu et al., "Large-Scale Long-Tailed
Recognition in an Open World", CVPR 2019. Lists and archives may each write `train/apartment_building-outdoor/1.jpg` or
`data_256/a/apartment_building/outdoor/1.jpg`; the key of both is `apartment_building-outdoor/1.jpg`. The test images
are Places365's validation images; their keys are their file names. TFDS has no builder for this data set.
"""

import functools
import re
from collections.abc import Set
from pathlib import Path

from ltjax.data.prepare.one_pass import DatasetSpec, Image
from ltjax.data.prepare.sources import archives, find, pick, read_list
from ltjax.types import UserError

NAME = "places_lt"
OFFICIAL = {"train": 62500, "validation": 7300, "test": 36500}
LISTS = {"train": "Places_LT_train.txt", "validation": "Places_LT_val.txt", "test": "Places_LT_test.txt"}
BOTH = (*archives("places365standard_easyformat"), "places365_standard")
TRAIN = (*archives("train_256_places365standard"), "data_256", *archives("train_large_places365standard"))
TRAIN = (*TRAIN, "data_large", "train")
TEST = (*archives("val_256"), "val_256", *archives("val_large"), "val_large", "val")
PIECES = (*BOTH, *TRAIN, *TEST, *LISTS.values())
CATEGORIES = "categories_places365.txt"
NUM_CLASSES = 365


def read_spec(source: Path) -> DatasetSpec:
    """Read the lists in a folder; UserError if a file is missing or a line is wrong."""
    found = find(source, [*PIECES, CATEGORIES])
    class_names = _class_names(found.get(CATEGORIES))
    labels = {name.replace("/", "-"): label for label, name in enumerate(class_names)}
    if any(name in found for name in BOTH):
        sources = [pick(source, found, "the images", BOTH)]
    else:
        train = pick(source, found, "the training images", (*BOTH, *TRAIN))
        sources = [train, pick(source, found, "the validation images of Places365", TEST)]
    return DatasetSpec(
        name=NAME,
        description=(
            "Places-LT: a long-tailed subset of the Places365-Standard training images, 5 to 4980 of each of 365 "
            "categories; 20 others of each for validation; the Places365 validation images as test images."
        ),
        homepage="https://github.com/zhmiao/OpenLongTailRecognition-OLTR",
        key_feature="file_name",
        class_names={"label": class_names},
        official=OFFICIAL,
        images=_read_lists(source, found, labels),
        key=functools.partial(_key, categories=labels.keys()),
        sources=sources,
        expected="train/airfield/00000001.jpg, a/airfield/00000001.jpg or Places365_val_00000435.jpg",
    )


def _read_lists(source: Path, found: dict[str, Path], labels: dict[str, int]) -> dict[str, Image]:
    images: dict[str, Image] = {}
    for split, file in LISTS.items():
        for where, path, label in read_list(pick(source, found, f"the list of the {split} split", [file]), NUM_CLASSES):
            key = _key(path, labels.keys())
            category = key.rpartition("/")[0] or _category(path, labels.keys())
            if not key or (split == "test") == ("/" in key):
                kind = "val/airfield/Places365_val_00000435.jpg" if split == "test" else "train/airfield/00000001.jpg"
                raise UserError(f"{where}: expected the path of an image such as {kind}, found {path!r}")
            if category and labels[category] != label:
                raise UserError(
                    f"{where}: {path} has the label {label}, but its category is number {labels[category]} of the "
                    "official ones"
                )
            if key in images:
                raise UserError(f"{where}: {path} is listed a second time, in this list or another")
            images[key] = Image(split, label)
    return images


def _key(path: str, categories: Set[str]) -> str:
    """Return an image's key without leading folders; "" for other files."""
    file = path.rpartition("/")[2]
    if file.startswith("Places365_val_"):
        return file
    category = _category(path, categories)
    return f"{category}/{file}" if category and re.fullmatch(r"\d{8}\.jpg", file) else ""


def _category(path: str, categories: Set[str]) -> str:
    """Return the category that the last one or two folders of a path name, joined by "-"; "" if they name none."""
    folders = path.split("/")[:-1]
    return next((name for name in ("-".join(folders[-2:]), "".join(folders[-1:])) if name in categories), "")


def _class_names(path: Path | None) -> list[str]:
    """Return the 365 categories in their official order, from the official file or, for None, from TFDS's copy."""
    import tensorflow_datasets as tfds

    if path is None:
        return Path(tfds.core.tfds_path("image_classification/categories_places365.txt")).read_text().split()
    lines = read_list(path, NUM_CLASSES)
    for number, (where, name, label) in enumerate(lines):
        if label != number or not re.fullmatch(r"/[a-z]/\w+(/\w+)?", name):
            raise UserError(f"{where}: expected `/a/airfield 0` and so on in the order of the numbers, found {name!r}")
    names = [name[3:] for _, name, _ in lines]
    if not len(set(names)) == len(names) == NUM_CLASSES:
        raise UserError(f"{path} does not name {NUM_CLASSES} different categories: replace it by the official one")
    return names
