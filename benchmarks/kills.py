"""Kill commands at random moments, and compare their output with that of an undisturbed run, bit for bit.

    python -m benchmarks.kills                          # 100 kills
    python -m benchmarks.kills --kills=6 --tasks=train,predict

A round starts a command up to 4 times. It kills it (SIGKILL or SIGTERM) after a random time, or fills its disk (a limit
on file sizes, at a random size). Then it lets the command end, and compares the files. A stopped command must not print
a traceback, and a partial file must not be accepted as complete.

The tasks: train (saves after every dispatch), attack (AutoAttack), predict, export, archive, report, and prepare
(a miniature of iNaturalist).
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import safe_open

from benchmarks import provenance
from ltjax import data
from ltjax.runs.archive import is_archive, read_archive
from ltjax.runs.trained import newest, variables_of

ROOT = Path(__file__).parents[1]
CONFIG = (
    "--config=configs/quickstart.py",
    "--config.data.max_count=20",
    "--config.data.imbalance=4.0",
    "--config.data.many_above=12",
    "--config.data.few_below=7",
    "--config.model.width=2",
    "--config.batch_size=16",
    "--config.epochs=4",
    "--config.classifier.epochs=2",
    "--config.eval_every=1",
    "--config.dispatch_steps=1",
    "--config.checkpoint_seconds=0.0",
    "--config.attack.num_images=24",
    "--config.attack.tests=('pgd-2','autoattack')",
)
SIGNALS = ("SIGKILL", "SIGTERM")
KINDS = (*SIGNALS, "full disk")
PHOTOS = 40  # to predict
MOST = 4  # disturbances in a round
UNEQUAL = ("seconds", "train_seconds", "wait_seconds", "images_per_second", "command", "versions", "git_commit")


class Task(NamedTuple):
    """A command to disturb.

    Attributes:
      inputs: Copies the command's inputs to a new folder.
      arguments: folder -> arguments of Python.
      outcome: folder -> the output to compare, after the command has ended.
      partial: folder -> raises if a killed command left a partial output.
    """

    inputs: Callable[[Path], Any]
    arguments: Callable[[Path], Sequence[str]]
    outcome: Callable[[Path], Any]
    partial: Callable[[Path], Any] = lambda folder: None


def without_times(value: Any) -> Any:
    """Remove durations and the like from nested dicts and lists."""
    if isinstance(value, dict):
        return {key: without_times(each) for key, each in value.items() if key not in UNEQUAL}
    return [without_times(each) for each in value] if isinstance(value, list) else value


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def files(folder: Path) -> dict[str, str]:
    """Hash every file below a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp"]
    return {str(path.relative_to(folder)): digest(path.read_bytes()) for path in paths}


def trained(folder: Path) -> dict[str, Any]:
    """Hash the final variables and all metrics of a run; add its results, without durations."""
    workdir = folder / "run"
    leaves = jax.tree.leaves(variables_of(workdir, newest(workdir)))
    lines = [without_times(json.loads(line)) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        "variables": digest(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)),
        "metrics": digest(json.dumps(lines).encode()),
        "results": without_times(json.loads((workdir / "results.json").read_text())),
        "split": digest((workdir / "split.json").read_bytes()),
    }


def json_or_absent(path: Path) -> None:
    if path.exists():
        json.loads(path.read_text())


