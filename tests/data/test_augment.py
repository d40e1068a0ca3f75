import colorsys
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from ltjax.data import augment, auto_augment, mixing
from ltjax.types import UserError
from tests.data.pictures import chi_square, photos
from tests.jaxprs import equations


def compiled(function, *arrays, **settings):
    """Call an augmentation as one program."""
    return jax.tree.map(np.asarray, jax.jit(partial(function, **settings))(*arrays))


@pytest.fixture(scope="module")
def cropped():
    """Return (offset, mirrored) of 8,100 crops of one image with 64 different values; None if a crop is no window."""
    image = np.arange(1, 65, dtype=np.uint8).reshape(8, 8, 1)
    out = compiled(augment.crop_flip, jax.random.key(0), np.tile(image, (8100, 1, 1, 1)))
    windows = {}
    for mirrored in (False, True):
        padded = np.pad(image[:, ::-1] if mirrored else image, ((4, 4), (4, 4), (0, 0)))[..., 0]
        for offset, window in enumerate(sliding_window_view(padded, (8, 8)).reshape(81, 64)):
            windows[window.tobytes()] = (offset, mirrored)
    return [windows.get(crop.tobytes()) for crop in out]


def test_crops_are_windows_of_the_padded_image_uniformly_chosen(cropped):
    assert None not in cropped
    counts = Counter(offset for offset, _ in cropped)
    assert chi_square([counts[offset] for offset in range(81)], 100) < 125  # 80 degrees of freedom: p = 0.001


def test_half_of_the_images_are_mirrored(cropped):
    assert abs(sum(mirrored for _, mirrored in cropped) - 4050) < 4 * np.sqrt(8100 / 4)


def test_crop_without_padding_and_flip_changes_nothing():
    images = photos(8, 12)
    out = compiled(augment.crop_flip, jax.random.key(0), images, padding=0, flip=False)
    np.testing.assert_array_equal(out, images)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32, jnp.bfloat16])
def test_crop_and_cutout_keep_shape_and_dtype(dtype):
    images = jax.ShapeDtypeStruct((4, 8, 12, 1), dtype)
    for function in (augment.crop_flip, partial(augment.cutout, size=4)):
        out = jax.eval_shape(function, jax.random.key(0), images)
        assert (out.shape, out.dtype) == (images.shape, dtype)


def test_cutout_is_a_square_around_a_uniform_pixel_clipped_at_the_border():
    images = np.ones((3200, 32, 32, 1), np.float32)
    black = compiled(augment.cutout, jax.random.key(1), images, size=16)[..., 0] == 0  # [B, 32, 32]
    for axis in (1, 2):
        lines = black.any(axis=3 - axis)  # [B, 32]
        first, last = lines.argmax(axis=1), 31 - lines[:, ::-1].argmax(axis=1)
        centres = np.where(first == 0, last + 1 - 8, first + 8)
        np.testing.assert_array_equal(first, np.maximum(centres - 8, 0))
        np.testing.assert_array_equal(last, np.minimum(centres + 8, 32) - 1)
        counts = np.bincount(centres, minlength=32)
        assert len(counts) == 32 and chi_square(counts, 100) < 61  # 31 degrees of freedom: p = 0.001
    np.testing.assert_array_equal(black, black.any(2)[:, :, None] & black.any(1)[:, None, :])


def test_cutout_of_odd_size_and_fill_by_channel():
    images = np.zeros((200, 32, 32, 3), np.float32)
    out = compiled(augment.cutout, jax.random.key(2), images, size=5, fill=(0.1, 0.2, 0.3))
    np.testing.assert_array_equal(out / np.float32([0.1, 0.2, 0.3]), (out != 0).astype(np.float32))
    assert (out[..., 0] != 0).sum(axis=(1, 2)).max() == 25


