"""Mixup and CutMix: pairs, shares and boxes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import betaincinv

from ltjax.data import augment, mixing, samplers
from ltjax.engine.feed import Resident, resident_draw
from ltjax.system import parallel
from ltjax.types import UserError


def chi_square(counts, expected):
    return np.sum((np.asarray(counts) - expected) ** 2 / expected)


def test_mixup_is_convex_and_names_its_partners():
    random = np.random.default_rng(0)
    images = jnp.asarray(random.random((6, 4, 4, 3), dtype=np.float32))
    permutation = jnp.array([2, 0, 1, 3, 5, 4])
    batch = mixing.mixup(images, jnp.arange(10, 16), 0.25, permutation)
    np.testing.assert_allclose(batch.images, 0.25 * images + 0.75 * images[permutation], rtol=1e-6)
    np.testing.assert_array_equal(batch.labels, np.arange(10, 16))
    np.testing.assert_array_equal(batch.partner_labels, 10 + permutation)
    assert batch.lam == 0.25
    np.testing.assert_array_equal(mixing.mixup(images, jnp.arange(6), 1.0, permutation).images, images)


def test_mixup_refuses_integers():
    with pytest.raises(ValueError, match="float images, not uint8"):
        mixing.mixup(jnp.zeros((2, 4, 4, 3), jnp.uint8), jnp.arange(2), 0.5, jnp.arange(2))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0, 30.0])
def test_draws_from_a_symmetric_beta(alpha):
    """Ten bins of equal probability."""
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = np.asarray(jax.jit(jax.vmap(partial(mixing.symmetric_beta, alpha=alpha)))(keys))
    bins = np.searchsorted(betaincinv(alpha, alpha, np.linspace(0.1, 0.9, 9)), drawn)
    assert drawn.dtype == np.float32 and drawn.min() >= 0 and drawn.max() <= 1
    assert chi_square(np.bincount(bins, minlength=10), 2000) < 27.9  # 9 degrees of freedom: p = 0.001


@pytest.mark.parametrize("alpha", [1.0, 0.2])
def test_random_mixup_draws_one_share_for_a_batch(alpha):
    values = np.arange(5, dtype=np.float32).reshape(5, 1, 1, 1)
    draw = jax.jit(jax.vmap(lambda rng: mixing.random_mixup(rng, values, jnp.arange(5), alpha=alpha)))
    batch = jax.tree.map(np.asarray, draw(jax.random.split(jax.random.key(0), 4000)))
    lam = np.asarray(batch.lam)
    variance = 1 / (4 * (2 * alpha + 1))  # of Beta(alpha, alpha), whose mean is 1/2
    assert abs(lam.mean() - 0.5) < 4 * np.sqrt(variance / 4000)
    assert abs(lam.var() - variance) < 0.05 * variance
    partners = np.asarray(batch.partner_labels)
    expected = lam[:, None] * np.arange(5) + (1 - lam[:, None]) * partners
    np.testing.assert_allclose(batch.images[..., 0, 0, 0], expected, atol=1e-5)


@pytest.mark.parametrize("count", [*range(1, 26), 32, 100, 127, 128, 500])
def test_each_image_is_the_partner_of_one_other(count):
    partners = np.asarray(jax.jit(mixing.partners)(np.arange(count)))
    np.testing.assert_array_equal(np.sort(partners), np.arange(count))
    assert count == 1 or (partners != np.arange(count)).all()


@pytest.mark.parametrize("count", [8, 64, 128, 1000])
def test_partners_are_4_places_apart_in_groups_of_8(count):
    np.testing.assert_array_equal(mixing.partners(jnp.arange(count)), np.arange(count) ^ 4)


def test_a_class_aware_batch_is_mixed_with_other_classes():
    sampler = samplers.create("class_aware")
    index = sampler(np.uint32(0), np.uint32(3), batch_size=128, class_counts=[5] * 32)
    labels = index // 5
    assert (np.asarray(mixing.partners(jnp.asarray(labels))) != labels).all()


def test_an_instance_balanced_batch_is_mixed_at_random():
    """Pairs share a class as often as random pairs do, although images are sorted by class."""
    sampler, counts = samplers.create("instance_balanced"), [700, 200, 100]
    labels = np.repeat(np.arange(3), counts)
    batches = [labels[sampler(np.uint32(1), np.uint32(k), batch_size=40, class_counts=counts)] for k in range(100)]
    same = [(np.asarray(mixing.partners(jnp.asarray(batch))) == batch).mean() for batch in batches]
    expected = sum(n * (n - 1) for n in counts) / (1000 * 999)
    assert abs(np.mean(same) - expected) < 4 * np.sqrt(expected * (1 - expected) / 2000)  # each pair counts twice


@pytest.fixture
def numbers(golden):
    return golden("cutmix")


def test_boxes_are_the_authors(numbers):
    """Their rows and columns are exchanged: a box is symmetric in them."""
    box = jax.jit(jax.vmap(lambda lam, row, column: jnp.stack(mixing.cutmix_box(lam, row, column, 32, 32))))
    lam, row, column = (numbers[key] for key in ("lam", "centre_row", "centre_column"))
    actual = np.asarray(box(lam.astype(np.float32), row, column))  # top, bottom, left, right
    np.testing.assert_array_equal(actual[:, [0, 2, 1, 3]], numbers["boxes"])


def test_cutmix_is_the_authors(numbers):
    images, permutation = jnp.asarray(numbers["images"]), numbers["permutation"]
    top, left, bottom, right = numbers["boxes"][numbers["case"]]
    labels = jnp.arange(6)
    batch = mixing.cutmix(images, labels, (images[permutation], labels[permutation]), (top, bottom, left, right))
    np.testing.assert_array_equal(batch.images, numbers["mixed"])
    np.testing.assert_allclose(batch.lam, numbers["lam_adjusted"][numbers["case"]], rtol=1e-6)
    np.testing.assert_array_equal(batch.partner_labels, permutation)


def test_lam_is_the_share_of_the_image_that_stays():
    images = jnp.arange(8.0)[:, None, None, None] + jnp.zeros((8, 32, 32, 1))
    draw = jax.jit(partial(mixing.random_cutmix, alpha=1.0, probability=1.0))
    for seed in range(20):
        batch = draw(jax.random.key(seed), images, jnp.arange(8))
        pixels, partners = np.asarray(batch.images)[..., 0], np.asarray(batch.partner_labels)
        own = pixels == np.arange(8)[:, None, None]
        np.testing.assert_allclose(own.mean((1, 2)), batch.lam, rtol=1e-6)
        assert (own | (pixels == partners[:, None, None])).all()


def test_half_of_the_batches_are_mixed():
    images = np.zeros((2, 8, 8, 1), np.float32)
    cutmix = partial(mixing.random_cutmix, alpha=1.0, probability=0.5)
    draw = jax.jit(jax.vmap(lambda rng: cutmix(rng, images, jnp.arange(2)).lam))
    lam = np.asarray(draw(jax.random.split(jax.random.key(0), 2000)))
    empty = 1 - 0.5 * (1 - 1 / 16)  # a box below 2 pixels is empty: lam above 15/16 at 8 pixels
    assert abs((lam == 1).mean() - empty) < 0.06


def test_boxes_from_balanced_images_come_from_rare_classes():
    counts = np.array([90, 10])
    images = np.repeat(np.arange(2, dtype=np.uint8), counts)[:, None, None, None] + np.zeros((100, 8, 8, 3), np.uint8)
    source = Resident(jnp.asarray(images), jnp.asarray(np.repeat(np.arange(2), counts), jnp.int32))
    settings = dict(crop_padding=0, flip=False, cutmix_alpha=1.0, cutmix_probability=1.0)
    draw = resident_draw(
        samplers.create("instance_balanced"),
        partial(augment.augment, **settings, cutmix_partner="class_balanced"),
        batch_size=64,
        class_counts=counts,
        mesh=parallel.make_mesh(jax.devices()[:1]),
        others=samplers.create("class_balanced"),
    )
    batches = [jax.jit(draw)(source, np.uint32(0), np.int32(step), jax.random.key(step)) for step in range(10)]
    own = np.mean([batch.labels.mean() for batch in batches])
    partners = np.mean([batch.partner_labels.mean() for batch in batches])
    assert own < 0.16 and 0.42 < partners < 0.58
    for batch in batches:  # every pixel is the image's or its partner's
        pixels = np.round(np.asarray(batch.images)[..., 0] * 255)
        share = np.where(np.asarray(batch.labels == batch.partner_labels), 1, batch.lam)
        np.testing.assert_allclose((pixels == np.asarray(batch.labels)[:, None, None]).mean((1, 2)), share, atol=1e-6)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(cutmix_alpha=-1.0), r"cutmix_alpha = -1.0, cutmix_probability = 0.5: alpha from 0"),
        (dict(cutmix_alpha=1.0, cutmix_probability=1.5), r"cutmix_probability = 1.5"),
        (dict(cutmix_alpha=1.0, cutmix_partner="rare"), r"cutmix_partner = 'rare'; allowed: batch, class_balanced"),
        (dict(cutmix_alpha=1.0, mixup_alpha=1.0), r"mixup_alpha and cutmix_alpha: turn one of them off"),
        (dict(cutmix_alpha=1.0, cutmix_partner="class_balanced"), r"for images in memory; take 'batch'"),
    ],
)
def test_impossible_settings_are_explained(settings, message):
    with pytest.raises(UserError, match=message):
        arrays = jax.random.key(0), np.zeros((2, 8, 8, 3), np.uint8), np.arange(2)
        jax.eval_shape(partial(augment.augment, **settings), *arrays)
