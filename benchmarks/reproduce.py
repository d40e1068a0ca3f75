"""Full-length runs, one after the other, beside other work, until all of benchmarks/reproduce.toml are in `results/`.

    python -m benchmarks.reproduce --folder=../reproduce --python=python3.12 --data_dir=DIR
    python -m benchmarks.reproduce --folder=../reproduce --list     # what is done, running and left, and when

The same command goes on where the last one was ended, by Ctrl-C, SIGTERM or kill -9. Everything lies in `--folder`,
outside the repository: a `git worktree` of the commit that was HEAD when the folder was made, an environment with that
checkout, and the workdirs. So work on the code changes no run under way. `--update` moves the checkout to today's HEAD
before the next run that has not begun. Runs have the lowest priority.

Each finished run is archived in `--results` (see `python -m ltjax.archive --help`): commit what is new there.
Exit code 1: a run failed, `<folder>/<run>.log` says why; the next command tries it again.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_suffix(".toml")
SAVING = 180.0  # seconds that a stopped run gets to save
CIFAR = {"cifar10": (10, 5000), "cifar100": (100, 500)}  # classes, training images of each
FROZEN = 0.2  # time of a step that trains the classifier alone, over that of a step that trains everything


class Run(NamedTuple):
    """One seed of one entry of the list."""

    config: str  # "cifar100_lt:method=ce,precision=bf16"
    seed: int
    begin: str = ""  # name of the run whose archive is the first stage, without its seed
    flags: tuple[str, ...] = ()
    attack: tuple[str, ...] = ()  # none: no attack


class Described(NamedTuple):
    """What the checkout says of a run."""

    name: str  # of its workdir and its archive
    stages: tuple[str, ...]
    work: float  # images that its training passes through the network, as time goes


def read_list(path: Path) -> list[Run]:
    """The runs of a TOML file, in order. Raises: ValueError naming an unknown key."""
    runs = []
    for entry in tomllib.loads(path.read_text())["run"]:
        known = ("config", "seeds", "precision", "begin", "flags", "attack")
        if unknown := set(entry) - set(known):
            raise ValueError(f"{path}: unknown key {min(unknown)!r} of {entry['config']}; known: {', '.join(known)}")
        precision = entry.get("precision", "bf16")
        config = entry["config"] + ("" if precision == "float32" else f",precision={precision}")
        more = {key: tuple(entry.get(key, ())) for key in ("flags", "attack")}
        runs += [Run(config, seed, entry.get("begin", ""), **more) for seed in entry.get("seeds", [0])]
    return runs


def describe(config: str, seed: int) -> Described:
    """Of a config of this checkout."""
    from ltjax.config import parse
    from ltjax.data import splits
    from ltjax.engine.experiment import steps_per_epoch

    file, _, arguments = config.partition(":")
    values = runpy.run_path(str(ROOT / "configs" / f"{file}.py"))["get_config"](arguments or None)
    run = parse(values.to_dict())
    stages = run.stages
    classes, most = CIFAR[run.data.name]
    counts = splits.class_counts(classes, most, imbalance=run.data.imbalance, profile=run.data.profile)
    work = 0.0
    for stage in stages.values():
        whole = any(group["rate"] for part, group in stage.groups.items() if part not in ("classifier", "logit_scale"))
        passes = 1 + stage.method.get("attack", {}).get("num_steps", 0)
        images = stage.epochs * steps_per_epoch(stage, counts, run.batch_size) * run.batch_size
        work += images * passes * (1.0 if whole else FROZEN)
    return Described(f"{run.name}-seed{seed}", tuple(stages), work)


def command(run: Run, described: Described) -> list[str]:
    """After `python`, in the queue's folder: no path of this machine, since results.json has it."""
    file, colon, arguments = run.config.partition(":")
    flags = ["checkout/run.py", f"--config=checkout/configs/{file}.py{colon}{arguments}", f"--config.seed={run.seed}"]
    flags += [f"--workdir=runs/{described.name}", *run.flags]
    if run.begin:
        _, second, *rest = described.stages
        flags += [
            f"--config.weights=results/{run.begin}-seed{run.seed}",
            "--config.weights_parts=('backbone', 'classifier')",
            f"--config.stages={(second, *rest)!r}",
            f"--config.{second}.start_from=scratch",
        ]
    return flags


def commands(run: Run, described: Described) -> dict[str, list[str]]:
    """{part of a run: its command after `python`}, in order: train, attack where the list asks for that, archive."""
    train = command(run, described)
    attack = {"attack": [*train, "--mode=attack", *run.attack]} if run.attack else {}
    archive = ["-m", "ltjax.archive", f"runs/{described.name}", f"results/{described.name}"]
    return {"train": train, **attack, "archive": archive}


