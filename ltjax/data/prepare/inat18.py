"""Prepare iNaturalist 2018: `python -m ltjax.data.prepare inat18 --source=FOLDER`.

FOLDER holds train_val2018.tar.gz, or the folder that it unpacks to, and the annotations train2018.json and
val2018.json or their archives (https://github.com/visipedia/inat_comp/tree/master/2018). categories.json, which names
the species, is optional. TFDS calls the data set `i_naturalist2018`.
"""

from pathlib import Path
from typing import Any

from ltjax.data.prepare.one_pass import DatasetSpec, Image
from ltjax.data.prepare.sources import archives, find, pick, read_json
from ltjax.types import UserError

NAME = "i_naturalist2018"
OFFICIAL = {"train": 437513, "validation": 24426}
NUM_CLASSES = 8142
IMAGES = (*archives("train_val2018"), "train_val2018")


def _json(stem: str) -> tuple[str, ...]:
    return (f"{stem}.json", *archives(f"{stem}.json"))


ANNOTATIONS = {"train": _json("train2018"), "validation": _json("val2018")}
CATEGORIES = _json("categories")
PIECES = (*IMAGES, *ANNOTATIONS["train"], *ANNOTATIONS["validation"])
KEPT_KEYS = frozenset({"images", "annotations", "categories", "id", "file_name", "image_id", "category_id"})
KEPT_KEYS |= {"name", "supercategory"}


def read_spec(source: Path) -> DatasetSpec:
    """Read the annotations in a folder; UserError if a file is missing or the layout is not the official one."""
    import tensorflow_datasets as tfds

    found = find(source, [*PIECES, *CATEGORIES])
    images, categories = _read_annotations(source, found)
    file = "image_classification/i_naturalist2018/inaturalist2018_supercategories.txt"
    supercategories = Path(tfds.core.tfds_path(file)).read_text().split()
    for category in categories:
        if category["supercategory"] not in supercategories:
            raise UserError(
                f"the category {category['id']} belongs to the unknown supercategory {category['supercategory']!r}: "
                f"expected one of {', '.join(supercategories)}"
            )
    return DatasetSpec(
        name=NAME,
        description=(
            "iNaturalist 2018: 437,513 training and 24,426 validation photographs of 8,142 species, as many of each as "
            "were taken. The test images, whose species are secret, are left out."
        ),
        homepage="https://github.com/visipedia/inat_comp/tree/master/2018",
        key_feature="id",
        class_names={"label": _class_names(source, found, categories), "supercategory": supercategories},
        by_label={"supercategory": [supercategories.index(category["supercategory"]) for category in categories]},
        official=OFFICIAL,
        images=images,
        key=_key,
        sources=[pick(source, found, "the images", IMAGES)],
        expected="train_val2018/Aves/2820/HASH.jpg",
    )


def _read_annotations(source: Path, found: dict[str, Path]) -> tuple[dict[str, Image], list[dict[str, Any]]]:
    """Return the images by key, and the categories by id."""
    images: dict[str, Image] = {}
    categories: list[dict[str, Any]] = []
    for split, files in ANNOTATIONS.items():
        path = pick(source, found, f"the annotations of the {split} split", files)
        content = read_json(path, KEPT_KEYS)
        try:
            categories = categories or _categories(path, content["categories"])
            for key, label in _labels(path, content, len(categories)).items():
                if key in images:
                    raise UserError(f"{path}: the image {key} belongs to the training split already")
                images[key] = Image(split, label)
        except (KeyError, TypeError, AttributeError) as error:  # AttributeError: a value of another type
            raise UserError(
                f"{path} does not have the layout of the official annotations ({type(error).__name__}: {error}): "
                "expected `images` with id and file_name, `annotations` with image_id and category_id, and "
                "`categories` with id, name and supercategory"
            ) from error
    return images, categories


def _key(path: str) -> str:
    """Return the file name without its suffix, a unique hash that TFDS calls the id."""
    return path.rpartition("/")[2].partition(".")[0]


def _categories(path: Path, categories: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort the categories by id; UserError unless the ids are 0, 1, 2 and so on."""
    ordered = sorted(categories, key=lambda category: category["id"])
    if not ordered or [category["id"] for category in ordered] != list(range(len(ordered))):
        raise UserError(f"{path}: expected categories with the ids 0, 1, 2 and so on, each once")
    return ordered


def _labels(path: Path, content: dict[str, Any], num_classes: int) -> dict[str, int]:
    """Return {key: category id} of the images; UserError if an image does not have exactly one category."""
    by_id: dict[Any, int] = {}
    for annotation in content["annotations"]:
        image, category = annotation["image_id"], annotation["category_id"]
        if category not in range(num_classes):
            raise UserError(
                f"{path}: the image {image!r} has the unknown category {category!r}: there are {num_classes}, from 0"
            )
        if image in by_id:
            raise UserError(f"{path}: the image {image!r} has two annotations: expected one")
        by_id[image] = int(category)
    labels: dict[str, int] = {}
    for image in content["images"]:
        key = _key(image["file_name"])
        if image["id"] not in by_id:
            raise UserError(f"{path}: {image['file_name']} has no annotation: expected one with its id {image['id']!r}")
        if key in labels:
            raise UserError(f"{path}: {image['file_name']} is there twice")
        labels[key] = by_id.pop(image["id"])
    if by_id:
        raise UserError(f"{path}: there is no image with the id {next(iter(by_id))!r}, which an annotation names")
    if not labels:
        raise UserError(f"{path} lists no image")
    return labels


def _class_names(source: Path, found: dict[str, Path], categories: list[dict[str, Any]]) -> list[str]:
    """Return the species by label: from categories.json, else TFDS's if their number fits, else the annotations'.

    The published annotations hide the names of the species, because they were made for the competition.
    """
    import tensorflow_datasets as tfds

    named, path = categories, None
    if any(name in found for name in CATEGORIES):
        path = pick(source, found, "the categories", CATEGORIES)
        try:
            named = _categories(path, read_json(path, KEPT_KEYS))
            names = [str(category["name"]) for category in named]
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: expected a list of categories with id and name") from error
    elif len(categories) == NUM_CLASSES:
        file = "image_classification/i_naturalist2018/inaturalist2018_labels.txt"
        names = Path(tfds.core.tfds_path(file)).read_text(encoding="utf-8").splitlines()
    else:
        names = [str(category["name"]) for category in categories]
    if not len(set(names)) == len(names) == len(categories):
        raise UserError(f"{path or 'the annotations'}: expected {len(categories)} different names of categories")
    return names
