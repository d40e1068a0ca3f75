"""Decoding, cropping and resizing images on the host."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from ltjax.data import decode
from ltjax.data.decode import View

VIEW = View(size=16, resize=20)


def picture(height=40, width=60):
    """A smooth image that JPEG changes little: red grows downwards, green to the right."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 255 / height, x * 255 / width, np.full((height, width), 80)], -1).astype(np.uint8)


def encoded(image, kind="JPEG", **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


@pytest.mark.parametrize("kind, mode", [("JPEG", "RGB"), ("PNG", "RGB"), ("PNG", "RGBA"), ("JPEG", "L"), ("PNG", "L")])
def test_all_colour_modes_decode_to_rgb(kind, mode):
    pixels = decode.decode(encoded(Image.fromarray(picture()).convert(mode), kind))
    assert pixels.shape == (40, 60, 3) and pixels.dtype == np.uint8
    expected = np.asarray(Image.fromarray(picture()).convert(mode).convert("RGB"))
    assert np.abs(pixels.astype(int) - expected).max() <= 12  # JPEG's loss


def test_cmyk_decodes_to_rgb():
    image = Image.fromarray(picture()).convert("CMYK")
    assert decode.decode(encoded(image)).shape == (40, 60, 3)


def test_the_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    assert decode.decode(encoded(Image.fromarray(picture()), exif=exif)).shape == (40, 60, 3)


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8 no image \xff\xd9"])
def test_bytes_that_are_no_image_are_an_error(content):
    with pytest.raises(ValueError):
        decode.decode(content)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_truncated_file_is_an_error(kind):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    whole = encoded(Image.fromarray(noise), kind)
    with pytest.raises(ValueError):
        decode.decode(whole[: len(whole) // 2])


def test_shrinking_averages_areas():
    checks = (np.indices((32, 32)).sum(0) % 2 * 200).astype(np.uint8)[..., None].repeat(3, -1)
    assert (decode.resized(checks, 8, 8) == 100).all()


def test_the_center_crop_is_the_middle_of_the_resized_image():
    image = picture(90, 60)
    whole = cv2.resize(image, (20, 30), interpolation=cv2.INTER_AREA)  # the shorter side is 20
    expected = whole[7:23, 2:18].astype(int)
    assert np.abs(decode.center_crop(image, VIEW).astype(int) - expected).max() <= 4


def test_random_windows_have_the_documented_areas_and_shapes():
    y, x = np.mgrid[:300, :400]
    image = np.stack([y / 300 * 255, x / 400 * 255, 0 * x], -1).astype(np.uint8)
    areas, shapes = [], []
    for key in range(400):
        cut = decode.random_resized_crop(image, np.uint32(key), View(32, 36, 0.08)).astype(np.float64)
        height = (cut[-1, :, 0].mean() - cut[0, :, 0].mean()) / 255 * 300 * 32 / 31
        width = (cut[:, -1, 1].mean() - cut[:, 0, 1].mean()) / 255 * 400 * 32 / 31
        areas.append(height * width / 120000)
        shapes.append(width / height)
    assert 0.07 < min(areas) < 0.13 and 0.85 < max(areas) < 1.02
    rng = np.random.default_rng(0)  # uniform, except for windows that do not fit
    area, shape = rng.uniform(0.08, 1, 50_000), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), 50_000))
    fits = (120000 * area * shape < 400**2) & (120000 * area / shape < 300**2)
    assert abs(np.mean(areas) - area[fits].mean()) < 0.04
    assert 0.72 < min(shapes) < 0.8 and 1.25 < max(shapes) < 1.38
    assert abs(np.mean(np.log(shapes)) - np.log(shape[fits]).mean()) < 0.03


def test_the_key_determines_the_window():
    image = np.random.default_rng(0).integers(0, 255, (50, 70, 3)).astype(np.uint8)
    first, again, other = (decode.random_resized_crop(image, np.uint32(key), VIEW) for key in (5, 5, 6))
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize("shape", [(4, 400), (400, 4), (1, 1)])
def test_extreme_aspect_ratios_are_cropped(shape):
    image = np.full((*shape, 3), 7, np.uint8)
    assert decode.random_resized_crop(image, np.uint32(0), VIEW).shape == (16, 16, 3)
    assert decode.center_crop(image, VIEW).shape == (16, 16, 3)