def finished(run: Run, archive: Path) -> bool:
    """Whether an archive has all that the list asks of a run."""
    results = archive / "results.json"
    if not results.is_file() or not (archive / "weights.safetensors").is_file():
        return False
    return not run.attack or "robustness" in json.loads(results.read_text())


class Queue(NamedTuple):
    folder: Path
    results: Path
    data_dir: str
    base: str  # the Python that makes the environment

    @property
    def checkout(self) -> Path:
        return self.folder / "checkout"

    @property
    def python(self) -> Path:
        return self.folder / "environment" / "bin" / "python"

    def workdir(self, described: Described) -> Path:
        return self.folder / "runs" / described.name

    def begun(self, described: Described) -> bool:
        return (self.workdir(described) / "config.json").exists()


def make_ready(queue: Queue, update: bool) -> None:
    """Checkout and environment, as they are or, with `update`, of today's HEAD."""
    queue.folder.mkdir(parents=True, exist_ok=True)
    queue.results.mkdir(parents=True, exist_ok=True)
    link = queue.folder / "results"  # so that config.weights names archives as it does in the repository
    if not link.exists():
        link.symlink_to(queue.results.resolve())

    def git(*arguments: str, at: Path = ROOT) -> str:
        command = ["git", "-C", str(at), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    if not queue.checkout.exists():
        git("worktree", "prune")
        git("worktree", "add", "--detach", str(queue.checkout.resolve()), "HEAD")
    elif update:
        git("checkout", "--detach", git("rev-parse", "HEAD"), at=queue.checkout)
    wanted = hashlib.sha256((queue.checkout / "pyproject.toml").read_bytes()).hexdigest()
    made = queue.folder / "environment" / "made_for"
    if not made.exists() or made.read_text() != wanted:
        subprocess.run([queue.base, "-m", "venv", str(queue.folder / "environment")], check=True)
        pip = [str(queue.python), "-m", "pip", "install", "--quiet", "--upgrade-strategy", "only-if-needed"]
        subprocess.run([*pip, "-e", str(queue.checkout)], check=True)
        made.write_text(wanted)


def descriptions(queue: Queue, runs: Sequence[Run]) -> list[Described]:
    """What the checkout says of all runs, in one process of its own."""
    asked = json.dumps([[run.config, run.seed] for run in runs])
    process = subprocess.run(
        [str(queue.python), "-m", "benchmarks.reproduce", "--describe", asked],
        cwd=queue.checkout,
        env=environment(queue),
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise SystemExit(f"the checkout in {queue.folder} does not know a run of the list:\n{process.stderr[-2000:]}")
    return [Described(name, tuple(stages), work) for name, stages, work in json.loads(process.stdout)]


def environment(queue: Queue) -> dict[str, str]:
    """Of a run: this checkout alone, and the devices that it chooses itself."""
    ours = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "XLA_FLAGS", "VIRTUAL_ENV")}
    ours |= {"TFDS_DATA_DIR": queue.data_dir} if queue.data_dir else {}
    return {**ours, "PYTHONPATH": str(queue.checkout)}


class Stopped(Exception):
    """A signal came; what was running has saved itself. number: of the signal."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def child(queue: Queue, arguments: Sequence[str], log: Path) -> int:
    """Run Python on `arguments` in the queue's folder at the lowest priority -> its exit code. Raises: Stopped."""
    with open(log, "ab") as output:
        output.write(f"\n$ {shlex.join(['python', *arguments])}\n".encode())
        output.flush()
        process = subprocess.Popen(
            ["nice", "-n", "19", str(queue.python), *arguments],
            cwd=queue.folder,
            env=environment(queue),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes here alone
        )
        with contextlib.suppress(OSError):  # Linux may weigh sessions, and "nice" only within one
            Path(f"/proc/{process.pid}/autogroup").write_text("19")
        try:
            return process.wait()
        except Stopped:
            process.terminate()
            try:
                process.wait(SAVING)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise


def make(queue: Queue, run: Run, described: Described) -> bool:
    """Train, attack where asked, and archive one run -> whether that worked. Raises: Stopped."""
    log = queue.folder / f"{described.name}.log"
    return all(child(queue, part, log) == 0 for part in commands(run, described).values())


def speed(queue: Queue, described: Sequence[Described]) -> float | None:
    """Images a second of the runs that have ended in this folder, by `Described.work`."""
    work = seconds = 0.0
    for one in described:
        file = queue.workdir(one) / "results.json"
        if file.exists():
            work, seconds = work + one.work, seconds + json.loads(file.read_text())["seconds"]
    return work / seconds if seconds else None


