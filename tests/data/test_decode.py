"""Decoding, cropping and resizing images on the host."""

import io
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from ltjax.data import decode
from ltjax.data.decode import View

VIEW = View(size=16, resize=20)


def picture(height=40, width=60):
    """Return a smooth image that JPEG changes little: red grows downwards, green to the right."""
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


# Containers that keep every pixel, and JPEG's successors at their best. Pillow cannot write the rest.
KINDS = {
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1"),
    "TIFF": ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr"),
    "WEBP": ("RGB", "RGBA", "L", "P"),
    "BMP": ("RGB", "RGBA", "L", "P", "1"),
    "GIF": ("RGB", "L", "P", "1"),
    "PPM": ("RGB", "L", "1"),
    "JPEG2000": ("RGB", "RGBA", "L", "LA"),
    "AVIF": ("RGB", "RGBA", "L", "LA"),
    "JPEG": ("RGB", "L", "1", "CMYK", "YCbCr"),
}
SETTINGS = {"WEBP": {"lossless": True, "exact": True}, "AVIF": {"quality": 100}, "JPEG": {"quality": 100}}


@pytest.mark.parametrize("kind, mode", [(kind, mode) for kind, modes in KINDS.items() for mode in modes])
def test_every_container_gives_the_pixels_that_pillow_reads(kind, mode):
    rng = np.random.default_rng(0)
    alpha = rng.integers(0, 256, (8, 8)).astype(np.uint8)
    image = Image.fromarray(np.dstack([picture(8, 8), alpha])).convert("RGB" if mode not in ("RGBA", "LA") else "RGBA")
    content = encoded(image.convert(mode), kind, **SETTINGS.get(kind, {}))
    with Image.open(io.BytesIO(content)) as opened:
        expected = np.asarray(opened.convert("RGB")).astype(int)
    assert np.abs(decode.decode(content) - expected).max() <= 1  # rounding of YCbCr and CMYK


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_a_jpeg_2000_without_a_container_is_decoded(mode):
    image = Image.fromarray(picture(8, 8)).convert(mode)
    content = encoded(image, "JPEG2000", no_jp2=True)
    np.testing.assert_array_equal(decode.decode(content), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("ending", [".png", ".tiff", ".ppm"])
def test_of_16_bits_the_upper_8_are_kept(ending):
    pixels = np.random.default_rng(0).integers(0, 5000, (8, 8, 3)).astype(np.uint16)
    content = cv2.imencode(ending, pixels)[1].tobytes()
    decoded, brightest = decode.decode_and_measure(content)
    np.testing.assert_array_equal(decoded, pixels[..., ::-1] >> 8)
    assert brightest == pixels.max() and decode.inspect(content) == ("", pixels.max())


def test_alpha_of_16_bits_is_dropped():
    pixels = np.random.default_rng(0).integers(0, 65536, (8, 8, 4)).astype(np.uint16)
    for ending in (".png", ".tiff"):
        decoded = decode.decode(cv2.imencode(ending, pixels)[1].tobytes())
        np.testing.assert_array_equal(decoded, pixels[..., 2::-1] >> 8)


@pytest.mark.parametrize("ending", [".tiff", ".pfm", ".hdr"])
def test_images_of_floats_are_refused_with_the_reason(ending):
    content = cv2.imencode(ending, np.full((8, 8, 3), 0.5, np.float32))[1].tobytes()
    assert "pixels of type float32, whose brightest value is unknown: convert it to 8 bits" in decode.problem(content)


def oriented(orientation, endian="<"):
    """Make EXIF data with an orientation and another entry."""
    exif = Image.Exif()
    exif.endian = endian
    exif[0x010F], exif[0x0112] = "camera", orientation
    return exif


def upright(content):
    """Return the pixels that Pillow turns upright."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_the_orientation_is_that_of_pillow_or_ignored(kind, orientation):
    settings = dict(exif=oriented(orientation), **SETTINGS.get(kind, {}))
    for mode in KINDS[kind]:
        image = Image.fromarray(picture(16, 24)).convert(mode)
        content, plain = (encoded(image, kind, **settings | changes) for changes in ({}, {"exif": oriented(1)}))
        turned, expected = decode.decode(content, upright=True), upright(content)
        assert turned.shape == expected.shape and turned.flags.c_contiguous
        assert np.abs(turned - expected).max() <= 1, mode
        np.testing.assert_array_equal(decode.decode(content), decode.decode(plain), err_msg=mode)


def in_segments(content, *segments):
    """Return a JPEG with segments APP1 after its first one."""
    end = 4 + int.from_bytes(content[4:6], "big")
    added = b"".join(b"\xff\xe1" + (len(each) + 2).to_bytes(2, "big") + each for each in segments)
    return content[:end] + added + content[end:]


XMP = b'http://ns.adobe.com/xap/1.0/\0<rdf:Description tiff:Orientation="6"/>'


@pytest.mark.parametrize(
    "change",
    [
        lambda jpeg: in_segments(jpeg, oriented(6, ">").tobytes()),
        lambda jpeg: in_segments(jpeg, XMP),
        lambda jpeg: in_segments(jpeg, XMP, oriented(8).tobytes()),  # EXIF data come first
        lambda jpeg: in_segments(jpeg, oriented(3).tobytes()[:30], b"Exif\0\0" + oriented(3).tobytes()[30:]),
        lambda jpeg: in_segments(jpeg, oriented(6).tobytes()).replace(b"\xff\xe1", b"\xff\xff\xff\xe1"),
        lambda jpeg: in_segments(jpeg, oriented(6).tobytes().replace(b"\x12\1\3\0", b"\x12\1\4\0")),  # 32 bits
        lambda jpeg: in_segments(jpeg, oriented(9).tobytes()),  # no orientation
        lambda jpeg: in_segments(jpeg, oriented(6).tobytes()[:20]),
        lambda jpeg: in_segments(jpeg, oriented(6).tobytes().replace(b"\0\1\0\0\0", b"\0\2\0\0\0")),
        lambda jpeg: in_segments(jpeg, b"Exif\0\0"),
    ],
)
def test_the_orientation_of_a_jpeg_is_read_wherever_pillow_reads_it(change):
    content = change(encoded(Image.fromarray(picture()), quality=100))
    np.testing.assert_array_equal(decode.decode(content, upright=True), upright(content))


def test_the_orientation_of_a_png_is_read_wherever_pillow_reads_it():
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Raw profile type exif", f"\nexif\n      34\n{oriented(6).tobytes().hex()}\n", zip=True)
    in_text = encoded(Image.fromarray(picture()), "PNG", pnginfo=texts)
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", XMP[29:].decode(), zip=True)
    in_xmp = encoded(Image.fromarray(picture()), "PNG", pnginfo=texts)
    first = encoded(Image.fromarray(picture()), "PNG", exif=oriented(6))
    start, pixels = first.index(b"eXIf") - 4, first.index(b"IDAT") - 4
    last = first[:start] + first[pixels:-12] + first[start:pixels] + first[-12:]
    for content in (in_text, in_xmp, first, last):
        assert decode.decode(content, upright=True).shape == (60, 40, 3)
        np.testing.assert_array_equal(decode.decode(content, upright=True), upright(content))
        np.testing.assert_array_equal(decode.decode(content), picture())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_of_16_bits_is_turned_or_not(orientation):
    pixels = np.random.default_rng(0).integers(0, 65536, (4, 6)).astype(np.uint16)
    content = encoded(Image.fromarray(pixels), "TIFF", tiffinfo={0x0112: orientation})
    np.testing.assert_array_equal(decode.decode(content)[..., 0], pixels >> 8)
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(image) >> 8  # Pillow turns a TIFF when it reads it
    np.testing.assert_array_equal(decode.decode(content, upright=True)[..., 0], expected)


@pytest.mark.parametrize("brightest", [1, 15, 1023, 4095])
@pytest.mark.parametrize("magic", [b"P2", b"P3", b"P5", b"P6"])
def test_a_declared_brightest_value_that_is_not_scaled_is_refused(magic, brightest):
    size = 1 if brightest < 256 else 2
    channels = 3 if magic in (b"P3", b"P6") else 1
    pixels = b"1 " * 4 * channels if magic in (b"P2", b"P3") else brightest.to_bytes(size, "big") * 4 * channels
    content = magic + b"\n# a comment\n2 2\n%d\n" % brightest + pixels
    assert decode.problem(content) == f"its brightest value is {brightest}: scale it to 255"


def test_a_declared_brightest_value_of_a_pam_is_refused():
    content = b"P7\nWIDTH 2\nHEIGHT 2\nDEPTH 1\nMAXVAL 15\nTUPLTYPE GRAYSCALE\nENDHDR\n" + bytes(4)
    assert decode.problem(content) == "its brightest value is 15: scale it to 255"


def test_transparent_pixels_of_a_gif_are_those_of_pillow():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4)).astype(np.uint8)
    content = encoded(Image.fromarray(pixels), "GIF")
    with Image.open(io.BytesIO(content)) as image:
        np.testing.assert_array_equal(decode.decode(content), np.asarray(image.convert("RGB")))


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


def claim(content, kind, height, width):
    """Change the size in the header of a PNG or JPEG."""
    changed = bytearray(content)
    if kind == "PNG":
        changed[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        changed[29:33] = zlib.crc32(changed[12:29]).to_bytes(4, "big")
    else:
        start = content.index(b"\xff\xc0") + 5
        changed[start : start + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(changed)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_header_with_too_many_pixels_is_refused_before_memory_is_taken(kind, monkeypatch):
    for library, function in ((cv2, "imdecode"), (decode.simplejpeg, "decode_jpeg")):
        monkeypatch.setattr(library, function, lambda *_, **__: pytest.fail("decoded"))
    content = claim(encoded(Image.fromarray(picture()), kind), kind, 60_000, 60_000)
    assert decode.problem(content) == f"more than {decode.MAX_PIXELS} pixels"
    with pytest.raises(ValueError, match=r"more than .* pixels"):
        decode.decode(content)


HEADERS_THAT_PILLOW_REFUSES = {
    "long numbers": b"P5 0000000000020000 0000000000020000 255\n",
    "pam": b"P7\nWIDTH 20000\nHEIGHT 20000\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n",
    "png with a wrong checksum": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0N \0\0N \x08\2\0\0\0"
    + zlib.crc32(b"IHDR\0\0N \0\0N \x08\2\0\0\0").to_bytes(4, "big")
    + b"\0\0\0\3tEXta\0b\0\0\0\1\0\0\0\0IDAT",
}


@pytest.mark.parametrize("kind", HEADERS_THAT_PILLOW_REFUSES)
def test_a_header_that_pillow_refuses_has_the_same_limit(kind):
    """Run in a new process, because OpenCV reads its limit when it is imported."""
    content = HEADERS_THAT_PILLOW_REFUSES[kind] + bytes(100)
    program = f"from ltjax.data import decode; print(decode.problem({content!r}))"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed == f"more than {decode.MAX_PIXELS} pixels\n"
