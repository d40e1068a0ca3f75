"""Decode, crop and resize image files on the host."""

import io
import math
import os
import re
import stat
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from ltjax.data import orientation
from ltjax.system.hashing import hash32
from ltjax.system.wording import one_line

JPEG = b"\xff\xd8"  # first bytes
SIGNATURES = (  # patterns of first bytes
    rb"\xff\xd8\xff",  # JPEG
    rb"\x89PNG\r\n",
    rb"GIF8[79]a",
    rb"BM....\0\0\0\0",
    rb"II[*+]\0|MM\0[*+]",  # TIFF
    rb"RIFF....WEBP",
    rb"\x59\xa6\x6a\x95",  # Sun raster
    rb"P[1-6]\s+[#\d]|P7\nWIDTH|P7\n#",  # PNM, PAM
    rb"....ftypavi[fs]",
    rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",  # JPEG 2000
)
BITS_PER_SAMPLE = 258  # tag of a TIFF
DARK = 1 << 14  # images of 16 bits whose brightest value is below a quarter of the range
MAX_PIXELS = 1 << 28  # more than any camera takes; images with more are not decoded
MAX_IMAGE_BYTES = 256 << 20  # more than any photograph; larger files are not read
warnings.filterwarnings("ignore", module=r"PIL\.")  # Pillow's warnings; damage is reported below
# Warnings after which libjpeg continues with invented pixels. Its other warnings (stray bytes, versions) are harmless.
INVENTED_PIXELS = re.compile(r"premature end|bad Huffman|bad arithmetic|instead of RST", re.IGNORECASE)
ATTEMPTS = 10  # draws of a random window that fits, before the centre of the image is taken
SHAPES = (3 / 4, 4 / 3)  # width over height of a random window


class View(NamedTuple):
    """How images of any size become squares of one size."""

    size: int  # side of the square, in pixels
    resize: int  # evaluation: the shorter side of the image before the centre crop
    min_area: float = 0.08  # training: the smallest share of the image in a random window
    upright: bool = False  # turn images as the orientation tags of their files say


def looks_like_image(head: bytes) -> bool:
    """Return whether a file's first 32 bytes are those of an image that OpenCV decodes."""
    return any(re.match(signature, head, re.DOTALL) for signature in SIGNATURES)


