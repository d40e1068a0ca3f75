"""The loop that drives attacks, with an attack that takes as many steps as its image says."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from ltjax.attacks import slots
from ltjax.attacks.ball import per_image

NUM = 70
STEPS = np.random.default_rng(0).integers(1, 90, NUM)  # of each image
FOOLED = np.arange(NUM) % 3 == 0  # who ends fooled, the others end because nothing is left to try
KEY = jax.random.key(5)


class State(NamedTuple):
    adversarial: jax.Array
    fooled: jax.Array
    done: jax.Array
    step: jax.Array


class Countdown(NamedTuple):
    """Image i ends at step `labels[i]`, as `images[i]` plus what it draws in each step; targets say whether fooled."""

    evaluations_a_step = 1

    def init(self, task):
        none = jnp.zeros(task.labels.shape, bool)
        return State(task.images, none, none, jnp.zeros(task.labels.shape, jnp.int32))

    def step(self, predict, task, state):
        step = state.step + 1
        bits = jax.random.key_data(task.keys)[:, 0] % 1000 + step.astype(jnp.uint32)
        ends = step >= task.labels
        fooled = ends & (task.targets[:, 0] == 1)
        seen = predict(state.adversarial)[:, :1].reshape(-1, 1, 1, 1)
        drawn = per_image(bits.astype(jnp.float32), seen)
        return State(state.adversarial + drawn + 0 * seen, fooled, ends & ~fooled, step)


def double(images):
    return 2 * images.reshape(len(images), -1)


def drive(chosen, *, batch_size, devices=1, dispatch=50):
    """-> the reports of a run on `chosen`, and what became of each image: fooled [NUM], pixel [NUM], times reported."""
    images = np.arange(NUM, dtype=np.float32).reshape(NUM, 1, 1, 1)
    mesh = slots.make_mesh(jax.devices()[:devices])
    how = dict(batch_size=batch_size, mesh=mesh, steps_a_dispatch=dispatch)
    targets = FOOLED[:, None].astype(int)
    reports = list(slots.run(Countdown(), Partial(double), images, STEPS, targets, chosen, KEY, **how))
    fooled, pixel, times = np.zeros(NUM, bool), np.zeros(NUM), np.zeros(NUM, int)
    for report in reports:
        fooled[report.index] = report.fooled
        pixel[report.index] = report.adversarial[:, 0, 0, 0]
        times[report.index] += 1
    return reports, fooled, pixel, times


@pytest.fixture(scope="module")
def alone():
    """The pixel that each image ends with, computed without the loop."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(NUM, dtype=jnp.int32))
    bits = np.asarray(jax.random.key_data(keys))[:, 0] % 1000
    return np.arange(NUM) + STEPS * bits + STEPS * (STEPS + 1) / 2


@pytest.mark.parametrize(
    "batch_size, devices, dispatch", [(70, 1, 50), (16, 1, 50), (16, 8, 7), (64, 8, 50), (5, 1, 3)]
)
def test_an_outcome_depends_on_the_image_alone(alone, batch_size, devices, dispatch):
    _, fooled, pixel, times = drive(np.arange(NUM), batch_size=batch_size, devices=devices, dispatch=dispatch)
    np.testing.assert_array_equal(times, 1)
    np.testing.assert_array_equal(fooled, FOOLED)
    np.testing.assert_array_equal(pixel, alone)


def test_the_chosen_images_alone_are_attacked_in_any_order(alone):
    chosen = np.array([60, 3, 17, 41])
    _, fooled, pixel, times = drive(chosen, batch_size=16)
    np.testing.assert_array_equal(np.flatnonzero(times), np.sort(chosen))
    np.testing.assert_array_equal(pixel[chosen], alone[chosen])
    np.testing.assert_array_equal(fooled[chosen], FOOLED[chosen])


@pytest.mark.parametrize("batch_size, dispatch", [(70, 50), (16, 50), (5, 3)])
def test_evaluations_count_no_settled_image(batch_size, dispatch):
    reports, *_ = drive(np.arange(NUM), batch_size=batch_size, dispatch=dispatch)
    assert reports[-1].evaluations == STEPS.sum()
    assert reports[-1].slots >= STEPS.sum()


def test_slots_are_refilled():
    """Steps run from 1 to 89: batches that wait for their slowest would keep about half of the slots idle."""
    reports, *_ = drive(np.arange(NUM), batch_size=16)
    waiting = NUM - np.cumsum([len(report.index) for report in reports]) > 16
    full = [report for report, more in zip(reports, waiting, strict=True) if more]
    assert full[-1].evaluations > 0.8 * full[-1].slots


def test_survivors_move_into_smaller_batches():
    reports, *_ = drive(np.arange(NUM), batch_size=70)
    left = NUM - np.cumsum([len(report.index) for report in reports])
    last = np.flatnonzero(left <= 17)[0]  # from here on, a quarter of the slots will do
    spent, work = reports[-1].slots - reports[last].slots, STEPS.max()
    assert 0 < spent <= 17 * work
    assert reports[-1].slots < 70 * work


def test_sizes_of_batches_divide_by_the_devices():
    eight, one = slots.make_mesh(jax.devices()[:8]), slots.make_mesh(jax.devices()[:1])
    assert slots.batch_sizes(512, eight) == [512, 128, 32]
    assert slots.batch_sizes(100, eight) == [104, 32]
    assert slots.batch_sizes(1, eight) == [8]
    assert slots.batch_sizes(1, one) == [1]
    assert slots.batch_sizes(64, one) == [64, 16]


def test_few_images_share_compiled_sizes():
    """Two attacks that leave different numbers standing run the same programs."""
    drive(np.arange(9), batch_size=64)
    before = slots._advance._cache_size()
    drive(np.arange(16), batch_size=64)
    drive(np.arange(10, 21), batch_size=64)
    assert slots._advance._cache_size() == before


def test_no_images_no_reports():
    assert drive(np.array([], int), batch_size=16)[0] == []
