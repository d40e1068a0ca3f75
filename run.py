"""Train, judge and use classifiers of long-tailed and of attacked images.

  python run.py --config=configs/quickstart.py             trains; the same command resumes a run that was stopped
  python run.py --config=configs/cifar100_lt.py:help       lists the arguments of a config, and settings worth knowing
  python run.py --config=configs/cifar100_lt.py:method=mislas,imbalance=50 --config.epochs=100 --dry_run
  python run.py --config=configs/cifar100_lt.py:method=mislas,imbalance=50 --mode=attack
  python run.py --workdir=runs/quickstart-seed0 --mode=predict --images=FOLDER --out=FILE.csv

Exit code 2: something to mend, named in one line.
"""

import json
import logging
import os
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
    """Ctrl-C or SIGTERM before training begins, when an exception could be swallowed by whatever is being imported."""
    os.write(2, b"\nStopped before anything began that could be saved.\n")
    os._exit(128 + number)


if __name__ == "__main__":
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, stop_at_once)

from absl import app, flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from configs.common import Help  # noqa: E402
from ltjax.modes import help as usage  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with its arguments after a colon; :help lists them."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run is kept; default: runs/NAME-seedSEED (-seedsFIRST-LAST with replicas)."
)
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval", "attack", "report", "predict"], "What to do.")
OF_A_RUN = ("predict", "report", "eval", "attack")  # modes that need no --config where the workdir holds a run
_IMAGES = flags.DEFINE_string("images", "", "Of --mode=predict: a folder, or a quoted pattern such as 'photos/*.jpg'.")
_OUT = flags.DEFINE_string("out", "-", "Of --mode=predict: FILE.csv, FILE.jsonl; on standard output, - or -.jsonl.")
_TOP_K = flags.DEFINE_integer("top_k", 5, "Of --mode=predict: classes of each image.")
_CALIBRATE = flags.DEFINE_bool("calibrate", False, "Fit a temperature on the hold-out: with train, eval or predict.")
_DRY_RUN = flags.DEFINE_boolean(
    "dry_run", False, "Print stages, parameter groups, schedules, class counts and memory; train and write nothing."
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Prepared data; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    "",
    "Of several processes: HOST:PORT of the first, or auto (SLURM, Open MPI, TPU: found anyway); none: run alone.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of several processes: how many there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of several processes: which one this is, from 0.")
_PATIENCE = flags.DEFINE_integer(
    "patience", 60, "Of several processes: seconds of silence after which another one counts as lost."
)


def help_page() -> str:
    own = flags.FLAGS.find_module_defining_flag(_MODE.name)
    return usage.flags_page(__doc__ or "", flags.FLAGS.flags_by_module_dict()[own or ""])


def parse_flags(arguments: list[str]) -> list[str]:
    """Read the flags; every mistake in them, or in the config, becomes one line."""
    if not arguments[1:] or {"-h", "-help", "--help"} & set(arguments[1:]):
        print(help_page())
        raise SystemExit(0)
    try:
        check_overrides(arguments)
        rest = flags.FLAGS(arguments)
        if _CALIBRATE.value and _MODE.value in ("attack", "report"):
            raise ValueError("--calibrate goes with --mode=train, eval or predict")
        if _DRY_RUN.value and _MODE.value != "train":
            raise ValueError(f"--dry_run is for --mode=train, not {_MODE.value}")
        if _CONFIG.value is None and not told_by_workdir():
            if _MODE.value in OF_A_RUN and _WORKDIR.value is not None:
                raise ValueError(
                    f"{_WORKDIR.value} holds no run (no config.json): give the --workdir of one, or a --config"
                )
            if _MODE.value in OF_A_RUN:
                raise ValueError(f"--mode={_MODE.value} needs the --workdir of a run, or a --config")
            raise ValueError("--config is needed, such as --config=configs/quickstart.py")
        if rest[1:]:
            raise ValueError(f"unexpected argument {rest[1]!r}: flags begin with --")
        return rest
    except Exception as error:  # flags, ml_collections and the config file each raise their own kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        fail(re.sub(r"^Unknown command line flag '(\w+)'\.(.*?)(\w+) \?$", r"unknown flag --\1.\2--\3?", lines[-1]))
        raise SystemExit(2) from None


def told_by_workdir() -> bool:
    """Whether the config is that of the run in the workdir: who uses a model need not know it."""
    return _CONFIG.value is None and _MODE.value in OF_A_RUN and (home(_WORKDIR.value or "") / "config.json").is_file()


def home(path: str) -> Path:
    """A path with ~ as a shell has it; what else is wrong with it is said when it is used."""
    return Path(os.path.expanduser(path))


def check_overrides(arguments: list[str]) -> None:
    """Load the config once by itself: ml_collections wraps its errors in tracebacks, and names no allowed keys.
    Of `help` among its arguments, print what that lists, and exit."""
    given = of_the_config(arguments)
    path, *argument = given.pop("config", "").split(":", 1)
    if not path and given:
        raise ValueError(
            f"--{next(iter(given))} changes a config: give that, too, such as --config=configs/quickstart.py"
        )
    if not path:
        return
    file = runpy.run_path(path) if Path(path).is_file() else {}
    meant = Path("configs") / f"{Path(path).stem}.py"
    if not file and meant.is_file():
        raise ValueError(f"no config file {path}; did you mean --config={meant}?")
    if "get_config" not in file:
        python = sorted(Path(path).parent.glob("*.py"))
        have = ", ".join(
            str(p) for p in python if re.search(r"^def get_config\b", p.read_text("utf-8", "replace"), re.MULTILINE)
        )
        what = (
            f"{path} is no config file (no get_config in it)" if file else f"no config file {path} from {os.getcwd()}"
        )
        raise ValueError(f"{what}; in its folder: {have or 'none'}")
    try:
        config = file["get_config"](*argument).to_dict()
    except Help as asked:
        others = ",".join(part for part in argument[0].split(",") if part != "help")
        heading = (file["__doc__"] or path).partition("\n")[0]
        print(usage.config_page(path, heading, asked.arguments, file["get_config"](others or None).to_dict()))
        raise SystemExit(0) from None
    for key in given:
        check_key(config, key.removeprefix("config."))