def read_file(path: str | os.PathLike) -> bytes:
    """Read an image file's bytes. OSError if they cannot be read; ValueError if it is no regular file, or too large."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > MAX_IMAGE_BYTES:
        raise ValueError(f"more than {MAX_IMAGE_BYTES} bytes")
    return Path(path).read_bytes()


def decode(encoded: bytes, *, upright: bool = False) -> np.ndarray:
    """Decode a JPEG, PNG or other image file of any colour space to RGB uint8 [h, w, 3].

    An alpha channel is dropped, and the pixels below it do not change. Of 16 bits a channel, the upper 8 are kept; see
    `DeepImages`.

    Args:
      upright: Turn the image as its orientation tag says, like Pillow's `ImageOps.exif_transpose`. Otherwise the tag is
        ignored in every format, as in the papers' code.

    Raises:
      ValueError: The file is empty, damaged, too large or no image.
    """
    return decode_and_measure(encoded, upright=upright)[0]


def decode_and_measure(encoded: bytes, *, upright: bool = False) -> tuple[np.ndarray, int | None]:
    """Do the same as `decode`, and also return the brightest value of an image of 16 bits a channel, else None."""
    if encoded.startswith(JPEG):
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(encoded, strict=False)
            if int(height) * int(width) <= MAX_PIXELS:
                pixels = simplejpeg.decode_jpeg(encoded, colorspace="RGB", strict=True)
                return orientation.turned(pixels, orientation.of_jpeg(encoded)) if upright else pixels, None
        except (ValueError, KeyError):  # CMYK, which OpenCV reads; a harmless warning; or damage
            if message := problem(encoded):
                raise ValueError(message) from None
    return _decode_uncommon(encoded, upright=upright)


def problem(content: bytes) -> str:
    """Return the error of an image file, "" for none."""
    return inspect(content)[0]


def inspect(content: bytes) -> tuple[str, int | None]:
    """Return the error of an image file ("" for none), and the brightest value if it has 16 bits a channel.

    libjpeg decodes a JPEG at an eighth of its size and warns if it invents pixels. Other files are decoded in full.
    """
    if content.startswith(JPEG) and len(content) <= MAX_IMAGE_BYTES:
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(content, strict=False)
            if int(height) * int(width) > MAX_PIXELS:
                return f"more than {MAX_PIXELS} pixels", None
            space = "CMYK" if space in ("CMYK", "YCCK") else "GRAY"
            simplejpeg.decode_jpeg(content, space, min_height=1, min_width=1, min_factor=8, strict=True)
            return "", None
        except (ValueError, KeyError) as error:  # KeyError: a colour space unknown to simplejpeg
            if INVENTED_PIXELS.search(str(error)):
                return one_line(error), None
    try:
        return "", _decode_uncommon(content)[1]
    except ValueError as error:
        return str(error), None


def _decode_uncommon(content: bytes, *, upright: bool = False) -> tuple[np.ndarray, int | None]:
    """Decode any format but a common JPEG. ValueError with the reason if that fails."""
    if not content:
        raise ValueError("empty")
    if len(content) > MAX_IMAGE_BYTES:
        raise ValueError(f"more than {MAX_IMAGE_BYTES} bytes")
    pixels, turn = _by_pillow(content, upright)
    if pixels is not None:
        return np.ascontiguousarray(orientation.turned(pixels, turn)), None
    encoded: Any = np.frombuffer(content, np.uint8)
    try:
        pixels = cv2.imdecode(encoded, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION)
        kept: Any = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED) if pixels is None else pixels
    except cv2.error as error:
        too_large = "CV_IO_MAX_IMAGE" in str(error)  # see ltjax/__init__.py
        raise ValueError(f"more than {MAX_PIXELS} pixels" if too_large else one_line(error)) from error
    if kept is not None and kept.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"pixels of type {kept.dtype}, whose brightest value is unknown: convert it to 8 bits")
    if pixels is None and kept is not None and kept.ndim == 2:  # OpenCV makes no RGB of grey JPEG 2000 codestreams
        pixels = cv2.cvtColor(kept, cv2.COLOR_GRAY2BGR)
    if pixels is None:
        raise ValueError("not an image that can be decoded")
    _check_range(content, pixels)
    colours: Any = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)  # some of OpenCV's decoders ignore IMREAD_COLOR_RGB
    colours = orientation.turned(colours, turn)
    if colours.dtype == np.uint8:
        return colours, None
    return (colours >> 8).astype(np.uint8), int(colours.max())


def _by_pillow(content: bytes, upright: bool) -> tuple[np.ndarray | None, int]:
    """Decode a GIF, or a TIFF of up to 8 bits a channel: OpenCV would change their pixels below transparent ones.

    Returns:
      The pixels, or None for other files; and the orientation by which the pixels, or else OpenCV's, are to be turned.
        Pillow and OpenCV turn a TIFF upright, and no other file.

    Raises:
      ValueError: The header of a file of any kind declares too many pixels, or a GIF or TIFF is damaged.
    """
    try:
        image: Any = Image.open(io.BytesIO(content))
    except Image.DecompressionBombError:
        raise ValueError(f"more than {MAX_PIXELS} pixels") from None
    except Exception:  # a kind that Pillow does not know, or damage: OpenCV decides
        return None, 1
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"more than {MAX_PIXELS} pixels")
        is_tiff = image.format == "TIFF"
        turn = orientation.of_opened(image, content) if upright != is_tiff else 1
        turn = orientation.undoing(turn) if is_tiff else turn
        if not is_tiff and image.format != "GIF":
            return None, turn
        try:
            if max(getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (1,))) > 8:
                return None, turn
            return np.asarray(image.convert("RGB")), turn
        except Exception as error:  # damage has many exception types
            raise ValueError(one_line(error)) from error


def _check_range(content: bytes, pixels: np.ndarray) -> None:
    """Raise ValueError if a file declares a brightest value that OpenCV does not scale to 255 or 65,535."""
    header = re.match(rb"P[2356]\s(?:\s|#[^\n]*\n)*\d+(?:\s|#[^\n]*\n)+\d+(?:\s|#[^\n]*\n)+(\d+)", content)
    header = header or re.match(rb"P7\n(?:[^\n]*\n)*?MAXVAL (\d+)", content)
    if header and int(header[1]) not in (255, 65535):
        raise ValueError(f"its brightest value is {int(header[1])}: scale it to 255")
    if pixels.dtype == np.uint16 and not header and not content.startswith((b"\x89PNG", b"II", b"MM")):
        raise ValueError("more than 8 bits a channel, with a brightest value that is unknown: convert it to 8 bits")


class DeepImages:
    """Collects images of 16 bits a channel, of which `decode` keeps the upper 8 bits, whatever range they fill."""

    def __init__(self):
        self._brightest: list[int] = []  # the brightest value of each image

    def add(self, brightest: int | None) -> None:
        """Add an image if it has 16 bits. brightest: from `decode_and_measure` or `inspect`."""
        if brightest is not None:
            self._brightest.append(brightest)

    def note(self) -> str:
        """Describe the images; "" if there are none."""
        if not self._brightest:
            return ""
        dark = sum(value < DARK for value in self._brightest)
        return (
            f"{len(self._brightest)} image(s) have 16 bits a channel, with brightest values from "
            f"{min(self._brightest):,} to {max(self._brightest):,} of 65,535; the upper 8 bits are used"
            + (f", so {dark} are dark: scale them to the full range" if dark else "")
        )


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
