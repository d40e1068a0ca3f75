"""Write miniatures of the large data sets in their official layouts, with small JPEGs coloured by class."""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import tensorflow_datasets as tfds

# Changes a miniature's images, {path: content}, in place before they are written.
Spoil = Callable[[dict[str, bytes]], None]


def photo(label: int, index: int, size: int = 64) -> bytes:
    """Make a JPEG of `size` x 1.25 `size` pixels: noisy stripes whose colours and direction depend on the class."""
    class_rng, rng = np.random.default_rng(label), np.random.default_rng((label, index))
    colours, angle = class_rng.uniform(40, 215, (2, 3)), class_rng.uniform(0, np.pi)
    period = class_rng.uniform(0.1, 0.4) * size
    y, x = np.mgrid[:size, : size * 5 // 4]
    phase = (x * np.cos(angle) + y * np.sin(angle)) / period + rng.uniform()
    share = (0.5 + 0.5 * np.sin(2 * np.pi * phase))[..., None]
    pixels = share * colours[0] + (1 - share) * colours[1] + rng.normal(0, 12, (*x.shape, 3))
    return cv2.imencode(".jpg", pixels.clip(0, 255).astype(np.uint8))[1].tobytes()


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def write_folder(path: Path, members: dict[str, bytes]) -> Path:
    for name, content in members.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def write_list(path: Path, labels: dict[str, int]) -> Path:
    path.write_text("".join(f"{name} {label}\n" for name, label in labels.items()))
    return path


def wnids() -> list[str]:
    """Return the WordNet ids of the classes of ImageNet, by label."""
    return Path(tfds.core.tfds_path("datasets/imagenet2012/labels.txt")).read_text().split()


def imagenet_lt(
    folder: Path,
    counts: Sequence[int] = (4, 3, 2),
    validation: int = 1,
    test: int = 2,
    size: int = 64,
    extracted: bool = False,
    spoil: Spoil | None = None,
) -> Path:
    """Write ImageNet-LT to `folder` and return it.

    It has `counts[label]` training images of the first classes, `validation` and `test` images of each class, and some
    that no list names; in folders if `extracted`, else in archives.
    """
    folder.mkdir(parents=True, exist_ok=True)
    classes = wnids()[: len(counts)]
    images: dict[str, bytes] = {}
    lists: dict[str, dict[str, int]] = {"train": {}, "val": {}, "test": {}}
    for label, (wnid, count) in enumerate(zip(classes, counts, strict=True)):
        for i in range(count + validation + 1):  # the last one is in no list
            path = f"train/{wnid}/{wnid}_{(i * 7) % 100 + 1}.JPEG"
            images[path] = photo(label, i, size)
            if i < count + validation:
                lists["train" if i < count else "val"][path] = label
    official = Path(tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")).read_text().split()
    for label, wnid in enumerate(classes):
        numbers = [number for number, other in enumerate(official, start=1) if other == wnid][:test]
        for i, number in enumerate(numbers):
            path = f"val/ILSVRC2012_val_{number:08d}.JPEG"
            images[path] = photo(label, 1000 + i, size)
            lists["test"][path] = label
    for split, labels in lists.items():
        write_list(folder / f"ImageNet_LT_{split}.txt", labels)
    if spoil:
        spoil(images)
    if extracted:
        return write_folder(folder, images)
    train = {}
    for wnid in classes:
        members = {path.split("/")[2]: content for path, content in images.items() if path.startswith(f"train/{wnid}/")}
        inner = io.BytesIO()
        with tarfile.open(fileobj=inner, mode="w") as tar:
            for name, content in members.items():
                header = tarfile.TarInfo(name)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
        train[f"{wnid}.tar"] = inner.getvalue()
    write_tar(folder / "ILSVRC2012_img_train.tar", train)
    val = {path.removeprefix("val/"): content for path, content in images.items() if path.startswith("val/")}
    write_tar(folder / "ILSVRC2012_img_val.tar", val)
    return folder


def places() -> list[str]:
    """Return the categories of Places365, by label."""
    return Path(tfds.core.tfds_path("image_classification/categories_places365.txt")).read_text().split()


def places_lt(
    folder: Path,
    counts: Sequence[int] = (3, 2, 2, 2, 2, 2, 2, 2, 4),
    validation: int = 1,
    test: int = 1,
    size: int = 64,
    layout: str = "easyformat",
    lists: str = "easyformat",
    extracted: bool = False,
    spoil: Spoil | None = None,
) -> Path:
    """Write Places-LT to `folder` and return it.

    It has `counts[label]` training images of the first categories; category 8 has a nested folder. `layout` of the
    archives and `lists`: `easyformat` (places365_standard/train/apartment_building-outdoor/...) or `standard`
    (data_256/a/apartment_building/outdoor/..., val_256/...), of the archives and of the lists. Paths given to `spoil`
    are those of the layout. Returns `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images: dict[str, bytes] = {}
    listed: dict[str, dict[str, int]] = {"train": {}, "val": {}, "test": {}}

    def train_path(name: str, file: str, style: str) -> str:
        return f"data_256/{name[0]}/{name}/{file}" if style == "standard" else f"train/{name.replace('/', '-')}/{file}"

    def test_path(name: str, file: str, style: str) -> str:
        return f"val_256/{file}" if style == "standard" else f"val/{name.replace('/', '-')}/{file}"

    prefix = "" if layout == "standard" else "places365_standard/"
    for label, (name, count) in enumerate(zip(places(), counts, strict=False)):
        for i in range(count + validation + 1):  # the last one is in no list
            file = f"{(i * 7) % 100 + 1:08d}.jpg"
            images[prefix + train_path(name, file, layout)] = photo(label, i, size)
            if i < count + validation:
                listed["train" if i < count else "val"][train_path(name, file, lists)] = label
        for i in range(test):
            file = f"Places365_val_{100 * i + 37 * label % 100 + 1:08d}.jpg"
            images[prefix + test_path(name, file, layout)] = photo(label, 1000 + i, size)
            listed["test"][test_path(name, file, lists)] = label
    for split, labels in listed.items():
        write_list(folder / f"Places_LT_{split}.txt", labels)
    if spoil:
        spoil(images)
    if extracted:
        return write_folder(folder, images)
    if layout == "easyformat":
        write_tar(folder / "places365standard_easyformat.tar", images)
    else:
        train = {path: content for path, content in images.items() if path.startswith("data_256")}
        write_tar(folder / "train_256_places365standard.tar", train)
        write_tar(folder / "val_256.tar", {path: images[path] for path in images.keys() - train.keys()})
    return folder


def inat18(
    folder: Path,
    counts: Sequence[int] = (4, 3, 2),
    validation: int = 1,
    size: int = 64,
    extracted: bool = False,
    categories: bool = False,
    spoil: Spoil | None = None,
    edit: Callable[[dict], None] | None = None,
) -> Path:
    """Write iNaturalist 2018 with `counts[label]` training images of the species `0`, `1`, ...

    Args:
      folder: the destination; made if missing, and returned.
      validation: images of each species.
      extracted: a folder and JSON files instead of `.tar.gz` archives.
      categories: adds categories.json, with names `Species 0` and so on.
      edit: changes the annotations, in place: {"train": ..., "val": ...}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups = ("Aves", "Plantae", "Insecta")
    species = [{"id": i, "name": str(i), "supercategory": groups[i % 3]} for i in range(len(counts))]
    images: dict[str, bytes] = {}
    annotations = {}
    for split, numbers in {"train": counts, "val": [validation] * len(counts)}.items():
        entries, labels = [], []
        for label, count in enumerate(numbers):
            for i in range(count):
                index = i + (1000 if split == "val" else 0)
                key = f"{(label * 7919 + index * 104729) % 2**32:032x}"[::-1]
                path = f"train_val2018/{groups[label % 3]}/{label}/{key}.jpg"
                images[path] = photo(label, index, size)
                number = len(images)
                entries.append({"id": number, "file_name": path, "width": size * 5 // 4, "height": size})
                labels.append({"id": number, "image_id": number, "category_id": label})
        annotations[split] = {"info": {"year": 2018}, "images": entries, "annotations": labels[::-1]}
        annotations[split]["categories"] = species
    if spoil:
        spoil(images)
    if edit:
        edit(annotations)
    files = {f"{split}2018.json": content for split, content in annotations.items()}
    if categories:
        files["categories.json"] = [{"id": i, "name": f"Species {i}", "kingdom": "?"} for i in range(len(counts))]
    for name, content in files.items():
        text = json.dumps(content).encode()
        if extracted:
            (folder / name).write_bytes(text)
        else:
            write_tar(folder / f"{name}.tar.gz", {name: text}, "w:gz")
    if extracted:
        return write_folder(folder, images)
    write_tar(folder / "train_val2018.tar.gz", images, "w:gz")
    return folder
