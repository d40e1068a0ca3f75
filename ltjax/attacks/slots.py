"""Attacks as machines that step, and the loop that keeps full batches of them busy.

Each slot of a batch holds one image with its attack's state and its own random numbers. Whenever an image is fooled, or
its attack has tried all it may, the slot goes to the next image that waits, once a quarter of the slots are free; with
none waiting, the batch shrinks. An image's outcome depends, up to rounding, on nothing but itself.
"""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ltjax.attacks.ball import per_image

BATCH_AXIS = "images"
SHRINK = 4  # each batch of the ladder is a quarter of the one above
SMALLEST = 16  # images; a smaller batch saves little and has to be compiled
DISPATCH_SECONDS = 5.0  # between reports
FULL_ENOUGH = 0.75  # share of slots at work below which waiting images are fetched


class Task(NamedTuple):
    """What an attack is given: B images that know nothing of each other."""

    images: jax.Array  # [B, H, W, channels] in [0, 1]
    labels: jax.Array  # [B], int32
    targets: jax.Array  # [B, T] classes other than the label, int32, the most likely first
    keys: jax.Array  # [B] typed random keys, one of each image


class Attack(Protocol):
    """A machine that evaluates the model once a step. Its numbers do not depend on the other images of the batch.

    The loop stops stepping an image once `fooled` or `done`; what `step` returns for such an image is thrown away.
    """

    def init(self, task: Task) -> Any:
        """State: a NamedTuple of arrays [B, ...] that has the fields below. Without evaluating the model.

        adversarial [B, H, W, channels]: inside the ball and [0, 1]; fools the model where `fooled`.
        fooled [B]: bool. done [B]: bool, nothing is left to try.
        """
        ...

    def step(self, predict: Any, task: Task, state: Any) -> Any:
        """One evaluation of `predict: images [B, H, W, channels] -> logits [B, C]` for every slot -> the new state."""
        ...