def progress(queue: Queue, one: Described) -> str:
    """Where a run under way stands: the last line of its log that has a step in it."""
    log = queue.folder / f"{one.name}.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line.strip() for line in reversed(lines) if " step " in line or " epoch " in line), "begun")


def show(queue: Queue, runs: Sequence[Run], described: Sequence[Described]) -> None:
    """Print a line for each run, with hours where they are known."""
    rate, ahead, busy = speed(queue, described), 0.0, running(queue)
    for run, one in zip(runs, described, strict=True):
        if finished(run, queue.results / one.name):
            print(f"done     {one.name}")
            continue
        ahead += one.work
        when = f", {one.work / rate / 3600:.1f} h, ends in about {ahead / rate / 3600:.1f} h" if rate else ""
        begun = queue.begun(one)
        state = "running" if one.name == busy else "begun" if begun else "left"
        print(f"{state:8} {one.name}{when}" + (f": {progress(queue, one)}" if begun else ""))


def running(queue: Queue) -> str:
    """The name of the run that a queue in this folder is making now; "" where none is at work."""
    file = queue.folder / "lock"
    if not file.exists():
        return ""
    with open(file) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return file.read_text().strip()
    return ""


@contextlib.contextmanager
def locked(queue: Queue) -> Iterator[Any]:
    """One queue in a folder; what is written to it is read by `running`. Raises: SystemExit."""
    queue.folder.mkdir(parents=True, exist_ok=True)
    with open(queue.folder / "lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"another queue is at work in {queue.folder}: --list shows what it does") from None
        yield lock


def note(lock: Any, name: str) -> None:
    lock.truncate(0)
    lock.write(name)
    lock.flush()


def say(one: Described, what: str) -> None:
    print(f"{time.strftime('%d %b %H:%M')} {one.name}: {what}", flush=True)


def work_through(queue: Queue, read: Path, update: bool) -> int:
    """Make what is left of the list -> the exit code."""
    failed: set[str] = set()
    with locked(queue) as lock:
        make_ready(queue, update=False)
        while True:
            runs = read_list(read)  # again, for it may have grown
            described = descriptions(queue, runs)
            left = [
                (run, one)
                for run, one in zip(runs, described, strict=True)
                if one.name not in failed and not finished(run, queue.results / one.name)
            ]
            if not left:
                break
            under_way = [pair for pair in left if queue.begun(pair[1])]
            if update and not under_way:
                make_ready(queue, update=True)
                update = False
                continue
            run, one = (under_way or left)[0]
            if run.begin and not (queue.results / f"{run.begin}-seed{run.seed}" / "results.json").exists():
                failed.add(one.name)
                say(one, f"left out: it begins with {run.begin}-seed{run.seed}, which is not there")
                continue
            note(lock, one.name)
            say(one, f"python {shlex.join(command(run, one))}")
            if make(queue, run, one):
                say(one, f"done; now git add {queue.results / one.name}")
            else:
                failed.add(one.name)
                say(one, f"failed, see {queue.folder / one.name}.log")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="of checkout, environment and workdirs; outside the repository")
    parser.add_argument("--runs", type=Path, default=LIST, help="the list (benchmarks/reproduce.toml)")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="where archives go (results/)")
    parser.add_argument("--python", default=sys.executable, help="makes the environment (this one); 3.12 is fastest")
    parser.add_argument("--data_dir", default="", help="prepared data; default: as run.py's")
    parser.add_argument("--update", action="store_true", help="take today's HEAD for runs that have not begun")
    parser.add_argument("--list", action="store_true", help="only say what is done, running and left")
    parser.add_argument("--describe", help=argparse.SUPPRESS)  # [[config, seed], ...] as JSON, of this checkout
    args = parser.parse_args(argv)
    if args.describe:
        print(json.dumps([describe(config, seed) for config, seed in json.loads(args.describe)]))
        return 0
    if args.folder is None or args.folder.resolve().is_relative_to(ROOT):
        parser.error(f"--folder={args.folder}: name a folder outside {ROOT}")
    queue = Queue(args.folder.resolve(), args.results.resolve(), args.data_dir, args.python)
    if queue.data_dir:
        queue = queue._replace(data_dir=str(Path(queue.data_dir).resolve()))
    if args.list:
        if not queue.python.exists():
            parser.error(f"{queue.folder} holds no queue yet: start one with the same command without --list")
        runs = read_list(args.runs)
        show(queue, runs, descriptions(queue, runs))
        return 0

    def stop(number: int, _: Any) -> None:
        raise Stopped(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        return work_through(queue, args.runs, args.update)
    except Stopped as stopped:
        print("Stopped; the run has saved itself. The same command goes on.", flush=True)
        return 128 + stopped.number


if __name__ == "__main__":
    sys.exit(main())
