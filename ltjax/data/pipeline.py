"""Stream batches of stored images to the devices: threads decode ahead, each process decodes its own rows.

(seed, step, row) alone determine the image in a row and its window. So a stream can begin at any step, and is the same
on any number of processes and threads.
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
from ltjax.system.cores import num_cores
from ltjax.system.hashing import hash32
from ltjax.system.wording import one_line
from ltjax.types import UserError

TASK_ROWS = 16  # at most this many images in one task of a thread
WAIT_SECONDS = 0.01  # between checks whether the devices are busy, while waiting for a chunk


class Plan(NamedTuple):
    """The images, labels and order of a stream of batches."""

    files: ImageFiles
    labels: np.ndarray  # [N]
    positions: Callable[[int], np.ndarray]  # step -> images of its batch, [B]; -1 is an empty image with label -1
    # (image, its `decode.window_draws`, out): fill `out`, uint8 [size, size, 3], with a window of the image
    cut: Callable[[np.ndarray, np.ndarray, np.ndarray], Any]
    view: View
    seed: np.uint32
    batch_size: int  # B, over all processes
    num_steps: int


def once(files: ImageFiles, labels: np.ndarray, order: np.ndarray, batch_size: int, view: View) -> Plan:
    """Plan one pass over the images `order`, cut as for evaluation; empty images fill the last batch."""
    num_steps = -(-len(order) // batch_size)
    padded = np.pad(order, (0, num_steps * batch_size - len(order)), constant_values=-1)

    def positions(step: int) -> np.ndarray:
        return padded[step * batch_size : (step + 1) * batch_size]

    cut = lambda image, draws, out: center_crop(image, view, out)  # noqa: E731
    return Plan(files, labels, positions, cut, view, np.uint32(0), batch_size, num_steps)


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
    """Plan training: `sampler` draws from the training images `order`, sorted by class.

    Windows are random, or as in evaluation if `view.min_area` is 1.
    """

    def positions(step: int) -> np.ndarray:
        return order[sampler(seed, np.uint32(step), batch_size=batch_size, class_counts=class_counts)]

    def cut(image: np.ndarray, draws: np.ndarray, out: np.ndarray) -> Any:
        return center_crop(image, view, out) if view.min_area == 1 else random_window(image, draws, view, out)

    return Plan(data.train_files, data.train_labels, positions, cut, view, seed, batch_size, num_steps)


def fill(plan: Plan, step: int, rows: np.ndarray, indices: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
    """Decode and cut `rows` [R] of a step's batch into `images` uint8 [R, size, size, 3] and `labels` int32 [R].

    `indices` [R] are the images in these rows; -1 is an empty image with label -1. UserError if an image cannot be
    read; other errors get a note with the image's name.
    """
    labels[:] = np.where(indices < 0, -1, plan.labels[indices])
    draws = window_draws(hash32(plan.seed, np.uint32(step), rows.astype(np.uint32)))
    for index, drawn, out in zip(indices.tolist(), draws, images, strict=True):
        if index < 0:
            out[:] = 0
            continue
        try:
            plan.cut(decode(plan.files[index], upright=plan.view.upright), drawn, out)
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(
                f"{plan.files.name(index)} cannot be read ({one_line(error)}): replace or remove it, then start again"
            ) from error
        except Exception as error:
            error.add_note(f"while {plan.files.name(index)} was decoded")
            raise


class Stream:
    """Chunks of K batches, sharded over the devices: images uint8 [K, B, size, size, 3] and labels int32 [K, B].

    While the devices work on one chunk, the next is decoded and sent. `waited` counts the seconds that `take` has
    waited while the devices were idle.
    """

    def __init__(self, plan: Plan, sharding: NamedSharding, threads: int = 0):
        """Start decoding threads, one per core if `threads` is 0; `sharding` is that of [K, B] arrays."""
        cv2.setNumThreads(0)  # no threads inside our threads
        self._plan, self._sharding = plan, sharding
        self._rows = local_rows(sharding, plan.batch_size)
        self._threads = threads or num_cores()
        self._decoders = ThreadPoolExecutor(self._threads, "decode")
        self._sender = ThreadPoolExecutor(1, "send")
        self._next: tuple[int, int, Future] | None = None  # first step, number of steps, future arrays
        self.waited = 0.0

    def take(
        self, step: int, num_steps: int, next_steps: int, busy: Callable[[], bool] = lambda: False
    ) -> tuple[jax.Array, jax.Array]:
        """Return the batches of `num_steps` steps from `step` on.

        `next_steps` is how many steps the next call will ask for, 0 if there is none. Waiting is not counted while the
        devices are `busy`.
        """
        chunk = self._next
        if chunk is None or chunk[:2] != (step, num_steps):
            chunk = (step, num_steps, self._begin(step, num_steps))
        after = step + num_steps
        # Begin the next chunk before this one is complete, so that no thread is idle during its last images.
        self._next = (after, next_steps, self._begin(after, next_steps)) if next_steps else None
        complete = False
        while not complete:
            began = time.monotonic()
            complete = bool(wait([chunk[2]], timeout=WAIT_SECONDS).done)
            self.waited += 0.0 if busy() else time.monotonic() - began
        return chunk[2].result()

    def _begin(self, step: int, num_steps: int) -> Future:
        """Submit a chunk: the threads decode it, then it is sent to the devices."""
        local, size = len(self._rows), self._plan.view.size
        each = min(TASK_ROWS, max(1, num_steps * local // self._threads))
        images = np.empty((num_steps, local, size, size, 3), np.uint8)
        labels = np.empty((num_steps, local), np.int32)
        tasks = []
        for number in range(num_steps):
            # Submitted first, so that it runs before the tasks that wait for it.
            positions = self._decoders.submit(self._plan.positions, step + number)
            for part in (slice(first, first + each) for first in range(0, local, each)):
                out = images[number, part], labels[number, part]
                tasks.append(self._decoders.submit(self._decode, step + number, positions, self._rows[part], *out))
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
        """Iterate over all batches, with K = 1."""
        for step in range(self._plan.num_steps):
            yield self.take(step, 1, int(step + 1 < self._plan.num_steps))

    def close(self) -> None:
        """Stop the threads and cancel pending tasks."""
        self._decoders.shutdown(wait=True, cancel_futures=True)
        self._sender.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Return the rows of a batch that this process's devices hold; `sharding` is that of [K, B] arrays."""
    slices = sharding.addressable_devices_indices_map((1, batch_size)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index[1]] for index in slices if index is not None]))
