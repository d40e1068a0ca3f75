"""Batches of stored images, decoded by threads ahead of time, each process its own rows, and put on the devices.

Which image stands where, and which window of it is cut out, follow from (seed, step, row) alone: a stream can begin at
any step, and is the same on any number of processes and threads.
"""

import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import cv2
import jax
import numpy as np
from jax.sharding import NamedSharding

from ltjax.cores import num_cores
from ltjax.data.decode import View, center_crop, decode, random_resized_crop
from ltjax.data.source import ImageFiles, Stored
from ltjax.hashing import hash32
from ltjax.types import UserError, one_line

AHEAD = 2  # batches that are being decoded while one is waited for


class Plan(NamedTuple):
    """What a stream of batches consists of."""

    files: ImageFiles
    labels: np.ndarray  # [N]
    positions: Callable[[int], np.ndarray]  # of a step: which images, [B]; -1: an empty one, with label -1
    cut: Callable[[np.ndarray, np.uint32], np.ndarray]  # (decoded image, key) -> uint8 [size, size, 3]
    size: int
    seed: np.uint32
    batch_size: int  # B, over all processes
    num_steps: int


def once(files: ImageFiles, labels: np.ndarray, order: np.ndarray, batch_size: int, view: View) -> Plan:
    """The images `order`, one after the other, cut as for evaluation; the last batch is filled with empty ones."""
    num_steps = -(-len(order) // batch_size)
    padded = np.pad(order, (0, num_steps * batch_size - len(order)), constant_values=-1)

    def positions(step: int) -> np.ndarray:
        return padded[step * batch_size : (step + 1) * batch_size]

    cut = lambda image, key: center_crop(image, view)  # noqa: E731
    return Plan(files, labels, positions, cut, view.size, np.uint32(0), batch_size, num_steps)


def training(
    data: Stored,
    order: np.ndarray,
    class_counts: np.ndarray,
    sampler: Callable,
    seed: np.uint32,
    *,
    batch_size: int,
    num_steps: int,
    view: View,
) -> Plan:
    """Random windows of the training images `order`, which is sorted by class, as a sampler draws them."""

    def positions(step: int) -> np.ndarray:
        return order[sampler(seed, np.uint32(step), batch_size=batch_size, class_counts=class_counts)]

    cut = lambda image, key: random_resized_crop(image, key, view)  # noqa: E731
    return Plan(data.train_files, data.train_labels, positions, cut, view.size, seed, batch_size, num_steps)


class _Draws:
    """For Grain: which image stands at each place of this process's share of the stream, and the key of its cut."""

    def __init__(self, plan: Plan, rows: np.ndarray, start: int):
        self._plan, self._rows, self._start = plan, rows, start
        self._positions = functools.lru_cache(maxsize=64)(lambda step: plan.positions(step)[rows])

    def __len__(self) -> int:
        return (self._plan.num_steps - self._start) * len(self._rows)

    def __getitem__(self, place: int) -> tuple[int, np.uint32]:
        step, row = divmod(place, len(self._rows))
        step += self._start
        key = hash32(self._plan.seed, np.uint32(step), np.uint32(self._rows[row]))
        return int(self._positions(step)[row]), key


def _load(plan: Plan, draw: tuple[int, np.uint32]) -> tuple[np.ndarray, np.ndarray]:
    index, key = draw
    if index < 0:
        return np.zeros((plan.size, plan.size, 3), np.uint8), np.asarray(-1, np.int32)
    try:
        pixels = decode(plan.files[index])
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{plan.files.name(index)} cannot be read ({one_line(error)}): mend or remove it, then start again"
        ) from error
    return plan.cut(pixels, key), np.asarray(plan.labels[index], np.int32)


class Stream:
    """Chunks of K batches on the devices: images uint8 [K, B, size, size, 3] and labels int32 [K, B], split over them.

    While the device works on one chunk, the next is decoded and sent. `waited`: seconds that `take` has kept callers.
    """

    def __init__(self, plan: Plan, sharding: NamedSharding, threads: int = 0):
        """sharding: of [K, B] arrays. threads: that decode; 0: one for each core."""
        cv2.setNumThreads(0)  # the threads are ours
        self._plan, self._sharding = plan, sharding
        self._threads = threads or num_cores()
        self._rows = local_rows(sharding, plan.batch_size)
        self._worker = ThreadPoolExecutor(1)
        self._batches: Iterator[Any] | None = None
        self._next: tuple[int, int, Future] | None = None  # first step, number of steps
        self._at = -1  # the step that `_batches` stands at
        self.waited = 0.0

    def take(self, step: int, num_steps: int, then: int) -> tuple[jax.Array, jax.Array]:
        """The batches of `num_steps` steps from `step` on. then: how many steps will be asked for next; 0: none."""
        began = time.monotonic()
        if self._next is None or self._next[:2] != (step, num_steps):
            if self._next is not None:
                self._next[2].result()
            self._next = (step, num_steps, self._worker.submit(self._make, step, num_steps))
        made = self._next[2].result()
        after = step + num_steps
        self._next = (after, then, self._worker.submit(self._make, after, then)) if then else None
        self.waited += time.monotonic() - began
        return made

    def _make(self, step: int, num_steps: int) -> tuple[jax.Array, jax.Array]:
        if self._batches is None or self._at != step:
            self._batches, self._at = self._open(step), step
        chunk = [next(self._batches) for _ in range(num_steps)]
        self._at += num_steps
        images, labels = (np.stack(values) for values in zip(*chunk, strict=True))
        shape = (num_steps, self._plan.batch_size)
        return (
            jax.make_array_from_process_local_data(self._sharding, images, (*shape, *images.shape[2:])),
            jax.make_array_from_process_local_data(self._sharding, labels, shape),
        )

    def _open(self, step: int) -> Iterator[Any]:
        import grain

        local = len(self._rows)
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=AHEAD * local + self._threads)
        source: Any = _Draws(self._plan, self._rows, step)
        images = grain.MapDataset.source(source).map(functools.partial(_load, self._plan))
        return iter(images.to_iter_dataset(options).batch(local, drop_remainder=True))

    def each(self) -> Iterator[tuple[jax.Array, jax.Array]]:
        """All batches in turn, with K = 1."""
        for step in range(self._plan.num_steps):
            yield self.take(step, 1, int(step + 1 < self._plan.num_steps))

    def close(self) -> None:
        if self._next is not None:
            self._next[2].cancel()
        self._worker.shutdown(wait=True)
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()
        self._batches = None

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Which rows of a batch the devices of this process need; sharding: of [K, B] arrays."""
    places = sharding.addressable_devices_indices_map((1, batch_size)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[place[1]] for place in places if place is not None]))
