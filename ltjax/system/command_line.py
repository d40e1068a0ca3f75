"""The argument parser of every `python -m ltjax...` command."""

import argparse

from ltjax.types import UserError


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises a one-line UserError instead of printing the usage and exiting."""

    def error(self, message: str):
        raise UserError(f"{message} (see `{self.prog} --help`)")
