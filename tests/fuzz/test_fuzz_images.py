"""Any file is an image that is decoded in full, or is refused or left out with a reason."""

import contextlib
import io
import struct
import tempfile
from pathlib import Path

import cv2
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from ltjax import data
from ltjax.data import decode
from ltjax.data.decode import View
from ltjax.predictor import files
from ltjax.types import UserError
from tests.data.miniatures import photo

VIEW = View(size=16, resize=20)
SHAPES = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 40)), st.sampled_from([(1, 1), (1, 10_000), (10_000, 1), (2, 5000)])
)
MODES = ("RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "LAB", "HSV", "La", "RGBa", "I;16", "I", "F")
KINDS = (
    "JPEG",
    "PNG",
    "TIFF",
    "WEBP",
    "BMP",
    "GIF",
    "PPM",
    "JPEG2000",
    "AVIF",
    "TGA",
    "ICO",
    "PCX",
    "SGI",
    "MPO",
    "DDS",
    "DIB",
    "ICNS",
    "XBM",
    "IM",
    "QOI",
)
# Whose pixels are those that Pillow reads, as docs/promises.md has it.
PROMISED = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "AVIF")
COMPRESSIONS = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "group4", "jpeg")
ENDINGS = (".png", ".tiff", ".jp2", ".ppm", ".pgm", ".pam", ".hdr", ".pfm", ".webp", ".bmp", ".sr")
ENDINGS += (".jpg", ".gif", ".avif", ".pbm", ".exr")
DTYPES = (np.uint8, np.uint16, np.int16, np.float32, np.int32, np.float64)
ORIENTATION = 274  # tag of EXIF


def of_mode(pixels, mode):
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    if mode in ("I", "F"):
        return Image.fromarray(pixels[..., 0].astype(np.int32 if mode == "I" else np.float32))
    image = Image.fromarray(pixels)
    if mode in ("P", "PA"):
        return image.quantize(16).convert(mode)
    if mode in ("La", "RGBa"):
        return image.convert(mode.upper()).convert(mode)
    return image.convert("RGB").convert(mode) if mode == "HSV" else image.convert(mode)


@st.composite
def written_by_pillow(draw, modes=MODES, kinds=KINDS):
    height, width = draw(SHAPES)
    pixels = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, (height, width, 4)).astype(np.uint8)
    mode, kind, frames = draw(st.sampled_from(modes)), draw(st.sampled_from(kinds)), draw(st.integers(1, 3))
    if mode in ("RGB", "L", "CMYK", "YCbCr", "LAB", "HSV", "1"):
        pixels = pixels[..., :3]
    image, file = of_mode(np.ascontiguousarray(pixels), mode), io.BytesIO()
    animated = {"save_all": True, "append_images": [image] * (frames - 1)} if frames > 1 else {}
    exif = Image.Exif()
    exif[ORIENTATION] = draw(st.sampled_from([1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 9]))
    more = animated if kind in ("GIF", "PNG", "TIFF", "WEBP", "MPO") else {}
    if kind == "TIFF":
        more = {**more, "compression": draw(st.sampled_from(COMPRESSIONS))}
    if kind == "PNG" and draw(st.booleans()):
        more = {**more, "transparency": (1, 2, 3) if mode == "RGB" else 3}
    if kind == "JPEG2000" and draw(st.booleans()):
        more = {**more, "no_jp2": True}
    try:
        image.save(file, kind, exif=exif, **more)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SystemError, struct.error):
        return photo(0, 0, 16)  # this kind does not have this mode, size or setting
    return file.getvalue()


@st.composite
def written_by_opencv(draw):
    (height, width), dtype = draw(SHAPES), draw(st.sampled_from(DTYPES))
    channels = draw(st.sampled_from([1, 3, 4]))
    values = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, (height, width, channels))
    try:
        written, content = cv2.imencode(draw(st.sampled_from(ENDINGS)), values.astype(dtype))
    except cv2.error:
        written, content = False, None
    return content.tobytes() if written and content is not None else photo(0, 0, 16)


whole_files = st.one_of(written_by_pillow(), written_by_opencv())


@st.composite
def damaged_files(draw):
    content = draw(whole_files)
    kind = draw(st.sampled_from(["cut", "flipped", "cut and flipped", "extended", "shifted"]))
    if kind.startswith("cut"):
        content = content[: draw(st.integers(0, len(content)))]
    if kind.endswith("flipped"):
        changed = bytearray(content)
        for place in draw(st.lists(st.integers(0, max(len(content) - 1, 0)), min_size=1, max_size=4)):
            if changed:
                changed[place] = draw(st.integers(0, 255))
        content = bytes(changed)
    if kind == "extended":
        content += draw(st.binary(max_size=50))
    if kind == "shifted":
        content = draw(st.binary(max_size=20)) + content
    return content


