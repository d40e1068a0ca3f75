"""Load CIFAR-10 and CIFAR-100 as prepared by TensorFlow Datasets or `python -m ltjax.data.prepare`.

Or from one file, `<data_dir>/<name>.npz`, which needs neither TFDS nor OpenCV.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from ltjax.data import records
from ltjax.data.source import Images, resolve_data_dir
from ltjax.system import npz
from ltjax.system.wording import one_line
from ltjax.types import UserError


def load(name: str, data_dir: str | os.PathLike | None = None) -> Images:
    """Load 50,000 training and 10,000 test images of [32, 32, 3] pixels, in the order of the original archive.

    `<data_dir>/<name>.npz` takes precedence over prepared folders and may hold any number of images; its arrays are the
    fields of `Images`. Of several prepared versions the newest is read. "cifar100" has the 100 fine classes. UserError
    if the data set is missing or damaged, or only TensorFlow can read it.
    """
    data_dir = resolve_data_dir(data_dir)
    if (data_dir / f"{name}.npz").is_file():
        return _read_npz(data_dir / f"{name}.npz")
    return records.load(name, data_dir)


def _read_npz(path: Path) -> Images:
    try:
        arrays = npz.read(path)
        values: dict[str, Any] = {field: arrays[field] for field in Images._fields}
        values["class_names"] = tuple(values["class_names"].tolist())
        images = Images(**values)
        for pixels, labels in (images[:2], images[2:4]):
            if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 32, 32, 3):
                raise ValueError(f"images are {pixels.dtype}{list(pixels.shape)} for {len(labels)} labels")
            if labels.dtype != np.int32 or not 0 <= labels.min() <= labels.max() < len(images.class_names):
                raise ValueError(f"labels are not int32 below {len(images.class_names)}")
        return images
    except MemoryError:
        raise
    except Exception as error:  # truncated zip files raise many kinds
        raise UserError(f"{path} is damaged or incomplete ({one_line(error)}): replace it or delete it") from error
