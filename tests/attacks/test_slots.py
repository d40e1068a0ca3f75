"""The loop that drives attacks, with an attack whose steps are set by the image."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from ltjax.attacks import slots
from ltjax.attacks.apgd import Apgd
from ltjax.attacks.ball import per_image
from ltjax.attacks.fab import Fab
from ltjax.attacks.square import Square

NUM = 70
STEPS = np.random.default_rng(0).integers(1, 90, NUM)  # of each image
FOOLED = np.arange(NUM) % 3 == 0  # the others end as done
KEY = jax.random.key(5)


class State(NamedTuple):
    adversarial: jax.Array
    fooled: jax.Array
    done: jax.Array
    step: jax.Array


class Countdown(NamedTuple):
    """An attack that ends image i at step `labels[i]`, as `images[i]` plus random numbers, fooled by `targets`."""

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
        drawn = per_image(bits.astype(seen.dtype), seen)
        return State(state.adversarial + drawn + 0 * seen, fooled, ends & ~fooled, step)


def double(images):
    return 2 * images.reshape(len(images), -1)


def drive(chosen, *, batch_size, devices=1, dispatch=50, looped=True):
    """Run on `chosen` -> reports; for each image whether it was fooled, its pixel, and how often it was reported."""
    images = np.arange(NUM, dtype=np.float32).reshape(NUM, 1, 1, 1)
    mesh = slots.make_mesh(jax.devices()[:devices])
    how = dict(batch_size=batch_size, mesh=mesh, steps_a_dispatch=dispatch, looped=looped)
    targets = FOOLED[:, None].astype(int)
    reports = list(slots.run(Countdown(), Partial(double), images, STEPS, targets, chosen, KEY, **how))
    fooled, pixel, times = np.zeros(NUM, bool), np.zeros(NUM), np.zeros(NUM, int)
    for report in reports:
        fooled[report.index] = report.fooled
        pixel[report.index] = report.adversarial[:, 0, 0, 0]
        times[report.index] += 1
    return reports, fooled, pixel, times


@pytest.fixture
def three_cores(monkeypatch):
    monkeypatch.setattr(slots, "num_cores", lambda: 3)


@pytest.fixture(scope="module")
def alone():
    """Return the pixel that each image ends with, computed without the loop."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(NUM, dtype=jnp.int32))
    bits = np.asarray(jax.random.key_data(keys))[:, 0] % 1000
    return np.arange(NUM) + STEPS * bits + STEPS * (STEPS + 1) / 2


@pytest.mark.parametrize(
    "batch_size, devices, dispatch", [(70, 1, 50), (16, 1, 50), (16, 8, 7), (64, 8, 50), (5, 1, 3)]
)
@pytest.mark.parametrize("looped", [True, False])
def test_a_result_depends_only_on_the_image(alone, batch_size, devices, dispatch, looped, three_cores):
    how = dict(batch_size=batch_size, devices=devices, dispatch=dispatch, looped=looped)
    _, fooled, pixel, times = drive(np.arange(NUM), **how)
    np.testing.assert_array_equal(times, 1)
    np.testing.assert_array_equal(fooled, FOOLED)
    np.testing.assert_array_equal(pixel, alone)


def test_only_the_chosen_images_are_attacked_in_any_order(alone):
    chosen = np.array([60, 3, 17, 41])
    _, fooled, pixel, times = drive(chosen, batch_size=16)
    np.testing.assert_array_equal(np.flatnonzero(times), np.sort(chosen))
    np.testing.assert_array_equal(pixel[chosen], alone[chosen])
    np.testing.assert_array_equal(fooled[chosen], FOOLED[chosen])


@pytest.mark.parametrize("looped", [True, False])
@pytest.mark.parametrize("batch_size, dispatch", [(70, 50), (16, 50), (5, 3)])
def test_evaluations_count_no_settled_image(batch_size, dispatch, looped, three_cores):
    reports, *_ = drive(np.arange(NUM), batch_size=batch_size, dispatch=dispatch, looped=looped)
    assert reports[-1].evaluations == STEPS.sum()
    assert reports[-1].slots >= STEPS.sum()


@pytest.mark.parametrize("looped", [True, False])
def test_slots_are_refilled(looped):
    """Attack with 1 to 89 steps: without refilling, about half of the slots would be idle."""
    reports, *_ = drive(np.arange(NUM), batch_size=16, looped=looped)
    waiting = NUM - np.cumsum([len(report.index) for report in reports]) > 16
    full = [report for report, more in zip(reports, waiting, strict=True) if more]
    assert full[-1].evaluations > 0.8 * full[-1].slots


def test_remaining_images_move_into_smaller_batches():
    reports, *_ = drive(np.arange(NUM), batch_size=70)
    left = NUM - np.cumsum([len(report.index) for report in reports])
    last = np.flatnonzero(left <= 17)[0]  # from here on, a quarter of the slots will do
    spent, work = reports[-1].slots - reports[last].slots, STEPS.max()
    assert 0 < spent <= 17 * work
    assert reports[-1].slots < 70 * work


def test_cores_share_the_images_evenly():
    assert slots.cpu_batches(65, 128, cores=2) == (2, [34, 24, 18, 12, 8])
    assert slots.cpu_batches(130, 128, cores=2) == (2, [34, 24, 18, 12, 8])  # two even rounds
    assert slots.cpu_batches(10_000, 512, cores=2)[1][0] == slots.CPU_BATCH
    assert slots.cpu_batches(10_000, 512, cores=64)[0] == 512 // slots.CPU_LEAST
    assert slots.cpu_batches(31, 512, cores=2) == (1, [32, 24, 18, 12, 8])
    assert slots.cpu_batches(5, 3, cores=2) == (1, [3])
    assert slots.cpu_batches(1, 1, cores=2) == (1, [1])