@pytest.mark.parametrize("policy", [{"auto_augment": True}, {"rand_augment": (2, 9.0)}], ids=["auto", "rand"])
@pytest.mark.parametrize("alpha", [1.0, 0.2])
def test_augmentation_compiles_without_while_loops(alpha, policy):
    every = partial(augment.augment, color_jitter=0.4, cutout_size=4, mixup_alpha=alpha, **policy)
    images, labels = jnp.asarray(photos()), jnp.arange(40)
    program = jax.make_jaxpr(every)(jax.random.key(0), images, labels)
    primitives = {equation.primitive.name for equation in equations(program.jaxpr)}
    assert {"random_bits", "scan"} <= primitives and "while" not in primitives


def test_augment_with_everything_off_divides_by_255():
    images, labels = photos(28, 28)[..., :1], np.arange(40)
    batch = compiled(augment.augment, jax.random.key(0), images, labels, crop_padding=0, flip=False)
    assert batch.images.dtype == np.float32
    np.testing.assert_allclose(batch.images, images / np.float32(255), rtol=1e-6)
    np.testing.assert_array_equal(batch.labels, labels)
    assert batch.partner_labels is None and batch.lam is None


def test_augment_refuses_grey_images_for_auto_augment_and_float_images():
    with pytest.raises(UserError, match="auto_augment needs RGB images"):
        compiled(
            augment.augment, jax.random.key(0), np.zeros((2, 28, 28, 1), np.uint8), np.arange(2), auto_augment=True
        )
    with pytest.raises(ValueError, match="augment crop_padding changes pixels"):
        augment.augment(jax.random.key(0), jnp.zeros((2, 28, 28, 1)), jnp.arange(2))


@jax.jit
def everything(rng, images):
    return augment.augment(rng, images, jnp.arange(len(images)), auto_augment=True, cutout_size=16, mixup_alpha=1.0)


def test_augment_composes_in_the_papers_order():
    @jax.jit
    def composed(rng, images):
        crop_rng, policy_rng, cutout_rng, mixup_rng = jax.random.split(rng, 4)
        images = auto_augment.auto_augment(policy_rng, augment.crop_flip(crop_rng, images))
        images = augment.cutout(cutout_rng, images.astype(jnp.float32) / 255)
        return mixing.random_mixup(mixup_rng, images, jnp.arange(len(images)), alpha=1.0)

    images = photos()
    batch, expected = (function(jax.random.key(5), images) for function in (everything, composed))
    np.testing.assert_allclose(batch.images, expected.images, atol=1e-6)
    np.testing.assert_array_equal(batch.partner_labels, expected.partner_labels)
    assert batch.images.dtype == jnp.float32
    assert np.min(batch.images) >= 0 and np.max(batch.images) <= 1 + 1e-6


def test_turning_a_part_off_keeps_the_others_random_numbers():
    arrays = jax.random.key(6), photos(), np.arange(40)
    whole = compiled(augment.augment, *arrays).images
    cut = compiled(augment.augment, *arrays, cutout_size=16).images
    assert np.all((cut == whole) | (cut == 0)) and np.any(cut != whole)


def test_the_key_determines_the_augmentation():
    first, second, other = (np.asarray(everything(jax.random.key(seed), photos()).images) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, second)
    assert np.any(first != other)


def test_augment_in_a_scan_on_two_devices_equals_one_device():
    @jax.jit
    def epoch(keys, images):
        return jax.lax.scan(lambda carry, rng: (carry, everything(rng, images)), None, keys)[1]

    images, keys = photos(), jax.random.split(jax.random.key(9), 3)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    shared = epoch(keys, jax.device_put(images, NamedSharding(mesh, PartitionSpec("data"))))
    assert len(shared.images.devices()) == 2
    shared = jax.tree.map(np.asarray, shared)
    for step, rng in enumerate(keys):
        alone = everything(rng, jnp.asarray(images))
        np.testing.assert_allclose(shared.images[step], alone.images, atol=2e-7)  # the last bit of mixup's sum
        np.testing.assert_array_equal(shared.partner_labels[step], alone.partner_labels)
        assert shared.lam[step] == alone.lam


