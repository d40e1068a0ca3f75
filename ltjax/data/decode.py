"""Decode, crop and resize image files on the host."""

import math
import re
from typing import Any, NamedTuple

import cv2
import numpy as np
import simplejpeg

from ltjax.hashing import hash32
from ltjax.types import one_line

JPEG = b"\xff\xd8"  # first bytes
MAX_IMAGE_BYTES = 256 << 20  # more than any photograph; larger files are not read
# Warnings after which libjpeg continues with invented pixels. Its other warnings (stray bytes, versions) are harmless.
INVENTED_PIXELS = re.compile(r"premature end|bad Huffman|bad arithmetic|instead of RST", re.IGNORECASE)
ATTEMPTS = 10  # draws of a random window that fits, before the centre of the image is taken
SHAPES = (3 / 4, 4 / 3)  # width over height of a random window


class View(NamedTuple):
    """How images of any size become squares of one size."""

    size: int  # side of the square, in pixels
    resize: int  # evaluation: the shorter side of the image before the centre crop
    min_area: float = 0.08  # training: the smallest share of the image in a random window


def decode(encoded: bytes) -> np.ndarray:
    """Decode a JPEG, PNG or other image file of any colour space to RGB uint8 [h, w, 3].

    The EXIF orientation is ignored, as in the papers' code. ValueError with what `problem` returns.
    """
    if encoded.startswith(JPEG):
        try:
            return simplejpeg.decode_jpeg(encoded, colorspace="RGB", strict=True)
        except (ValueError, KeyError):
            pass  # CMYK, which OpenCV reads; a harmless warning; or damage
    if message := problem(encoded):
        raise ValueError(message)
    pixels: Any = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    return pixels


def problem(content: bytes) -> str:
    """Say what is wrong with an image file; "" if nothing is.

    libjpeg decodes a JPEG at an eighth of its size and warns if it invents pixels. OpenCV decodes everything else.
    """
    if not content:
        return "empty"
    if len(content) > MAX_IMAGE_BYTES:
        return f"more than {MAX_IMAGE_BYTES} bytes"
    if content.startswith(JPEG):
        try:
            space = simplejpeg.decode_jpeg_header(content, strict=False)[2]
            space = "CMYK" if space in ("CMYK", "YCCK") else "GRAY"
            simplejpeg.decode_jpeg(content, space, min_height=1, min_width=1, min_factor=8, strict=True)
            return ""
        except (ValueError, KeyError) as error:  # KeyError: a colour space unknown to simplejpeg
            if INVENTED_PIXELS.search(str(error)):
                return one_line(error)
    try:
        pixels: Any = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:  # the header declares more pixels than OpenCV accepts
        return one_line(error)
    return "not an image that can be decoded" if pixels is None else ""


def resized(image: np.ndarray, height: int, width: int, out: np.ndarray | None = None) -> np.ndarray:
    """Resize uint8 [h, w, 3] to [height, width, 3]: means over areas to shrink, bilinear to enlarge.

    Fill and return the contiguous array `out`. If it is None, return a new array, or an image of that size unchanged.
    """
    if image.shape[:2] == (height, width):
        if out is None:
            return image
        out[:] = image
        return out
    shrinks = height < image.shape[0] or width < image.shape[1]
    pixels = cv2.resize(image, (width, height), dst=out, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return np.asarray(pixels)


def random_resized_crop(image: np.ndarray, key: np.uint32, view: View) -> np.ndarray:
    """Cut a random window from an image and resize it to the view's square: uint8 [size, size, 3].

    The window's share of the area is uniform from `min_area` to 1, its shape log-uniform in `SHAPES`, its position
    uniform. If no such window fits in ten attempts, the largest one with an allowed shape is cut from the centre. The
    uint32 `key` determines all of it.
    Source: Szegedy et al. 2015, with the numbers of torchvision's transform.
    """
    return random_window(image, window_draws(key), view)


def window_draws(keys: np.ndarray | np.uint32) -> np.ndarray:
    """Draw the random numbers of `random_window` for uint32 keys [...]: float64 [..., ATTEMPTS, 4] in [0, 1)."""
    draws = hash32(np.asarray(keys)[..., None], np.arange(4 * ATTEMPTS, dtype=np.uint32))
    return draws.reshape(*draws.shape[:-1], ATTEMPTS, 4) / 2.0**32


def random_window(image: np.ndarray, draws: np.ndarray, view: View, out: np.ndarray | None = None) -> np.ndarray:
    """Compute `random_resized_crop` from the `window_draws` [ATTEMPTS, 4] of its key; `out` as in `resized`."""
    height, width = image.shape[:2]
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
    return resized(image[top : top + h, left : left + w], view.size, view.size, out)


def center_crop(image: np.ndarray, view: View, out: np.ndarray | None = None) -> np.ndarray:
    """Resize the shorter side to `resize` and cut out the centre: uint8 [size, size, 3]; `out` as in `resized`."""
    height, width = image.shape[:2]
    # Resize only the window that the square shows, in the original image's pixels.
    side = min(height, width) * min(view.size / view.resize, 1.0)
    h = w = max(1, round(side))
    top, left = (height - h) // 2, (width - w) // 2
    return resized(image[top : top + h, left : left + w], view.size, view.size, out)