def check(content):
    """Decode an image as training and prediction do. Return its error, "" for none."""
    problem, brightest = decode.inspect(content)
    assert "\n" not in problem and len(problem) <= 300
    try:
        pixels, also_brightest = decode.decode_and_measure(content)
    except ValueError as error:
        assert problem and str(error), "the check passed, and decoding fails"
        return problem
    assert not problem, "the check failed, and decoding works"
    assert brightest == also_brightest
    turned = decode.decode(content, upright=True)
    assert sorted(turned.shape) == sorted(pixels.shape) and turned.sum() == pixels.sum()
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size
    assert decode.center_crop(pixels, VIEW).shape == (16, 16, 3)
    assert decode.random_resized_crop(pixels, np.uint32(len(content)), VIEW).shape == (16, 16, 3)
    return ""


@given(whole_files)
def test_a_whole_file_is_decoded_or_its_type_is_refused(content):
    problem = check(content)
    known = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if problem:
        assert "brightest value" in problem or known is None


@given(written_by_pillow(("RGB", "RGBA", "L", "LA", "P", "1"), PROMISED))
def test_pixels_are_those_of_pillow(content):
    with Image.open(io.BytesIO(content)) as image:
        stored = image.getexif().get(ORIENTATION, 1) if image.format == "TIFF" else 1
        expected = np.asarray(image.convert("RGB")).astype(int)
    turned = decode.decode(content, upright=stored != 1)  # Pillow turns a TIFF when it reads it
    assert np.abs(turned - expected).max() <= 1


@given(written_by_pillow())
def test_a_whole_file_is_turned_as_pillow_turns_it(content):
    if decode.problem(content):
        return
    with Image.open(io.BytesIO(content)) as image:
        exif = image.getexif()
    tagged = Image.fromarray(decode.decode(content))
    tagged.getexif()[ORIENTATION] = exif.get(ORIENTATION, 1)
    np.testing.assert_array_equal(decode.decode(content, upright=True), np.asarray(ImageOps.exif_transpose(tagged)))


@given(damaged_files())
def test_a_damaged_file_is_decoded_or_refused_with_a_reason(content):
    check(content)


@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused_with_a_reason(content):
    check(content)


@given(st.lists(st.tuples(st.one_of(whole_files, damaged_files(), st.binary(max_size=30)), st.booleans()), max_size=5))
def test_a_folder_counts_every_file(contents):
    """Each file of a class is an image that is loaded, or is left out, or is counted as damaged."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for label, name in enumerate("ab"):
            (root / "train" / name).mkdir(parents=True)
            (root / "train" / name / "whole.jpg").write_bytes(photo(label, 0, 16))
            (root / "val" / name).mkdir(parents=True)
            (root / "val" / name / "whole.jpg").write_bytes(photo(label, 1, 16))
        for number, (content, named) in enumerate(contents):
            (root / "train" / "a" / f"{number}.{'png' if named else 'data'}").write_bytes(content)
        taken = [content for content, named in contents if named or decode.looks_like_image(content[:32])]
        damaged = sum(decode.problem(content) != "" for content in taken)
        stderr = io.StringIO()
        try:
            with contextlib.redirect_stderr(stderr):
                loaded = data.load("image_folder", root)
        except UserError as error:
            assert damaged and f"{damaged} of {4 + len(taken)} images cannot be read" in str(error)
            return
        assert not damaged
        assert len(loaded.train_files) == 2 + len(taken)
        left_out = len(contents) - len(taken)
        assert (f"{left_out} file(s) are no images" in stderr.getvalue()) == (left_out > 0)


@given(whole_files)
def test_the_first_bytes_tell_an_image_from_other_files(content):
    if not decode.problem(content):
        assert decode.looks_like_image(content[:32])


@given(st.one_of(whole_files, damaged_files(), st.binary(max_size=60)), st.sampled_from([1, 3]))
def test_prediction_reads_an_image_or_reports_the_reason(content, channels):
    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        file.write(content)
        file.flush()
        image = files.read_image(file.name, VIEW, channels)
    if isinstance(image, str):
        assert image == decode.problem(content) != ""
    else:
        assert image[0].shape == (16, 16, channels) and image[0].dtype == np.uint8