def test_colour_jitter_chains_three_blends_in_random_order():
    """Each image is one of the six orders of brightness, contrast and saturation, with its own factors."""
    images = np.random.default_rng(0).uniform(0.3, 0.6, (12, 6, 5, 3)).astype(np.float32)
    jittered = compiled(augment.color_jitter, jax.random.key(1), images, strength=0.3)
    order_rng, factor_rng = jax.random.split(jax.random.key(1))
    order = np.argsort(np.asarray(jax.random.uniform(order_rng, (3, 12))), axis=0)
    factors = np.asarray(jax.random.uniform(factor_rng, (3, 12), jnp.float32, 0.7, 1.3))
    assert len({tuple(column) for column in order.T}) > 3
    for i, image in enumerate(images):
        expected = image
        for kind, factor in zip(order[:, i], factors[:, i], strict=True):
            grey = (expected @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
            origin = [np.zeros_like(grey), np.full_like(grey, grey.mean()), grey][kind]
            expected = np.clip(origin + factor * (expected - origin), 0, 1)
        np.testing.assert_allclose(jittered[i], expected, atol=2e-6)


def test_colour_jitter_of_strength_0_changes_nothing():
    images = np.random.default_rng(0).uniform(0, 1, (4, 6, 5, 3)).astype(np.float32)
    jittered = compiled(augment.color_jitter, jax.random.key(1), images, strength=0.0)
    np.testing.assert_allclose(jittered, images, atol=1e-6)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"color_jitter": 1.5}, "augment color_jitter = 1.5: factors from"),
        ({"color_jitter": -0.1}, "augment color_jitter = -0.1: 0 turns it off"),
        ({"rand_augment": (2, 11.0)}, r"augment rand_augment = \(2, 11.0\)"),
        ({"rand_augment": (2,)}, "augment rand_augment"),
        ({"rand_augment": (2, 9.0), "auto_augment": True}, "auto_augment and rand_augment: turn one"),
    ],
)
def test_impossible_settings_are_explained(settings, message):
    images = jnp.zeros((2, 8, 8, 3), jnp.uint8)
    with pytest.raises(UserError, match=message):
        augment.augment(jax.random.key(0), images, jnp.zeros(2, jnp.int32), **settings)


@pytest.mark.parametrize("settings", [{"color_jitter": 0.4}, {"rand_augment": (2, 9.0)}])
def test_colour_operations_refuse_grey_images(settings):
    with pytest.raises(UserError, match="needs RGB images, but these have 1 channel"):
        compiled(
            augment.augment, jax.random.key(0), np.zeros((2, 8, 8, 1), np.uint8), np.zeros(2, np.int32), **settings
        )


def test_a_random_window_of_the_whole_area_is_the_image():
    """A window has an area of 1 and a ratio of 1, or does not fit: then the image stays whole."""
    images = photos(16, 16)
    np.testing.assert_array_equal(compiled(augment.random_window, jax.random.key(0), images, min_area=1.0), images)


def test_random_windows_are_pillows_enlargements_of_crops():
    """Every result is the bilinear enlargement of one of the windows of the image, up to rounding."""
    image = photos(12, 12)[9]
    windows = []
    for height in range(3, 13):
        for width in range(3, 13):
            for top in range(13 - height):
                for left in range(13 - width):
                    crop = Image.fromarray(image[top : top + height, left : left + width])
                    windows.append(np.asarray(crop.resize((12, 12), Image.Resampling.BILINEAR)))
    windows = np.stack(windows).astype(int)
    made = compiled(augment.random_window, jax.random.key(0), np.tile(image, (30, 1, 1, 1)), min_area=0.1)
    for each in made.astype(int):
        assert np.abs(windows - each).max((1, 2, 3)).min() <= 1


def window_area(random, side, min_area):
    """Return one draw of torchvision's RandomResizedCrop: the area of its window."""
    for _ in range(10):
        area = side**2 * random.uniform(min_area, 1)
        ratio = np.exp(random.uniform(-np.log(4 / 3), np.log(4 / 3)))
        width, height = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < width <= side and 0 < height <= side:
            return width * height
    return side**2


