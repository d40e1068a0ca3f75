"""`--mode=predict`: write the most probable classes of image files to a table or to JSON lines."""

import contextlib
import csv
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
from rich.console import Console
from rich.progress import TextColumn, TimeElapsedColumn

from ltjax.data import progress
from ltjax.predictor import load_as_configured
from ltjax.predictor.files import Prediction, find, predictions, predictions_of_rows
from ltjax.runs.workdir import check_same_config, named_disk_errors
from ltjax.system import processes
from ltjax.system.files import read_json
from ltjax.system.paths import local
from ltjax.system.signals import StopSignals
from ltjax.types import UserError

TABLE, LINES = ".csv", ".jsonl"
STDOUT = ("-", f"-{LINES}")  # names of standard output
STOPPING = "Stopping: finishing this batch of images. A second signal stops at once."
PARTIAL = ".partial"  # at the end of the name of an unfinished output


def header(top_k: int) -> list[str]:
    """Return the column names of a table."""
    pairs = [(f"class_{k}", f"confidence_{k}") for k in range(1, top_k + 1)]
    return ["file", *itertools.chain(*pairs), "error"]


def as_table(batch: Iterable[Prediction], top_k: int) -> str:
    """Format rows of a CSV table. File names are written byte for byte, even if they are not UTF-8."""

    def row(prediction: Prediction) -> str:
        pairs = [(name, f"{p:.6f}") for name, p in zip(prediction.classes, prediction.confidences, strict=True)]
        empty = [""] * (2 * (top_k - len(pairs)))
        text, end = io.StringIO(), "\r\n"  # csv in Python 3.11 quotes only the characters of its line terminator
        cells = [prediction.file, *itertools.chain(*pairs), *empty, prediction.error]
        csv.writer(text, lineterminator=end).writerow(cells)
        return text.getvalue().removesuffix(end) + "\n"

    return "".join(map(row, batch))


def as_lines(batch: Iterable[Prediction]) -> str:
    """Format JSON lines: {"file", "classes": [{"class", "confidence"}, ...]} or {"file", "error"}.

    Bytes of a file name that are not UTF-8 become U+FFFD, because JSON is Unicode.
    """

    def text(name: str) -> str:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    def line(prediction: Prediction) -> dict[str, Any]:
        if prediction.error:
            return {"file": text(prediction.file), "error": text(prediction.error)}
        pairs = zip(prediction.classes, prediction.confidences, strict=True)
        classes = [{"class": text(name), "confidence": round(p, 6)} for name, p in pairs]
        return {"file": text(prediction.file), "classes": classes}

    return "".join(json.dumps(line(prediction)) + "\n" for prediction in batch)


def _write(file: io.RawIOBase, text: str) -> None:
    """Write unbuffered, so that a killed process leaves complete lines."""
    rest = memoryview(text.encode("utf-8", "surrogateescape"))  # file names are bytes
    while rest:
        rest = rest[file.write(rest) or 0 :]


def kind_of(out: str) -> str:
    """Return the format of an output file, `TABLE` or `LINES`. UserError if its name has another ending."""
    suffix = TABLE if out == "-" else Path(out).suffix.lower()
    if suffix not in (TABLE, LINES):
        raise UserError(
            f"--out={out}: FILE{TABLE}, FILE{LINES} (JSON lines), or - ({TABLE[1:]}) or -{LINES} to standard output"
        )
    return suffix


def written_to(out: str) -> Path:
    """Return where lines are written: beside a file, until it is complete; to a pipe or a device directly."""
    path = local(out).resolve()  # what a link names
    if path.exists() and not path.is_file():
        return path
    name = path.name
    while len(os.fsencode(name + PARTIAL)) > 255:  # bytes, the limit of file systems
        name = name[:-1]
    return path.with_name(name + PARTIAL)


@contextlib.contextmanager
def _opened(out: str) -> Generator[Any]:
    """Open the output, unbuffered. If the reader of standard output closes it, exit with code 0.

    A file gets its name when it is complete.
    """
    if out not in STDOUT:
        path, written = local(out).resolve(), written_to(out)
        with named_disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(written, "wb", buffering=0) as file:
                yield file
            if written != path:
                written.replace(path)
        return
    sys.stdout.flush()
    try:
        with open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as file:
            yield file
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushing at exit must not fail
        raise SystemExit(0) from None


