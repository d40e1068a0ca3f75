"""Measure the training step of both stages of MiSLAS on CIFAR-100-LT. From the root of the checkout:

    python -m benchmarks.cifar_step                                         # ResNet-32, batch 128: minutes on a CPU
    python -m benchmarks.cifar_step --depth=8 --batch_size=32 --max_count=50        # a quick look
    python -m benchmarks.cifar_step --dtype=bfloat16 --out=step.json
    python -m benchmarks.cifar_step --torch                         # compared with PyTorch, on a CPU
    python -m benchmarks.cifar_step --torch=PYTHON                  # PyTorch in another Python

The images are random, because the speed does not depend on their content. For each stage it measures

- images a second: steps in the compiled loop that training dispatches, over the time until the device is done;
- that step compared with the same step dispatched alone, in turns, by the median of `--repeats`. XLA compiles a loop of
  one step as the step, so this is `run(state, source, 1)`. Only the last dispatch waits for the device;
- dispatches of an epoch: calls of the compiled function while `ltjax.train.train` trains an epoch;
- image bytes from host to device between the epoch's first dispatch and the end of its last, implicit and explicit, as
  `jax.transfer_guard` reports them. The benchmark first checks that a deliberate transfer is reported;
- operations for each image, by XLA and by hand: see `benchmarks/flops.py`.

It also times the training's evaluation function on the test images, `--repeats` times.

With `--torch` it measures only images a second of both stages and of evaluating 10,000 images, for five programs: ltjax
in float32 and bfloat16, and three variants of `benchmarks/torch_step.py`, a plain PyTorch network in its own process.
They take `--repeats` turns, so that other load on the machine affects all.
"""

import argparse
import contextlib
import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import flops, provenance
from configs import cifar100_lt
from ltjax import train
from ltjax.config import RunConfig, parse
from ltjax.data.source import Images
from ltjax.engine import experiment as experiments
from ltjax.engine import feed
from ltjax.engine.stage import CompiledStage, TrainState
from ltjax.system import devices, xla

ROOT = Path(__file__).parents[1]
NUM_TEST = 10_000  # images to evaluate with --torch, as many as CIFAR-100 has
EVALUATION = "evaluation"
PYTHON_HAS_TORCH = "import importlib.util as u; raise SystemExit(u.find_spec('torch') is None)"


def write_random_images(data_dir: Path, *, per_class: int, num_classes: int = 100, num_test: int = 1000) -> None:
    """Write noise in the shape of CIFAR-100 to `<data_dir>/cifar100.npz`, which `ltjax.data.cifar` reads."""
    rng = np.random.default_rng(0)

    def pixels(count):
        return rng.integers(256, size=(count, 32, 32, 3), dtype=np.uint8)

    labels = np.repeat(np.arange(num_classes, dtype=np.int32), per_class)
    test_labels = np.arange(num_test, dtype=np.int32) % num_classes
    names = tuple(f"class {number}" for number in range(num_classes))
    data_dir.mkdir(parents=True, exist_ok=True)
    images = Images(pixels(len(labels)), labels, pixels(num_test), test_labels, names)
    np.savez(data_dir / "cifar100.npz", **images._asdict())


def one_epoch_config(
    *,
    depth: int,
    width: int = 16,
    batch_size: int = 128,
    dtype: str = "float32",
    steps: int = 0,
    max_count: int = 500,
    gpu_graphs: str = "default",
) -> dict[str, Any]:
    """Return `configs/cifar100_lt.py:method=mislas` with one epoch for each stage."""
    config = cifar100_lt.get_config(f"method=mislas,imbalance={min(100, max_count)}")  # no class is empty
    config.model.update(depth=depth, width=width, dtype=dtype)
    config.update(batch_size=batch_size, dispatch_steps=steps, epochs=1, gpu_graphs=gpu_graphs)
    config.classifier.epochs = 1
    return config.to_dict()


class Transfer(NamedTuple):
    shape: tuple[int, ...]
    size: int | None  # bytes; None if the guard reports none


