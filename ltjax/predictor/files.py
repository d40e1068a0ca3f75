"""Predict the classes of image files: find and decode them while the device works, and rank the classes."""

import glob
import itertools
import os
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from ltjax.data.decode import DeepImages, View, center_crop, decode_and_measure, read_file
from ltjax.data.folders import LeftOut, images_below
from ltjax.data.pipeline import TASK_ROWS
from ltjax.predictor.model import Model, calibrated
from ltjax.system import xla
from ltjax.system.cores import num_cores
from ltjax.system.paths import local
from ltjax.system.wording import one_line
from ltjax.types import UserError

AHEAD = 2  # batches decoded while the device works on one


class Prediction(NamedTuple):
    """Prediction for one file.

    Attributes:
      file: Path.
      classes: Names of the most probable classes, most probable first.
      confidences: Of these classes; calibrated if a temperature was fitted.
      error: Reason if the file could not be read. There are no classes then.
    """

    file: str
    classes: tuple[str, ...]
    confidences: tuple[float, ...]
    error: str = ""


def find(images: str) -> Iterator[str]:
    """Find image files, in natural order (img9 before img10).

    Args:
      images: A file; a folder, of which all images are found recursively, each folder once, and notes count the other
        and the hidden files; or a pattern (`*`, `?`, `[a-z]`, `**` for any folders), of which all matches are taken.

    Raises:
      UserError: There are none.
    """
    path = os.fspath(local(images))
    if os.path.isdir(path):
        files: Iterator[str] = _images_below(path)
        message = f"no images that can be decoded in {images} or below it"
    elif os.path.exists(path):
        files, message = iter((path,)), ""
    else:
        matches = (match for match in glob.iglob(path, recursive=True) if not os.path.isdir(match))
        files = iter(sorted(matches, key=lambda match: [_natural(part) for part in Path(match).parts]))
        message = f"nothing matches --images={images}: a folder, or a quoted pattern such as 'photos/**/*.jpg'"
    first = next(files, None)
    if first is None:
        raise UserError(message)
    return itertools.chain((first,), files)


def _images_below(folder: str) -> Iterator[str]:
    """Yield the images in and below a folder, then print notes on the files left out."""

    def say(error: OSError) -> None:
        print(f"cannot list {error.filename}: {error.strerror}", file=sys.stderr)

    left_out = LeftOut()
    yield from images_below(folder, left_out, order=_natural, cannot_list=say)
    for note in left_out.notes():
        print(f"note: {folder}: {note}", file=sys.stderr)


def _natural(name: str) -> tuple[list[Any], str]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name


def read_image(file: str, view: View, channels: int) -> tuple[np.ndarray, int | None] | str:
    """Do what `_read_into` does with a new array: return it and the brightest value, or an error message."""
    pixels = np.empty((view.size, view.size, channels), np.uint8)
    error, brightest = _read_into(file, view, pixels)
    return error or (pixels, brightest)


def _read_into(file: str, view: View, out: np.ndarray) -> tuple[str, int | None]:
    """Fill `out`, uint8 [size, size, 1 or 3], with the network's input from a file; black if it cannot be read.

    Returns:
      An error message, "" for none; and the brightest value of an image of 16 bits a channel, else None.
    """
    try:
        pixels, brightest = decode_and_measure(read_file(file), upright=view.upright)
        if out.shape[-1] == 1:
            cv2.cvtColor(center_crop(pixels, view), cv2.COLOR_RGB2GRAY, dst=out[..., 0])
        else:
            center_crop(pixels, view, out)
    except OSError as error:
        message = error.strerror or one_line(error)
    except (ValueError, MemoryError, cv2.error) as error:
        message = one_line(error)
    else:
        return "", brightest
    out[:] = 0
    return message, None


class _Batch(NamedTuple):
    files: list[str]
    errors: list[str]  # "" for files without one
    probabilities: jax.Array  # [B, k]
    classes: jax.Array  # [B, k]