def test_windows_have_torchvisions_areas_and_uniform_positions():
    """A horizontal and a vertical ramp show where the window begins and ends."""
    rows, columns = np.meshgrid(np.arange(32) * 8, np.arange(32) * 8, indexing="ij")
    image = np.stack([rows, columns, rows], -1).astype(np.uint8)
    made = compiled(augment.random_window, jax.random.key(1), np.tile(image, (4000, 1, 1, 1)), min_area=0.08)
    made = made.astype(float) / 8
    height, width = (made[:, -1, 16, 0] - made[:, 0, 16, 0]), (made[:, 16, -1, 1] - made[:, 16, 0, 1])
    random, shares = np.random.default_rng(0), [0.1, 0.25, 0.5, 0.75, 0.9]
    expected = np.quantile([window_area(random, 32, 0.08) for _ in range(4000)], shares)
    np.testing.assert_allclose(np.quantile((height + 1) * (width + 1), shares), expected, atol=0.025 * 32**2)
    centres = (made[:, 0, 16, 0] + made[:, -1, 16, 0]) / 2
    assert abs(centres.mean() - 15.5) < 0.5 and centres.std() > 3


def test_hue_is_colorsys():
    images = np.random.default_rng(0).uniform(size=(1, 5, 5, 3)).astype(np.float32)
    images[0, 0] = images[0, 0, :, :1]  # greys
    for shift in (0.0, 0.1, -0.3):
        turned = compiled(augment._shifted_hue, images, np.full((1, 1, 1), shift, np.float32))
        for pixel, expected in zip(images.reshape(-1, 3), turned.reshape(-1, 3), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel.astype(float))
            np.testing.assert_allclose(expected, colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value), atol=2e-6)


def test_jitter_with_a_hue_turns_colours_and_keeps_greys():
    images = np.full((64, 2, 2, 3), 0.5, np.float32)
    images[:, 0, 0, 0] = 0.9
    jittered = compiled(augment.color_jitter, jax.random.key(0), images, strength=0.0, hue=0.1)
    np.testing.assert_allclose(jittered[:, 1], images[:, 1], atol=1e-6)
    other = jittered[:, 0, 0]
    np.testing.assert_allclose(other.max(-1), 0.9, atol=1e-6)
    assert (other.argmax(-1) == 0).all()
    moved = other[:, 1:].max(-1) - 0.5  # 6 times the shift times the chroma, 0.4: uniform from 0 to 0.24
    assert moved.max() <= 0.24 + 1e-6 and 0.05 < moved.std() < 0.09  # 0.24 / sqrt(12) = 0.069


def test_blur_is_a_gaussian_that_repeats_the_border():
    images = np.random.default_rng(0).uniform(size=(3, 9, 9, 3)).astype(np.float32)
    blurred = compiled(augment.gaussian_blur, jax.random.key(0), images, sigma=(1.5, 1.5))
    padded = np.pad(images, ((0, 0), (5, 5), (5, 5), (0, 0)), "edge")
    weights = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    expected = np.einsum("bijcpq,p,q->bijc", sliding_window_view(padded, (11, 11), (1, 2)), weights, weights)
    np.testing.assert_allclose(blurred, expected, atol=1e-5)


@pytest.mark.parametrize("setting, changed", [("grey", 0.2), ("blur", 0.5), ("jitter_probability", 0.8)])
def test_a_share_of_the_images_is_grey_blurred_or_jittered(setting, changed):
    images, labels = np.tile(photos()[:1], (1000, 1, 1, 1)), np.zeros(1000, np.int32)
    settings = dict(crop_padding=0, flip=False, color_jitter=0.4 if setting == "jitter_probability" else 0.0)
    made = compiled(augment.augment, jax.random.key(0), images, labels, **settings, **{setting: changed}).images
    different = np.abs(made - images.astype(np.float32) / 255).max((1, 2, 3)) > 1e-3
    assert abs(different.mean() - changed) < 0.06  # a blur below 0.3 pixels changes little
    if setting == "grey":
        assert np.ptp(made[different], -1).max() < 1e-6