class Settled(NamedTuple):
    """What became of K images since the last report; and the work so far, in evaluations of the model."""

    index: np.ndarray  # int [K], of the images
    fooled: np.ndarray  # bool [K]
    adversarial: np.ndarray  # [K, H, W, channels]
    evaluations: int  # of images that were not settled yet
    slots: int  # of all images of the batches


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """One axis over the devices, by default all of this process: each has a share of the slots."""
    devices = jax.local_devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (BATCH_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def split(tree: Any, mesh: Mesh) -> Any:
    """Arrays [B, ...] over the devices."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(BATCH_AXIS)))


def batch_sizes(batch_size: int, mesh: Mesh) -> list[int]:
    """The batches that are compiled, largest first: multiples of the number of devices."""
    devices = mesh.size
    sizes = [-(-batch_size // devices) * devices]
    while sizes[-1] // SHRINK >= max(SMALLEST, devices):
        sizes.append(-(-(sizes[-1] // SHRINK) // devices) * devices)
    return sizes


class _Slots(NamedTuple):
    """A batch on the devices."""

    images: jax.Array
    labels: jax.Array
    targets: jax.Array
    index: jax.Array  # int32 [B], of the image; -1: empty

    def task(self, rng: jax.Array) -> Task:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, self.index)
        return Task(self.images, self.labels, self.targets, keys)


def _at_work(state: Any) -> jax.Array:
    return ~(state.fooled | state.done)


def _constrain(tree: Any, mesh: Mesh) -> Any:
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec(BATCH_AXIS)))


@partial(jax.jit, static_argnames=("attack", "mesh"), donate_argnames=("state",))
def _advance(attack: Attack, mesh: Mesh, predict: Any, slots: _Slots, state: Any, rng, most, least):
    """Up to `most` steps, while at least `least` slots are at work -> state, steps done, evaluations for the latter."""
    task = slots.task(rng)

    def go_on(carried):
        state, steps, _ = carried
        return (steps < most) & (_at_work(state).sum() >= least)

    def step(carried):
        state, steps, evaluations = carried
        working = _at_work(state)
        new = attack.step(predict, task, state)
        state = jax.tree.map(lambda new, old: jnp.where(per_image(working, new), new, old), new, state)
        return _constrain(state, mesh), steps + 1, evaluations + working.sum(dtype=jnp.int32)

    zero = jnp.zeros((), jnp.int32)
    return jax.lax.while_loop(go_on, step, (state, zero, zero))


@partial(jax.jit, static_argnames=("attack", "mesh"))
def _arrange(attack: Attack, mesh: Mesh, slots: _Slots, state: Any, come_from, incoming: _Slots, rng):
    """A batch whose slot i is the old slot `come_from[i]`, or, where that is -1, the incoming image i."""
    stays = come_from >= 0

    def choose(new, old):
        return jnp.where(per_image(stays, new), old[jnp.maximum(come_from, 0)], new)

    slots = _Slots(*map(choose, incoming, slots))
    fresh = attack.init(incoming.task(rng))
    fresh = fresh._replace(done=fresh.done | (incoming.index < 0))
    return _constrain((slots, jax.tree.map(choose, fresh, state)), mesh)


def run(
    attack: Attack,
    predict: Any,
    images: np.ndarray,
    labels: np.ndarray,
    targets: np.ndarray,
    chosen: np.ndarray,
    rng: jax.Array,
    *,
    batch_size: int,
    mesh: Mesh,
    steps_a_dispatch: int | None = None,
) -> Iterator[Settled]:
    """Attack the `chosen` images, and report after each dispatch which of them are settled.

    Args:
      predict: a `jax.tree_util.Partial`. images [N, H, W, channels], labels [N], targets [N, T]: on the host.
      chosen: int [K], which of them. rng: image i's random numbers follow from it and i, whatever else is attacked.
      batch_size: slots; a half, a quarter, ... of them for few images, and fewer once fewer are left. Slots wait for
        the slowest only where no image is left to take their place.
      steps_a_dispatch: at most; by default as many as take `DISPATCH_SECONDS`.
    """
    while batch_size // 2 >= len(chosen) > 0:  # not just as many as chosen: that would compile anew for each number
        batch_size = -(-batch_size // 2)
    sizes, waiting = batch_sizes(batch_size, mesh), list(chosen)
    size = sizes[0]

    def gather(index: np.ndarray) -> _Slots:
        rows = np.maximum(index, 0)
        parts = images[rows], labels[rows].astype(np.int32), targets[rows].astype(np.int32), index.astype(np.int32)
        return _Slots(*split(parts, mesh))

    empty = np.full(size, -1)
    held = empty.copy()  # the image of each slot
    slots = gather(empty)
    state = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(attack.init, jax.eval_shape(slots.task, rng))
    )
    evaluations, spent, most = 0, 0, 50
    while waiting or (held >= 0).any():
        alive = np.flatnonzero(held >= 0)
        fitting = [s for s in sizes if s >= len(alive) + len(waiting)]
        size = min(fitting, default=sizes[0])
        come_from = np.full(size, -1)
        if size == len(held):
            come_from[alive] = alive
        else:
            come_from[: len(alive)] = alive
        free = np.flatnonzero(come_from < 0)[: len(waiting)]
        incoming = np.full(size, -1)
        incoming[free], waiting = waiting[: len(free)], waiting[len(free) :]
        if len(free) or size != len(held):
            slots, state = _arrange(attack, mesh, slots, state, come_from.astype(np.int32), gather(incoming), rng)
            held = np.where(come_from >= 0, held[come_from], incoming)

        at_work = int((held >= 0).sum())
        smaller = [s for s in sizes if s < size]
        if waiting:
            least = max(1, int(FULL_ENOUGH * size))
        else:  # go on until the rest fits into a smaller batch
            least = smaller[0] + 1 if smaller and at_work > smaller[0] else 1
        began = time.monotonic()
        state, steps, live = _advance(attack, mesh, predict, slots, state, rng, steps_a_dispatch or most, least)
        evaluations, spent = evaluations + int(live), spent + int(steps) * size  # waits
        enough = int(steps) * DISPATCH_SECONDS / max(time.monotonic() - began, 1e-6)
        most = min(max(int(enough), 1), 4 * most)  # a first dispatch takes its compilation's time
        fooled, done = np.asarray(state.fooled), np.asarray(state.done)
        ended = np.flatnonzero((fooled | done) & (held >= 0))
        rows = np.asarray(state.adversarial)[ended] if len(ended) else np.zeros((0, *images.shape[1:]), images.dtype)
        index = held[ended]
        held[ended] = -1
        yield Settled(index, fooled[ended], rows, evaluations, spent)
