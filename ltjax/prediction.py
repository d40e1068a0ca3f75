"""`--mode=predict`: image files in, a table of their most probable classes out, as long as there are files."""

import contextlib
import csv
import glob
import io
import itertools
import json
import os
import re
import stat
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import TextColumn, TimeElapsedColumn

from ltjax import processes, xla
from ltjax.checkpoint import read_json
from ltjax.cores import num_cores
from ltjax.data import progress
from ltjax.data.decode import MAX_IMAGE_BYTES, View, center_crop, decode
from ltjax.data.image_folder import SUFFIXES
from ltjax.paths import local
from ltjax.predictor import Model, load_as_configured
from ltjax.signals import StopSignals
from ltjax.types import UserError, one_line
from ltjax.workdir import check_same_config, named_disk_errors

AHEAD = 2  # batches that are being decoded while one is waited for
TABLE, LINES = ".csv", ".jsonl"
STDOUT = ("-", f"-{LINES}")  # names that stand for standard output


class Prediction(NamedTuple):
    """What the network says of one file: the most probable classes, most probable first, or why it could not look."""

    file: str  # as it was found, or given
    classes: tuple[str, ...]  # names
    confidences: tuple[float, ...]  # of these; calibrated where a temperature was fitted
    error: str = ""  # then there are no classes


def find(images: str) -> Iterator[str]:
    """The files that are meant, in natural order (img9 before img10): of a folder, the images in it and below it; of a
    pattern (`*`, `?`, `[a-z]`, `**` for any folders), all that match; or one file.

    Hidden files, and in folders files of other kinds than images, are passed over.
    Raises: UserError naming what was looked for, where there is nothing.
    """
    path = os.fspath(local(images))
    if os.path.isdir(path):
        files: Iterator[str] = _walk(path, ())
        looked_for = f"no images in {images} or below it; known kinds: {', '.join(SUFFIXES)}"
    elif os.path.exists(path):
        files, looked_for = iter((path,)), ""
    else:
        matches = glob.iglob(path, recursive=True)
        files = iter(sorted((match for match in matches if not os.path.isdir(match)), key=_natural_path))
        looked_for = f"nothing matches --images={images}: a folder, or a quoted pattern such as 'photos/**/*.jpg'"
    first = next(files, None)
    if first is None:
        raise UserError(looked_for)
    return itertools.chain((first,), files)


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """One folder's names at a time. above: the folders on the way here, since links may lead back."""
    try:
        found = os.stat(folder)
        entries = sorted(os.scandir(folder), key=lambda entry: _natural(entry.name))
    except OSError as error:
        print(f"cannot list {folder}: {error.strerror}", file=sys.stderr)
        return
    here = (found.st_dev, found.st_ino)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            if here not in above:
                yield from _walk(entry.path, (*above, here))
        elif entry.name.lower().endswith(SUFFIXES):
            yield entry.path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: where it is called an image, reading it will say so
        return False


def _natural(name: str) -> tuple[list[Any], str]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name


def _natural_path(path: str) -> list[Any]:
    return [_natural(part) for part in Path(path).parts]


def read_image(file: str, view: View, channels: int) -> np.ndarray | str:
    """The pixels that the network sees, uint8 [size, size, channels], or what is wrong with the file."""
    try:
        about = os.stat(file)
        if not stat.S_ISREG(about.st_mode):
            return "no file"
        if about.st_size > MAX_IMAGE_BYTES:
            return f"more than {MAX_IMAGE_BYTES} bytes"
        pixels = center_crop(decode(Path(file).read_bytes()), view)
    except OSError as error:
        return error.strerror or one_line(error)
    except (ValueError, MemoryError, cv2.error) as error:
        return one_line(error)
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[..., None] if channels == 1 else pixels


class _Batch(NamedTuple):
    files: list[str]
    errors: list[str]  # "" where the file was read
    probabilities: jax.Array  # [B, k], and so is
    classes: jax.Array


def _ranked(logits: jax.Array, temperature: np.float32, k: int) -> tuple[jax.Array, jax.Array]:
    values, classes = jax.lax.top_k(logits, k)  # of logits: probabilities may be equal where these are not
    whole = jax.nn.logsumexp(logits / temperature, axis=-1, keepdims=True)
    return jnp.exp(values / temperature - whole), classes


