"""What `python -m ltjax.data.prepare places_lt --source=FOLDER` does.

FOLDER holds places365standard_easyformat.tar, or train_256_places365standard.tar and val_256.tar, or what they unpack
to, and the lists Places_LT_train.txt, Places_LT_val.txt and Places_LT_test.txt by Liu et al., "Large-Scale Long-Tailed
Recognition in an Open World", CVPR 2019. Lists and archives may each write `train/apartment_building-outdoor/1.jpg` or
`data_256/a/apartment_building/outdoor/1.jpg`; TFDS has no builder of this data set. Here both are known as
`apartment_building-outdoor/1.jpg`, and the test images, from Places365's validation images, by their files' names.
"""

import re
from collections.abc import Set
from pathlib import Path

from ltjax.data.prepare_large import Image, Plan, prepare_from
from ltjax.data.prepare_sources import archives, find, pick, read_list
from ltjax.types import UserError

NAME = "places_lt"
OFFICIAL = {"train": 62500, "validation": 7300, "test": 36500}
LISTS = {"train": "Places_LT_train.txt", "validation": "Places_LT_val.txt", "test": "Places_LT_test.txt"}
BOTH = (*archives("places365standard_easyformat"), "places365_standard")
TRAIN = (*archives("train_256_places365standard"), "data_256", *archives("train_large_places365standard"), "data_large")
TRAIN = (*TRAIN, "train")
TEST = (*archives("val_256"), "val_256", *archives("val_large"), "val_large", "val")
CATEGORIES = "categories_places365.txt"
NUM_CLASSES = 365


def prepare(data_dir: Path, source: Path | None, skip_damaged: bool = False) -> str:
    """Writes Places-LT below `data_dir` unless it is there: see `prepare_large.prepare`."""
    return prepare_from(NAME, data_dir, source, plan, [*BOTH, *TRAIN, *TEST, *LISTS.values()], skip_damaged)


def plan(source: Path) -> Plan:
    """What the lists in a folder ask for. Raises: UserError for a file that is missing or a line that is another."""
    found = find(source, [*BOTH, *TRAIN, *TEST, *LISTS.values(), CATEGORIES])
    class_names = _class_names(found.get(CATEGORIES))
    labels = {name.replace("/", "-"): label for label, name in enumerate(class_names)}

    def key(path: str) -> str:
        return _key(path, labels.keys())

    images: dict[str, Image] = {}
    for split, file in LISTS.items():
        for where, path, label in read_list(pick(source, found, f"the list of the {split} split", [file]), NUM_CLASSES):
            known = key(path)
            category = known.rpartition("/")[0] or _category(path, labels.keys())
            if not known or (split == "test") == ("/" in known):
                kind = "val/airfield/Places365_val_00000435.jpg" if split == "test" else "train/airfield/00000001.jpg"
                raise UserError(f"{where}: expected the path of an image such as {kind}, found {path!r}")
            if category and labels[category] != label:
                raise UserError(
                    f"{where}: {path} has the label {label}, but its category is number {labels[category]} of the "
                    "official ones"
                )
            if known in images:
                raise UserError(f"{where}: {path} is listed a second time, in this list or another")
            images[known] = Image(split, label)
    if any(name in found for name in BOTH):
        sources = [pick(source, found, "the images", BOTH)]
    else:
        train = pick(source, found, "the training images", (*BOTH, *TRAIN))
        sources = [train, pick(source, found, "the validation images of Places365", TEST)]
    return Plan(
        name=NAME,
        version="1.0.0",
        description=(
            "Places-LT: a long-tailed subset of the Places365-Standard training images, 5 to 4980 of each of 365 "
            "categories; 20 others of each for validation; the Places365 validation images as test images."
        ),
        homepage="https://github.com/zhmiao/OpenLongTailRecognition-OLTR",
        key_feature="file_name",
        class_names={"label": class_names},
        by_label={},
        official=OFFICIAL,
        images=images,
        key=key,
        sources=sources,
        expected="train/airfield/00000001.jpg, a/airfield/00000001.jpg or Places365_val_00000435.jpg",
    )


def _key(path: str, categories: Set[str]) -> str:
    """What an image is known by; empty for other files. Leading folders do not count."""
    file = path.rpartition("/")[2]
    if file.startswith("Places365_val_"):
        return file
    category = _category(path, categories)
    return f"{category}/{file}" if category and re.fullmatch(r"\d{8}\.jpg", file) else ""


def _category(path: str, categories: Set[str]) -> str:
    """The category that a path's last one or two folders name, as one word; empty if none."""
    folders = path.split("/")[:-1]
    return next((name for name in ("-".join(folders[-2:]), "".join(folders[-1:])) if name in categories), "")


def _class_names(path: Path | None) -> list[str]:
    """The 365 categories in their official order, from the official file or else from TFDS's copy of it."""
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
