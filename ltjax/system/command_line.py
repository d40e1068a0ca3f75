"""Common parts of the `python -m ltjax...` commands: the parser of its arguments, and how it ends."""

import argparse
import sys
from collections.abc import Callable

from ltjax.types import UserError


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises a one-line UserError instead of printing the usage and exiting."""

    def error(self, message: str):
        raise UserError(f"{message} (see `{self.prog} --help`)")


def exit_code(command: Callable[[], None]) -> int:
    """Run a command. Return 0, or after one line `error: ...` on stderr 2, or 130 if it was interrupted."""
    try:
        command()
        return 0
    except (UserError, OSError) as error:
        message, code = str(error), 2
    except KeyboardInterrupt as interrupt:
        message, code = str(interrupt) or "interrupted", 130
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
