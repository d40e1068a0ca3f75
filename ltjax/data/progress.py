"""A progress bar on stderr, for what takes minutes. Where stderr is no terminal, nothing is written."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

IMAGES = (MofNCompleteColumn(), TimeRemainingColumn())


def bar(*columns: ProgressColumn, transient: bool = False) -> Progress:
    """A bar with a description and `columns`, by default `IMAGES`. transient: it is wiped away at the end."""
    console = Console(stderr=True)
    shown = (TextColumn("{task.description}"), BarColumn(), *(columns or IMAGES))
    return Progress(*shown, console=console, transient=transient, disable=not console.is_terminal)
