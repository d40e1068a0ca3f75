"""Measure the training step on an accelerator, by data type, batch size and XLA's flags. From the checkout's root:

    python -m benchmarks.device_step --dtype float32 bfloat16 --batch_size 128 512 --flags default deterministic --trace
    python -m benchmarks.device_step --net=resnet50 --dtype=bfloat16 --batch_size=256 --stream=20
    python -m benchmarks.device_step --depth=8 --width=8 --batch_size=32 --steps=2                  # a quick look

--net=resnet32 is the first stage of MiSLAS on CIFAR-100-LT, with images on the device. resnet50 is cross-entropy on
iNaturalist 2018's numbers of images and classes, 224 pixels; first on batches that stay on the device, then, with
--stream, on JPEGs of 800x600 that are decoded during training. All images are synthetic.

Programs of the same --flags are compiled in parallel and timed in turns. The table has seconds to compile, images a
second by the median dispatch (streamed: over all dispatches), and memory by XLA's plan, by `--dry_run` and, if the
device reports it, at the peak. The peak is the process's, so it is only shown for a single program. --trace sums up the
kernels of one dispatch of the first program. --out is written after each part.
"""

import argparse
import collections
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks import cifar_step, decode, provenance
from configs import inat18
from ltjax import data
from ltjax.config import StageConfig, parse
from ltjax.engine import experiment as experiments
from ltjax.engine.feed import Chunk
from ltjax.engine.stage import CompiledStage, TrainState
from ltjax.modes import dry_run
from ltjax.system import devices, xla

# XLA's flags by name: those of `config.gpu_graphs`, and one for bit-identical runs
FLAGS: dict[str, dict[str, Any]] = {**xla.GPU_GRAPHS, "deterministic": {"xla_gpu_deterministic_ops": True}}
STEPS = {"resnet32": 85, "resnet50": 4}  # in a dispatch: an epoch of CIFAR-100-LT; a chunk of a stream
KERNELS = 25  # kept of a trace


class Prepared(NamedTuple):
    """The first stage of a run, ready to be compiled."""

    experiment: experiments.Experiment
    stage: StageConfig
    compiled: CompiledStage

    def state(self) -> TrainState:
        variables = experiments.starting_variables(self.experiment, self.stage)
        return self.compiled.init(experiments.seeds(self.experiment.config), variables)

    def batches(self, num_steps: int) -> Any:
        return experiments.open_feed(self.experiment, self.stage, num_steps)

    def expected_bytes(self) -> int:
        """Return the memory that `--dry_run` expects."""
        run = self.experiment.config._replace(stages={self.stage.name: self.stage})
        return dry_run.expected_memory(self.experiment._replace(config=run)).peak()[0]


def prepare(values: Mapping[str, Any], data_dir: Path | None) -> Prepared:
    run = parse(values)
    stage, experiment = next(iter(run.stages.values())), experiments.set_up(run, data_dir)
    return Prepared(experiment, stage, experiments.build_stage(experiment, stage))


def large(*, depth: int, size: int, dtype: str, batch_size: int) -> dict[str, Any]:
    """Return `configs/inat18.py:method=ce` for a ResNet of `depth` layers."""
    config = inat18.get_config(f"method=ce,model=resnet{depth},size={size}")
    config.model.dtype = dtype
    config.batch_size = batch_size
    return config.to_dict()


def made_up_large(*, width: int, height: int, count: int = 64):
    """Replace every data set inside the block by iNaturalist 2018 with `count` different JPEGs in memory."""
    stored = decode.inaturalist(decode.Held(decode.made_up(count, width, height)))
    return mock.patch.object(data, "load", lambda *_: stored)


class Program(NamedTuple):
    """A compiled dispatch and its measurements."""

    prepared: Prepared
    compiled: Any
    carried: list[Any]  # [state, steps done]
    row: dict[str, Any]

    def dispatch(self, source: Any) -> float:
        """Run a dispatch; return the seconds until the device is done."""
        began = time.perf_counter()
        self.carried[0], _ = jax.block_until_ready(self.compiled(self.carried[0], source))
        self.carried[1] += self.row["steps"]
        return time.perf_counter() - began

    def held(self, source: Any) -> Any:
        """Return a source with the batches of the next dispatch."""
        if not isinstance(source, Chunk):
            return source
        return source._replace(first=jnp.asarray(self.carried[1], jnp.int32))


