"""What `python -m ltjax.data.prepare imagenet_lt --source=FOLDER` does.

FOLDER holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, or the folders `train` and `val` that they unpack to,
and the lists ImageNet_LT_train.txt, ImageNet_LT_val.txt and ImageNet_LT_test.txt by Liu et al., "Large-Scale
Long-Tailed Recognition in an Open World", CVPR 2019, of lines like `train/n01440764/n01440764_190.JPEG 0`.
"""

import re
from pathlib import Path

from ltjax.data.prepare_large import Image, Plan, prepare_from
from ltjax.data.prepare_sources import archives, find, pick, read_list
from ltjax.types import UserError

NAME = "imagenet_lt"
OFFICIAL = {"train": 115846, "validation": 20000, "test": 50000}
LISTS = {"train": "ImageNet_LT_train.txt", "validation": "ImageNet_LT_val.txt", "test": "ImageNet_LT_test.txt"}
TRAIN = (*archives("ILSVRC2012_img_train"), "ILSVRC2012_img_train", "train")
TEST = (*archives("ILSVRC2012_img_val"), "ILSVRC2012_img_val", "val")


def prepare(data_dir: Path, source: Path | None, skip_damaged: bool = False) -> str:
    """Writes ImageNet-LT below `data_dir` unless it is there: see `prepare_large.prepare`."""
    return prepare_from(NAME, data_dir, source, plan, [*TRAIN, *TEST, *LISTS.values()], skip_damaged)


def plan(source: Path) -> Plan:
    """What the lists in a folder ask for. Raises: UserError for a file that is missing or a line that is another."""
    import tensorflow_datasets as tfds

    wnids = Path(tfds.core.tfds_path("datasets/imagenet2012/labels.txt")).read_text().split()
    test_wnids = Path(tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")).read_text().split()
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    found = find(source, [*TRAIN, *TEST, *LISTS.values()])
    images: dict[str, Image] = {}
    for split, file in LISTS.items():
        for where, path, label in read_list(pick(source, found, f"the list of the {split} split", [file]), len(wnids)):
            key = _key(path)
            if split == "test":
                match = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", key)
                expected = "ILSVRC2012_val_00000446.JPEG"
                wnid = test_wnids[int(match[1]) - 1] if match and 0 < int(match[1]) <= len(test_wnids) else None
            else:
                match = re.fullmatch(r"(n\d{8})_\d+\.JPEG", key)
                expected = "n01440764_190.JPEG, the file of a training image of one of the 1000 classes"
                wnid = match[1] if match and match[1] in labels else None
            if wnid is None:
                raise UserError(f"{where}: expected the path of an image such as {expected}, found {path!r}")
            if labels[wnid] != label:
                raise UserError(
                    f"{where}: {key} has the label {label}, but its class {wnid} is number {labels[wnid]} of the "
                    "sorted WordNet ids"
                )
            if key in images:
                raise UserError(f"{where}: {key} is listed a second time, in this list or another")
            images[key] = Image(split, label)
    return Plan(
        name=NAME,
        version="1.0.0",
        description=(
            "ImageNet-LT: a long-tailed subset of the ImageNet (ILSVRC 2012) training images, 5 to 1280 of each of "
            "1000 classes; 20 others of each for validation; the ILSVRC 2012 validation images as test images."
        ),
        homepage="https://github.com/zhmiao/OpenLongTailRecognition-OLTR",
        key_feature="file_name",
        class_names={"label": wnids},
        by_label={},
        official=OFFICIAL,
        images=images,
        key=_key,
        sources=[pick(source, found, "the training images", TRAIN), pick(source, found, "the test images", TEST)],
        expected="n01440764.tar/n01440764_190.JPEG, n01440764/n01440764_190.JPEG or ILSVRC2012_val_00000446.JPEG",
    )


def _key(path: str) -> str:
    """The file's name, which is unique among the images of ImageNet."""
    return path.rpartition("/")[2]
