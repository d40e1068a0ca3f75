"""The first signal is a request to stop, and the second one stops at once."""

import os
import signal
import subprocess
import sys

import pytest

from ltjax.system.signals import Interrupted, StopSignals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_only_noted(number, capfd):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        os.kill(os.getpid(), number)
        assert stop.requested == number
    assert signal.getsignal(number) is before
    assert "A second signal stops at once" in capfd.readouterr().err


def test_the_message_can_be_chosen(capfd):
    with StopSignals("Stopping: one more image."):
        os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err == "\nStopping: one more image.\n"


def test_a_second_signal_ends_the_process():
    code = (
        "import os, signal; from ltjax.system.signals import StopSignals\n"
        "with StopSignals():\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('went on')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (128 + signal.SIGTERM, "")


def test_the_exit_code_is_that_of_the_signal():
    assert Interrupted(signal.SIGTERM).exit_code == 143
