"""A progress bar on stderr, for what takes minutes. Where stderr is no terminal, as in a job's log, a line a minute."""

import datetime
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
    """unit: what is counted, and how much of what tasks count is one."""

    def __init__(self, *columns: ProgressColumn, unit: tuple[str, int], **settings: Any):
        super().__init__(*columns, **settings)
        self._unit = unit
        self._lines: dict[TaskID, tuple[float, float]] = {}  # when the last one was, and what was done at the start

    def add_task(self, *args: Any, **settings: Any) -> TaskID:
        task = super().add_task(*args, **settings)
        self._lines[task] = self.get_time(), self._tasks[task].completed
        return task

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._say(task_id)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        said, start = self._lines[task_id]
        if not self.disable or self.get_time() < said + LINE_SECONDS:
            return
        self._lines[task_id] = self.get_time(), start
        task, (what, one) = self._tasks[task_id], self._unit
        speed = (task.completed - start) / max(task.elapsed or 0.0, 1e-9)
        of, left = "", ""
        if task.total is not None:
            of = f" of {task.total / one:,.0f}"
            if speed:
                left = f", {datetime.timedelta(seconds=round((task.total - task.completed) / speed))} left"
        line = f"{task.description}: {task.completed / one:,.0f}{of} {what}, {speed / one:,.1f} a second{left}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def bar(*columns: ProgressColumn, transient: bool = False, unit: tuple[str, int] = ("images", 1)) -> Progress:
    """A bar with a description and `columns`, by default `IMAGES`. transient: it is wiped away at the end.

    unit: of the lines that stand for it, as ("MB", 1_000_000).
    """
    console = Console(stderr=True, markup=False, emoji=False)  # names of files as they are
    shown = (TextColumn("{task.description}", markup=False), BarColumn(), *(columns or IMAGES))
    return _Bar(*shown, unit=unit, console=console, transient=transient, disable=not console.is_terminal)
