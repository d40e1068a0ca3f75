"""The faults that `benchmarks.kills` finds in disturbed commands."""

import random

import pytest

from benchmarks import kills


class Now(random.Random):
    """Draw the end of each interval."""

    def uniform(self, a, b):
        return b


def disturbed(code, kind, tmp_path, seconds=1.5):
    return kills.disturb(("-c", code), tmp_path, kind, seconds, Now())


@pytest.mark.parametrize("kind", kills.SIGNALS)
def test_a_command_that_ends_silently_after_a_signal_has_no_fault(tmp_path, kind):
    assert disturbed("import time; time.sleep(60)", kind, tmp_path) == kind


def test_a_traceback_after_a_signal_is_a_fault(tmp_path):
    code = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: 1 / 0); time.sleep(60)"
    assert disturbed(code, "SIGTERM", tmp_path).startswith("fault: code 1, Traceback")


def test_a_command_that_ends_before_its_signal_is_no_kill(tmp_path):
    assert disturbed("pass", "SIGKILL", tmp_path, 60.0) == "ended"


def test_a_command_that_fails_on_its_own_is_a_fault(tmp_path):
    assert disturbed("raise SystemExit(3)", "SIGKILL", tmp_path, 60.0).startswith("fault: code 3")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys; print('error: the disk is full', file=sys.stderr); sys.exit(2)", "full disk"),
        ("open({out!r}, 'wb').write(bytes(10**6))", "fault: code 1, Traceback"),
        ("import sys; sys.exit(2)", "fault: code 2"),
        ("pass", "ended"),
    ],
)
def test_a_full_disk_must_end_in_one_line(tmp_path, code, expected):
    code = code.replace("{out!r}", repr(str(tmp_path / "out")))
    assert disturbed(code, "full disk", tmp_path).startswith(expected)


def test_the_task_that_predicts_accepts_all_rows_or_none(tmp_path):
    partial, out = kills.tasks(tmp_path)["predict"].partial, tmp_path / "out.csv"
    partial(tmp_path)
    out.write_text("row\n" * (1 + kills.PHOTOS))
    partial(tmp_path)
    out.write_text("row\n" * kills.PHOTOS)
    with pytest.raises(ValueError, match="a part"):
        partial(tmp_path)


def test_figures_are_compared_and_durations_are_not():
    nested = {"stages": [{"seconds": 1.0, "loss": 2.0}], "versions": {"jax": "0"}}
    assert kills.without_times(nested) == {"stages": [{"loss": 2.0}]}
    assert kills.different({"loss": 1, "step": 2}, {"loss": 2, "step": 2}) == "loss"
