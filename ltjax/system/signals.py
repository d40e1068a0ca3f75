"""On Ctrl-C or SIGTERM, finish what is running, and save it."""

import os
import signal
from typing import Any


class Interrupted(Exception):
    """Raised after a stop signal. The training loop saves, and raises it again."""

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_code = 128 + signal_number


SAVING = "Stopping: finishing the steps under way (or compiling), then saving. A second signal stops at once."


class StopSignals:
    """Context in which the first Ctrl-C or SIGTERM only sets `requested`; a second one stops the process at once."""

    def __init__(self, message: str = SAVING):
        """Prepare. message: printed after the first signal."""
        self.requested: int | None = None
        self._message = message
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:
                pass  # only the main thread can handle signals
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame) -> None:
        if self.requested is not None:
            os._exit(128 + number)
        self.requested = number
        os.write(2, f"\n{self._message}\n".encode())
