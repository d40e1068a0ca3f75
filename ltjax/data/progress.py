"""Notes and a progress bar on stderr; one line a minute if stderr is not a terminal, as in a job's log."""

import datetime
import sys
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

IMAGES = (MofNCompleteColumn(), TimeRemainingColumn())
LINE_SECONDS = 60.0


class _Bar(Progress):
    def __init__(self, *columns: ProgressColumn, unit: tuple[str, int], **settings: Any):
        super().__init__(*columns, **settings)
        self._unit = unit
        self._lines: dict[TaskID, tuple[float, float]] = {}  # time of the last line, amount done at the start

    def add_task(self, *args: Any, **settings: Any) -> TaskID:
        task = super().add_task(*args, **settings)
        self._lines[task] = self.get_time(), self._tasks[task].completed
        return task

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._print_line(task_id)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._print_line(task_id)

    def _print_line(self, task_id: TaskID) -> None:
        last, start = self._lines[task_id]
        if not self.disable or self.get_time() < last + LINE_SECONDS:
            return
        self._lines[task_id] = self.get_time(), start
        task, (unit, size) = self._tasks[task_id], self._unit
        speed = (task.completed - start) / max(task.elapsed or 0.0, 1e-9)
        of, left = "", ""
        if task.total is not None:
            of = f" of {task.total / size:,.0f}"
            if speed:
                left = f", {datetime.timedelta(seconds=round((task.total - task.completed) / speed))} left"
        line = f"{task.description}: {task.completed / size:,.0f}{of} {unit}, {speed / size:,.1f} a second{left}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def bar(*columns: ProgressColumn, transient: bool = False, unit: tuple[str, int] = ("images", 1)) -> Progress:
    """Make a bar with a description and `columns`, by default `IMAGES`; a `transient` bar is cleared at the end.

    `unit` is the name and size of the unit in lines, such as ("MB", 1_000_000).
    """
    console = Console(stderr=True, markup=False, emoji=False)  # file names are printed literally
    shown = (TextColumn("{task.description}", markup=False), BarColumn(), *(columns or IMAGES))
    return _Bar(*shown, unit=unit, console=console, transient=transient, disable=not console.is_terminal)


def note(text: str) -> None:
    """Print a note on stderr, from the first process alone."""
    import jax  # late, because preparing data needs no jax

    if jax.process_index() == 0:
        print(f"note: {text}", file=sys.stderr)
