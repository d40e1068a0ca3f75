"""The orientation of photographs: read the tag that cameras write, and turn pixels by it.

Orientations are the numbers 1 (upright) to 8 of the TIFF and EXIF specifications. Cameras keep the sensor's pixels and
write how to turn them.
"""

import re
import struct
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from PIL import Image

TAG = 274  # of EXIF's first directory, which is that of a TIFF
NUMBERS = {1: "B", 3: "H", 4: "I"}  # the types of whole numbers in EXIF, by their codes
START_OF_SCAN, APP1 = 0xDA, 0xE1  # markers of a JPEG
EXIF, XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"  # how a segment APP1 begins
TURNS: dict[int, Callable[[Any], Any]] = {  # how to turn the pixels of an orientation
    2: lambda pixels: cv2.flip(pixels, 1),
    3: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_180),
    4: lambda pixels: cv2.flip(pixels, 0),
    5: cv2.transpose,
    6: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE),
    7: lambda pixels: cv2.rotate(cv2.transpose(pixels), cv2.ROTATE_180),
    8: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE),
}
IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
IN_PNG = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # chunks and texts that may hold it


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn pixels [h, w, 3] upright: [h, w, 3], or [w, h, 3] for orientations from 5 up. Others than 2 to 8: as is."""
    return TURNS[orientation](pixels) if orientation in TURNS else pixels


def undoing(orientation: int) -> int:
    """Return the orientation whose turn undoes that of another one."""
    return {6: 8, 8: 6}.get(orientation, orientation)


def of_jpeg(content: bytes) -> int:
    """Read the orientation of a JPEG: that of its EXIF data or else, as in Pillow, of its XMP data; 1 if it has none.

    This takes microseconds, where Pillow takes a tenth of the time of decoding.
    """
    exif = xmp = b""
    at = 2
    try:
        while content[at] == 0xFF and (marker := content[at + 1]) != START_OF_SCAN:
            if marker == 0xFF:  # padding before a marker
                at += 1
                continue
            end = at + 2 + (content[at + 2] << 8) + content[at + 3]
            if marker == APP1:
                segment = content[at + 4 : end]
                exif += segment.removeprefix(EXIF) if segment.startswith(EXIF) else b""
                xmp = segment if segment.startswith(XMP) else xmp
            at = end
    except IndexError:  # the file ends
        pass
    in_xmp = IN_XMP.search(xmp) if xmp else None
    return (_of_exif(exif) if exif else 0) or (int(in_xmp[1]) if in_xmp else 1)


def _of_exif(exif: bytes) -> int:
    """Read the orientation from the first directory of EXIF data; 0 if it has none, or is damaged."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 0
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, start)
        for at in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind = struct.unpack_from(order + "HH", exif, at)
            if tag == TAG:
                return struct.unpack_from(order + NUMBERS[kind], exif, at + 8)[0]
    except (struct.error, KeyError):
        pass
    return 0


def of_opened(image: Image.Image, content: bytes) -> int:
    """Read the orientation of a file that Pillow has opened; 1 if it has none, or it is damaged."""
    if image.format in ("JPEG", "MPO"):
        return of_jpeg(content)
    if image.format == "PNG" and not any(name in content for name in IN_PNG):
        return 1  # else Pillow would decode the image to find the chunks behind the pixels
    try:
        return int(image.getexif().get(TAG, 1))
    except Exception:  # damage has many exception types
        return 1