def check(images: str, out: str) -> tuple[str, Iterator[str]]:
    """Check --images and --out before anything is loaded. Return `kind_of(out)` and `find(images)`."""
    if processes.several():
        raise UserError("--mode=predict works in one process, with all of its devices: start it on one machine")
    if not images:
        raise UserError("--mode=predict needs --images=FOLDER, or a quoted pattern such as --images='photos/*.jpg'")
    return kind_of(out), find(images)


def predict_workdir(
    config: Mapping[str, Any] | None,
    workdir: str | Path,
    *,
    images: str,
    out: str = "-",
    top_k: int = 5,
    target_prior: str | None = None,
    model_prior: str | None = None,
    files: Iterator[str] | None = None,
) -> dict[str, int]:
    """Predict image files with the newest checkpoint, or with `config.weights` if the workdir holds no run.

    Args:
      config: The config of the run, to be checked; None: the one in the workdir.
      images: A folder or a pattern, see `ltjax.predictor.files.find`.
      out: FILE.csv or FILE.jsonl, which is FILE.csv.partial until it is complete; "-" or "-.jsonl" for standard output.
      top_k: Number of classes listed for each image.
      target_prior: See `ltjax.predictor.load`.
      model_prior: See `ltjax.predictor.load`.
      files: From `check`, if it has found them already.

    Returns:
      The numbers of files, {"images", "unreadable"}.

    Raises:
      UserError: For any mistake that the caller can correct, or if no file can be read.
    """
    workdir, began = local(workdir), time.monotonic()
    kind, files = check(images, out) if files is None else (kind_of(out), files)
    if config is None:
        config = read_json(workdir / "config.json")
    else:
        check_same_config(workdir, config)
    model = load_as_configured(config, workdir, target_prior=target_prior, model_prior=model_prior)
    if model.takes_features:
        from ltjax.data import feature_files  # reads files of other kinds

        if os.path.splitext(images)[1].lower() not in feature_files.READERS:
            kinds = ", ".join(feature_files.READERS)
            raise UserError(f"--images={images}: the network takes features of images: a file of {kinds}")
        batches = predictions_of_rows(model, *feature_files.rows(images), top_k)
    else:
        batches = predictions(model, files, top_k=top_k)
    top_k = min(top_k, len(model.class_names))
    fitted = "" if model.temperature == 1 else f", temperature {model.temperature:.3f}"
    expected = "" if target_prior is None else f", for classes as frequent as in {target_prior}"
    _say(f"{model.about}: {len(model.class_names)} classes{fitted}{expected}")

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # damaged files are named below
    total = unreadable = 0
    columns = TextColumn("{task.completed:,} images, {task.fields[rate]:,.0f} a second"), TimeElapsedColumn()
    with StopSignals(STOPPING) as stop, _opened(out) as file, progress.bar(*columns, transient=True) as bar:
        task = bar.add_task("predicting", total=None, rate=0.0)
        if kind == TABLE:
            _write(file, ",".join(header(top_k)) + "\n")
        for batch in batches:
            _write(file, as_table(batch, top_k) if kind == TABLE else as_lines(batch))
            for prediction in batch:
                if prediction.error:
                    _say(f"unreadable: {prediction.file}: {prediction.error}", bar.console)
                    unreadable += 1
            total += len(batch)
            bar.update(task, advance=len(batch), rate=total / (time.monotonic() - began))
            if stop.requested is not None:
                kept = "" if out in STDOUT else f" Their lines are in {written_to(out)}."
                again = "The same command starts again from the first."
                _say(f"Stopped after {total:,} images.{kept} {again}", bar.console)
                raise SystemExit(128 + stop.requested)
    where = "" if out in STDOUT else f"; written to {out}"
    _say(f"{total:,} images, {unreadable:,} of them unreadable, {time.monotonic() - began:.1f} s{where}")
    if unreadable == total:
        raise UserError(f"none of the {total:,} files of --images={images} could be read")
    return {"images": total, "unreadable": unreadable}


def _say(text: str, console: Console | None = None) -> None:
    """Print to stderr, because the table may go to standard output."""
    (console or Console(stderr=True)).print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
