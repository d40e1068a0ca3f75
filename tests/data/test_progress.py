"""Progress lines if stderr is not a terminal."""

import pytest

from ltjax.data import progress


@pytest.fixture
def clock(monkeypatch):
    """`clock[0]` is the time in seconds for bars made by `progress.bar`."""
    now = [0.0]
    make = progress._Bar.__init__

    def with_clock(bar, *columns, **settings):
        make(bar, *columns, get_time=lambda: now[0], **settings)

    monkeypatch.setattr(progress._Bar, "__init__", with_clock)
    return now


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def test_a_line_a_minute_shows_amount_speed_and_time_left(capsys, clock):
    with progress.bar() as bar:
        task = bar.add_task("preparing inat18", total=437_513, completed=100_000)
        for second in range(150):
            clock[0] = second + 1.0
            bar.advance(task, 500)
    expected = "preparing inat18: {} of 437,513 images, 500.0 a second, {} left"
    assert lines(capsys) == [expected.format("130,000", "0:10:15"), expected.format("160,000", "0:09:15")]


def test_less_than_a_minute_of_work_prints_nothing(capsys, clock):
    with progress.bar() as bar:
        task = bar.add_task("checking images", total=100)
        clock[0] = 59.0
        bar.advance(task, 100)
    assert lines(capsys) == []


def test_work_of_unknown_length_shows_amount_and_speed(capsys, clock):
    with progress.bar(unit=("MB", 10**6)) as bar:
        task = bar.add_task("x.tar", total=None)
        clock[0] = 60.0
        bar.update(task, advance=120_000_000)
    assert lines(capsys) == ["x.tar: 120 MB, 2.0 a second"]
