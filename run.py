"""Train, evaluate and use image classifiers for long-tailed data and adversarial inputs.

  python run.py --config=configs/quickstart.py             trains; the same command resumes a stopped run
  python run.py --config=configs/cifar100_lt.py:help       lists a config's arguments and common settings
  python run.py --config=configs/cifar100_lt.py:method=mislas,imbalance=50 --config.epochs=100 --dry_run
  python run.py --config=configs/cifar100_lt.py:method=mislas,imbalance=50 --mode=attack
  python run.py --workdir=runs/quickstart-seed0 --mode=predict --images=FOLDER --out=FILE.csv

Exit code 2: a mistake, described in one line.
"""

import gc
import json
import logging
import os
import pkgutil
import re
import runpy
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


def stop_at_once(number: int, _frame) -> None:
    """Handle Ctrl-C and SIGTERM outside of training: during an import, an exception could be swallowed."""
    os.write(2, b"\nStopped; there was nothing to save.\n")
    os._exit(128 + number)


if __name__ == "__main__":
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, stop_at_once)

from absl import app, flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from configs.common import Help  # noqa: E402
from ltjax.modes import usage  # noqa: E402

MODES = {  # what each value of --mode calls with (config, workdir, data_dir); predict takes other arguments
    "train": "ltjax.train:train",
    "eval": "ltjax.modes.evaluate:evaluate_workdir",
    "attack": "ltjax.modes.attack:attack_workdir",
    "report": "ltjax.modes.report:report_workdir",
    "predict": "ltjax.modes.predict:predict_workdir",
}
MODES_OF_A_RUN = tuple(MODES)[1:]  # they can read the config from the workdir

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with its arguments after a colon; :help lists them."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; default: runs/NAME-seedSEED (-seedsFIRST-LAST with replicas)."
)
_MODE = flags.DEFINE_enum("mode", "train", list(MODES), "What to do.")
_IMAGES = flags.DEFINE_string("images", "", "With --mode=predict: folder, or quoted pattern such as 'photos/*.jpg'.")
_OUT = flags.DEFINE_string("out", "-", "With --mode=predict: FILE.csv or FILE.jsonl; - or -.jsonl: standard output.")
_TOP_K = flags.DEFINE_integer("top_k", 5, "With --mode=predict: number of classes listed for each image.")
_TARGET_PRIOR = flags.DEFINE_string(
    "target_prior", None, "With --mode=predict: class frequencies in use: uniform, train, FILE.csv."
)
_MODEL_PRIOR = flags.DEFINE_string(
    "model_prior", None, "With --mode=predict: class frequencies in training; default: by method."
)
_CALIBRATE = flags.DEFINE_bool("calibrate", False, "Fit a temperature on the hold-out: with train, eval or predict.")
_DRY_RUN = flags.DEFINE_boolean(
    "dry_run", False, "Print stages, parameter groups, schedules, class counts and memory; train and write nothing."
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Prepared data; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    "",
    "With several processes: HOST:PORT of the first; auto (the default on SLURM, Open MPI, TPUs); none: run alone.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With several processes: number of processes.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With several processes: number of this process, from 0.")
_PATIENCE = flags.DEFINE_integer(
    "patience", 60, "With several processes: seconds without a heartbeat after which a process counts as lost."
)


def help_page() -> str:
    module = flags.FLAGS.find_module_defining_flag(_MODE.name)
    return usage.flags_page(__doc__ or "", flags.FLAGS.flags_by_module_dict()[module or ""])


def parse_flags(arguments: list[str]) -> list[str]:
    """Read the flags. Print a mistake in them or in the config as one line, and exit with code 2."""
    if not arguments[1:] or {"-h", "-help", "--help"} & set(arguments[1:]):
        print(help_page())
        raise SystemExit(0)
    # A shell leaves ~ in --config=~/c.py as it is.
    arguments = [re.sub("^(--?config=)(~[^:]*)", lambda m: m[1] + str(home(m[2])), each) for each in arguments]
    try:
        check_overrides(arguments)
        rest = flags.FLAGS(arguments)
        if _CALIBRATE.value and _MODE.value in ("attack", "report"):
            raise ValueError("--calibrate goes with --mode=train, eval or predict")
        if (_TARGET_PRIOR.value or _MODEL_PRIOR.value) and _MODE.value != "predict":
            raise ValueError(f"--target_prior and --model_prior are for --mode=predict, not {_MODE.value}")
        if _MODEL_PRIOR.value and not _TARGET_PRIOR.value:
            raise ValueError("--model_prior goes with --target_prior, the prior of the place where the model is used")
        if _DRY_RUN.value and _MODE.value != "train":
            raise ValueError(f"--dry_run is for --mode=train, not {_MODE.value}")
        if _CONFIG.value is None and not config_is_in_workdir():
            if _MODE.value in MODES_OF_A_RUN and _WORKDIR.value is not None:
                raise ValueError(
                    f"{_WORKDIR.value} holds no run (no config.json): give the --workdir of one, or a --config"
                )
            if _MODE.value in MODES_OF_A_RUN:
                raise ValueError(f"--mode={_MODE.value} needs the --workdir of a run, or a --config")
            raise ValueError("--config is needed, such as --config=configs/quickstart.py")
        if rest[1:]:
            raise ValueError(f"unexpected argument {rest[1]!r}: flags begin with --")
        return rest
    except Exception as error:  # absl, ml_collections and the config file raise many exception types
        lines = str(error).strip().splitlines() or [type(error).__name__]
        fail(re.sub(r"^Unknown command line flag '(\w+)'\.(.*?)(\w+) \?$", r"unknown flag --\1.\2--\3?", lines[-1]))
        raise SystemExit(2) from None


