"""`--mode=predict`: image files in, a table of their most probable classes out, as long as there are files."""

import contextlib
import csv
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import cv2
from rich.console import Console
from rich.progress import TextColumn, TimeElapsedColumn

from ltjax.data import progress
from ltjax.predictor import load_as_configured
from ltjax.predictor.files import Prediction, find, predictions
from ltjax.runs.checkpoint import read_json
from ltjax.runs.workdir import check_same_config, named_disk_errors
from ltjax.system import processes
from ltjax.system.paths import local
from ltjax.system.signals import StopSignals
from ltjax.types import UserError

TABLE, LINES = ".csv", ".jsonl"
STDOUT = ("-", f"-{LINES}")  # names that stand for standard output


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
