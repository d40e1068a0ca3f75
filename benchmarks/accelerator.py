"""Run all measurements on a machine with an accelerator and no internet, in one call of nine minutes.

    python -m benchmarks.accelerator --pack=build/pack                  # from the root of the copied checkout
    python -m benchmarks.accelerator --pack=build/pack --list           # finished and remaining pieces
    python -m benchmarks.accelerator --tiny                             # the same pieces, tiny, on any machine

The most informative pieces run first (`measured`). Each has a limit in seconds: it then gets SIGTERM, is killed if it
does not end, and the next one starts. The first full-length run of `benchmarks/reproduce.toml` runs in the background,
with a third of the memory, during the pieces that measure no time. The other runs of that list follow, until
`--seconds` are over. A stopped run saves its state. The same command resumes it if `--workdir` still exists, and
retries failed and stopped pieces, the latter with twice the limit.

Each piece writes `<out>/<device>/<piece>.json` when it ends: status (done, failed or stopped), device, versions,
commit, command, start times, the end of its output, and its result as far as it got. Finished runs are archived in the
same folder. The whole output of a piece is in `<workdir>/logs`. `--pack` is the folder that `benchmarks/pack.py` made;
without it, this Python's packages and the images of `--data_dir` are used. Exit code 1: a piece failed.
"""

import argparse
import datetime
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
SECONDS = 540.0  # of a call
SAVING = 20.0  # seconds that a stopped run gets to save; part of `--seconds`
KILLED = 2.0  # seconds from SIGTERM to SIGKILL for all other pieces
LEAST = 5.0  # seconds; with less time left, no piece starts
RESULTS = {  # files of a run's parts
    "train": "runs/{}/results.json",
    "attack": "runs/{}/attack.json",
    "archive": "results/{}/results.json",
}
BACKGROUND, FOREGROUND = "0.33", "0.5"  # shares of the device's memory while two pieces run at once


class Piece(NamedTuple):
    name: str
    command: Sequence[str]  # after `python`, in the workdir
    result: str  # the file that it writes there: JSON, or pytest's XML
    limit: float = math.inf  # seconds; then it gets SIGTERM
    environment: Mapping[str, str] = MappingProxyType({})
    background: bool = False  # the next pieces start without waiting for it
    parallel: bool = False  # may run during the background piece; the others wait for its end
    resumes: bool = False  # continues after a stop
    after: str = ""  # a piece that must be done first


def bench(name: str, limit: float, module: str, *flags: str, **fields: Any) -> Piece:
    """Return the piece that runs a benchmark of this folder."""
    result = f"pieces/{name}.json"
    return Piece(name, ("-m", f"benchmarks.{module}", *flags, f"--out={result}"), result, limit, **fields)


ENVIRONMENT = Piece(
    "environment",
    ("-m", "benchmarks.accelerator", "--report=pieces/environment.json"),
    "pieces/environment.json",
    limit=30,
)