_rank = xla.jit(_ranked, static_argnames="k")


def predictions(model: Model, files: Iterable[str], *, top_k: int = 5, threads: int = 0) -> Iterator[list[Prediction]]:
    """Batches of predictions, in the order of the files; `AHEAD` batches are decoded while the device works.

    threads: that decode; 0: one for each core. Raises: UserError where the model cannot look at files.
    """
    if top_k < 1:
        raise UserError(f"top_k = {top_k}: at least 1")
    if model.view is None:
        raise UserError(f"{model.about}: nobody noted the size of its images; give it, ltjax.load(..., image_size=32)")
    if model.channels not in (1, 3):
        raise UserError(f"{model.about}: takes images of {model.channels} channels, and files have 1 or 3")
    cv2.setNumThreads(0)  # the threads are ours
    pool = ThreadPoolExecutor(threads or num_cores())
    return _stream(model, model.view, iter(files), min(top_k, len(model.class_names)), pool)


def _stream(
    model: Model, view: View, files: Iterator[str], top_k: int, pool: ThreadPoolExecutor
) -> Iterator[list[Prediction]]:
    black = np.zeros((view.size, view.size, model.channels), np.uint8)
    decoding: deque[tuple[list[str], list[Future]]] = deque()
    working: _Batch | None = None
    several = False

    def dispatch(names: list[str], futures: list[Future]) -> _Batch:
        found = [future.result() for future in futures]
        errors = [one if isinstance(one, str) else "" for one in found]
        images = [black if isinstance(one, str) else one for one in found]
        images += [black] * (model.batch_size - len(names) if several else 0)  # no other size to compile for
        logits = model.start(np.stack(images))
        return _Batch(names, errors, *_rank(logits, np.float32(model.temperature), k=top_k))

    try:
        while True:
            names = list(itertools.islice(files, model.batch_size))
            several = several or len(names) == model.batch_size
            if names:
                decoding.append((names, [pool.submit(read_image, name, view, model.channels) for name in names]))
            if not decoding:
                break
            if len(decoding) > AHEAD or not names:
                before, working = working, dispatch(*decoding.popleft())
                if before is not None:
                    yield _told(before, model.class_names)
        if working is not None:
            yield _told(working, model.class_names)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _told(batch: _Batch, names: tuple[str, ...]) -> list[Prediction]:
    probabilities, classes = np.asarray(batch.probabilities), np.asarray(batch.classes)
    return [
        Prediction(file, (), (), error)
        if error
        else Prediction(file, tuple(names[c] for c in classes[i]), tuple(float(p) for p in probabilities[i]))
        for i, (file, error) in enumerate(zip(batch.files, batch.errors, strict=True))
    ]


def header(top_k: int) -> list[str]:
    """The columns of a table."""
    pairs = [(f"class_{k}", f"confidence_{k}") for k in range(1, top_k + 1)]
    return ["file", *itertools.chain(*pairs), "error"]


def as_table(batch: Iterable[Prediction], top_k: int) -> str:
    """Rows of a CSV table, without its header. Names of files are written byte for byte, which may be no UTF-8."""

    def row(one: Prediction) -> str:
        pairs = [(name, f"{p:.6f}") for name, p in zip(one.classes, one.confidences, strict=True)]
        empty = [""] * (2 * (top_k - len(pairs)))
        text, end = io.StringIO(), "\r\n"  # a csv.writer of Python 3.11 quotes what its line ends are made of
        csv.writer(text, lineterminator=end).writerow([one.file, *itertools.chain(*pairs), *empty, one.error])
        return text.getvalue().removesuffix(end) + "\n"

    return "".join(map(row, batch))


def as_lines(batch: Iterable[Prediction]) -> str:
    """JSON objects, one a line: {"file", "classes": [{"class", "confidence"}, ...]} or {"file", "error"}.

    JSON is Unicode and names of files are bytes: those of them that are no UTF-8 become U+FFFD.
    """

    def text(name: str) -> str:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    def one(found: Prediction) -> dict[str, Any]:
        if found.error:
            return {"file": text(found.file), "error": text(found.error)}
        pairs = zip(found.classes, found.confidences, strict=True)
        classes = [{"class": text(name), "confidence": round(p, 6)} for name, p in pairs]
        return {"file": text(found.file), "classes": classes}

    return "".join(json.dumps(one(found)) + "\n" for found in batch)


