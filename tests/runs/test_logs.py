"""Progress: a bar in a terminal, lines in a file."""

import io
import os
import pty
import re

import pytest
from rich.console import Console
from rich.table import Table

from ltjax.runs import logs


@pytest.fixture
def now(monkeypatch):
    """Return a clock whose time is `now[0]`."""
    time = [100.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: time[0])
    return time


def in_a_file(monkeypatch):
    """Return `make_console()`, and the file to which it writes."""
    file = io.StringIO()
    monkeypatch.setattr(logs.sys, "stdout", file)
    return logs.make_console(), file


def train(console, now, *, seconds, steps):
    with logs.StageProgress(console, "MiSLAS, stage 1", steps, 0, 64, epochs=2) as bar:
        for step in range(1, steps + 1):
            now[0] += seconds
            bar.show(step, 1 + 2 * (step - 1) // steps, 1.5, 0.125, (steps - step) * seconds)
            if step == steps // 2:
                bar.say("epoch 1")


def test_a_file_gets_a_line_about_every_thirty_seconds(monkeypatch, now):
    console, file = in_a_file(monkeypatch)
    train(console, now, seconds=8.0, steps=20)
    assert file.getvalue().splitlines() == [
        "MiSLAS, stage 1  epoch 1/2  step 4/20  loss 1.500  512 images/s  ETA 2:08",
        "MiSLAS, stage 1  epoch 1/2  step 8/20  loss 1.500  512 images/s  ETA 1:36",
        "epoch 1",  # restarts the 30 seconds
        "MiSLAS, stage 1  epoch 2/2  step 14/20  loss 1.500  512 images/s  ETA 0:48",
        "MiSLAS, stage 1  epoch 2/2  step 18/20  loss 1.500  512 images/s  ETA 0:16",
    ]


NAME = "[red]stop[/red] :car: [a]"  # markup and emoji to rich, a name to us


def test_markup_in_names_is_printed_as_it_is(monkeypatch, now):
    console, file = in_a_file(monkeypatch)
    with logs.StageProgress(console, NAME, 10, 0, 64, epochs=1) as bar:
        now[0] += 40
        bar.show(1, 1, 1.5, None, None)
    console.print(f"cannot use {NAME}")
    table = Table(NAME, title=NAME, caption=NAME)
    table.add_row(NAME)
    console.print(table)
    assert file.getvalue().count(NAME) == 6


def test_a_bar_prints_markup_in_names_as_it_is(monkeypatch, now):
    terminal = io.StringIO()
    console = Console(file=terminal, width=200, force_terminal=True, color_system=None, markup=False, emoji=False)
    with logs.StageProgress(console, NAME, 10, 0, 64, epochs=1) as bar:
        bar.show(1, 1, 1.5, None, None)
    with logs.AttackProgress(console) as bar:
        bar.show(NAME, 1, 10)
    assert terminal.getvalue().count(NAME) >= 2


def test_a_short_stage_prints_no_progress_lines_to_a_file(monkeypatch, now):
    console, file = in_a_file(monkeypatch)
    train(console, now, seconds=0.1, steps=20)
    assert file.getvalue() == "epoch 1\n"


def test_an_attack_prints_its_progress_to_a_file(monkeypatch, now):
    console, file = in_a_file(monkeypatch)
    with logs.AttackProgress(console) as bar:
        for settled in (0, 100, 200):
            bar.show("apgd-ce", settled, 1000, 0.25)
            now[0] += 20
    assert file.getvalue() == "apgd-ce: 200 of 1,000 images  robust accuracy so far 25.0%  ETA 2:40\n"


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_file_gets_no_bars_or_colours_whatever_the_environment(monkeypatch, now, variable):
    monkeypatch.setenv(variable, "1")
    console, file = in_a_file(monkeypatch)
    train(console, now, seconds=40.0, steps=2)
    console.print("[bold]done[/bold] 12")
    assert "\r" not in file.getvalue() and "\x1b" not in file.getvalue()


def test_lines_in_a_file_are_not_wrapped(monkeypatch):
    console, file = in_a_file(monkeypatch)
    console.print("word " * 60)
    assert file.getvalue() == "word " * 60 + "\n"


def test_a_terminal_gets_a_live_bar_and_no_progress_lines(now):
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        console = Console(file=terminal, width=100)
        assert console.is_terminal
        train(console, now, seconds=40.0, steps=4)
    shown = read_all(reader)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert "\x1b[2K" in shown and "━" in text  # rewritten in place
    assert "step 2/4" not in text
    assert [line for line in re.split("[\r\n]+", text) if line and "━" not in line] == ["epoch 1"]


def read_all(descriptor):
    """Read everything from a pseudo-terminal whose other end is closed."""
    parts = []
    while True:
        try:
            part = os.read(descriptor, 4096)
        except OSError:  # end of the data on Linux
            part = b""
        if not part:
            os.close(descriptor)
            return b"".join(parts).decode()
        parts.append(part)


def test_a_notebook_gets_wrapped_lines_and_a_file_does_not(monkeypatch, capsys):
    assert logs.make_console().soft_wrap
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert not logs.make_console().soft_wrap
