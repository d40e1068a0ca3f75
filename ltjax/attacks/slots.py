"""Run an attack on many images, in batches that stay full.

Each slot of a batch holds one image with its attack's state and its random key. An image is settled if the attack has
fooled the model or exhausted its budget. Once a quarter of the slots are free, the next waiting images take them; if
none wait, the batch shrinks. Up to rounding, an image's result does not depend on the others.

On accelerators the steps run in a compiled loop. On CPUs the host dispatches each step, because XLA's convolutions are
several times as slow in a loop. Each core has a batch and a thread: one thread's dispatches run in sequence, and most
of a network uses a single core.
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
SHRINK = 4  # each batch size is a quarter of the next larger one
SMALLEST = 16  # images; compiling a smaller batch does not pay
DISPATCH_SECONDS = 5.0  # between reports
FULL_ENOUGH = 0.75  # share of active slots below which waiting images are fetched
# On CPUs, the time of a step is proportional to the batch size: large batches gain nothing, and empty slots cost.
CPU_BATCH = 64  # images of one core; more do not fit into its cache
CPU_LEAST = 16  # images of one core before another core is used
CPU_GRAIN = 2  # images; batch sizes are multiples of it, so that few are compiled
CPU_PATIENCE = 100  # steps before a batch shrinks; compiling a size takes as long as dozens of steps


class Task(NamedTuple):
    """Input of an attack: B independent images.

    Attributes:
      images: [B, H, W, channels] in [0, 1].
      labels: int32 [B].
      targets: int32 [B, T], classes other than the label, most likely first.
      keys: [B] typed random keys.
    """

    images: jax.Array
    labels: jax.Array
    targets: jax.Array
    keys: jax.Array


class Attack(Protocol):
    """An attack as a state machine. An image's numbers do not depend on the others of the batch.

    Attributes:
      evaluations_a_step: Model evaluations of a step.
    """

    evaluations_a_step: int

    def init(self, task: Task) -> Any:
        """Return the first state, a NamedTuple of arrays [B, ...], without evaluating the model.

        It has the fields `adversarial` [B, H, W, channels], in the ball and [0, 1], which fools the model if `fooled`;
        `fooled` bool [B]; and `done` bool [B], whether the budget is exhausted.
        """
        ...

    def step(self, predict: Any, task: Task, state: Any) -> Any:
        """Take a step of every slot and return the new state; that of fooled and done images is ignored.

        predict: images [B, H, W, channels] -> logits [B, C].
        """
        ...


class Settled(NamedTuple):
    """K images settled since the last report, and the model evaluations so far.

    Attributes:
      index: int [K], of the images.
      fooled: bool [K].
      adversarial: [K, H, W, channels].
      evaluations: Evaluations of unsettled images.
      slots: Evaluations of all slots.
    """

    index: np.ndarray
    fooled: np.ndarray
    adversarial: np.ndarray
    evaluations: int
    slots: int


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """Make a mesh of one axis over the devices, by default all of this process. It splits the slots."""
    devices = jax.local_devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (BATCH_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def split(tree: Any, mesh: Mesh) -> Any:
    """Split arrays [B, ...] over the devices."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(BATCH_AXIS)))


