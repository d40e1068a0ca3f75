"""Show and log a run's progress: a bar or lines, `metrics.jsonl`, TensorBoard."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tensorboardX import SummaryWriter

from ltjax.system.files import write_atomic

LINE_SECONDS = 30.0  # between lines about progress if there is no terminal for a bar


class RunLog:
    """Logs metrics to `metrics.jsonl`, one JSON object (stage, epoch, step, split, values) a line, and TensorBoard."""

    def __init__(self, workdir: Path, steps_before: dict[str, int]):
        """Open the logs. steps_before: {stage: steps of all stages before it}, for TensorBoard's single axis."""
        self._path = workdir / "metrics.jsonl"
        self._steps_before = steps_before
        self._file = open(self._path, "a")
        self._board = SummaryWriter(str(workdir / "tensorboard"))

    def write(self, stage: str, epoch: int, step: int, split: str, values: dict[str, Any]) -> None:
        line = {"stage": stage, "epoch": epoch, "step": step, "split": split, "values": values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in _scalars(values):
            self._board.add_scalar(f"{split}/{name}", value, self._steps_before[stage] + step)

    def rewind(self, stage: str, step: int, evaluated: int) -> None:
        """Drop the lines of a stage that a resumed run will write again.

        Args:
          step: Drop training metrics after this step.
          evaluated: Drop evaluations after this step.
        """
        self._file.close()
        lines = []
        for line in self._path.read_text().splitlines():
            try:
                entry = json.loads(line)
                last = step if entry["split"] == "train" else evaluated
                repeated = entry["stage"] == stage and entry["step"] > last
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # cut short by a kill, or changed
            if not repeated:
                lines.append(line + "\n")
        write_atomic(self._path, "".join(lines))
        self._file = open(self._path, "a")

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind, *_) -> None:
        for part in (self._file, self._board):
            try:
                part.close()
            except OSError:
                if kind is None:
                    raise  # otherwise the exception that ended the block matters more


def _scalars(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", scalar) for inner, scalar in _scalars(value))
        elif isinstance(value, (int, float)):
            yield name, value


class NoLog:
    """Replaces `RunLog` in all processes except the first."""

    def write(self, stage: str, epoch: int, step: int, split: str, values: dict[str, Any]) -> None:
        pass

    def rewind(self, stage: str, step: int, evaluated: int) -> None:
        pass

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *_) -> None:
        pass


def make_console(*, quiet: bool = False) -> Console:
    """Make the console of standard output.

    A terminal or a notebook gets wrapped lines. A file gets plain unwrapped lines and tables of up to 120 columns, even
    if FORCE_COLOR is set. Markup and emoji codes are printed as they are: a class may be called "[red]stop" or ":car:".
    """
    plain = dict[str, Any](markup=False, emoji=False, quiet=quiet)
    console = Console(**plain)
    if sys.stdout.isatty() or console.is_jupyter:
        return console
    return Console(width=120, soft_wrap=True, force_terminal=False, **plain)


class LiveOrLines(Progress):
    """A live bar in a terminal. In a file, a line if the last one is `LINE_SECONDS` old."""

    def __init__(self, console: Console, *columns: ProgressColumn):
        super().__init__(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._last = time.monotonic()

    def say(self, line: str) -> None:
        """Print a permanent line."""
        self.console.print(line)
        self._last = time.monotonic()

    def pulse(self, line: str) -> None:
        """Print the line if there is no bar and the last line is old enough."""
        if self.disable and time.monotonic() - self._last >= LINE_SECONDS:
            self.say(line)


class StageProgress(LiveOrLines):
    """The progress of a stage: epoch, rate, loss, time left."""

    def __init__(self, console: Console, title: str, num_steps: int, done: int, batch_size: int, epochs: int):
        super().__init__(
            console,
            TextColumn("{task.description}", style="bold", markup=False),
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[rate]}"),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("ETA {task.fields[eta]}"),
        )
        self._title, self._num_steps, self._batch_size, self._epochs = title, num_steps, batch_size, epochs
        self._bar = self.add_task(
            title, total=num_steps, completed=done, epoch=f"-/{epochs}", rate="compiling", loss="-", eta="-"
        )

    def show(self, step: int, epoch: int, loss: float, step_seconds: float | None, seconds_left: float | None) -> None:
        rate = f"{self._batch_size / step_seconds:,.0f} images/s" if step_seconds else "compiling"
        self.update(
            self._bar,
            completed=step,
            epoch=f"{epoch}/{self._epochs}",
            rate=rate,
            loss=f"{loss:.3f}",
            eta=clock(seconds_left),
        )
        self.pulse(
            f"{self._title}  epoch {epoch}/{self._epochs}  step {step:,}/{self._num_steps:,}  loss {loss:.3f}  {rate}  "
            f"ETA {clock(seconds_left)}"
        )


class AttackProgress(LiveOrLines):
    """The progress of each attack: images settled, robust accuracy so far, time left."""

    def __init__(self, console: Console):
        super().__init__(
            console,
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[robust]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._bars: dict[str, Any] = {}
        self._began: dict[str, tuple[float, int]] = {}  # {attack: (start time, images settled at that time)}

    def show(self, attack: str, settled: int, total: int, robust: float | None = None) -> None:
        """Update the progress of an attack. robust: share of all images that are still robust; None if unknown."""
        if attack not in self._bars:
            self._bars[attack] = self.add_task(attack, total=total, robust="")
            self._began[attack] = time.monotonic(), settled
        shown = "" if robust is None else f"robust accuracy so far {robust:.1%}"
        self.update(self._bars[attack], completed=settled, total=total, robust=shown)
        began, before = self._began[attack]
        rate = (settled - before) / max(time.monotonic() - began, 1e-9)
        left = clock((total - settled) / rate if rate else None)
        self.pulse("  ".join(filter(None, (f"{attack}: {settled:,} of {total:,} images", shown, f"ETA {left}"))))


def clock(seconds: float | None) -> str:
    """Format a time as "1:02:03" or "4:05"; "-" for None."""
    if seconds is None:
        return "-"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
