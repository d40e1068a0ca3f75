"""Batches of stored images, decoded by threads ahead of time, each process its own rows, and put on the devices.

Which image stands where, and which window of it is cut out, follow from (seed, step, row) alone: a stream can begin at
any step, and is the same on any number of processes and threads.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import cv2
import jax
import numpy as np
from jax.sharding import NamedSharding

from ltjax.data.decode import View, center_crop, decode, random_window, window_draws
from ltjax.data.source import ImageFiles, Stored
from ltjax.hashing import hash32
from ltjax.system.cores import num_cores
from ltjax.types import UserError, one_line

TASK_ROWS = 16  # images that a thread decodes before it looks for more, at most
WAIT_SECONDS = 0.01  # between looks at what the devices do, while a chunk is waited for


class Plan(NamedTuple):
    """What a stream of batches consists of."""

    files: ImageFiles
    labels: np.ndarray  # [N]
    positions: Callable[[int], np.ndarray]  # of a step: which images, [B]; -1: an empty one, with label -1
    # (decoded image, what `decode.window_draws` drew for it, uint8 [size, size, 3] to be filled)
    cut: Callable[[np.ndarray, np.ndarray, np.ndarray], Any]
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

    cut = lambda image, draws, out: center_crop(image, view, out)  # noqa: E731
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

    cut = lambda image, draws, out: random_window(image, draws, view, out)  # noqa: E731
    return Plan(data.train_files, data.train_labels, positions, cut, view.size, seed, batch_size, num_steps)


def fill(plan: Plan, step: int, rows: np.ndarray, indices: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
    """Decode and cut some rows of a step's batch, one after the other.

    Args:
      rows: [R], of the batch. indices: [R], which image stands in each; -1: an empty one, with label -1.
      images, labels: uint8 [R, size, size, 3] and int32 [R], to be filled.
    Raises: UserError naming an image that cannot be read; with a note that names it, whatever else is raised.
    """
    labels[:] = np.where(indices < 0, -1, plan.labels[indices])
    draws = window_draws(hash32(plan.seed, np.uint32(step), rows.astype(np.uint32)))
    for index, drawn, out in zip(indices.tolist(), draws, images, strict=True):
        if index < 0:
            out[:] = 0
            continue
        try:
            plan.cut(decode(plan.files[index]), drawn, out)
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(
                f"{plan.files.name(index)} cannot be read ({one_line(error)}): mend or remove it, then start again"
            ) from error
        except Exception as error:
            error.add_note(f"while {plan.files.name(index)} was decoded")
            raise


class Stream:
    """Chunks of K batches on the devices: images uint8 [K, B, size, size, 3] and labels int32 [K, B], split over them.

    While the device works on one chunk, the next is decoded and sent. `waited`: seconds that `take` has kept callers
    whose devices had nothing to do.
    """

    def __init__(self, plan: Plan, sharding: NamedSharding, threads: int = 0):
        """sharding: of [K, B] arrays. threads: that decode; 0: one for each core."""
        cv2.setNumThreads(0)  # the threads are ours
        self._plan, self._sharding = plan, sharding
        self._rows = local_rows(sharding, plan.batch_size)
        self._threads = threads or num_cores()
        self._decoders = ThreadPoolExecutor(self._threads, "decode")
        self._sender = ThreadPoolExecutor(1, "send")
        self._next: tuple[int, int, Future] | None = None  # first step, number of steps, the arrays to come
        self.waited = 0.0

    def take(
        self, step: int, num_steps: int, then: int, busy: Callable[[], bool] = lambda: False
    ) -> tuple[jax.Array, jax.Array]:
        """The batches of `num_steps` steps from `step` on. then: how many steps will be asked for next; 0: none.

        busy: whether the devices have something to do, so that waiting does not count yet.
        """
        made = self._next
        if made is None or made[:2] != (step, num_steps):
            made = (step, num_steps, self._begin(step, num_steps))
        after = step + num_steps
        # Begun before this chunk is complete, so that no thread is idle while others decode the last images of it.
        self._next = (after, then, self._begin(after, then)) if then else None
        complete = False
        while not complete:
            began = time.monotonic()
            complete = bool(wait([made[2]], timeout=WAIT_SECONDS).done)
            self.waited += 0.0 if busy() else time.monotonic() - began
        return made[2].result()

    def _begin(self, step: int, num_steps: int) -> Future:
        """Have the threads decode a chunk, and then have it sent."""
        local, size = len(self._rows), self._plan.size
        each = min(TASK_ROWS, max(1, num_steps * local // self._threads))
        images = np.empty((num_steps, local, size, size, 3), np.uint8)
        labels = np.empty((num_steps, local), np.int32)
        tasks = []
        for number in range(num_steps):
            positions = self._decoders.submit(self._plan.positions, step + number)  # done before a task waits for it
            for part in (slice(first, first + each) for first in range(0, local, each)):
                into = images[number, part], labels[number, part]
                tasks.append(self._decoders.submit(self._decode, step + number, positions, self._rows[part], *into))
        return self._sender.submit(self._send, tasks, images, labels)

    def _decode(self, step: int, positions: Future, rows: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
        fill(self._plan, step, rows, positions.result()[rows], images, labels)

    def _send(self, tasks: list[Future], images: np.ndarray, labels: np.ndarray) -> tuple[jax.Array, jax.Array]:
        for task in tasks:
            task.result()
        shape = (len(labels), self._plan.batch_size)
        return (
            jax.make_array_from_process_local_data(self._sharding, images, (*shape, *images.shape[2:])),
            jax.make_array_from_process_local_data(self._sharding, labels, shape),
        )

    def each(self) -> Iterator[tuple[jax.Array, jax.Array]]:
        """All batches in turn, with K = 1."""
        for step in range(self._plan.num_steps):
            yield self.take(step, 1, int(step + 1 < self._plan.num_steps))

    def close(self) -> None:
        """Stop the threads: what they have not begun is dropped."""
        self._decoders.shutdown(wait=True, cancel_futures=True)
        self._sender.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Which rows of a batch the devices of this process need; sharding: of [K, B] arrays."""
    places = sharding.addressable_devices_indices_map((1, batch_size)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[place[1]] for place in places if place is not None]))