def of_the_config(arguments: list[str]) -> dict[str, str]:
    """{"config": FILE, "config.KEY": VALUE} of the flags, each either --name=value or --name value."""
    given = {}
    for flag, after in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = flag.partition("=")
        if re.match(r"--?config($|\.)", name):
            given[name.lstrip("-")] = value if equals else after
    return given


def check_key(config: dict, key: str) -> None:
    """Raises ValueError, with what is allowed, unless the dotted key is in the nested dicts."""
    *folders, name = key.split(".")
    for depth, part in enumerate((*folders, name)):
        if not isinstance(config, dict) or part not in config:
            allowed = ", ".join(config) if isinstance(config, dict) else "nothing below it"
            where = ".".join(("config", *folders[:depth]))
            raise ValueError(f"unknown config key config.{key}; allowed in {where}: {allowed}")
        config = config[part]


def fail(message: object) -> None:
    print("error: " + " ".join(str(message).split()), file=sys.stderr)


def main(_: list[str]) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before XLA is loaded, whose remarks would tear the bars
    # Imported after the flags are read, so that --help and a mistyped flag answer at once.
    from ltjax.runs import results
    from ltjax.system import processes
    from ltjax.system.signals import Interrupted
    from ltjax.types import UserError, one_line

    quieten()
    try:
        config = run_config()
        start(config)
        chosen_mode(config)()
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
    """Silence loggers that would tear the progress bars, and background saves, whose errors the main thread raises."""
    for chatty in ("absl", "jax", "orbax", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
    report_thread, report_unraisable = threading.excepthook, sys.unraisablehook

    def of_a_save(trace: TracebackType | None) -> bool:
        return any("/orbax/" in frame.filename for frame in traceback.extract_tb(trace))

    threading.excepthook = lambda error: None if of_a_save(error.exc_traceback) else report_thread(error)
    sys.unraisablehook = lambda error: None if of_a_save(error.exc_traceback) else report_unraisable(error)


def run_config() -> dict[str, Any]:
    """The config of the flags or, for modes that need a run, the one in the workdir."""
    from ltjax.runs.checkpoint import read_json

    return read_json(home(_WORKDIR.value or "") / "config.json") if told_by_workdir() else _CONFIG.value.to_dict()


def workdir_of(config: Mapping[str, Any]) -> str:
    seed, replicas = config.get("seed", 0), config.get("replicas", 1)
    seeds = f"seeds{seed}-{seed + replicas - 1}" if replicas > 1 else f"seed{seed}"
    return _WORKDIR.value or str(Path("runs") / f"{config.get('name')}-{seeds}")


def start(config: Mapping[str, Any]) -> None:
    """Start JAX's devices and, if there are several processes, check that they do the same."""
    from ltjax.modes import calibrate
    from ltjax.system import devices, processes

    devices.use_cpu_cores(config.get("batch_size", 1))
    processes.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _PATIENCE.value)
    for warning in devices.start_devices():
        print(f"note: {warning}", file=sys.stderr)
    processes.agree({"--mode": _MODE.value, "--workdir": workdir_of(config), "--config": ",".join(sorted(config))})
    processes.agree({f"config.{key}": json.dumps(config[key], sort_keys=True, default=str) for key in sorted(config)})
    if _CALIBRATE.value:
        calibrate.check(config)


def chosen_mode(config: Mapping[str, Any]) -> Callable[[], Any]:
    """What --mode and --dry_run ask for."""
    from ltjax import train
    from ltjax.modes import attack, calibrate, dry_run, evaluate, report

    workdir, data_dir = workdir_of(config), _DATA_DIR.value

    def predict() -> None:
        from rich.console import Console

        from ltjax.modes import predict as prediction  # it needs OpenCV, and training does not

        if _CALIBRATE.value:  # the table may go to standard output
            prediction.check(_IMAGES.value, _OUT.value)
            on_stderr = Console(stderr=True, markup=False, emoji=False)
            calibrate.calibrate_workdir(config, workdir, data_dir, on_stderr)
        prediction.predict_workdir(config, workdir, images=_IMAGES.value, out=_OUT.value, top_k=_TOP_K.value)

    if _MODE.value == "predict":
        return predict
    if _DRY_RUN.value:
        return lambda: dry_run.dry_run(config, workdir, data_dir)
    modes: dict[str, Callable] = {
        "train": train.train,
        "eval": evaluate.evaluate_workdir,
        "attack": attack.attack_workdir,
        "report": report.report_workdir,
    }

    def work() -> None:
        modes[_MODE.value](config, workdir, data_dir)
        if _CALIBRATE.value:
            calibrate.calibrate_workdir(config, workdir, data_dir)

    return work


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