def tasks(template: Path) -> dict[str, Task]:
    """Return all tasks. `template` is a folder with a finished run `run`, images `photos`, and a miniature `source`."""

    def copy_run(folder: Path) -> None:
        shutil.copytree(template / "run", folder / "run")

    def no_inputs(folder: Path) -> None:
        folder.mkdir(exist_ok=True)

    def of_run(*arguments: str) -> Callable[[Path], Sequence[str]]:
        return lambda folder: ("run.py", *CONFIG, f"--workdir={folder / 'run'}", *arguments)

    def results(name: str) -> Callable[[Path], Any]:
        return lambda folder: without_times(json.loads((folder / "run" / name).read_text()))

    def archived(folder: Path) -> dict[str, str]:
        return files(folder / "out")

    def exported(folder: Path) -> dict[str, Any]:
        """Hash the arrays, and add the metadata, which safetensors writes in a random order."""
        with safe_open(folder / "out" / "net.safetensors", "numpy") as file:
            arrays = {key: digest(file.get_tensor(key).tobytes()) for key in file.keys()}
            return {"arrays": arrays, "metadata": file.metadata()}

    def whole_predictions(folder: Path) -> None:
        out = folder / "out.csv"
        if out.exists() and len(out.read_text().splitlines()) != 1 + PHOTOS:
            raise ValueError("a part of the predictions")

    def whole_export(folder: Path) -> None:
        if (folder / "out" / "net.safetensors").exists():
            exported(folder)

    def whole_archive(folder: Path) -> None:
        if is_archive(folder / "out"):
            read_archive(folder / "out")

    def whole_report(folder: Path) -> None:
        page = folder / "run" / "report" / "index.html"
        if page.exists() and not page.read_text().rstrip().endswith("</html>"):
            raise ValueError("half a page")

    def whole_data(folder: Path) -> None:
        if (folder / "data" / "i_naturalist2018" / "1.0.0").exists():
            data.load("i_naturalist2018", folder / "data")

    def prepared(folder: Path) -> dict[str, str]:
        return {name: each for name, each in files(folder / "data").items() if not name.endswith(".lock")}

    return {
        "train": Task(no_inputs, of_run(), trained, lambda folder: json_or_absent(folder / "run" / "results.json")),
        "attack": Task(
            copy_run,
            of_run("--mode=attack"),
            results("attack.json"),
            lambda folder: json_or_absent(folder / "run" / "attack.json"),
        ),
        "predict": Task(
            copy_run,
            lambda folder: (
                "run.py",
                f"--workdir={folder / 'run'}",
                "--mode=predict",
                f"--images={template / 'photos'}",
                f"--out={folder / 'out.csv'}",
            ),
            lambda folder: digest((folder / "out.csv").read_bytes()),
            whole_predictions,
        ),
        "export": Task(
            copy_run,
            lambda folder: (
                "-m",
                "ltjax.interop.export",
                str(folder / "run"),
                "--format=safetensors",
                f"--out={folder / 'out' / 'net.safetensors'}",
            ),
            exported,
            whole_export,
        ),
        "archive": Task(
            copy_run,
            lambda folder: ("-m", "ltjax.runs.archive", str(folder / "run"), str(folder / "out")),
            archived,
            whole_archive,
        ),
        "report": Task(
            copy_run, of_run("--mode=report"), lambda folder: files(folder / "run" / "report"), whole_report
        ),
        "prepare": Task(
            no_inputs,
            lambda folder: (
                "-m",
                "ltjax.data.prepare",
                "inat18",
                f"--source={template / 'source'}",
                f"--data_dir={folder / 'data'}",
            ),
            prepared,
            whole_data,
        ),
    }


def environment(template: Path) -> dict[str, str]:
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(template / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }


