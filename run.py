"""Train or evaluate: python run.py --config=configs/quickstart.py [--workdir=DIR] [--mode=train|eval] [--data_dir=DIR]

Settings after the config: --config=configs/cifar100_lt.py:method=mislas,imbalance=50 --config.epochs=100.
The same command resumes a run that was stopped. Exit code 2: something to mend, named in one line.
"""

import logging
import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with its arguments after a colon.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept; default: runs/NAME-seedSEED.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "What to do.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Prepared data sets; default: $TFDS_DATA_DIR.")


def parse_flags(arguments: list[str]) -> list[str]:
    """Read the flags; every mistake in them, or in the config, becomes one line."""
    try:
        rest = flags.FLAGS(arguments)
        if _CONFIG.value is None:
            raise ValueError("--config is needed, such as --config=configs/quickstart.py")
        if rest[1:]:
            raise ValueError(f"unexpected argument {rest[1]!r}: flags begin with --")
        return rest
    except (flags.Error, ValueError, TypeError, KeyError, AttributeError, OSError, ImportError) as error:
        fail(error)
        raise SystemExit(2) from None


def fail(error: Exception) -> None:
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    print("error: " + " ".join(str(message).split()), file=sys.stderr)


def main(_: list[str]) -> None:
    from ltjax import train  # after the flags, so that --help and a mistyped flag answer at once
    from ltjax.signals import Interrupted
    from ltjax.types import UserError

    for chatty in ("absl", "jax", "orbax"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    config = _CONFIG.value.to_dict()
    workdir = _WORKDIR.value or str(Path("runs") / f"{config.get('name')}-seed{config.get('seed', 0)}")
    do = {"train": train.train, "eval": train.evaluate_workdir}[_MODE.value]
    try:
        train.use_cpu_cores(config.get("batch_size", 1))
        do(config, workdir, _DATA_DIR.value)
    except UserError as error:
        fail(error)
        sys.exit(2)
    except Interrupted as stop:
        print(f"Stopped and saved. To resume, run the same command again:\n  {train.results.command()}")
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