@contextlib.contextmanager
def host_to_device() -> Iterator[list[Transfer]]:
    """Record transfers from host to device, implicit and by `device_put`, inside the block; fill the list at its end.

    `jax.transfer_guard` writes a line to the process's stderr for each transfer to each device. A split transfer is
    counted whole on each device, so sizes are upper bounds.
    """
    transfers: list[Transfer] = []
    sys.stderr.flush()
    with tempfile.TemporaryFile() as log:
        stderr = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            with jax.transfer_guard_host_to_device("log_explicit"):
                yield transfers
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            log.seek(0)
            for line in log.read().decode(errors="replace").splitlines():
                if "host-to-device transfer" not in line:
                    print(line, file=sys.stderr)
                elif match := re.search(r"ShapedArray\((\w+)\[([\d,]*)\]", line):
                    shape = tuple(int(n) for n in match[2].split(",") if n)
                    transfers.append(Transfer(shape, jnp.dtype(match[1]).itemsize * math.prod(shape)))
                else:
                    transfers.append(Transfer((), None))


def check_the_guard(image_shape: tuple[int, ...], batch_size: int) -> None:
    """Raise RuntimeError if a batch of images can be sent to the device without a report."""
    batch = np.zeros((batch_size, *image_shape), np.uint8)
    with host_to_device() as put:
        jax.device_put(batch).block_until_ready()
    first = jax.jit(lambda images: images[0, 0, 0, 0])
    with host_to_device() as passed:
        first(batch).block_until_ready()
    if not passed or sum(t.size or 0 for t in put) < batch.nbytes:
        raise RuntimeError(f"this JAX does not report all transfers: {put}, {passed}, {batch.nbytes} bytes each")


def time_steps(compiled: CompiledStage, state: TrainState, source: feed.Resident, steps: int, repeats: int):
    """Time a step, [repeats] seconds each: in a dispatch of `steps`, and in `steps` dispatches of one."""

    def scanned(state):
        return compiled.run(state, source, steps)

    def single(state):
        metrics = {}
        for _ in range(steps):
            state, metrics = compiled.run(state, source, 1)
        return state, metrics

    seconds: dict[str, list[float]] = {"scanned": [], "single": []}
    ways = [("scanned", scanned), ("single", single)]
    for _, way in ways:
        state, _ = jax.block_until_ready(way(state))  # compiles
    for turn in range(repeats):
        for name, way in ways if turn % 2 else reversed(ways):
            started = time.perf_counter()
            state, _ = jax.block_until_ready(way(state))
            seconds[name].append((time.perf_counter() - started) / steps)
    return seconds


def time_evaluation(experiment: experiments.Experiment, variables: Any, repeats: int) -> list[float]:
    """Time the evaluation of all test images, [repeats] seconds."""
    seconds = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        experiment.evaluators["net"](variables, experiment.test_set)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]  # the first one compiles


