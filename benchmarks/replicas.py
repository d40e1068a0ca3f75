"""Measure total images a second of 1, 2, 4 and 8 seeds of cross-entropy on CIFAR-100-LT in one program.

    python -m benchmarks.replicas                                 # from the checkout's root; long on a CPU
    python -m benchmarks.replicas --depth=8 --batch_size=32       # a quick look
    python -m benchmarks.replicas --out=replicas.json

Each number of replicas runs as in training (`ltjax.system.parallel`), in two ways: "loop", one replica after the other
inside the program, and "vmap", all in one batched step with grouped convolutions. Images are random, because the speed
does not depend on their content. The programs are timed in turns, so that other load on the machine affects all.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from benchmarks import provenance
from benchmarks.cifar_step import write_random_images
from configs import cifar100_lt
from ltjax.config import REPLICATE, parse
from ltjax.engine import experiment as experiments
from ltjax.system import devices, parallel


def prepared(args: argparse.Namespace, data_dir: Path, replicas: int, replicate: str) -> tuple[Any, Any, Any, Any]:
    """Return compiled stage, state, images on the device and mesh of a run with `replicas` replicas."""
    config = cifar100_lt.get_config(f"method=ce,imbalance={min(100, args.max_count)}")
    config.model.update(depth=args.depth, width=args.width, dtype=args.dtype)
    config.update(batch_size=args.batch_size, epochs=1, replicas=replicas, replicate=replicate)
    run = parse(config.to_dict())
    experiment = experiments.set_up(run, data_dir)
    compiled = experiments.build_stage(experiment, run.stages["ce"])
    state = compiled.init(experiments.seeds(run), experiments.fresh_variables(experiment, run.stages["ce"]))
    return compiled, state, experiment.train_data, experiment.mesh


def measure(args: argparse.Namespace, data_dir: Path, write: Callable[[list[dict[str, Any]]], None]):
    """Return a row of figures for each program.

    Each program is timed and written by `write` once it is compiled; then all are timed in turns, `args.repeats` times.
    """
    rows, programs = [], []

    def turn(row: dict[str, Any], program: list[Any]) -> None:
        compiled, state, source = program
        started = time.perf_counter()
        program[1], _ = jax.block_until_ready(compiled.run(state, source, args.steps))
        row["seconds_per_step"].append((time.perf_counter() - started) / args.steps)
        row["images_per_second"] = args.batch_size * row["replicas"] / statistics.median(row["seconds_per_step"])

    for replicas in args.replicas:
        for replicate in REPLICATE if replicas > 1 else ("loop",):
            compiled, state, source, mesh = prepared(args, data_dir, replicas, replicate)
            started = time.perf_counter()
            state, _ = jax.block_until_ready(compiled.run(state, source, args.steps))
            groups = mesh.shape[parallel.REPLICA_AXIS]
            rows.append(
                {
                    "replicas": replicas,
                    "replicate": replicate if replicas > 1 else "-",
                    "device_groups": groups,
                    "first_call_seconds": time.perf_counter() - started,
                    "seconds_per_step": [],
                }
            )
            programs.append([compiled, state, source])
            turn(rows[-1], programs[-1])
            write(rows)
    for _ in range(args.repeats - 1):
        for row, program in zip(rows, programs, strict=True):
            turn(row, program)
    for row in rows:
        row["over_first"] = row["images_per_second"] / rows[0]["images_per_second"]
    write(rows)
    return rows


def table(rows: list[dict[str, Any]], title: str) -> Table:
    grid = Table(title=title)
    for name in (
        "replicas",
        "how",
        "groups of devices",
        "images/s in total",
        "ratio to the first row",
        "first call, s",
    ):
        grid.add_column(name, justify="right")
    for row in rows:
        numbers = (f"{row['images_per_second']:,.0f}", f"{row['over_first']:.2f}", f"{row['first_call_seconds']:.0f}")
        grid.add_row(str(row["replicas"]), row["replicate"], str(row["device_groups"]), *numbers)
    return grid


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replicas", description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--depth", type=int, default=32, help="depth of the ResNet: 6 n + 2")
    parser.add_argument("--width", type=int, default=16, help="channels of its first stage")
    parser.add_argument("--batch_size", type=int, default=128, help="batch of each replica")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=0, help="steps in a dispatch; 0: 50, on a CPU 2")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each program")
    parser.add_argument("--max_count", type=int, default=500, help="images of the largest class")
    parser.add_argument("--out", type=Path, help="JSON file to write, after each program")
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments_parser().parse_args(argv)
    devices.use_cpu_cores(args.batch_size)
    origin = provenance.of("replicas", argv)
    args.steps = args.steps or (2 if jax.default_backend() == "cpu" else 50)
    about = {**origin, "settings": {key: value for key, value in vars(args).items() if key != "out"}}
    with tempfile.TemporaryDirectory() as folder:
        write_random_images(Path(folder), per_class=args.max_count)
        rows = measure(args, Path(folder), lambda rows: provenance.write(args.out, {**about, "rows": rows}))
    on = f"{origin['num_devices']} x {origin['device']}"
    title = f"ResNet-{args.depth}, batch {args.batch_size} a replica, {args.dtype}, {on}"
    Console(width=None if sys.stdout.isatty() else 120).print(table(rows, title))


if __name__ == "__main__":
    main()
