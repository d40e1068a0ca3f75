"""From the bytes of an image file to the pixels that a network sees: decoding, cropping, resizing, on a host."""

import math
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

from ltjax.hashing import hash32

ATTEMPTS = 10  # at a window of the drawn area and shape, before the middle of the image is taken
SHAPES = (3 / 4, 4 / 3)  # of a random window, width over height


class View(NamedTuple):
    """How images of any size become squares of one size."""

    size: int  # side of the square, in pixels
    resize: int  # evaluation: the shorter side, before the square in the middle is cut out
    min_area: float = 0.08  # training: smallest share of the image in a random window


def decode(encoded: bytes) -> np.ndarray:
    """A JPEG, PNG or other image file -> RGB uint8 [h, w, 3], whatever its colours: grey, CMYK, with transparency.

    Orientations noted in the file are not heeded, as in the code of the papers. Raises: ValueError where the bytes are
    no whole image.
    """
    if encoded[:2] == b"\xff\xd8":
        try:
            return simplejpeg.decode_jpeg(encoded, colorspace="RGB", strict=True)
        except ValueError:
            pass  # CMYK, or damaged: OpenCV reads the first
        if b"\xff\xd9" not in encoded[-1024:]:
            raise ValueError("a JPEG without an end: cut short")
    if not encoded:
        raise ValueError("an empty file")
    pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        raise ValueError("not an image, or damaged")
    return np.asarray(pixels)


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [h, w, 3] -> [height, width, 3]: means over areas where it shrinks, bilinear where it grows."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = height < image.shape[0] or width < image.shape[1]
    made = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return np.asarray(made)


def random_resized_crop(image: np.ndarray, key: np.uint32, view: View) -> np.ndarray:
    """A random window of the image, resized to the view's square: uint8 [size, size, 3].

    Its area is a uniform share of the image's, from `min_area` to 1, its shape log-uniform in `SHAPES`, its place
    uniform; if no such window fits in ten attempts, the largest of an allowed shape is cut from the middle.
    key: uint32 that all of it follows from. Source: Szegedy et al. 2015, with the numbers of torchvision's transform.
    """
    height, width = image.shape[:2]
    # [ATTEMPTS, 4] in [0, 1)
    draws = hash32(key, np.arange(4 * ATTEMPTS, dtype=np.uint32)).reshape(ATTEMPTS, 4) / 2.0**32
    low, high = (math.log(shape) for shape in SHAPES)
    for area, shape, row, column in draws.tolist():
        area = (view.min_area + (1 - view.min_area) * area) * height * width
        shape = math.exp(low + (high - low) * shape)
        h, w = round(math.sqrt(area / shape)), round(math.sqrt(area * shape))
        if 0 < h <= height and 0 < w <= width:
            top, left = int(row * (height - h + 1)), int(column * (width - w + 1))
            break
    else:
        shape = min(max(width / height, SHAPES[0]), SHAPES[1])
        h, w = min(height, round(width / shape)), min(width, round(height * shape))
        top, left = (height - h) // 2, (width - w) // 2
    return resized(image[top : top + h, left : left + w], view.size, view.size)


def center_crop(image: np.ndarray, view: View) -> np.ndarray:
    """The shorter side becomes `resize`, then the square in the middle is cut out: uint8 [size, size, 3]."""
    height, width = image.shape[:2]
    # Only what the square shows is resized: the same window, in the pixels of the image as it is.
    side = min(height, width) * min(view.size / view.resize, 1.0)
    h = w = max(1, round(side))
    top, left = (height - h) // 2, (width - w) // 2
    return resized(image[top : top + h, left : left + w], view.size, view.size)