def _ranked(
    logits: jax.Array, temperature: np.float32, shift: np.ndarray | None, k: int
) -> tuple[jax.Array, jax.Array]:
    scores = calibrated(logits, temperature, shift)
    # Different logits may have equal quotients.
    _, classes = jax.lax.top_k(logits if shift is None else scores, k)
    total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    return jnp.exp(jnp.take_along_axis(scores, classes, axis=-1) - total), classes


_rank = xla.jit(_ranked, static_argnames="k")


def predictions(model: Model, files: Iterable[str], *, top_k: int = 5, threads: int = 0) -> Iterator[list[Prediction]]:
    """Predict files in batches, in their order. `AHEAD` batches are decoded while the device works.

    Args:
      threads: That decode. 0: one for each core.

    Raises:
      UserError: The model's image size is unknown, or it takes neither 1 nor 3 channels.
    """
    if top_k < 1:
        raise UserError(f"top_k = {top_k}: at least 1")
    if model.view is None:
        raise UserError(f"{model.about}: the size of its images is unknown; set it: ltjax.load(..., image_size=32)")
    if model.channels not in (1, 3):
        raise UserError(f"{model.about}: takes images of {model.channels} channels, and files have 1 or 3")
    cv2.setNumThreads(0)  # only our threads
    return _stream(model, model.view, iter(files), min(top_k, len(model.class_names)), threads or num_cores())


def predictions_of_rows(model: Model, features: np.ndarray, names: list[str], top_k: int) -> Iterator[list[Any]]:
    """Predict features [N, 1, 1, D] in batches, with a name for each."""
    top_k = min(top_k, len(model.class_names))
    for first in range(0, len(names), model.batch_size):
        part = slice(first, first + model.batch_size)
        logits = model.start(np.asarray(features[part], np.float32))
        ranked = _rank(logits, np.float32(model.temperature), model.shift, k=top_k)
        yield _predictions(_Batch(names[part], [""] * len(names[part]), *ranked), model.class_names)


def _stream(model: Model, view: View, files: Iterator[str], top_k: int, threads: int) -> Iterator[list[Prediction]]:
    pool, each = ThreadPoolExecutor(threads), min(TASK_ROWS, max(1, model.batch_size // threads))
    decoding: deque[tuple[list[str], np.ndarray, list[Future]]] = deque()
    working: _Batch | None = None
    several, deep = False, DeepImages()  # several: batches

    def decode(names: list[str]) -> tuple[list[str], np.ndarray, list[Future]]:
        size = model.batch_size if several else len(names)  # else another size compiles
        images = np.empty((size, view.size, view.size, model.channels), np.uint8)
        images[len(names) :] = 0

        def some(part: slice) -> list[tuple[str, int | None]]:
            return [_read_into(*file) for file in zip(names[part], itertools.repeat(view), images[part])]

        parts = (slice(first, min(first + each, len(names))) for first in range(0, len(names), each))
        return names, images, [pool.submit(some, part) for part in parts]

    def dispatch(names: list[str], images: np.ndarray, tasks: list[Future]) -> _Batch:
        results = [result for task in tasks for result in task.result()]
        for _, brightest in results:
            deep.add(brightest)
        ranked = _rank(model.start(images), np.float32(model.temperature), model.shift, k=top_k)
        return _Batch(names, [error for error, _ in results], *ranked)

    try:
        while True:
            names = list(itertools.islice(files, model.batch_size))
            several = several or len(names) == model.batch_size
            if names:
                decoding.append(decode(names))
            if not decoding:
                break
            if len(decoding) > AHEAD or not names:
                previous, working = working, dispatch(*decoding.popleft())
                if previous is not None:
                    yield _predictions(previous, model.class_names)
        if working is not None:
            yield _predictions(working, model.class_names)
        if note := deep.note():
            print(f"note: {note}", file=sys.stderr)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _predictions(batch: _Batch, names: tuple[str, ...]) -> list[Prediction]:
    probabilities, classes = np.asarray(batch.probabilities), np.asarray(batch.classes)
    return [
        Prediction(file, (), (), error)
        if error
        else Prediction(file, tuple(names[c] for c in classes[i]), tuple(float(p) for p in probabilities[i]))
        for i, (file, error) in enumerate(zip(batch.files, batch.errors, strict=True))
    ]