def start(arguments: Sequence[str], template: Path, most_bytes: int | None = None) -> subprocess.Popen:
    """Start a command. Writing a file fails at `most_bytes`."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(template),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if most_bytes is not None:  # Python ignores SIGXFSZ, so that a write fails with EFBIG, as it does with ENOSPC
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    return process


def to_the_end(arguments: Sequence[str], template: Path) -> float:
    """Run a command to its end, and return the seconds that it took."""
    began = time.monotonic()
    process = start(arguments, template)
    _, error = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with code {process.returncode}: {error[-2000:]}")
    return time.monotonic() - began


def disturb(arguments: Sequence[str], template: Path, kind: str, seconds: float, rng: random.Random) -> str:
    """Start a command and disturb it. Return what happened: `kind`, "ended", or "fault: ..."."""
    if kind == "full disk":
        process = start(arguments, template, most_bytes=int(10 ** rng.uniform(1, 5.5)))
        _, error = process.communicate()
        if process.returncode == 0:
            return "ended"
        lines = error.strip().splitlines()
        if process.returncode != 2 or not lines or not lines[-1].startswith("error: ") or "Traceback" in error:
            return f"fault: code {process.returncode}, {error[-1500:]}"
        return kind
    process = start(arguments, template)
    try:
        _, error = process.communicate(timeout=rng.uniform(0, seconds))
        return "ended" if process.returncode == 0 else f"fault: code {process.returncode}, {error[-1500:]}"
    except subprocess.TimeoutExpired:
        process.send_signal(getattr(signal, kind))
        _, error = process.communicate()
    stopped = (0, 128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL)
    if "Traceback" in error or process.returncode not in stopped:
        return f"fault: code {process.returncode}, {error[-1500:]}"
    return kind


def measure(names: Sequence[str], kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Disturb the tasks in turn until `kills` signals were sent. Return counts by task, and all faults."""
    rng, template = random.Random(seed), folder / "template"
    make_template(template)
    known = tasks(template)
    expected, seconds = {}, {}
    for name in names:
        place = folder / f"{name}-undisturbed"
        place.mkdir()
        known[name].inputs(place)
        to_the_end(known[name].arguments(place), template)  # compiles
        shutil.rmtree(place)
        place.mkdir()
        known[name].inputs(place)
        seconds[name] = to_the_end(known[name].arguments(place), template)
        expected[name] = json.loads(json.dumps(known[name].outcome(place)))
    counts: dict[str, Counter] = {name: Counter() for name in names}
    faults: list[str] = []
    number = 0
    while sum(counts[name][kind] for name in names for kind in SIGNALS) < kills:
        name = names[number % len(names)]
        place = folder / f"{name}-{number}"
        number += 1
        place.mkdir()
        task = known[name]
        task.inputs(place)
        for _ in range(rng.randint(1, MOST)):
            kind = rng.choice(KINDS)
            what = disturb(task.arguments(place), template, kind, seconds[name], rng)
            counts[name][what.partition(":")[0]] += 1
            if what.startswith("fault"):
                faults.append(f"{name}, {kind}: {what}")
            try:
                task.partial(place)
            except Exception as error:
                faults.append(f"{name}, {kind}: its partial output cannot be read: {error}")
        try:
            to_the_end(task.arguments(place), template)
            outcome = json.loads(json.dumps(task.outcome(place)))
            equal = outcome == expected[name]
            counts[name]["rounds"] += 1
            counts[name]["equal"] += equal
            if not equal:
                faults.append(f"{name}: another end: {different(expected[name], outcome)}")
        except Exception as error:
            faults.append(f"{name}: no end: {error}")
        shutil.rmtree(place)
        print(f"{name}: {dict(counts[name])}", file=sys.stderr, flush=True)
    return {"counts": {name: dict(each) for name, each in counts.items()}, "faults": faults, "seconds": seconds}


def different(expected: Any, actual: Any) -> str:
    if isinstance(expected, dict) and isinstance(actual, dict):
        keys = [key for key in {**expected, **actual} if expected.get(key) != actual.get(key)]
        return ", ".join(keys[:10])
    return f"{str(expected)[:200]} and {str(actual)[:200]}"


def make_template(template: Path) -> None:
    """Train a run, and write images and a miniature data set."""
    from tests.data import miniatures

    template.mkdir()
    to_the_end(("run.py", *CONFIG, f"--workdir={template / 'run'}"), template)
    (template / "photos").mkdir()
    for number in range(PHOTOS):
        (template / "photos" / f"{number}.jpg").write_bytes(miniatures.photo(number % 5, number, 32))
    miniatures.inat18(template / "source", counts=(12, 7, 4, 3), validation=2, size=40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="signals in all, full disks not counted (default: 100)")
    parser.add_argument("--tasks", default="", help="comma-separated; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    known = list(tasks(Path()))
    names = args.tasks.split(",") if args.tasks else known
    if unknown := set(names) - set(known):
        parser.error(f"unknown tasks {', '.join(unknown)}; known: {', '.join(known)}")
    origin = provenance.of("kills", sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        summary = measure(names, args.kills, args.seed, Path(folder))
    print(json.dumps(summary, indent=1))
    provenance.write(args.out, {**origin, **summary})
    sys.exit(1 if summary["faults"] else 0)


if __name__ == "__main__":
    main()