def config_is_in_workdir() -> bool:
    """Return whether the config comes from the run in the workdir, so that --config is not needed."""
    if _CONFIG.value is not None or _MODE.value not in MODES_OF_A_RUN:
        return False
    return config_in_workdir().is_file()


def config_in_workdir() -> Path:
    return home(_WORKDIR.value or "") / "config.json"


def home(path: str) -> Path:
    """Expand ~ at the start of a path. Other mistakes in the path are reported when it is used."""
    return Path(os.path.expanduser(path))


def check_overrides(arguments: list[str]) -> None:
    """Check --config and the --config.KEY flags, or print the config's help page and exit.

    This loads the config once more than absl does, because ml_collections hides its errors in tracebacks and does not
    list the allowed keys.
    """
    overrides = config_flags_of(arguments)
    path, *argument = overrides.pop("config", "").split(":", 1)
    if not path and overrides:
        raise ValueError(
            f"--{next(iter(overrides))} changes a config: give that, too, such as --config=configs/quickstart.py"
        )
    if not path:
        return
    file = load_config_file(path)
    try:
        config = file["get_config"](*argument).to_dict()
    except Help as requested:
        others = ",".join(part for part in argument[0].split(",") if part != "help")
        heading = (file["__doc__"] or path).partition("\n")[0]
        print(usage.config_page(path, heading, requested.arguments, file["get_config"](others or None).to_dict()))
        raise SystemExit(0) from None
    for key in overrides:
        check_key(config, key.removeprefix("config."))


def load_config_file(path: str) -> dict[str, Any]:
    """Return the globals of a config file. Raise ValueError, which lists the config files, if it is no config."""
    file = runpy.run_path(path) if Path(path).is_file() else {}
    likely = Path("configs") / f"{Path(path).stem}.py"
    if not file and likely.is_file():
        raise ValueError(f"no config file {path}; did you mean --config={likely}?")
    if "get_config" not in file:
        defines = re.compile(r"^def get_config\b", re.MULTILINE)
        others = sorted(Path(path).parent.glob("*.py"))
        others = ", ".join(str(other) for other in others if defines.search(other.read_text("utf-8", "replace")))
        if file:
            raise ValueError(f"{path} is no config file (no get_config in it); in its folder: {others or 'none'}")
        raise ValueError(f"no config file {path} from {os.getcwd()}; in its folder: {others or 'none'}")
    return file


def config_flags_of(arguments: list[str]) -> dict[str, str]:
    """Return {"config": FILE, "config.KEY": VALUE} from flags of the form --name=value or --name value."""
    values = {}
    for flag, after in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = flag.partition("=")
        if re.match(r"--?config($|\.)", name):
            values[name.lstrip("-")] = value if equals else after
    return values


def check_key(config: dict, key: str) -> None:
    """Raise ValueError, listing the allowed keys, if the dotted key is not in the nested dicts."""
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(config, dict) or part not in config:
            allowed = ", ".join(config) if isinstance(config, dict) else "nothing below it"
            where = ".".join(("config", *parts[:depth]))
            raise ValueError(f"unknown config key config.{key}; allowed in {where}: {allowed}")
        config = config[part]


def fail(message: object) -> None:
    print("error: " + " ".join(str(message).split()), file=sys.stderr)


