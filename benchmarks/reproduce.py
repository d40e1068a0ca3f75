"""Make the full-length runs of benchmarks/reproduce.toml, one after the other, and archive them in `results/`.

    python -m benchmarks.reproduce --folder=../reproduce --python=python3.12 --data_dir=DIR
    python -m benchmarks.reproduce --folder=../reproduce --list     # finished, running and remaining runs

After Ctrl-C, SIGTERM or kill -9, the same command resumes. `--folder`, outside the repository, has a `git worktree` of
the commit that was HEAD when the folder was made, an environment with that checkout, and the workdirs. So changes of
the code affect no running run. `--update` moves the checkout to HEAD before the next run starts. Runs have the lowest
priority.

Each finished run is archived in `--results` (see `python -m ltjax.runs.archive --help`): commit the new archives. Exit
code 1: a run failed. `<folder>/<run>.log` has the reason, and the next command tries it again.
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
FROZEN = 0.2  # time of a step that trains only the classifier, relative to one that trains all


class Run(NamedTuple):
    """One seed of one entry of the list."""

    config: str  # "cifar100_lt:method=ce,precision=bf16"
    seed: int
    begin: str = ""  # name of the run whose archive is the first stage, without its seed
    flags: Sequence[str] = ()
    attack: Sequence[str] = ()  # (): no attack


class Described(NamedTuple):
    """A run's name, stages and work."""

    name: str  # of its workdir and its archive
    stages: tuple[str, ...]
    work: float  # images through the network in training, in proportion to the time


def read_list(path: Path) -> list[Run]:
    """Read the runs of a TOML file, in order. Raise ValueError for an unknown key."""
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


def describe(run: Run) -> Described:
    """Describe a run, by a config of this checkout and the run's flags."""
    from absl import flags
    from ml_collections import config_flags

    from ltjax.config import parse
    from ltjax.data import splits
    from ltjax.engine.experiment import steps_per_epoch

    file, _, arguments = run.config.partition(":")
    values = runpy.run_path(str(ROOT / "configs" / f"{file}.py"))["get_config"](arguments or None)
    line, parser = [__file__, *run.flags], flags.FlagValues()
    config_flags.DEFINE_config_dict("config", values, flag_values=parser, sys_argv=line)
    parser(line)  # changes the values
    config = parse(values.to_dict())
    classes, most = CIFAR[config.data.name]
    counts = splits.class_counts(classes, most, imbalance=config.data.imbalance, profile=config.data.profile)
    work = 0.0
    for stage in config.stages.values():
        whole = any(group["rate"] for part, group in stage.groups.items() if part not in ("classifier", "logit_scale"))
        passes = 1 + len(stage.views) + stage.method.get("attack", {}).get("num_steps", 0)
        images = stage.epochs * steps_per_epoch(stage, counts, config.batch_size) * config.batch_size
        work += images * passes * (1.0 if whole else FROZEN)
    return Described(f"{config.name}-seed{run.seed}", tuple(config.stages), work)


def command(run: Run, described: Described) -> list[str]:
    """Return the command after `python`. It has no path of this machine, because results.json stores it."""
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
    """Return {part: its command after `python`}: train, attack if the list has its flags, archive."""
    train = command(run, described)
    attack = {"attack": [*train, "--mode=attack", *run.attack]} if run.attack else {}
    archive = ["-m", "ltjax.runs.archive", f"runs/{described.name}", f"results/{described.name}"]
    return {"train": train, **attack, "archive": archive}


def finished(run: Run, archive: Path) -> bool:
    """Return whether an archive has weights, results and, if listed, the attack's."""
    results = archive / "results.json"
    if not results.is_file() or not (archive / "weights.safetensors").is_file():
        return False
    return not run.attack or "robustness" in json.loads(results.read_text())