def batch_sizes(batch_size: int, mesh: Mesh) -> list[int]:
    """Return the batch sizes to compile, largest first: multiples of the number of devices."""
    devices = mesh.size
    sizes = [-(-batch_size // devices) * devices]
    while sizes[-1] // SHRINK >= max(SMALLEST, devices):
        sizes.append(-(-(sizes[-1] // SHRINK) // devices) * devices)
    return sizes


class _Slots(NamedTuple):
    """A batch on the devices. index: int32 [B], of the image, -1 for an empty slot. Other fields: see `Task`."""

    images: jax.Array
    labels: jax.Array
    targets: jax.Array
    index: jax.Array

    def task(self, rng: jax.Array) -> Task:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, self.index)
        return Task(self.images, self.labels, self.targets, keys)


def _active(state: Any) -> jax.Array:
    return ~(state.fooled | state.done)


def _step_active(attack: Attack, predict: Any, task: Task, state: Any) -> tuple[Any, jax.Array]:
    """Take one step of the active slots -> state, which slots were active."""
    active = _active(state)
    new = attack.step(predict, task, state)
    return jax.tree.map(lambda new, old: jnp.where(per_image(active, new), new, old), new, state), active


def _constrain(tree: Any, mesh: Mesh) -> Any:
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec(BATCH_AXIS)))


@partial(jax.jit, static_argnames=("attack", "mesh"), donate_argnames=("state",))
def _advance(attack: Attack, mesh: Mesh, predict: Any, slots: _Slots, state: Any, rng, most, least):
    """Take up to `most` steps while at least `least` slots are active -> state, steps, evaluations of active slots."""
    task = slots.task(rng)

    def goes_on(carried):
        state, steps, _ = carried
        return (steps < most) & (_active(state).sum() >= least)

    def step(carried):
        state, steps, evaluations = carried
        state, active = _step_active(attack, predict, task, state)
        return _constrain(state, mesh), steps + 1, evaluations + active.sum(dtype=jnp.int32)

    zero = jnp.zeros((), jnp.int32)
    return jax.lax.while_loop(goes_on, step, (state, zero, zero))


@partial(jax.jit, static_argnames=("attack", "mesh"))
def _arrange(attack: Attack, mesh: Mesh, slots: _Slots, state: Any, come_from, incoming: _Slots, rng):
    """Make a batch whose slot i is the old slot `come_from[i]`, or the incoming image i if that is -1."""
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
    """Take one step of the active slots -> state, active slots before and after."""
    state, active = _step_active(attack, predict, task, state)
    return state, active.sum(dtype=jnp.int32), _active(state).sum(dtype=jnp.int32)


def _advance_from_host(step: Any, stop: threading.Event, predict: Any, task: Task, state: Any, most: int, least: int):
    """Do the same as `_advance`, with calls of a compiled `_step`."""
    steps, evaluations, counts = 0, 0, None  # counts are read while the next step runs, so one step more is done
    while steps < most and not stop.is_set():
        state, *latest = step(predict, task, state)
        steps += 1
        before, counts = counts, latest
        if before is not None:
            evaluations += int(before[0])
            if int(before[1]) < least:
                break
    return state, steps, evaluations + (int(counts[0]) if counts else 0)


def cpu_batches(num_images: int, batch_size: int, cores: int) -> tuple[int, list[int]]:
    """Return the number of concurrent batches, and their sizes, largest first. The largest splits the images evenly."""
    batches = max(1, min(cores, min(num_images, batch_size) // CPU_LEAST))
    most = min(batch_size // batches, CPU_BATCH)
    rounds = -(-num_images // (batches * most))
    size = -(-num_images // (batches * rounds))
    sizes = [min(most, -(-size // CPU_GRAIN) * CPU_GRAIN)]
    while sizes[-1] > CPU_LEAST // 2:
        sizes.append(int(FULL_ENOUGH * sizes[-1]) // CPU_GRAIN * CPU_GRAIN)
    return batches, sizes


class _Batch:
    """A batch and the images of its slots.

    It traces and compiles in the caller's thread, because other threads do not see contexts such as `jax.enable_x64`.
    """

    def __init__(self, attack: Attack, mesh: Mesh, sizes: list[int], patience: int, waiting: deque, gather: Any, rng):
        self.attack, self.mesh, self.sizes, self.waiting, self.rng = attack, mesh, sizes, waiting, rng
        self.patience = patience  # steps before it may shrink
        self.gather = lambda index: _Slots(*split(gather(index), mesh))
        self.held = np.full(sizes[0], -1)  # image of each slot
        self.slots = self.gather(self.held)
        shapes = jax.eval_shape(attack.init, jax.eval_shape(self.slots.task, rng))
        self.state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        self.least = 0

    def fill(self) -> bool:
        """Fetch images, resize the batch, and set `least`, the active slots below which to stop. False: all is done."""
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
        active = int((self.held >= 0).sum())
        smaller = [s for s in sizes if s < size]
        if self.waiting:
            self.least = max(1, int(FULL_ENOUGH * size))
        else:  # until the rest fits into a smaller batch
            self.least = smaller[0] + 1 if smaller and active > smaller[0] else 1
        return True

    def settle(self, state: Any, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Store the state after some steps -> index, fooled and adversarial of the settled images."""
        self.state, self.patience = state, self.patience - steps
        fooled, done = np.asarray(state.fooled), np.asarray(state.done)
        ended = np.flatnonzero((fooled | done) & (self.held >= 0))
        index = self.held[ended]
        self.held[ended] = -1
        empty = np.zeros((0, *state.adversarial.shape[1:]), state.adversarial.dtype)
        return index, fooled[ended], np.asarray(state.adversarial)[ended] if len(ended) else empty


Advanced = tuple[Any, int, int, float]  # state, steps, evaluations of active slots, seconds


def _dispatcher(
    attack: Attack, mesh: Mesh, predict: Any, rng: jax.Array, looped: bool, stop: threading.Event
) -> Callable[[_Batch, int], Callable[[], Advanced]]:
    """Return a function that prepares up to a number of steps of a batch; calling its result takes them."""
    compiled: dict[int, Any] = {}  # by batch size

    def dispatch(batch: _Batch, most: int) -> Callable[[], Advanced]:
        advance: Callable[[], tuple[Any, Any, Any]]
        if looped:
            advance = partial(_advance, attack, mesh, predict, batch.slots, batch.state, rng, most, batch.least)
        else:
            task, size = _task(batch.slots, rng), len(batch.held)
            if size not in compiled:
                compiled[size] = _step.lower(attack, predict, task, batch.state).compile()
            advance = partial(_advance_from_host, compiled[size], stop, predict, task, batch.state, most, batch.least)

        def timed() -> Advanced:
            began = time.monotonic()
            state, steps, evaluations = advance()
            return state, int(steps), int(evaluations), time.monotonic() - began  # int() waits for the device

        return timed

    return dispatch


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

    The many parameters are the attack's input, its layout on the devices, and two settings for tests.

    Args:
      predict: A `jax.tree_util.Partial`.
      images: [N, H, W, channels], on the host.
      labels: [N], on the host.
      targets: [N, T], on the host.
      chosen: int [K], indices of the images to attack.
      rng: Image i's random numbers depend only on it and i.
      batch_size: Slots. Fewer are used if there are few images, and as fewer are left.
      mesh: The devices. Of several CPU devices only the first is used, whose threads use every core.
      steps_a_dispatch: Largest number of steps. Default: as many as take `DISPATCH_SECONDS`.
      looped: Loop on the devices, not on the host. Default: True unless they are CPUs.
    """
    if not len(chosen):
        return
    looped = mesh.devices.flat[0].platform != "cpu" if looped is None else looped
    if looped:
        while batch_size // 2 >= len(chosen):  # not len(chosen), which would compile for each number of images
            batch_size = -(-batch_size // 2)
        num_batches, sizes, patience = 1, batch_sizes(batch_size, mesh), 0
    else:
        num_batches, sizes = cpu_batches(len(chosen), batch_size, num_cores())
        patience = CPU_PATIENCE
        mesh = make_mesh([mesh.devices.flat[0]])
        predict, rng = jax.device_put((predict, rng), NamedSharding(mesh, PartitionSpec()))

    def gather(index: np.ndarray) -> tuple[np.ndarray, ...]:
        rows = np.maximum(index, 0)
        return images[rows], labels[rows].astype(np.int32), targets[rows].astype(np.int32), index.astype(np.int32)

    waiting, stop = deque(chosen.tolist()), threading.Event()
    dispatch = _dispatcher(attack, mesh, predict, rng, looped, stop)
    pool = ThreadPoolExecutor(num_batches) if num_batches > 1 else None
    running: dict[Future, tuple[_Batch, int]] = {}

    def start(batch: _Batch, most: int) -> None:
        if batch.fill():
            steps = dispatch(batch, steps_a_dispatch or most)
            running[pool.submit(steps) if pool else _done(steps)] = batch, most

    evaluations, slots = 0, 0
    try:
        for _ in range(num_batches):
            start(_Batch(attack, mesh, sizes, patience, waiting, gather, rng), 50)
        while running:
            ready = next(iter(wait(running, return_when=FIRST_COMPLETED).done))
            batch, most = running.pop(ready)
            state, steps, active, seconds = ready.result()
            evaluations += attack.evaluations_a_step * active
            slots += attack.evaluations_a_step * steps * len(batch.held)
            yield Settled(*batch.settle(state, steps), evaluations, slots)
            enough = int(steps * DISPATCH_SECONDS / max(seconds, 1e-6))
            start(batch, min(max(enough, 1), 4 * most))  # 4: the first dispatch includes its compilation
    finally:
        stop.set()
        if pool:
            pool.shutdown()


def _done(function: Callable[[], Any]) -> Future:
    """Call a function now, and return its result as a future."""
    future: Future = Future()
    future.set_result(function())
    return future
