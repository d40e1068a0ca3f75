"""Samplers: how often each image is drawn, and the same draws on host and devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax.data import samplers
from ltjax.types import UserError

COUNTS = np.array([50, 20, 7, 3, 1])  # 81 images
CLASS_OF = np.repeat(np.arange(5), COUNTS)
SETTINGS = [
    ("instance_balanced", {}),
    ("class_balanced", {}),
    ("class_aware", {}),
    ("class_aware", {"in_a_row": 3}),
]
each_sampler = pytest.mark.parametrize("name, settings", SETTINGS, ids=lambda value: str(value))


def draws(name, seed, num_draws, batch_size=16, class_counts=COUNTS, **settings):
    """Return the first `num_draws` draws, batch after batch, on the host."""
    sampler = samplers.create(name, **settings)
    steps = range(-(-num_draws // batch_size))
    batches = [
        sampler(np.uint32(seed), np.uint32(step), batch_size=batch_size, class_counts=class_counts) for step in steps
    ]
    return np.concatenate(batches)[:num_draws]


@pytest.mark.parametrize("batch_size", [1, 16, 81, 200])
def test_instance_balanced_draws_every_image_once_per_pass(batch_size):
    passes = draws("instance_balanced", 0, 81 * 4, batch_size).reshape(4, 81)
    np.testing.assert_array_equal(np.sort(passes), np.broadcast_to(np.arange(81), (4, 81)))


def test_instance_balanced_passes_have_different_orders():
    passes = draws("instance_balanced", 0, 81 * 20).reshape(20, 81)
    assert len({tuple(order) for order in passes.tolist()}) == 20


def test_class_balanced_draws_classes_equally_often():
    counts = np.bincount(CLASS_OF[draws("class_balanced", 1, 10_000, 500)], minlength=5)
    assert np.square(counts - 2000).sum() / 2000 < 23.5  # 4 degrees of freedom: p = 0.0001


def test_class_balanced_draws_the_images_of_a_class_equally_often():
    drawn = draws("class_balanced", 2, 10_000, 500)
    counts = np.bincount(drawn[drawn < 50], minlength=50)
    assert np.square(counts - counts.mean()).sum() / counts.mean() < 94  # 49 degrees of freedom: p = 0.0001


@pytest.mark.parametrize("in_a_row", [1, 3, 4])
def test_class_aware_draws_each_class_once_per_cycle_in_a_row(in_a_row):
    classes = CLASS_OF[draws("class_aware", 0, 5 * in_a_row * 12, in_a_row=in_a_row)].reshape(12, 5, in_a_row)
    np.testing.assert_array_equal(classes, np.broadcast_to(classes[..., :1], classes.shape))
    np.testing.assert_array_equal(np.sort(classes[..., 0]), np.broadcast_to(np.arange(5), (12, 5)))


def test_class_aware_cycles_have_different_orders():
    cycles = CLASS_OF[draws("class_aware", 0, 5 * 4 * 40)][::4].reshape(40, 5)
    assert len({tuple(order) for order in cycles.tolist()}) > 20


@pytest.mark.parametrize("in_a_row", [1, 4])
def test_class_aware_draws_every_image_of_a_class_once_per_pass(in_a_row):
    drawn = draws("class_aware", 3, 5 * 4 * 60, in_a_row=in_a_row)  # 240 of each class
    for c, count in enumerate(COUNTS):
        of_class = drawn[CLASS_OF[drawn] == c]
        rounds = of_class[: 240 // count * count].reshape(-1, count)
        members = np.flatnonzero(CLASS_OF == c)
        np.testing.assert_array_equal(np.sort(rounds), np.broadcast_to(members, rounds.shape))


def test_class_aware_reshuffles_a_class_for_each_pass():
    drawn = draws("class_aware", 3, 5 * 4 * 105)
    rounds = drawn[CLASS_OF[drawn] == 1].reshape(-1, 20)
    assert len({tuple(order) for order in rounds.tolist()}) == len(rounds) == 21


def test_class_aware_repeats_the_image_of_a_class_of_one():
    classes_of_one = draws("class_aware", 0, 4 * 2 * 10, class_counts=np.array([1, 1])).reshape(20, 4)
    np.testing.assert_array_equal(classes_of_one, np.broadcast_to(classes_of_one[:, :1], (20, 4)))


@each_sampler
def test_draws_do_not_depend_on_the_batch_size(name, settings):
    np.testing.assert_array_equal(draws(name, 4, 240, 16, **settings), draws(name, 4, 240, 80, **settings))


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_draws_under_jit_scan_and_vmap_equal_those_of_numpy(name):
    """The steps are int32, as in the training loop."""
    sampler = partial(samplers.create(name), batch_size=16, class_counts=COUNTS)

    @jax.jit
    def on_device(seed, steps):  # [3, 2] steps: three iterations of a scan, two steps at once
        return jax.lax.scan(lambda _, pair: (None, jax.vmap(partial(sampler, seed))(pair)), None, steps)[1]

    batches = on_device(np.uint32(5), np.arange(6, dtype=np.int32).reshape(3, 2))
    assert batches.dtype == jnp.int32
    np.testing.assert_array_equal(batches, draws(name, 5, 96).reshape(3, 2, 16))


@each_sampler
def test_seeds_draw_differently(name, settings):
    assert len({tuple(draws(name, seed, 32, **settings).tolist()) for seed in range(20)}) == 20


@each_sampler
@pytest.mark.parametrize("class_counts", [[10_000, 1], [1] * 7, [1], [3000] + [1] * 300], ids=lambda c: f"{len(c)}")
def test_indices_are_in_range_for_skewed_counts(name, settings, class_counts):
    drawn = draws(name, 2**32 - 1, 4000, 500, class_counts=np.array(class_counts), **settings)
    assert drawn.dtype == np.int32
    assert drawn.min() >= 0 and drawn.max() < sum(class_counts)


@each_sampler
def test_the_last_step_before_overflow_draws_valid_indices(name, settings):
    last = np.uint32(2**32 // 16 - 1)
    drawn = samplers.create(name, **settings)(np.uint32(0), last, batch_size=16, class_counts=COUNTS)
    assert drawn.min() >= 0 and drawn.max() < 81


def test_the_draws_are_frozen():
    """A change would alter every training run."""
    first_draws = {name: draws(name, 0, 12).tolist() for name in samplers.SAMPLERS}
    assert first_draws == {
        "instance_balanced": [71, 9, 28, 53, 68, 40, 66, 48, 77, 42, 59, 27],
        "class_balanced": [73, 74, 78, 75, 80, 71, 75, 60, 7, 61, 80, 75],
        "class_aware": [79, 77, 78, 79, 80, 80, 80, 80, 27, 49, 25, 36],
    }


def test_an_unknown_sampler_names_the_known_ones():
    with pytest.raises(UserError, match="unknown sampler 'square_root'; known: instance_balanced, class_balanced"):
        samplers.create("square_root")


def test_an_unknown_setting_names_the_allowed_ones():
    with pytest.raises(UserError, match=r"sampler 'class_aware' has no setting 'k'; allowed: .*in_a_row"):
        samplers.create("class_aware", k=4)


@pytest.mark.parametrize("in_a_row", [0, -1, 2.5])
def test_in_a_row_must_be_a_positive_integer(in_a_row):
    with pytest.raises(UserError, match="in_a_row"):
        samplers.create("class_aware", in_a_row=in_a_row)