def compile_all(prepared: Sequence[Prepared], flags: str, steps: int) -> list[Program]:
    """Trace programs of the same flags one after the other, and compile them in parallel."""

    def compiled(lowered: Any) -> tuple[Any, float]:
        began = time.perf_counter()
        return lowered.compile(compiler_options=FLAGS[flags] or None), time.perf_counter() - began

    states = [each.state() for each in prepared]
    lowered = [
        each.compiled.run.lower(state, experiments.source_shapes(each.experiment, steps), steps)
        for each, state in zip(prepared, states, strict=True)
    ]
    programs = []
    with ThreadPoolExecutor(len(lowered)) as pool:
        for each, state, (executable, seconds) in zip(prepared, states, pool.map(compiled, lowered), strict=True):
            memory = executable.memory_analysis()
            row = {
                "dtype": each.experiment.config.model["dtype"],
                "batch_size": each.experiment.config.batch_size,
                "flags": flags,
                "steps": steps,
                "compile_seconds": seconds,
                "bytes_by_xla": memory and memory.temp_size_in_bytes + memory.argument_size_in_bytes,
            }
            programs.append(Program(each, executable, [state, 0], row))
    return programs


def measure(programs: Sequence[Program], repeats: int) -> list[Any]:
    """Time programs in turns. Return their sources, which stay on the device."""
    sources = []
    for program in programs:
        with program.prepared.batches(program.row["steps"]) as feed:
            sources.append(jax.block_until_ready(feed.take(0, program.row["steps"], 0)))
        program.row["first_dispatch_seconds"] = program.dispatch(program.held(sources[-1]))
        program.row["seconds_per_dispatch"] = []
    for _ in range(repeats):
        for program, source in zip(programs, sources, strict=True):
            program.row["seconds_per_dispatch"].append(program.dispatch(program.held(source)))
    for program in programs:
        row = program.row
        row["ms_per_step"] = 1e3 * statistics.median(row["seconds_per_dispatch"]) / row["steps"]
        row["images_per_second"] = 1e3 * row["batch_size"] / row["ms_per_step"]
    return sources


def memory(prepared: Prepared) -> dict[str, int | None]:
    """Return bytes on a device: `--dry_run`'s estimate, and the peak of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return {"bytes_by_dry_run": prepared.expected_bytes(), "peak_bytes": stats.get("peak_bytes_in_use")}


def streamed(program: Program, dispatches: int) -> dict[str, Any]:
    """Measure images a second through the stream, after two dispatches that fill it."""
    steps, seconds, before = program.row["steps"], [], 0.0
    total = program.carried[1] + (dispatches + 2) * steps
    with program.prepared.batches(total) as feed:
        for number in range(dispatches + 2):
            began = time.perf_counter()
            source = feed.take(program.carried[1], steps, steps if number < dispatches + 1 else 0)
            program.dispatch(source)
            seconds.append(time.perf_counter() - began)
            before = feed.waited if number < 2 else before
        waited = feed.waited - before
    images = program.row["batch_size"] * steps * dispatches
    return {
        "images_per_second": images / sum(seconds[2:]),
        "waited_share": waited / sum(seconds[2:]),
        "seconds_per_dispatch": seconds[2:],
    }


def traced(call: Callable[[], Any]) -> dict[str, Any]:
    """Sum up the kernels of a call by time: of the device's streams, or on a CPU of XLA's threads."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
        device = [plane for plane in planes if plane.name.startswith("/device:")]
        lines = [line for plane in device or planes for line in plane.lines]
        streams = [line for line in lines if line.name.startswith("Stream")] or [
            line for line in lines if line.name == "XLA Ops" or line.name.startswith("tf_XLA")
        ]
        events = [(event.name, event.start_ns, event.duration_ns) for line in streams for event in line.events]
    return summarise(events)


def summarise(events: Sequence[tuple[str, float, float]]) -> dict[str, Any]:
    """Sum up events (name, start, duration in ns): their span, its busy share, and the names with the most time."""
    busy = until = 0.0
    for _, start, duration in sorted(events, key=lambda event: event[1]):
        busy += max(0.0, start + duration - max(start, until))
        until = max(until, start + duration)
    span = until - min((start for _, start, _ in events), default=0.0)
    names: dict[str, list[float]] = collections.defaultdict(list)
    for name, _, duration in events:
        names[name].append(duration)
    most = sorted(names.items(), key=lambda item: -sum(item[1]))[:KERNELS]
    return {
        "events": len(events),
        "span_ms": span / 1e6,
        "busy_share": busy / span if span else 0.0,
        "kernels": [{"name": name[:120], "count": len(each), "ms": sum(each) / 1e6} for name, each in most],
    }