def train_one_epoch(config, data_dir: Path, compiled: dict[str, CompiledStage]):
    """Train one epoch of each stage with `ltjax.train.train`. Return {stage: (dispatches, transfers to the device)}.

    Transfers are those from the start of a stage's first dispatch to the end of its last.
    """
    stages: dict[str, tuple[list[int], list[Transfer]]] = {}
    with contextlib.ExitStack() as capture:

        def counted_stage(_, stage):
            name = stage.name

            def counted(state, source, num_steps):
                if name not in stages:
                    stages[name] = ([], capture.enter_context(host_to_device()))
                stages[name][0].append(num_steps)
                state, metrics = compiled[name].run(state, source, num_steps)
                if sum(stages[name][0]) == compiled[name].num_steps:
                    jax.block_until_ready(metrics)
                    capture.close()
                return state, metrics

            return compiled[name]._replace(run=counted)

        with (
            tempfile.TemporaryDirectory() as workdir,
            mock.patch.object(experiments, "build_stage", counted_stage),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            train.train(config, workdir, data_dir)
    return stages


def measure(config, data_dir: Path, *, repeats: int, with_flops: bool) -> dict[str, Any]:
    """Measure both stages and evaluation."""
    run = parse(config)
    experiment, compiled = experiments.set_up_with_stages(run, data_dir)
    check_the_guard(experiment.image_shape, run.batch_size)
    seconds, operations = {}, {}
    for name, stage in run.stages.items():
        if with_flops:
            operations[name] = flops.by_xla(experiment, stage)
        steps = feed.dispatch_length(compiled[name].steps_per_epoch, run.dispatch_steps)
        state = compiled[name].init(experiments.seeds(run), experiments.starting_variables(experiment, stage))
        seconds[name] = time_steps(compiled[name], state, experiment.train_data, steps, repeats)
    variables = experiments.starting_variables(experiment, next(iter(run.stages.values())))
    evaluation = time_evaluation(experiment, variables, repeats)
    epochs = train_one_epoch(config, data_dir, compiled)

    numbers = {}
    for name, stage in run.stages.items():
        dispatches, transfers = epochs[name]
        images = [t.size for t in transfers if t.size is None or t.shape[-3:] == experiment.image_shape]
        median = {key: statistics.median(values) for key, values in seconds[name].items()}
        numbers[name] = {
            "title": stage.title,
            "images_per_second": run.batch_size / median["scanned"],
            "scanned_seconds_per_step": seconds[name]["scanned"],
            "single_seconds_per_step": seconds[name]["single"],
            "scanned_over_single": median["scanned"] / median["single"],
            "steps_per_epoch": sum(dispatches),
            "dispatches_per_epoch": len(dispatches),
            "image_bytes_to_device_per_epoch": None
            if any(t.size is None for t in images)
            else sum(t.size for t in images),
            "other_transfers_to_device_per_epoch": len(transfers) - len(images),
        }
        if with_flops:
            trains = any("backbone" in path for path in compiled[name].trained)
            size = {key: run.model[key] for key in ("depth", "width")}
            by_hand = flops.by_hand(**size, num_classes=len(experiment.class_names), backbone_trains=trains)
            numbers[name]["flops_per_image"] = {
                "by_xla": operations[name],
                "by_hand": by_hand,
                "xla_over_hand": operations[name] / by_hand,
            }
    return {
        "stages": numbers,
        EVALUATION: {
            "num_images": experiment.test_set.size,
            "images_per_second": experiment.test_set.size / statistics.median(evaluation),
            "seconds": evaluation,
        },
        "num_images": int(experiment.split.class_counts.sum()),
    }


def ltjax_turns(config, data_dir: Path) -> tuple[dict[str, Callable[[], float]], dict[str, int], RunConfig]:
    """Return {stage, or "evaluation": turn() -> seconds an image}, steps of a turn of each stage, and the run."""
    run = parse(config)
    experiment, compiled = experiments.set_up_with_stages(run, data_dir)
    states, steps = {}, {}
    for name, stage in run.stages.items():
        steps[name] = feed.dispatch_length(compiled[name].steps_per_epoch, run.dispatch_steps)
        states[name] = compiled[name].init(experiments.seeds(run), experiments.starting_variables(experiment, stage))
    variables = experiments.starting_variables(experiment, next(iter(run.stages.values())))

    def train_for_a_dispatch(name):
        started = time.perf_counter()
        states[name], _ = jax.block_until_ready(compiled[name].run(states[name], experiment.train_data, steps[name]))
        return (time.perf_counter() - started) / (steps[name] * run.batch_size)

    def evaluate():
        started = time.perf_counter()
        experiment.evaluators["net"](variables, experiment.test_set)
        return (time.perf_counter() - started) / experiment.test_set.size

    turns: dict[str, Callable[[], float]] = {name: partial(train_for_a_dispatch, name) for name in run.stages}
    return {**turns, EVALUATION: evaluate}, steps, run


def has_torch(python: str) -> bool:
    """Return whether the interpreter `python` has PyTorch."""
    try:
        return subprocess.run([python, "-c", PYTHON_HAS_TORCH], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


class TorchProcess(contextlib.AbstractContextManager):
    """`benchmarks/torch_step.py` in the interpreter `python`; it is idle between requests.

    `settings` are those of its `Runner`. Attributes are `version`, `threads` and `ways`, {name: title}.
    """

    def __init__(self, python: str, settings: Mapping[str, int]):
        command = [python, "-m", "benchmarks.torch_step", json.dumps(settings)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        about = self._read()
        self.version, self.threads, self.ways = about["version"], about["threads"], about["ways"]

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()  # pyrefly: ignore[missing-attribute]
        if not line:
            raise RuntimeError(f"benchmarks/torch_step.py has ended with exit code {self.process.wait()}")
        return json.loads(line)

    def seconds(self, way: str, what: str, count: int) -> float:
        """Time `count` steps of a stage, or the evaluation of `count` images."""
        print(json.dumps([way, what, count]), file=self.process.stdin, flush=True)
        return self._read()["seconds"]

    def __exit__(self, *error) -> None:
        self.process.communicate()  # it ends when its input closes


def compare(configs: Mapping[str, dict[str, Any]], data_dir: Path, python: str, repeats: int) -> dict[str, Any]:
    """Time ltjax with each config, {dtype: config}, and PyTorch in the interpreter `python`, in turns."""
    turns, titles, steps, run = {}, {}, {}, None
    for dtype, config in configs.items():
        turns[f"ltjax_{dtype}"], steps, run = ltjax_turns(config, data_dir)
        titles[f"ltjax_{dtype}"] = f"ltjax, {dtype}"
    assert run is not None
    size = dict(batch_size=run.batch_size, eval_batch_size=run.eval_batch_size, num_classes=100)
    with TorchProcess(python, {**size, **{key: run.model[key] for key in ("depth", "width")}}) as torch:

        def torch_turn(way, what):
            count = NUM_TEST if what == EVALUATION else steps[what]
            return torch.seconds(way, what, count) / (count if what == EVALUATION else count * run.batch_size)

        for way, title in torch.ways.items():
            titles[f"torch_{way}"] = f"PyTorch, {title}"
            turns[f"torch_{way}"] = {what: partial(torch_turn, way, what) for what in (*steps, EVALUATION)}
        seconds: dict[str, dict[str, list[float]]] = {row: {what: [] for what in turns[row]} for row in turns}
        for number in range(1 + repeats):
            for what in (*steps, EVALUATION):
                for row in turns if number % 2 else reversed(turns):
                    seconds[row][what].append(turns[row][what]())
        # the first turn compiles and warms up
        measured = {row: {what: each[1:] for what, each in times.items()} for row, times in seconds.items()}
        return {
            "rows": {row: {"title": titles[row], **figures} for row, figures in with_ratios(measured).items()},
            "steps_per_turn": steps,
            "evaluated_images": NUM_TEST,
            "torch": {"version": torch.version, "threads": torch.threads},
        }


def with_ratios(seconds: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, Any]]:
    """Return figures of {row: {what: seconds an image}}, by the median of the turns and by the shortest.

    Ratios are of images a second, to PyTorch's NCHW float32 and to PyTorch's best.
    """
    figures: dict[str, dict[str, Any]] = {}
    for row, times in seconds.items():
        figures[row] = {what: {"seconds_per_image": list(each)} for what, each in times.items()}
    torch_rows = [row for row in seconds if row.startswith("torch_")]
    for name, choose in (("median", statistics.median), ("minimum", min)):
        for row, times in seconds.items():
            for what in times:
                torch = [choose(seconds[other][what]) for other in torch_rows]
                chosen = choose(times[what])
                figures[row][what][name] = {
                    "seconds_per_image": chosen,
                    "images_per_second": 1 / chosen,
                    "over_torch_nchw_float32": torch[0] / chosen,
                    "over_best_torch": min(torch) / chosen,
                }
    return figures


def compared_table(numbers: dict[str, Any]) -> Table:
    model, torch = numbers["config"]["model"], numbers["torch"]
    grid = Table(
        title=f"Images/s: ResNet-{model['depth']}, batch {numbers['config']['batch_size']}, "
        f"{numbers['num_devices']} x {numbers['device']}; PyTorch {torch['version']}, threads: {torch['threads']}",
        caption="In brackets: ratio to PyTorch's NCHW float32; ratio to PyTorch's best in the column.",
    )
    grid.add_column("")
    columns = [*numbers["steps_per_turn"], EVALUATION]
    for what in columns:
        grid.add_column(EVALUATION if what == EVALUATION else numbers["config"][what]["title"], justify="right")
    for row in numbers["rows"].values():
        medians = [row[what]["median"] for what in columns]
        cell = "{images_per_second:,.0f} ({over_torch_nchw_float32:.2f}, {over_best_torch:.2f})"
        grid.add_row(row["title"], *(cell.format(**each) for each in medians))
    return grid


def table(numbers: dict[str, Any]) -> Table:
    model = numbers["config"]["model"]
    grid = Table(
        title=f"ResNet-{model['depth']}, batch {numbers['config']['batch_size']}, {model['dtype']}, "
        f"{numbers['num_devices']} x {numbers['device']}"
    )
    grid.add_column("")
    rows = list(numbers["stages"].values())
    for row in rows:
        grid.add_column(row["title"], justify="right")

    def add(label, show):
        grid.add_row(label, *(show(row) for row in rows))

    def milliseconds(key):
        return lambda row: f"{1e3 * statistics.median(row[key]):.2f}"

    add("images/s", lambda row: f"{row['images_per_second']:,.0f}")
    add("ms a step, in the loop", milliseconds("scanned_seconds_per_step"))
    add("ms a step, dispatched alone", milliseconds("single_seconds_per_step"))
    add("ratio", lambda row: f"{row['scanned_over_single']:.3f}")
    add("steps an epoch", lambda row: str(row["steps_per_epoch"]))
    add("dispatches an epoch", lambda row: str(row["dispatches_per_epoch"]))
    add("image bytes to the device an epoch", lambda row: str(row["image_bytes_to_device_per_epoch"]))
    add("other transfers to the device", lambda row: str(row["other_transfers_to_device_per_epoch"]))
    evaluated = numbers[EVALUATION]
    grid.add_row(f"images/s, evaluating {evaluated['num_images']:,}", f"{evaluated['images_per_second']:,.0f}")
    if all("flops_per_image" in row for row in rows):
        add("MFLOP an image, by XLA", lambda row: f"{row['flops_per_image']['by_xla'] / 1e6:.1f}")
        add("MFLOP an image, by hand", lambda row: f"{row['flops_per_image']['by_hand'] / 1e6:.1f}")
        add("ratio", lambda row: f"{row['flops_per_image']['xla_over_hand']:.3f}")
    return grid


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cifar_step", description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=32, help="depth of the ResNet: 6 n + 2")
    parser.add_argument("--width", type=int, default=16, help="channels of its first stage")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="with --torch: both")
    parser.add_argument("--steps", type=int, default=0, help="steps in a dispatch; 0: as in training")
    parser.add_argument("--gpu_graphs", choices=tuple(xla.GPU_GRAPHS), default="default", help="config.gpu_graphs")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each program")
    parser.add_argument("--max_count", type=int, default=500, help="images of the largest class")
    parser.add_argument("--no_flops", action="store_true", help="skip counting operations, which compiles for a CPU")
    parser.add_argument(
        "--torch",
        nargs="?",
        const=sys.executable,
        metavar="PYTHON",
        help="compare with PyTorch on a CPU; PYTHON: an interpreter with PyTorch (default: this one)",
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    if args.torch and not has_torch(args.torch):
        parser.error(f'--torch: {args.torch} has no PyTorch; pip install -e ".[torch]", or name another interpreter')
    devices.use_cpu_cores(args.batch_size)
    if args.torch and jax.default_backend() != "cpu":
        parser.error("--torch compares on a CPU; set JAX_PLATFORMS=cpu")
    origin = provenance.of("cifar_step", arguments)

    def config(dtype):
        return one_epoch_config(
            depth=args.depth,
            width=args.width,
            batch_size=args.batch_size,
            dtype=dtype,
            steps=args.steps,
            max_count=args.max_count,
            gpu_graphs=args.gpu_graphs,
        )

    numbers = {**origin, "images": "random", "config": config(args.dtype)}
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder)
        if args.torch:
            write_random_images(data_dir, per_class=args.max_count, num_test=NUM_TEST)
            configs = {dtype: config(dtype) for dtype in ("float32", "bfloat16")}
            numbers |= compare(configs, data_dir, args.torch, args.repeats)
        else:
            write_random_images(data_dir, per_class=args.max_count)
            numbers |= measure(numbers["config"], data_dir, repeats=args.repeats, with_flops=not args.no_flops)
    grid = compared_table(numbers) if args.torch else table(numbers)
    Console(width=None if sys.stdout.isatty() else 120).print(grid)
    provenance.write(args.out, numbers)


if __name__ == "__main__":
    main()
