"""Prepare ImageNet-LT: `python -m ltjax.data.prepare imagenet_lt --source=FOLDER`.

FOLDER holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, or the folders `train` and `val` that they unpack to,
and the lists ImageNet_LT_train.txt, ImageNet_LT_val.txt and ImageNet_LT_test.txt by Liu et al., "Large-Scale
Long-Tailed Recognition in an Open World", CVPR 2019, with lines like `train/n01440764/n01440764_190.JPEG 0`.
"""

import re
from pathlib import Path

from ltjax.data.prepare.one_pass import DatasetSpec, Image
from ltjax.data.prepare.sources import Line, archives, find, pick, read_list
from ltjax.types import UserError

NAME = "imagenet_lt"
OFFICIAL = {"train": 115846, "validation": 20000, "test": 50000}
LISTS = {"train": "ImageNet_LT_train.txt", "validation": "ImageNet_LT_val.txt", "test": "ImageNet_LT_test.txt"}
TRAIN = (*archives("ILSVRC2012_img_train"), "ILSVRC2012_img_train", "train")
TEST = (*archives("ILSVRC2012_img_val"), "ILSVRC2012_img_val", "val")
PIECES = (*TRAIN, *TEST, *LISTS.values())


def read_spec(source: Path) -> DatasetSpec:
    """Read the lists in a folder; UserError if a file is missing or a line is wrong."""
    import tensorflow_datasets as tfds

    wnids = Path(tfds.core.tfds_path("datasets/imagenet2012/labels.txt")).read_text().split()
    test_wnids = Path(tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")).read_text().split()
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    found = find(source, PIECES)
    images: dict[str, Image] = {}
    for split, file in LISTS.items():
        for line in read_list(pick(source, found, f"the list of the {split} split", [file]), len(wnids)):
            key = _key(line.path)
            wnid = _test_wnid(line, test_wnids) if split == "test" else _train_wnid(line, labels)
            if labels[wnid] != line.label:
                raise UserError(
                    f"{line.where}: {key} has the label {line.label}, but its class {wnid} is number {labels[wnid]} of "
                    "the sorted WordNet ids"
                )
            if key in images:
                raise UserError(f"{line.where}: {key} is listed a second time, in this list or another")
            images[key] = Image(split, line.label)
    return DatasetSpec(
        name=NAME,
        description=(
            "ImageNet-LT: a long-tailed subset of the ImageNet (ILSVRC 2012) training images, 5 to 1280 of each of "
            "1000 classes; 20 others of each for validation; the ILSVRC 2012 validation images as test images."
        ),
        homepage="https://github.com/zhmiao/OpenLongTailRecognition-OLTR",
        key_feature="file_name",
        class_names={"label": wnids},
        official=OFFICIAL,
        images=images,
        key=_key,
        sources=[pick(source, found, "the training images", TRAIN), pick(source, found, "the test images", TEST)],
        expected="n01440764.tar/n01440764_190.JPEG, n01440764/n01440764_190.JPEG or ILSVRC2012_val_00000446.JPEG",
    )


def _key(path: str) -> str:
    """Return the file name, which is unique among the images of ImageNet."""
    return path.rpartition("/")[2]


def _train_wnid(line: Line, labels: dict[str, int]) -> str:
    match = re.fullmatch(r"(n\d{8})_\d+\.JPEG", _key(line.path))
    if not match or match[1] not in labels:
        raise _unexpected(line, "n01440764_190.JPEG, the file of a training image of one of the 1000 classes")
    return match[1]


def _test_wnid(line: Line, test_wnids: list[str]) -> str:
    match = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", _key(line.path))
    if not match or not 0 < int(match[1]) <= len(test_wnids):
        raise _unexpected(line, "ILSVRC2012_val_00000446.JPEG")
    return test_wnids[int(match[1]) - 1]


def _unexpected(line: Line, example: str) -> UserError:
    return UserError(f"{line.where}: expected the path of an image such as {example}, found {line.path!r}")