def table(numbers: Mapping[str, Any]) -> Table:
    grid = Table(title=f"{numbers['net']}, {numbers['num_devices']} x {numbers['device']}")
    for head in ("data type", "batch", "flags", "compiled in s", "ms a step", "images/s", "streamed", "MB at most"):
        grid.add_column(head, justify="right")
    for row in numbers["programs"]:
        flow, most = row.get("streamed"), row.get("peak_bytes")
        grid.add_row(
            row["dtype"],
            str(row["batch_size"]),
            row["flags"],
            f"{row['compile_seconds']:.0f}",
            f"{row['ms_per_step']:.2f}",
            f"{row['images_per_second']:,.0f}",
            f"{flow['images_per_second']:,.0f}" if flow else "-",
            f"{most / 1e6:,.0f} (--dry_run: {row['bytes_by_dry_run'] / 1e6:,.0f})" if most else "-",
        )
    return grid


@contextlib.contextmanager
def prepared_programs(args: argparse.Namespace) -> Iterator[list[Prepared]]:
    """Prepare a run for each data type and batch size."""
    shapes = [dict(dtype=dtype, batch_size=size) for dtype in args.dtype for size in args.batch_size]
    if args.net == "resnet50":
        width, height = map(int, args.jpegs.split("x"))
        with made_up_large(width=width, height=height):
            yield [prepare(large(depth=args.depth or 50, size=args.size, **shape), None) for shape in shapes]
    else:
        size = dict(depth=args.depth or 32, width=args.width)
        with tempfile.TemporaryDirectory() as folder:
            cifar_step.write_random_images(Path(folder), per_class=500)
            yield [prepare(cifar_step.one_epoch_config(**size, **shape), Path(folder)) for shape in shapes]


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device_step", description=__doc__.splitlines()[0])
    parser.add_argument("--net", choices=tuple(STEPS), default="resnet32")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), nargs="+", default=["float32"])
    parser.add_argument("--batch_size", type=int, nargs="+", default=[128])
    parser.add_argument("--flags", choices=tuple(FLAGS), nargs="+", default=["default"])
    parser.add_argument("--steps", type=int, default=0, help="steps in a dispatch; 0: 85, or 4 of resnet50")
    parser.add_argument("--repeats", type=int, default=5, help="timed dispatches")
    parser.add_argument("--stream", type=int, default=0, metavar="N", help="resnet50: dispatches of decoded JPEGs")
    parser.add_argument("--jpegs", default="800x600", help="size of the JPEGs")
    parser.add_argument("--trace", action="store_true", help="sum up one dispatch's kernels")
    parser.add_argument("--depth", type=int, default=0, help="depth of the network, instead of 32 or 50")
    parser.add_argument("--width", type=int, default=16, help="resnet32: channels of its first stage")
    parser.add_argument("--size", type=int, default=224, help="resnet50: side of the images in pixels")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = arguments_parser()
    args = parser.parse_args(arguments)
    if args.stream and args.net != "resnet50":
        parser.error("--stream is for --net=resnet50, whose images stay on disk")
    devices.use_cpu_cores(min(args.batch_size))
    steps = args.steps or STEPS[args.net]
    numbers: dict[str, Any] = {**provenance.of("device_step", arguments), "net": args.net, "programs": []}
    with prepared_programs(args) as prepared:
        for flags in args.flags:
            programs = compile_all(prepared, flags, steps)
            sources = measure(programs, args.repeats)
            first = programs[0]
            for program in programs:
                numbers["programs"].append(program.row)
            if len(prepared) == len(args.flags) == 1:
                first.row.update(memory(prepared[0]))
            provenance.write(args.out, numbers)
            if args.trace and "trace" not in numbers:
                numbers["trace"] = traced(partial(first.dispatch, first.held(sources[0])))
                provenance.write(args.out, numbers)
            for program in programs if args.stream else ():
                program.row["streamed"] = streamed(program, args.stream)
                provenance.write(args.out, numbers)
    Console(width=None if sys.stdout.isatty() else 120).print(table(numbers))


if __name__ == "__main__":
    main()