def main(_: list[str]) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before XLA loads: its messages would break progress bars
    gc.disable()  # until everything is imported, see `run_mode`
    # Imported after the flags are read, so that --help and a mistyped flag answer immediately.
    from ltjax.runs import results
    from ltjax.system import processes
    from ltjax.system.signals import Interrupted
    from ltjax.system.wording import one_line
    from ltjax.types import UserError

    quieten()
    try:
        config = run_config()
        start(config)
        run_mode(config)
    except UserError as error:
        fail(error)
        if processes.several():
            processes.leave(2)
        sys.exit(2)
    except Interrupted as stop:
        if processes.first():
            print(f"Stopped and saved. To resume, run the same command again:\n  {results.command()}")
        sys.exit(stop.exit_code)
    except Exception as error:
        if processes.lost(error):
            processes.leave_lost(f"another process is gone ({one_line(error)[:200]})")
        if processes.several():
            traceback.print_exc()
            processes.leave(1)  # the others notice
        raise


def quieten() -> None:
    """Silence loggers that would break progress bars, and Orbax's threads, whose errors the main thread raises too."""
    for name in ("absl", "jax", "orbax", "asyncio"):  # what they report as errors is raised, too
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
    report_thread, report_unraisable = threading.excepthook, sys.unraisablehook

    def in_orbax(trace: TracebackType | None) -> bool:
        return any("/orbax/" in frame.filename for frame in traceback.extract_tb(trace))

    def of_a_save(error: Any) -> bool:  # TensorStore may call Orbax back when its event loop has ended
        return in_orbax(error.exc_traceback) or str(error.exc_value) == "Event loop is closed"

    threading.excepthook = lambda error: None if in_orbax(error.exc_traceback) else report_thread(error)
    sys.unraisablehook = lambda error: None if of_a_save(error) else report_unraisable(error)


def run_config() -> dict[str, Any]:
    """Return the config that the flags give, or the one in the workdir."""
    from ltjax.system.files import read_json

    if config_is_in_workdir():
        return read_json(config_in_workdir())
    return _CONFIG.value.to_dict()


def workdir_of(config: Mapping[str, Any]) -> str:
    seed, replicas = config.get("seed", 0), config.get("replicas", 1)
    seeds = f"seeds{seed}-{seed + replicas - 1}" if replicas > 1 else f"seed{seed}"
    return _WORKDIR.value or str(Path("runs") / f"{config.get('name')}-{seeds}")


def start(config: Mapping[str, Any]) -> None:
    """Start JAX's devices. Check that all processes, if there are several, were started with the same command."""
    from ltjax.config import parse, with_defaults
    from ltjax.modes import calibrate
    from ltjax.runs.weights import hash_weights, is_weights
    from ltjax.system import devices, processes

    parse(config)  # only to check
    devices.use_cpu_cores(config.get("batch_size", 1))
    processes.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _PATIENCE.value)
    for warning in devices.start_devices():
        print(f"note: {warning}", file=sys.stderr)
    # without the location of data, which may differ between machines
    deciding = (_MODE, _DRY_RUN, _CALIBRATE, _IMAGES, _OUT, _TOP_K, _TARGET_PRIOR, _MODEL_PRIOR)
    processes.agree({f"--{flag.name}": str(flag.value) for flag in deciding})
    processes.agree({"--workdir": workdir_of(config), "--config": ",".join(sorted(config))})
    compared = with_defaults(config)  # without locations, which may differ between machines
    if is_weights(compared["weights"]):
        compared["weights"] = hash_weights(compared["weights"])
    processes.agree({f"config.{key}": json.dumps(compared[key], sort_keys=True) for key in sorted(compared)})
    if _CALIBRATE.value:
        calibrate.check(config)


def run_mode(config: Mapping[str, Any]) -> None:
    """Run the mode, with --dry_run and --calibrate."""
    from ltjax.modes import calibrate

    mode: Callable = pkgutil.resolve_name("ltjax.modes.dry_run:dry_run" if _DRY_RUN.value else MODES[_MODE.value])
    where = workdir_of(config), _DATA_DIR.value
    gc.freeze()  # what was imported stays: while JAX traces, Python need not search it for garbage
    gc.enable()
    if _MODE.value != "predict":
        mode(config, *where)
        if _CALIBRATE.value and not _DRY_RUN.value:
            calibrate.calibrate_workdir(config, *where)
        return
    files = None
    if _CALIBRATE.value:
        from rich.console import Console

        from ltjax.modes import predict  # loads OpenCV, which training does not need

        _, files = predict.check(_IMAGES.value, _OUT.value)
        stderr = Console(stderr=True, markup=False, emoji=False)  # predictions may go to standard output
        calibrate.calibrate_workdir(config, *where, stderr)
    priors = dict(target_prior=_TARGET_PRIOR.value, model_prior=_MODEL_PRIOR.value)
    mode(config, where[0], images=_IMAGES.value, out=_OUT.value, top_k=_TOP_K.value, files=files, **priors)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