class Queue(NamedTuple):
    folder: Path
    results: Path
    data_dir: str
    base: str  # the Python of the environment

    @property
    def checkout(self) -> Path:
        return self.folder / "checkout"

    @property
    def python(self) -> Path:
        return self.folder / "environment" / "bin" / "python"

    def workdir(self, described: Described) -> Path:
        return self.folder / "runs" / described.name

    def started(self, described: Described) -> bool:
        return (self.workdir(described) / "config.json").exists()

    def under_way(self) -> set[str]:
        """Return the names of runs that have begun and have no archive, whether or not they are in the list."""
        begun = {path.parent.name for path in (self.folder / "runs").glob("*/config.json")}
        return {name for name in begun if not (self.results / name / "results.json").exists()}


def make_ready(queue: Queue, update: bool) -> None:
    """Make checkout and environment if they are missing; with `update`, move them to HEAD."""
    queue.folder.mkdir(parents=True, exist_ok=True)
    queue.results.mkdir(parents=True, exist_ok=True)
    link = queue.folder / "results"  # so that config.weights has the same paths as in the repository
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
    digest = hashlib.sha256((queue.checkout / "pyproject.toml").read_bytes()).hexdigest()
    marker = queue.folder / "environment" / "made_for"
    if not marker.exists() or marker.read_text() != digest:
        subprocess.run([queue.base, "-m", "venv", str(queue.folder / "environment")], check=True)
        pip = [str(queue.python), "-m", "pip", "install", "--quiet", "--upgrade-strategy", "only-if-needed"]
        subprocess.run([*pip, "-e", str(queue.checkout)], check=True)
        marker.write_text(digest)


def descriptions(queue: Queue, runs: Sequence[Run]) -> list[Described]:
    """Describe all runs by the checkout's configs, in a separate process."""
    process = subprocess.run(
        [str(queue.python), "-m", "benchmarks.reproduce", "--describe", json.dumps(runs)],
        cwd=queue.checkout,
        env=environment(queue),
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise SystemExit(f"the checkout in {queue.folder} cannot describe a run of the list:\n{process.stderr[-2000:]}")
    return [Described(name, tuple(stages), work) for name, stages, work in json.loads(process.stdout)]


def environment(queue: Queue) -> dict[str, str]:
    """Return a run's environment: the checkout, and no flags for devices."""
    variables = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "XLA_FLAGS", "VIRTUAL_ENV")
    }
    variables |= {"TFDS_DATA_DIR": queue.data_dir} if queue.data_dir else {}
    return {**variables, "PYTHONPATH": str(queue.checkout)}


class Stopped(Exception):
    """The signal `number` stopped this process; the run has saved its state."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def child(queue: Queue, arguments: Sequence[str], log: Path) -> int:
    """Run Python in the queue's folder at the lowest priority; return its exit code. Raise Stopped on a signal."""
    with open(log, "ab") as output:
        output.write(f"\n$ {shlex.join(['python', *arguments])}\n".encode())
        output.flush()
        process = subprocess.Popen(
            ["nice", "-n", "19", str(queue.python), *arguments],
            cwd=queue.folder,
            env=environment(queue),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # only this process gets Ctrl-C
        )
        with contextlib.suppress(OSError):  # with autogroup, Linux applies "nice" only within a session
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
    """Train, attack and archive one run; return whether all succeeded. Raise Stopped on a signal."""
    log = queue.folder / f"{described.name}.log"
    return all(child(queue, part, log) == 0 for part in commands(run, described).values())


def speed(queue: Queue, described: Sequence[Described]) -> float | None:
    """Return images a second of the finished runs in this folder, by `Described.work`."""
    work = seconds = 0.0
    for run in described:
        file = queue.workdir(run) / "results.json"
        if file.exists():
            work, seconds = work + run.work, seconds + json.loads(file.read_text())["seconds"]
    return work / seconds if seconds else None