def test_a_cpu_batch_shrinks_after_its_patience(monkeypatch):
    monkeypatch.setattr(slots, "CPU_PATIENCE", 40)
    monkeypatch.setattr(slots, "num_cores", lambda: 1)
    reports, *_ = drive(np.arange(32), batch_size=32, dispatch=10, looped=False)
    slots_of_each = np.diff([0, *(report.slots for report in reports)]) // 10
    assert (slots_of_each[:4] == 32).all() and (slots_of_each[4:] < 32).all()


def test_threads_use_the_callers_jax_settings(three_cores):
    """JAX has settings such as x64 for each thread."""
    with jax.enable_x64(True):
        images, mesh = np.full((48, 1, 1, 1), 1 / 3), slots.make_mesh(jax.devices()[:1])
        task = images, np.ones(48, int), np.ones((48, 1), int), np.arange(48), KEY
        for report in slots.run(Countdown(), Partial(double), *task, batch_size=48, mesh=mesh):
            assert report.adversarial.dtype == np.float64


def test_an_error_in_a_thread_is_raised_and_ends_the_others(three_cores):
    def fails(seen):
        raise ZeroDivisionError("of the model")

    def predict(x):
        return jax.pure_callback(fails, jax.ShapeDtypeStruct((len(x), 1), x.dtype), x)

    images, mesh = np.zeros((48, 1, 1, 1), np.float32), slots.make_mesh(jax.devices()[:1])
    task = images, np.ones(48, int), np.ones((48, 1), int), np.arange(48), KEY
    with pytest.raises(Exception, match="of the model"):
        list(slots.run(Countdown(), Partial(predict), *task, batch_size=48, mesh=mesh))


MACHINES = {
    "apgd": Apgd(0.02, num_steps=12),
    "fab": Fab(0.02, num_steps=5, num_targets=2),
    "square": Square(0.1, num_queries=40),
}


def small_cnn(weights, images):
    """Return a network without ltjax, in PyTorch's order of dimensions."""
    how = dict(window_strides=(2, 2), padding="SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
    x = jax.nn.relu(jax.lax.conv_general_dilated(images.transpose(0, 3, 1, 2), weights[0], **how))
    return x.reshape(len(x), -1) @ weights[1]


@pytest.fixture(scope="module")
def small():
    """Return predict, images [40, 8, 8, 3], labels, targets; images with smaller margins are fooled earlier."""
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=shape).astype(np.float32) / 5 for shape in ((8, 3, 3, 3), (128, 4))]
    images = rng.random((40, 8, 8, 3), dtype=np.float32)
    ranked = np.asarray(small_cnn(weights, images)).argsort(1)[:, ::-1]
    return Partial(small_cnn, weights), images, ranked[:, 0], ranked[:, 1:]


@pytest.mark.parametrize("name", MACHINES)
def test_loops_on_host_and_device_give_the_same_result(small, name, three_cores):
    _, images, labels, _ = small
    results = []
    for looped in (True, False):
        fooled, adversarial = np.zeros(len(labels), bool), images.copy()
        how = dict(batch_size=32, mesh=slots.make_mesh(jax.devices()[:1]), looped=looped)
        for report in slots.run(MACHINES[name], *small, np.arange(len(labels)), KEY, **how):
            fooled[report.index], adversarial[report.index] = report.fooled, report.adversarial
        results.append((fooled, adversarial))
    assert 0 < results[0][0].sum() < len(labels)
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-5)


@pytest.mark.parametrize("name", MACHINES)
def test_no_convolution_is_in_a_loop_on_a_cpu(small, name, monkeypatch):
    """Convolutions are several times as slow in loops there. Other arithmetic may loop."""
    predict, images, labels, targets = small
    steps = []

    step = slots._step

    class Watched:
        def lower(self, *arguments):
            steps.append(jax.make_jaxpr(step.__wrapped__, static_argnums=0)(*arguments))
            return step.lower(*arguments)

    monkeypatch.setattr(slots, "_advance", None)
    monkeypatch.setattr(slots, "_step", Watched())
    how = dict(batch_size=16, mesh=slots.make_mesh())
    list(slots.run(MACHINES[name], predict, images, labels, targets, np.arange(4), KEY, **how))
    assert steps
    for jaxpr in steps:
        assert "conv_general_dilated" in str(jaxpr)
        assert not any("conv_general_dilated" in str(eqn) for eqn in loops(jaxpr.jaxpr))


def loops(jaxpr):
    """Return all `while` and `scan` below a jaxpr."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("while", "scan"):
            yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from loops(inner)


def test_sizes_of_batches_divide_by_the_devices():
    eight, one = slots.make_mesh(jax.devices()[:8]), slots.make_mesh(jax.devices()[:1])
    assert slots.batch_sizes(512, eight) == [512, 128, 32]
    assert slots.batch_sizes(100, eight) == [104, 32]
    assert slots.batch_sizes(1, eight) == [8]
    assert slots.batch_sizes(1, one) == [1]
    assert slots.batch_sizes(64, one) == [64, 16]


def test_few_images_share_compiled_sizes():
    """Run two attacks with different numbers of robust images by the same programs."""
    drive(np.arange(9), batch_size=64)
    before = slots._advance._cache_size()
    drive(np.arange(16), batch_size=64)
    drive(np.arange(10, 21), batch_size=64)
    assert slots._advance._cache_size() == before


def test_no_images_give_no_reports():
    assert drive(np.array([], int), batch_size=16)[0] == []
