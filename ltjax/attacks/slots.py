"""Attacks as machines that step, and the loop that keeps full batches of them busy.

Each slot of a batch holds one image with its attack's state and its own random numbers. Whenever an image is fooled, or
its attack has tried all it may, the slot goes to the next image that waits, once a quarter of the slots are free; with
none waiting, the batch shrinks. An image's outcome depends, up to rounding, on nothing but itself.

An accelerator steps in a loop of its own. For CPUs the host dispatches each step: XLA's convolutions are several times
as slow in a loop there. Each core steps a batch of its own, from a thread of its own: what one thread dispatches to a
CPU runs one after the other, and much of a network keeps a single core busy.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ltjax.attacks.ball import per_image
from ltjax.system import xla
from ltjax.system.cores import num_cores

BATCH_AXIS = "images"
SHRINK = 4  # each batch of the ladder is a quarter of the one above
SMALLEST = 16  # images; a smaller batch saves little and has to be compiled
DISPATCH_SECONDS = 5.0  # between reports
FULL_ENOUGH = 0.75  # share of slots at work below which waiting images are fetched
# A CPU's step takes as long as its batch is large, so that a large batch gains nothing and an empty slot costs.
CPU_BATCH = 64  # images of one core; the maps of more leave its cache
CPU_LEAST = 16  # images of one core, before the next core takes a batch
CPU_GRAIN = 2  # images; sizes are multiples of it, so that few are compiled
CPU_PATIENCE = 100  # steps before a batch shrinks; compiling a size takes as long as some dozens


class Task(NamedTuple):
    """What an attack is given: B images that know nothing of each other."""

    images: jax.Array  # [B, H, W, channels] in [0, 1]
    labels: jax.Array  # [B], int32
    targets: jax.Array  # [B, T] classes other than the label, int32, the most likely first
    keys: jax.Array  # [B] typed random keys, one of each image


class Attack(Protocol):
    """A machine that steps. Its numbers do not depend on the other images of the batch.

    A step evaluates the model `evaluations_a_step` times. The loop stops stepping an image once `fooled` or `done`;
    what `step` returns for such an image is thrown away.
    """

    evaluations_a_step: int

    def init(self, task: Task) -> Any:
        """State: a NamedTuple of arrays [B, ...] that has the fields below. Without evaluating the model.

        adversarial [B, H, W, channels]: inside the ball and [0, 1]; fools the model where `fooled`.
        fooled [B]: bool. done [B]: bool, nothing is left to try.
        """
        ...

    def step(self, predict: Any, task: Task, state: Any) -> Any:
        """Evaluate `predict: images [B, H, W, channels] -> logits [B, C]` for every slot -> the new state."""
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


@jax.jit
def _task(slots: _Slots, rng: jax.Array) -> Task:
    return slots.task(rng)


@partial(xla.jit, static_argnames=("attack",), donate_argnames=("state",))
def _step(attack: Attack, predict: Any, task: Task, state: Any):
    """One step of the slots at work -> state, how many were at work before, how many are now."""
    working = _at_work(state)
    new = attack.step(predict, task, state)
    state = jax.tree.map(lambda new, old: jnp.where(per_image(working, new), new, old), new, state)
    return state, working.sum(dtype=jnp.int32), _at_work(state).sum(dtype=jnp.int32)


def _advance_from_host(step: Any, stop: threading.Event, predict: Any, task: Task, state: Any, most: int, least: int):
    """What `_advance` does, a step at a time, by a compiled `_step`. A step's counts are read while the next one runs,
    so that one step more is done than need be."""
    steps, evaluations, counts = 0, 0, None
    while steps < most and not stop.is_set():
        state, *latest = step(predict, task, state)
        steps += 1
        before, counts = counts, latest
        if before is not None:
            evaluations += int(before[0])
            if int(before[1]) < least:
                break
    return state, steps, evaluations + (int(counts[0]) if counts else 0)


class _Cores(NamedTuple):
    """How many batches step at a time, and their sizes, largest first."""

    batches: int
    sizes: list[int]


def cpu_batches(num_images: int, batch_size: int, cores: int) -> _Cores:
    """A batch for each core, as large as deals the images out evenly, and smaller ones for when fewer are left."""
    batches = max(1, min(cores, min(num_images, batch_size) // CPU_LEAST))
    most = min(batch_size // batches, CPU_BATCH)
    rounds = -(-num_images // (batches * most))
    size = -(-num_images // (batches * rounds))
    sizes = [min(most, -(-size // CPU_GRAIN) * CPU_GRAIN)]
    while sizes[-1] > CPU_LEAST // 2:
        sizes.append(int(FULL_ENOUGH * sizes[-1]) // CPU_GRAIN * CPU_GRAIN)
    return _Cores(batches, sizes)


class _Batch:
    """A batch at work, and the images of its slots.

    It traces and compiles in the caller's thread: others do not see settings of JAX such as `jax.enable_x64`.
    """

    def __init__(self, attack: Attack, mesh: Mesh, sizes: list[int], patience: int, waiting: deque, gather: Any, rng):
        self.attack, self.mesh, self.sizes, self.waiting, self.rng = attack, mesh, sizes, waiting, rng
        self.patience = patience  # steps left in which it must not shrink
        self.gather = lambda index: _Slots(*split(gather(index), mesh))
        self.held = np.full(sizes[0], -1)  # the image of each slot
        self.slots = self.gather(self.held)
        like = jax.eval_shape(attack.init, jax.eval_shape(self.slots.task, rng))
        self.state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        self.least = 0

    def fill(self) -> bool:
        """Fetch images, move to a batch that fits, and say how long to go on; False once nothing is left to do."""
        alive = np.flatnonzero(self.held >= 0)
        if not len(alive) and not self.waiting:
            return False
        sizes = self.sizes if self.patience <= 0 else [s for s in self.sizes if s >= len(self.held)]
        size = min((s for s in sizes if s >= len(alive) + len(self.waiting)), default=self.sizes[0])
        come_from = np.full(size, -1)
        if size == len(self.held):
            come_from[alive] = alive
        else:
            come_from[: len(alive)] = alive
        free = np.flatnonzero(come_from < 0)[: len(self.waiting)]
        incoming = np.full(size, -1)
        incoming[free] = [self.waiting.popleft() for _ in free]
        if len(free) or size != len(self.held):
            arguments = self.slots, self.state, come_from.astype(np.int32), self.gather(incoming), self.rng
            self.slots, self.state = _arrange(self.attack, self.mesh, *arguments)
            self.held = np.where(come_from >= 0, self.held[come_from], incoming)
        at_work = int((self.held >= 0).sum())
        smaller = [s for s in sizes if s < size]
        if self.waiting:
            self.least = max(1, int(FULL_ENOUGH * size))
        else:  # go on until the rest fits into a smaller batch
            self.least = smaller[0] + 1 if smaller and at_work > smaller[0] else 1
        return True

    def settle(self, state: Any, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Take the state after some steps -> index, fooled and adversarial of the images that are settled."""
        self.state, self.patience = state, self.patience - steps
        fooled, done = np.asarray(state.fooled), np.asarray(state.done)
        ended = np.flatnonzero((fooled | done) & (self.held >= 0))
        index = self.held[ended]
        self.held[ended] = -1
        adversarial = state.adversarial
        rows = (
            np.asarray(adversarial)[ended] if len(ended) else np.zeros((0, *adversarial.shape[1:]), adversarial.dtype)
        )
        return index, fooled[ended], rows


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
    looped: bool | None = None,
) -> Iterator[Settled]:
    """Attack the `chosen` images, and report after each dispatch which of them are settled.

    Args:
      predict: a `jax.tree_util.Partial`. images [N, H, W, channels], labels [N], targets [N, T]: on the host.
      chosen: int [K], which of them. rng: image i's random numbers follow from it and i, whatever else is attacked.
      batch_size: slots; fewer for few images, and fewer once fewer are left. Slots wait for the slowest only where no
        image is left to take their place.
      mesh: the devices. Of several CPU devices the first does all: its threads reach every core.
      steps_a_dispatch: at most; by default as many as take `DISPATCH_SECONDS`.
      looped: whether the devices loop; otherwise the host does. By default they do unless they are CPUs.
    """
    if not len(chosen):
        return
    looped = mesh.devices.flat[0].platform != "cpu" if looped is None else looped
    if looped:
        while batch_size // 2 >= len(chosen):  # not just as many as chosen: that would compile anew for each number
            batch_size = -(-batch_size // 2)
        batches, sizes, patience = 1, batch_sizes(batch_size, mesh), 0
    else:
        batches, sizes = cpu_batches(len(chosen), batch_size, num_cores())
        patience = CPU_PATIENCE
        mesh = make_mesh([mesh.devices.flat[0]])
        predict, rng = jax.device_put((predict, rng), NamedSharding(mesh, PartitionSpec()))
    waiting, compiled, stop = deque(chosen.tolist()), {}, threading.Event()

    def gather(index: np.ndarray) -> tuple[np.ndarray, ...]:
        rows = np.maximum(index, 0)
        return images[rows], labels[rows].astype(np.int32), targets[rows].astype(np.int32), index.astype(np.int32)

    def work(batch: _Batch, most: int) -> Callable[[], tuple[Any, int, int, float]]:
        """The steps to do next -> state, steps, evaluations, seconds."""
        if looped:
            rest = batch.slots, batch.state, rng, most, batch.least
            advance = partial(_advance, attack, mesh, predict, *rest)
        else:
            task, size = _task(batch.slots, rng), len(batch.held)
            if size not in compiled:
                compiled[size] = _step.lower(attack, predict, task, batch.state).compile()
            advance = partial(_advance_from_host, compiled[size], stop, predict, task, batch.state, most, batch.least)

        def timed():
            began = time.monotonic()
            state, steps, live = advance()
            return state, int(steps), int(live), time.monotonic() - began  # waits

        return timed

    evaluations, spent, started, each = 0, 0, {}, attack.evaluations_a_step
    pool = ThreadPoolExecutor(batches) if batches > 1 else None

    def start(batch: _Batch, most: int) -> None:
        if batch.fill():
            steps = work(batch, steps_a_dispatch or most)
            started[pool.submit(steps) if pool else _done(steps)] = batch, most

    try:
        for _ in range(batches):
            start(_Batch(attack, mesh, sizes, patience, waiting, gather, rng), 50)
        while started:
            ready = next(iter(wait(started, return_when=FIRST_COMPLETED).done))
            batch, most = started.pop(ready)
            state, steps, live, seconds = ready.result()
            evaluations, spent = evaluations + each * live, spent + each * steps * len(batch.held)
            index, fooled, adversarial = batch.settle(state, steps)
            enough = int(steps * DISPATCH_SECONDS / max(seconds, 1e-6))
            yield Settled(index, fooled, adversarial, evaluations, spent)
            start(batch, min(max(enough, 1), 4 * most))  # a first dispatch takes its compilation's time
    finally:
        stop.set()
        if pool:
            pool.shutdown()


def _done(function: Callable[[], Any]) -> Future:
    """A function's result, computed at once."""
    future: Future = Future()
    future.set_result(function())
    return future