def progress(queue: Queue, run: Described) -> str:
    """Return the progress of a started run: the last line of its log with a step or an epoch."""
    log = queue.folder / f"{run.name}.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line.strip() for line in reversed(lines) if " step " in line or " epoch " in line), "begun")


def show(queue: Queue, runs: Sequence[Run], described: Sequence[Described]) -> None:
    """Print a line for each run, with hours if they are known."""
    rate, ahead, busy = speed(queue, described), 0.0, running(queue)
    for run, about in zip(runs, described, strict=True):
        if finished(run, queue.results / about.name):
            print(f"done     {about.name}")
            continue
        ahead += about.work
        when = f", {about.work / rate / 3600:.1f} h, ends in about {ahead / rate / 3600:.1f} h" if rate else ""
        started = queue.started(about)
        state = "running" if about.name == busy else "begun" if started else "left"
        print(f"{state:8} {about.name}{when}" + (f": {progress(queue, about)}" if started else ""))


def running(queue: Queue) -> str:
    """Return the name of the run that a queue in this folder makes now; "" if none does."""
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
    """Lock the folder for one queue, with a file for `running`. Raise SystemExit if it is locked."""
    queue.folder.mkdir(parents=True, exist_ok=True)
    with open(queue.folder / "lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"another queue runs in {queue.folder}: --list shows its progress") from None
        yield lock


def note(lock: Any, name: str) -> None:
    lock.truncate(0)
    lock.write(name)
    lock.flush()


def say(run: Described, text: str) -> None:
    print(f"{time.strftime('%d %b %H:%M')} {run.name}: {text}", flush=True)


def work_through(queue: Queue, read: Path, update: bool) -> int:
    """Make the remaining runs of the list; return the exit code."""
    failed: set[str] = set()
    with locked(queue) as lock:
        make_ready(queue, update=False)
        while True:
            if update:  # before the list is described, because an older checkout may not know all of it
                waits_for = sorted(queue.under_way() - failed)
                update = bool(waits_for)
                if update:
                    print(f"--update waits for {', '.join(waits_for)} in {queue.folder / 'runs'}", flush=True)
                else:
                    make_ready(queue, update=True)
            runs = read_list(read)  # again, because it may have changed
            described = descriptions(queue, runs)
            left = [
                (run, about)
                for run, about in zip(runs, described, strict=True)
                if about.name not in failed and not finished(run, queue.results / about.name)
            ]
            if not left:
                break
            started = [pair for pair in left if queue.started(pair[1])]
            run, about = (started or left)[0]
            if run.begin and not (queue.results / f"{run.begin}-seed{run.seed}" / "results.json").exists():
                failed.add(about.name)
                say(about, f"left out: it begins with {run.begin}-seed{run.seed}, which is not there")
                continue
            note(lock, about.name)
            say(about, f"python {shlex.join(command(run, about))}")
            if make(queue, run, about):
                say(about, f"done; now git add {queue.results / about.name}")
            else:
                failed.add(about.name)
                say(about, f"failed, see {queue.folder / about.name}.log")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="of checkout, environment and workdirs, outside the repository")
    parser.add_argument("--runs", type=Path, default=LIST, help="the list (benchmarks/reproduce.toml)")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the archives (results/)")
    parser.add_argument("--python", default=sys.executable, help="Python of the environment (default: this one)")
    parser.add_argument("--data_dir", default="", help="prepared data (default: that of run.py)")
    parser.add_argument("--update", action="store_true", help="move the checkout to HEAD before the next run")
    parser.add_argument("--list", action="store_true", help="only list finished, running and remaining runs")
    parser.add_argument("--describe", help=argparse.SUPPRESS)  # runs as JSON, for this checkout's configs
    args = parser.parse_args(argv)
    if args.describe:
        print(json.dumps([describe(Run(*each)) for each in json.loads(args.describe)]))
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
        print("Stopped; the run has saved itself. The same command continues.", flush=True)
        return 128 + stopped.number


if __name__ == "__main__":
    sys.exit(main())