def measured(platform_name: str, data_dir: Path | None, first_run: Piece, tiny: bool) -> list[Piece]:
    """Return the measurements in order; the limits of sequential pieces add up to at most `SECONDS`.

    `platform_name` is JAX's, such as "gpu". `first_run` is a full-length run for the background.
    """

    def small(*flags: str) -> tuple[str, ...]:
        return flags if tiny else ()

    platforms = {"gpu": "cuda,cpu", "cpu": "cpu"}.get(platform_name, f"{platform_name},cpu")
    tests = {  # full float32 products, and resumed runs must be bit-identical
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", platforms),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip(),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": FOREGROUND}
    pytest = ("-m", "pytest", "checkout/tests/gpu", "-c", "checkout/pyproject.toml", "--rootdir=checkout", "-vv")
    pytest += ("-W", "default", "-p", "no:cacheprovider", "--junitxml=pieces/tests.xml")
    exact = {**share, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    cifar = (f"--data_dir={data_dir}",) if data_dir else ()
    step = small("--depth=8", "--width=4", "--steps=2", "--repeats=1")
    both, sizes = ("--dtype", "bfloat16", "float32"), ("--batch_size", *(("32", "64") if tiny else ("128", "512")))
    large = small("--depth=10", "--size=64", "--batch_size=16", "--steps=1", "--repeats=1", "--jpegs=80x60")
    wide = ("--batch_size=16", "--attack_steps=2", "--model=wrn10_1", "--guide=wrn10_1")
    attacked = ("--only", "lbgat-0", "--no_flops", "--steps=5", "--repeats=2", *small("--steps=1", *wide))
    four = small("--depth=8", "--width=4", "--batch_size=16", "--steps=2", "--max_count=100")
    return [
        ENVIRONMENT,
        bench(
            *("pipeline", 25, "decode", "--stream"),
            *("--batch_size", "256", "1024", "--turns=2", "--chunk=400"),
            *small("--batch_size", "16", "32", "--turns=1", "--chunk=20"),
            environment={"JAX_PLATFORMS": "cpu"},
        ),
        first_run._replace(
            limit=175 - SAVING,
            environment={**first_run.environment, "XLA_PYTHON_CLIENT_MEM_FRACTION": BACKGROUND},
            background=True,
        ),
        Piece("tests", pytest, "pieces/tests.xml", limit=90, environment={**share, **tests}, parallel=True),
        bench(
            *("gradients", 45, "gradients", *cifar),
            *small("--batch=16", "--depth=10", "--size=64", "--nets", "resnet50"),
            environment=exact,
            parallel=True,
        ),
        bench(
            *("resume", 40, "resume", *small("--depth=8", "--width=4", "--batch_size=16", "--steps=2")),
            environment=share,
            parallel=True,
        ),
        bench("step", 60, "device_step", *both, *sizes, "--flags", "default", "deterministic", "--trace", *step),
        bench("step-graphs", 40, "device_step", *both, "--flags", "step", "dispatch", *step, *sizes[:2]),
        bench(
            *("resnet50", 70, "device_step", "--net=resnet50", "--dtype=bfloat16", "--batch_size=256", "--stream=20"),
            *large,
            *small("--stream=2"),
        ),
        bench("lbgat-bfloat16", 45, "adversarial_step", "--dtype=bfloat16", *attacked),
        bench("lbgat-float32", 40, "adversarial_step", "--dtype=float32", *attacked),
        bench("autoattack", 20, "autoattack", "--attacks=apgd-ce", f"--images={24 if tiny else 128}"),
        bench("replicas", 20, "replicas", "--replicas", "4", "--dtype=bfloat16", "--repeats=3", *four),
    ]


def full_length(packed: bool, tiny: bool) -> list[Piece]:
    """Return the parts of the runs of `benchmarks/reproduce.toml`; with `packed`, of those whose images are packed."""
    from benchmarks import reproduce

    runs = [(run, reproduce.describe(run)) for run in reproduce.read_list(reproduce.LIST)]
    if packed:
        runs = [pair for pair in runs if re.match(r"cifar100_lt-.*-if100-", pair[1].name)]
    if tiny:  # the first run, and the first that starts from another run, with that run
        begun = next(run for run, _ in runs if run.begin)
        other = f"{begun.begin}-seed{begun.seed}"
        runs = [pair for number, pair in enumerate(runs) if number == 0 or pair[0] == begun or pair[1].name == other]
    pieces = []
    for run, described in runs:
        before = f"{run.begin}-seed{run.seed}-archive" if run.begin else ""
        for part, command in reproduce.commands(run, described).items():
            flags = tiny_flags(described.stages) if tiny and part != "archive" else []
            file = {"train": "runs/{}/results.json", "attack": "runs/{}/attack.json"}.get(
                part, "results/{}/results.json"
            )
            name = described.name + ("" if part == "train" else f"-{part}")
            result = file.format(described.name)
            pieces.append(Piece(name, (*command, *flags), result, after=before, resumes=part == "train"))
            before = name
    return pieces


def tiny_flags(stages: Sequence[str]) -> list[str]:
    flags = ["--config.epochs=2", "--config.data.max_count=100", "--config.batch_size=32"]
    flags += ["--config.model.depth=8", "--config.model.width=4"]
    return flags + (["--config.classifier.epochs=1"] if "classifier" in stages else [])


def all_pieces(platform_name: str, data_dir: Path | None, packed: bool, tiny: bool) -> list[Piece]:
    """Return the measurements, then the runs; the first run is in both."""
    runs = full_length(packed, tiny)
    return [*measured(platform_name, data_dir, runs[0], tiny), *runs]


def read_result(path: Path) -> Any:
    """Read a piece's result as JSON values."""
    if path.suffix != ".xml":
        return json.loads(path.read_text())
    tests = {}
    for case in ElementTree.parse(path).iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        name = f"{case.get('classname')}::{case.get('name')}"
        tests[name] = {"outcome": outcome, "seconds": float(case.get("time", 0))}
    return tests


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def tail(log: Path, size: int = 3000) -> str:
    return log.read_text(errors="replace")[-size:] if log.exists() else ""


def report() -> dict[str, Any]:
    """Describe this machine. Call it in a separate process, because it claims the device."""
    import jax
    import jax.numpy as jnp
    from jax.extend import backend

    from ltjax.runs import results

    devices = jax.devices()
    started = time.perf_counter()
    total = float(jnp.ones((1024, 1024)).sum())
    try:
        asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"]
        card = subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        card = None
    return {
        "platform": devices[0].platform,
        "device": f"{devices[0].platform}: {devices[0].device_kind}",
        "num_devices": len(devices),
        "device_memory_bytes": (devices[0].memory_stats() or {}).get("bytes_limit"),
        "first_computation": {"right": total == 1024.0**2, "seconds": time.perf_counter() - started},
        "backend": backend.get_backend().platform_version,
        "nvidia_smi": card,
        "system": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "versions": results.versions(),
        "flags": {key: value for key, value in os.environ.items() if key.startswith(("JAX_", "XLA_"))},
    }


class Place(NamedTuple):
    """The folders of runs and records, and the processes' environment."""

    workdir: Path
    folder: Path
    common: Mapping[str, Any]  # machine and code, in every record
    environment: Mapping[str, str]

    def record(self, name: str) -> dict[str, Any]:
        return read(self.folder / f"{name}.json") or {}

    def done(self, name: str) -> bool:
        return self.record(name).get("status") == "done"


class Child:
    """A running piece, for at most `seconds`.

    It has a separate process group, so that only this process gets Ctrl-C: a second signal would stop a run of ltjax
    without saving.
    """

    def __init__(self, piece: Piece, place: Place, seconds: float):
        self.piece, self.place, self.log = piece, place, place.workdir / "logs" / f"{piece.name}.txt"
        for path in (self.log, place.workdir / piece.result):
            path.parent.mkdir(parents=True, exist_ok=True)
        if not piece.resumes:
            (place.workdir / piece.result).unlink(missing_ok=True)
        self.started, self.began, self.until = now(), time.monotonic(), time.monotonic() + seconds
        with open(self.log, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *piece.command],
                cwd=place.workdir,
                env={**place.environment, **piece.environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> str:
        """Wait for its end or its limit, write its record, and return its status. Ctrl-C and SIGTERM also stop it."""
        try:
            self.process.wait(max(0.0, self.until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return self.end(stopped=True)
        except KeyboardInterrupt:
            self.end(stopped=True)
            raise
        return self.end(stopped=False)

    def end(self, *, stopped: bool) -> str:
        """End it, write its record, and return "done", "failed" or "stopped"."""
        self.stop()
        code = self.process.returncode
        status = "done" if code == 0 else "stopped" if stopped else "failed"
        self.write(status, code)
        return status

    def stop(self) -> None:
        """End its processes, first by SIGTERM."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(SAVING if self.piece.resumes else KILLED)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)  # also its children
        except ProcessLookupError:
            pass
        self.process.wait()

    def write(self, status: str, code: int) -> None:
        piece, earlier = self.piece, self.place.record(self.piece.name).get("sessions", [])
        result = self.place.workdir / piece.result
        seconds = time.monotonic() - self.began
        record = {
            "piece": piece.name,
            "status": status,
            **self.place.common,
            "command": shlex.join([*(f"{k}={v}" for k, v in piece.environment.items()), "python", *piece.command]),
            "limit": piece.limit if math.isfinite(piece.limit) else None,
            "sessions": [*earlier, {"started": self.started, "seconds": seconds, "exit_code": code, "status": status}],
            "output": tail(self.log),
            "result": read_result(result) if result.exists() else None,
        }
        write(self.place.folder / f"{piece.name}.json", record)
        print(f"{piece.name:44} {status:8} {seconds:5.0f} s", flush=True)
        if status == "failed":
            print(record["output"], flush=True)


def work(pieces: Sequence[Piece], place: Place, deadline: float) -> dict[str, str]:
    """Run the remaining pieces until `deadline` by `time.monotonic`. Return {piece: status}; "left": not started."""
    statuses: dict[str, str] = {}
    background: Child | None = None
    try:
        for piece in pieces:
            if background and not piece.parallel:
                statuses[background.piece.name] = background.wait()
                background = None
            if place.done(piece.name):
                continue
            stops = sum(session["status"] == "stopped" for session in place.record(piece.name).get("sessions", []))
            rest = deadline - time.monotonic() - (SAVING if piece.resumes else KILLED)
            seconds = min(piece.limit * 2**stops, rest)
            if seconds < LEAST or (piece.after and not place.done(piece.after)):
                statuses.setdefault(piece.name, "left")
                continue
            child = Child(piece, place, seconds)
            if piece.background:
                background = child
            else:
                statuses[piece.name] = child.wait()
        if background:
            statuses[background.piece.name] = background.wait()
    except BaseException:
        if background and background.process.returncode is None:
            background.end(stopped=True)
        raise
    return statuses


def show_list(out: Path, names: Sequence[str]) -> None:
    """Print the status of every piece, for each device that has records."""
    folders = sorted(path.parent for path in out.glob("*/environment.json")) or [out / "no device yet"]
    for folder in folders:
        print(f"{folder}:")
        for name in names:
            record = read(folder / f"{name}.json")
            print(f"  {name:44} " + (f"{record['status']}, {record['sessions'][-1]['started']}" if record else "left"))


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        help="for this call (default: %(default)g); a longer call lengthens each limit in proportion",
    )
    parser.add_argument("--out", type=Path, help="records and archives (default: results; tiny: <workdir>/kept)")
    parser.add_argument("--workdir", type=Path, help="runs and logs (default: runs/accelerator; tiny: with -tiny)")
    parser.add_argument("--pack", type=Path, help="folder that benchmarks/pack.py made")
    parser.add_argument("--data_dir", type=Path, help="prepared data sets (default: the pack's, else $TFDS_DATA_DIR)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PREFIX", help="pieces whose names start with this")
    parser.add_argument("--tiny", action="store_true", help="tiny settings that check the procedure; a CPU suffices")
    parser.add_argument("--list", action="store_true", help="show finished and remaining pieces")
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)  # for the child that describes the machine
    return parser


def link(name: Path, target: Path) -> None:
    """Link a folder, so that commands name no path of this machine."""
    name.parent.mkdir(parents=True, exist_ok=True)
    target.mkdir(parents=True, exist_ok=True)
    name.unlink(missing_ok=True)
    name.symlink_to(target.resolve())


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    parser = arguments_parser()
    args = parser.parse_args(arguments)
    if args.report:
        write(args.report, report())
        return 0
    if Path.cwd() != ROOT.resolve():
        parser.error(f"run this from the root of the checkout: cd {ROOT}")
    workdir = args.workdir or Path("runs") / ("accelerator-tiny" if args.tiny else "accelerator")
    workdir = workdir.absolute()
    out = (args.out or (workdir / "kept" if args.tiny else Path("results"))).absolute()
    paths, data_dir = [str(ROOT.resolve())], args.data_dir
    if args.pack:
        to = workdir / "unpacked"
        if subprocess.run([sys.executable, "-m", "benchmarks.pack", f"--unpack={args.pack}", f"--to={to}"]).returncode:
            return 1
        paths.insert(0, str(to / "site"))
        sys.path.insert(0, paths[0])
        data_dir = data_dir or to / "data"
    packed = data_dir is not None and (data_dir / "cifar100.npz").exists()
    if args.list:
        show_list(out, list(dict.fromkeys(piece.name for piece in all_pieces("gpu", None, packed, args.tiny))))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the children, as on Ctrl-C
    link(workdir / "checkout", ROOT)
    if args.tiny and data_dir is None:
        from benchmarks import cifar_step

        data_dir, packed = workdir / "random", True
        cifar_step.write_random_images(data_dir, per_class=100)
    environment = {"JAX_COMPILATION_CACHE_DIR": str(workdir / "compiled"), **os.environ, "PYTHONUNBUFFERED": "1"}
    environment |= {"TFDS_DATA_DIR": str(data_dir.absolute())} if data_dir else {}
    environment["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])

    common: dict[str, Any] = {"tiny": args.tiny}
    deadline, slower = began + args.seconds, max(1.0, args.seconds / SECONDS)
    place = Place(workdir, workdir / "machine", common, environment)
    Child(ENVIRONMENT, place, slower * ENVIRONMENT.limit).wait()
    described = place.record(ENVIRONMENT.name)
    machine = described["result"]
    if described["status"] != "done" or machine is None:
        print(f"error: cannot describe this machine:\n{described['output']}")
        return 1
    print(f"{machine['num_devices']} x {machine['device']}, jax {machine['versions'].get('jax')}")
    if machine["platform"] == "cpu" and not args.tiny:
        print("error: JAX finds no accelerator here; --tiny checks the procedure on a CPU")
        return 1
    from benchmarks import pack

    common |= {key: machine[key] for key in ("device", "num_devices", "versions")}
    common["git_commit"] = pack.commit(args.pack)
    folder = out / re.sub(r"[^a-z0-9]+", "-", machine["device"].partition(": ")[2].lower()).strip("-")
    link(workdir / "results", folder)
    place = place._replace(folder=folder)
    write(folder / "environment.json", {**described, **common})
    pieces = all_pieces(machine["platform"], data_dir and data_dir.absolute(), packed, args.tiny)
    chosen = [piece._replace(limit=slower * piece.limit) for piece in pieces if piece.name.startswith(tuple(args.only))]
    try:
        statuses = work(chosen, place, deadline)
    except KeyboardInterrupt:
        print(f"stopped; the same command continues. Records in {folder}")
        return 130
    for status in ("failed", "stopped", "left"):
        print(f"{status}: {', '.join(name for name, each in statuses.items() if each == status) or 'none'}")
    print(f"records in {folder}")
    return 1 if "failed" in statuses.values() else 0


if __name__ == "__main__":
    sys.exit(main())