class _Raw(Protocol):
    def write(self, content: memoryview, /) -> int | None: ...


def _write(file: _Raw, text: str) -> None:
    """All of it at once, past any buffer: who is killed leaves whole lines."""
    left = memoryview(text.encode("utf-8", "surrogateescape"))  # names of files are bytes
    while left:
        left = left[file.write(left) or 0 :]


def kind_of(out: str) -> str:
    """`TABLE` or `LINES`. Raises: UserError for a name that says neither."""
    suffix = TABLE if out == "-" else Path(out).suffix.lower()
    if suffix not in (TABLE, LINES):
        raise UserError(
            f"--out={out}: FILE{TABLE}, FILE{LINES} (JSON lines), or - ({TABLE[1:]}) or -{LINES} to standard output"
        )
    return suffix


@contextlib.contextmanager
def _opened(out: str) -> Iterator[Any]:
    """To write to, without a buffer. A reader of standard output may leave when it has seen enough."""
    if out not in STDOUT:
        path = local(out)
        with named_disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb", buffering=0) as file:
                yield file
        return
    sys.stdout.flush()
    try:
        with open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as file:
            yield file
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing fails at exit
        raise SystemExit(0) from None


def check(images: str, out: str) -> tuple[str, Iterator[str]]:
    """`kind_of(out)` and `find(images)`, before anything is loaded. Raises: UserError, as they do."""
    if processes.several():
        raise UserError("--mode=predict works in one process, with all of its devices: start it on one machine")
    if not images:
        raise UserError("--mode=predict needs --images=FOLDER, or a quoted pattern such as --images='photos/*.jpg'")
    return kind_of(out), find(images)


def predict_workdir(
    config: Mapping[str, Any] | None, workdir: str | Path, *, images: str, out: str = "-", top_k: int = 5
) -> dict[str, int]:
    """Write what the newest checkpoint, or `config.weights`, says of image files to a table or to JSON lines.

    Args:
      config: that of the run, for checking; None: whatever the workdir holds. images: see `find`.
      out: FILE.csv, FILE.jsonl, or to standard output "-" for CSV, "-.jsonl". top_k: classes of each image.
    Returns: {"images", "unreadable"}: how many.
    Raises: UserError for anything the caller can mend, and where no file could be read.
    """
    workdir, began = local(workdir), time.monotonic()
    kind, files = check(images, out)
    if config is None:
        config = read_json(workdir / "config.json")
    else:
        check_same_config(workdir, config)
    model = load_as_configured(config, workdir)
    batches = predictions(model, files, top_k=top_k)
    top_k = min(top_k, len(model.class_names))
    fitted = "" if model.temperature == 1 else f", temperature {model.temperature:.3f}"
    _say(f"{model.about}: {len(model.class_names)} classes{fitted}")

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # damaged files are named below
    total = unreadable = 0
    columns = TextColumn("{task.completed:,} images, {task.fields[rate]:,.0f} a second"), TimeElapsedColumn()
    with StopSignals() as stop, _opened(out) as file, progress.bar(*columns, transient=True) as bar:
        task = bar.add_task("predicting", total=None, rate=0.0)
        if kind == TABLE:
            _write(file, ",".join(header(top_k)) + "\n")
        for batch in batches:
            _write(file, as_table(batch, top_k) if kind == TABLE else as_lines(batch))
            for one in batch:
                if one.error:
                    _say(f"unreadable: {one.file}: {one.error}", bar.console)
                    unreadable += 1
            total += len(batch)
            bar.update(task, advance=len(batch), rate=total / (time.monotonic() - began))
            if stop.requested is not None:
                _say(f"Stopped after {total:,} images; the same command begins anew.", bar.console)
                raise SystemExit(128 + stop.requested)
    where = "" if out in STDOUT else f"; written to {out}"
    _say(f"{total:,} images, {unreadable:,} of them unreadable, {time.monotonic() - began:.1f} s{where}")
    if unreadable == total:
        raise UserError(f"none of the {total:,} files of --images={images} could be read")
    return {"images": total, "unreadable": unreadable}


def _say(text: str, console: Console | None = None) -> None:
    """On stderr: standard output may be the table's."""
    (console or Console(stderr=True)).print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
