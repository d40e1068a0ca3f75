from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from ltjax.data import auto_augment
from ltjax.types import UserError
from tests.data.pictures import chi_square, photos

GREY = (128, 128, 128)


def affine(*matrix):
    return lambda image, _: image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=GREY)


PILLOW = {
    "shear_x": lambda image, m: affine(1, m, 0, 0, 1, 0)(image, m),
    "shear_y": lambda image, m: affine(1, 0, 0, m, 1, 0)(image, m),
    "translate_x": lambda image, m: affine(1, 0, m * image.width, 0, 1, 0)(image, m),
    "translate_y": lambda image, m: affine(1, 0, 0, 0, 1, m * image.height)(image, m),
    "rotate": lambda image, m: image.rotate(m, fillcolor=GREY),
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "invert": lambda image, _: ImageOps.invert(image),
    "posterize": lambda image, m: ImageOps.posterize(image, int(m)),
    "solarize": lambda image, m: ImageOps.solarize(image, m),
    "brightness": lambda image, m: ImageEnhance.Brightness(image).enhance(1 + m),
    "color": lambda image, m: ImageEnhance.Color(image).enhance(1 + m),
    "contrast": lambda image, m: ImageEnhance.Contrast(image).enhance(1 + m),
    "sharpness": lambda image, m: ImageEnhance.Sharpness(image).enhance(1 + m),
}


@pytest.mark.parametrize("shape", [(32, 32), (24, 40)])
def test_one_hot_products_equal_indexing(shape):
    """Pixels, table entries and counts are equal to the bit."""
    random, images = np.random.default_rng(1), photos(*shape)
    x, y = (random.integers(0, size, images.shape[:3], np.int32) for size in (shape[1], shape[0]))
    table = random.integers(0, 256, (len(images), 256, 3), np.uint8)
    values = images.reshape(len(images), -1, 3).astype(np.int32)
    for ways, arguments in (
        ((auto_augment._pixels_by_index, auto_augment._pixels_by_products), (images, x, y)),
        ((auto_augment._entries_by_index, auto_augment._entries_by_products), (table, values)),
        ((auto_augment._counts_by_index, auto_augment._counts_by_products), (values,)),
    ):
        by_index, by_products = (jax.jit(way)(*arguments) for way in ways)
        assert by_index.dtype == by_products.dtype
        np.testing.assert_array_equal(by_index, by_products)


@pytest.mark.parametrize("policy", [auto_augment.auto_augment, auto_augment.rand_augment])
@pytest.mark.parametrize(
    "platform, expected", [("tpu", [False, False]), ("cuda", [True, False]), ("cpu", [True, True])]
)
def test_gathers_and_scatters_depend_on_the_platform(policy, platform, expected):
    """A TPU neither gathers nor scatters; a GPU gathers pixels and entries."""
    traced = jax.jit(policy).trace(jax.random.key(0), jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.uint8))
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    assert [name in program for name in ("stablehlo.gather", "stablehlo.scatter")] == expected


def test_every_operation_is_compared_with_pillow():
    assert set(PILLOW) == set(auto_augment.MAGNITUDES)
    assert {name for pair in auto_augment.CIFAR10_POLICY for name, _, _ in pair} <= set(PILLOW)


@pytest.mark.parametrize("shape", [(32, 32), (24, 40)])
@pytest.mark.parametrize("name", PILLOW)
def test_operation_matches_pillow(name, shape):
    images = photos(*shape)
    low, high, signed = auto_augment.MAGNITUDES[name]
    magnitudes = np.linspace(-high if signed else low, high, len(images))
    if name == "posterize":
        magnitudes = np.round(magnitudes)
    ours = np.asarray(auto_augment.apply_operation(name, images, magnitudes.astype(np.float32)))
    pairs = zip(images, magnitudes, strict=True)
    pillow = np.stack([np.asarray(PILLOW[name](Image.fromarray(image), m)) for image, m in pairs])
    difference = np.abs(ours.astype(int) - pillow.astype(int))
    if name in ("autocontrast", "brightness", "color", "contrast", "sharpness"):
        assert difference.max() <= 1 and np.mean(difference > 0) < 0.01
    elif name in ("shear_x", "shear_y", "translate_x", "translate_y", "rotate"):
        assert np.mean(difference.any(axis=-1)) < 0.0005
    else:
        assert difference.max() == 0


def test_operation_refuses_unknown_names_and_other_images():
    with pytest.raises(ValueError, match="'blur': choose one of shear_x"):
        auto_augment.apply_operation("blur", jnp.zeros((1, 8, 8, 3), jnp.uint8))
    with pytest.raises(ValueError, match="not float32"):
        auto_augment.apply_operation("invert", jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(UserError, match="auto_augment needs RGB images, but these have 1 channel"):
        auto_augment.auto_augment(jax.random.key(0), jnp.zeros((1, 8, 8, 1), jnp.uint8))


def test_auto_augment_draws_the_policy_with_its_probabilities(optimised):
    image = photos()[20]
    names = list(auto_augment.MAGNITUDES)
    apply = jax.jit(auto_augment._apply)

    def outcomes(pair, probability, image):
        """Return (probability, image after one operation) of each outcome; sign and level as in the paper's table."""
        name, share, level = pair
        low, high, signed = auto_augment.MAGNITUDES[name]
        magnitude = low + (high - low) * level / 9
        magnitude = round(magnitude) if name == "posterize" else magnitude
        both = np.array([magnitude, -magnitude], np.float32)
        changed = np.asarray(apply(np.stack([image] * 2), np.full(2, names.index(name)), both))
        yield probability * (1 - share), image
        yield probability * share * (0.5 if signed else 1.0), changed[0]
        if signed:
            yield probability * share * 0.5, changed[1]

    expected = Counter()
    for first, second in auto_augment.CIFAR10_POLICY:
        for probability, halfway in outcomes(first, 1 / 25, image):
            for likelihood, final in outcomes(second, probability, halfway):
                expected[final.tobytes()] += likelihood
    assert np.isclose(sum(expected.values()), 1)

    draws = jax.jit(auto_augment.auto_augment)(jax.random.key(0), np.tile(image, (8000, 1, 1, 1)))
    counts = Counter(drawn.tobytes() for drawn in np.asarray(draws))
    assert {key for key in counts if expected[key] == 0} == set()
    likely = [key for key, probability in expected.items() if 8000 * probability >= 8]
    statistic = chi_square([counts[key] for key in likely], np.array([8000 * expected[key] for key in likely]))
    assert len(likely) > 60
    assert statistic < len(likely) + 4 * np.sqrt(2 * len(likely))


def test_rand_augment_applies_operations_at_one_magnitude():
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    rand_augment = jax.jit(auto_augment.rand_augment, static_argnames=("num_operations", "magnitude"))
    once = np.asarray(rand_augment(jax.random.key(0), images, num_operations=1, magnitude=6.0))
    candidates = []
    for name, (low, high, signed) in auto_augment.MAGNITUDES.items():
        size = low + (high - low) * 0.6
        size = round(size) if name == "posterize" else size
        for sign in (1, -1) if signed else (1,):
            candidates.append(np.asarray(auto_augment.apply_operation(name, images, sign * size)))
    which = [{n for n, c in enumerate(candidates) if (c[i] == once[i]).all()} for i in range(40)]
    assert all(which) and len(set.union(*which)) > 12
    twice = rand_augment(jax.random.key(0), images, num_operations=2, magnitude=6.0)
    assert (np.asarray(twice) != once).any()
