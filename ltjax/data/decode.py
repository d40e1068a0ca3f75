"""From the bytes of an image file to the pixels that a network sees: decoding, cropping, resizing, on a host."""

import math
import re
from typing import Any, NamedTuple

import cv2
import numpy as np
import simplejpeg

from ltjax.hashing import hash32
from ltjax.types import one_line

JPEG = b"\xff\xd8"  # how one begins
MAX_IMAGE_BYTES = 256 << 20  # more than any photograph has: what claims to be larger is not read
# What libjpeg warns of and goes on from, with pixels made up. Its other warnings are harmless: stray bytes, versions.
MADE_UP = re.compile(r"premature end|bad Huffman|bad arithmetic|instead of RST", re.IGNORECASE)
ATTEMPTS = 10  # at a window of the drawn area and shape, before the middle of the image is taken
SHAPES = (3 / 4, 4 / 3)  # of a random window, width over height


class View(NamedTuple):
    """How images of any size become squares of one size."""

    size: int  # side of the square, in pixels
    resize: int  # evaluation: the shorter side, before the square in the middle is cut out
    min_area: float = 0.08  # training: smallest share of the image in a random window


def decode(encoded: bytes) -> np.ndarray:
    """A JPEG, PNG or other image file -> RGB uint8 [h, w, 3], whatever its colours: grey, CMYK, with transparency.

    Orientations noted in the file are not heeded, as in the code of the papers. Raises: ValueError where `problem` has
    something to say.
    """
    if encoded.startswith(JPEG):
        try:
            return simplejpeg.decode_jpeg(encoded, colorspace="RGB", strict=True)
        except (ValueError, KeyError):
            pass  # CMYK, which OpenCV reads, a harmless warning, or damage
    if found := problem(encoded):
        raise ValueError(found)
    pixels: Any = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    return pixels


def problem(content: bytes) -> str:
    """What is wrong with the file of an image; empty if nothing.

    Any colour space, orientation and name will do. A JPEG is decoded by libjpeg at an eighth of its size, with an eye
    on the warnings by which it tells that pixels are made up; OpenCV is asked about everything else.
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
        except (ValueError, KeyError) as error:  # KeyError: a kind of JPEG that simplejpeg has no name for
            if MADE_UP.search(str(error)):
                return one_line(error)
    try:
        pixels: Any = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:  # one that claims to have more pixels than OpenCV accepts
        return one_line(error)
    return "not an image that can be decoded" if pixels is None else ""


def resized(image: np.ndarray, height: int, width: int, out: np.ndarray | None = None) -> np.ndarray:
    """uint8 [h, w, 3] -> [height, width, 3]: means over areas where it shrinks, bilinear where it grows.

    out: contiguous, to be filled and returned; None: a new array, or the image itself where it has that size.
    """
    if image.shape[:2] == (height, width):
        if out is None:
            return image
        out[:] = image
        return out
    shrinks = height < image.shape[0] or width < image.shape[1]
    made = cv2.resize(image, (width, height), dst=out, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return np.asarray(made)


def random_resized_crop(image: np.ndarray, key: np.uint32, view: View) -> np.ndarray:
    """A random window of the image, resized to the view's square: uint8 [size, size, 3].

    Its area is a uniform share of the image's, from `min_area` to 1, its shape log-uniform in `SHAPES`, its place
    uniform; if no such window fits in ten attempts, the largest of an allowed shape is cut from the middle.
    key: uint32 that all of it follows from. Source: Szegedy et al. 2015, with the numbers of torchvision's transform.
    """
    return random_window(image, window_draws(key), view)


def window_draws(keys: np.ndarray | np.uint32) -> np.ndarray:
    """What `random_window` draws for uint32 keys [...]: float64 [..., ATTEMPTS, 4] in [0, 1)."""
    draws = hash32(np.asarray(keys)[..., None], np.arange(4 * ATTEMPTS, dtype=np.uint32))
    return draws.reshape(*draws.shape[:-1], ATTEMPTS, 4) / 2.0**32


def random_window(image: np.ndarray, draws: np.ndarray, view: View, out: np.ndarray | None = None) -> np.ndarray:
    """`random_resized_crop` by what `window_draws` drew for its key, [ATTEMPTS, 4]; out: see `resized`."""
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
    """The shorter side becomes `resize`, then the square in the middle is cut out: uint8 [size, size, 3].

    out: see `resized`.
    """
    height, width = image.shape[:2]
    # Only what the square shows is resized: the same window, in the pixels of the image as it is.
    side = min(height, width) * min(view.size / view.resize, 1.0)
    h = w = max(1, round(side))
    top, left = (height - h) // 2, (width - w) // 2
    return resized(image[top : top + h, left : left + w], view.size, view.size, out)
