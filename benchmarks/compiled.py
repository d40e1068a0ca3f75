"""Compile the training steps for a TPU v5e and for an H100, without either, and check the programs.

    pip install -e ".[aot]"                                 # XLA for TPU and CUDA, in a separate environment
    python -m benchmarks.compiled                           # all programs, for both: three quarters of an hour
    python -m benchmarks.compiled --platform=gpu --only=mislas1 --only=reslt
    python -m benchmarks.compiled --tiny                    # tiny networks, against the common bounds

Every program is lowered as in a run, compiled for a mesh of device descriptions, and read (`benchmarks/hlo.py`).
Figures are of one step: collectives, kernels, launches by a GPU's host, scatters, sums in bfloat16, transfers from and
to the host, loops that data end, operations, bytes, and a lower bound of the time. `COMMON` and `BOUNDS` have the
bounds and their reasons. No program runs, so nothing here is measured.

Exit code 1: a figure is above its bound; each such line names the program, the figure and the bound. 2: a compiler is
missing, or the arguments are wrong.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from rich.console import Console
from rich.table import Table

from benchmarks import hlo, provenance
from ltjax.config import RunConfig, parse
from ltjax.data.source import Images, Stored
from ltjax.engine import evaluate
from ltjax.engine import experiment as experiments
from ltjax.system import parallel, xla

STEPS = 3  # in a dispatch; XLA unrolls a loop of one step
PLATFORMS = ("tpu", "gpu")
TARGET = Path(__file__).with_name("h100.txtpb")
CHIPS = {"tpu": hlo.V5E, "gpu": hlo.H100}
TOPOLOGIES = {"tpu": "v5e:2x4", "gpu": "H100"}
MODULES = {"tpu": "libtpu", "gpu": "jax_plugins.xla_cuda13"}
PACKAGES = {"tpu": "libtpu", "gpu": "jax-cuda13-pjrt"}


class Program(NamedTuple):
    """A stage's step, or evaluation."""

    name: str
    config: str  # "file:arguments", as after --config=configs/
    stage: str  # "": evaluation
    settings: Mapping[str, Any] = {}  # changes of the config
    chips: Mapping[str, int] = {"tpu": 8, "gpu": 1}  # by platform; others are left out


MISLAS = "cifar100_lt:method=mislas,imbalance=100"
PROGRAMS = (
    Program("mislas1", MISLAS, "features"),
    Program("mislas1-bf16", MISLAS + ",precision=bf16", "features"),
    Program("mislas1-other", MISLAS, "features", chips={"tpu": 1, "gpu": 8}),
    Program("mislas1-seeds", MISLAS, "features", dict(replicas=8), chips={"tpu": 8}),
    Program("mislas1-vmap", MISLAS, "features", dict(replicas=4, replicate="vmap"), chips={"gpu": 1}),
    Program("mislas1-graph", MISLAS, "features", dict(gpu_graphs="step"), chips={"gpu": 1}),
    Program("mislas1-dispatch", MISLAS, "features", dict(gpu_graphs="dispatch"), chips={"gpu": 1}),
    Program("mislas2", MISLAS, "classifier"),
    Program("mislas2-bf16", MISLAS + ",precision=bf16", "classifier"),
    Program("reslt", "cifar100_lt:method=reslt,imbalance=100", "reslt"),
    Program("drolt2", "cifar100_lt:method=drolt,imbalance=100", "dro"),
    Program("trades", "cifar100:method=trades,model=preact18", "trades"),
    Program("lbgat", "cifar100:method=lbgat,precision=bf16", "lbgat"),
    Program("resnet50", "inat18:method=mislas,precision=bf16", "features", dict(batch_size=1024), {"tpu": 8, "gpu": 8}),
    Program("evaluation", MISLAS, ""),
)

# {figure: its heading}, in the order of the table
HEADINGS = {
    "all_reduces": "all-reduces",
    "all_reduce_mb": "MB",
    "other_collectives": "other collectives",
    "kernels": "kernels",
    "graphs": "graphs",
    "launches": "launches",
    "temporaries_mb": "temporaries, MB",
    "bf16_sums": "bf16 sums",
    "scatters": "scatters",
    "host_transfers": "host transfers",
    "dynamic_loops": "loops that data end",
    "wide_windows": "wide windows",
    "gflop": "GFLOP",
    "gb": "GB",
    "least_ms": "at least, ms",
    "xla_ms": "by XLA, ms",
}


class Bound(NamedTuple):
    most: float
    why: str


# Bounds of every program on every platform, also with --tiny.
COMMON = {
    "other_collectives": Bound(0, "each device has all parameters and a part of the batch"),
    "bf16_sums": Bound(0, "8 bits cannot hold a sum over a batch: gradients point elsewhere"),
    "scatters": Bound(0, "an accelerator applies the updates sequentially, in any order"),
    "host_transfers": Bound(0, "a step must not wait for the host"),
    "dynamic_loops": Bound(0, "a GPU's host would wait for each iteration"),
    "wide_windows": Bound(
        0, "weight gradients go to cuDNN as backward-filter convolutions, without windows as wide as the map"
    ),
}
# Exceptions.
EXCEPT: dict[tuple[str, str], dict[str, Bound]] = {
    ("drolt2", "tpu"): {
        "other_collectives": Bound(1, "the loss compares the batch's features, 32 KB, with each other")
    },
    ("resnet50", "tpu"): {
        "scatters": Bound(1, "max-pooling by windows: slices take a TPU more memory and, by XLA's estimate, more time")
    },
}
WHY = {
    "all_reduces": "devices wait for each other: once for each batch norm and direction, once for all gradients",
    "all_reduce_mb": "gradients cross the links once, statistics are small",
    "kernels": "the time of a small step is proportional to its kernels",
    "launches": "a GPU waits for its host at each launch",
    "temporaries_mb": "limits the batch on a device",
}
# Bounds of the figures of WHY, in that order: about a tenth above the compiled program when the bound was set.
MOST: dict[tuple[str, str], tuple[float | None, ...]] = {
    ("mislas1", "tpu"): (67, 2.1, 580, None, 250),
    ("mislas1-bf16", "tpu"): (67, 1.1, 550, None, 170),
    ("mislas1-other", "tpu"): (None, None, 2200, None, 310),
    ("mislas1-seeds", "tpu"): (0, 0, 2200, None, 310),
    ("mislas2", "tpu"): (36, 0.04, 360, None, 160),
    ("mislas2-bf16", "tpu"): (36, 0.04, 360, None, 160),
    ("reslt", "tpu"): (69, 2.1, 630, None, 250),
    ("drolt2", "tpu"): (73, 2.1, 860, None, 260),
    ("trades", "tpu"): (60, 50, 3400, None, 1400),  # a guess from lbgat; it did not compile within ten minutes
    ("lbgat", "tpu"): (67, 130, 3400, None, 1400),
    ("resnet50", "tpu"): (103, 130, 2500, None, 5100),
    ("evaluation", "tpu"): (0, 0, 83, None, 10),
    ("mislas1", "gpu"): (None, None, 520, 181, 350),
    ("mislas1-bf16", "gpu"): (None, None, 570, 181, 210),
    ("mislas1-other", "gpu"): (67, 2.1, 750, 631, 51),
    ("mislas1-vmap", "gpu"): (None, None, 550, 250, 1400),
    ("mislas1-graph", "gpu"): (None, None, 520, 3, 350),
    ("mislas1-dispatch", "gpu"): (None, None, 520, 0, 350),
    ("mislas2", "gpu"): (None, None, 240, 131, 30),
    ("mislas2-bf16", "gpu"): (None, None, 270, 72, 35),
    ("reslt", "gpu"): (None, None, 540, 181, 350),
    ("drolt2", "gpu"): (None, None, 570, 191, 350),
    ("trades", "gpu"): (None, None, 1700, 1201, 1400),
    ("lbgat", "gpu"): (None, None, 3500, 2101, 2800),
    ("resnet50", "gpu"): (105, 130, 1500, 1101, 7500),
    ("evaluation", "gpu"): (None, None, 110, 95, 120),
}
BOUNDS = {
    key: {name: Bound(most, why) for (name, why), most in zip(WHY.items(), row, strict=True) if most is not None}
    for key, row in MOST.items()
}


INATURALIST = "i_naturalist2018"  # the data set whose images stay on disk


class Missing(Exception):
    """A compiler is not installed."""


def devices(platform: str, count: int) -> list[jax.Device]:
    """Describe devices to compile for. Raise Missing if there is no compiler."""
    if not installed(platform):
        raise Missing(f'no XLA for {platform} here ({PACKAGES[platform]}): pip install -e ".[aot]"')
    if platform == "tpu":
        return topologies.get_topology_desc(TOPOLOGIES["tpu"], platform="tpu").devices[:count]
    described: dict[str, Any] = dict(topology=f"1x1x{count}", target_config=TARGET.read_text())
    return topologies.get_topology_desc("", platform="cuda", **described).devices


def installed(platform: str) -> bool:
    package = MODULES[platform].partition(".")[0]
    return importlib.util.find_spec(package) is not None and importlib.util.find_spec(MODULES[platform]) is not None


def set_up() -> None:
    """Let JAX run on a CPU, and the TPU's compiler look for no TPU. Call it before JAX starts."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may compile
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("jax_plugins.xla_cuda13").setLevel(logging.ERROR)  # it warns that it cannot run programs


def settings_of(program: Program, platform: str, tiny: bool) -> dict[str, Any]:
    """Return the config of a program."""
    file, _, arguments = program.config.partition(":")
    config = importlib.import_module(f"configs.{file}").get_config(arguments)
    with config.unlocked():
        config.update(dict(program.settings))
        for net in ("model", "guide"):
            if config.get(net):
                config[net].platform = platform
    values = config.to_dict()
    return _shrunk(values) if tiny else values


def _shrunk(config: dict[str, Any]) -> dict[str, Any]:
    small = dict(
        resnet_cifar=dict(depth=8, width=8),
        wide_resnet=dict(depth=10, width=1),
        preact_resnet=dict(depth=18, width=8),
        resnet=dict(depth=10, width=8),
    )
    for net in ("model", "guide"):
        if config.get(net):
            config[net].update(small[config[net]["name"]])
    config.update(batch_size=64, eval_batch_size=64)
    for name in config["stages"]:
        if "attack" in config[name]["method"]:
            config[name]["method"]["attack"]["num_steps"] = 2
    if config["data"]["name"] == INATURALIST:
        config["data"].update(size=64, resize=72, classes=50, max_count=50)
    return config


class _NoFiles:
    """Files that are never read."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> bytes:
        raise OSError("these files are never read")

    def name(self, index: int) -> str:
        return str(index)

    def identity(self, index: int) -> bytes:
        return b"%16d" % index


def _made_up(name: str, *_: object) -> Images | Stored:
    """Return white images, or files that are never read, with the counts and shape of a data set."""
    if name == INATURALIST:
        counts = np.full(8142, 53)  # sums to 437,513
        counts[0] += 1000 - 53
        counts[-1] = 2
        counts[1 : 1 + 437_513 - counts.sum()] += 1
        labels = np.repeat(np.arange(8142, dtype=np.int32), counts)
        test = np.repeat(np.arange(8142, dtype=np.int32), 3)
        return Stored(_NoFiles(len(labels)), labels, _NoFiles(len(test)), test, tuple(map(str, range(8142))))
    labels, test = np.repeat(np.arange(100, dtype=np.int32), 500), np.repeat(np.arange(100, dtype=np.int32), 100)
    white = np.full((1, 32, 32, 3), 255, np.uint8)
    shapes = [np.broadcast_to(white, (len(x), 32, 32, 3)) for x in (labels, test)]
    return Images(shapes[0], labels, shapes[1], test, tuple(map(str, range(100))))


@contextlib.contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """Trace inside the block as on devices of `platform`, with made-up images."""
    with (
        mock.patch.object(jax, "default_backend", lambda: platform),
        mock.patch.object(xla, "cpu_options", dict),
        mock.patch.object(experiments.data, "load", _made_up),
    ):
        yield


def lower(program: Program, platform: str, *, tiny: bool = False) -> jax.stages.Lowered:
    """Lower a program for its devices. Raise Missing if there is no compiler."""
    described = devices(platform, program.chips[platform])
    with traced_for(platform):
        run = parse(settings_of(program, platform, tiny))
        experiment = experiments.set_up(run, None)
        mesh = parallel.make_mesh(described, replicas=run.replicas)
        experiment = experiment._replace(mesh=mesh)
        if not program.stage:
            return _evaluation(run, experiment)
        compiled = experiments.build_stage(experiment, run.stages[program.stage])
        state = jax.eval_shape(compiled.init, experiments.seeds(run), experiments.fresh_shapes(experiment))
        state = _placed(state, parallel.state_sharding(mesh, run.replicas))
        return compiled.run.lower(state, _placed_on(mesh, experiments.source_shapes(experiment, STEPS)), STEPS)


def _evaluation(run: RunConfig, experiment: experiments.Experiment) -> jax.stages.Lowered:
    """Lower the dispatch that evaluates the test images on the device."""
    functions: list[Any] = []

    def keep(function: Any, **settings: Any) -> Any:
        functions.append(jax.jit(function, **settings))
        return functions[-1]

    with mock.patch.object(xla, "jit", keep):
        evaluate.evaluator(experiment.nets, experiment.mesh)
    variables = _placed(experiments.fresh_shapes(experiment), parallel.replicated(experiment.mesh))
    size = experiment.test_set.size
    batch = evaluate.shared_batch(run.eval_batch_size, size, experiment.mesh)
    shape, split = (-(-size // batch), batch), parallel.split_batch(experiment.mesh, axis=1)
    images = jax.ShapeDtypeStruct((*shape, *experiment.image_shape), jnp.uint8, sharding=split)
    labels = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=split)
    return functions[0].lower((variables, None), (images, labels))


def _placed(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _placed_on(mesh: Mesh, tree: Any) -> Any:
    """Keep shardings on `mesh`; place all other shapes on each of its devices."""

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        is_placed = isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if is_placed else parallel.replicated(mesh))

    return jax.tree.map(placed, tree)


class Compiled(NamedTuple):
    stablehlo: str
    hlo: str
    temporaries: int  # bytes
    thunks: str  # of a GPU's program; else ""
    thunk_metadata: str
    seconds: float


def compile_it(lowered: jax.stages.Lowered, platform: str) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        program = lowered.compile(compiler_options={"xla_dump_to": folder} if platform == "gpu" else None)
        seconds = time.monotonic() - began
        thunks, metadata = (
            "".join(path.read_text() for path in sorted(Path(folder).glob(f"*.{name}.txt")))
            for name in ("thunk_sequence_after_thunk_passes", "thunk_metadata")
        )
    memory: Any = program.memory_analysis()
    return Compiled(lowered.as_text(), program.as_text() or "", memory.temp_size_in_bytes, thunks, metadata, seconds)


def figures(found: Compiled, platform: str, chips: int, batch_size: int) -> dict[str, Any]:
    """Return {figure: number} of a step, None if the platform has none, and details of "collectives".

    `batch_size` is that of all devices; a sum over at least as many numbers counts as a sum over a batch.
    """
    module = hlo.parse(found.hlo)
    step = hlo.step(module)
    moved = hlo.collectives(module, step)
    estimate = hlo.estimate(module, step, CHIPS[platform], chips)
    started = hlo.launches(module, found.thunks, found.thunk_metadata) if found.thunks else None
    reduced = moved.get("all-reduce", hlo.Moved(0, 0, ()))
    on_gpu = platform == "gpu"
    return {
        "all_reduces": reduced.count,
        "all_reduce_mb": reduced.size / 1e6,
        "other_collectives": sum(each.count for kind, each in moved.items() if kind != "all-reduce"),
        "kernels": hlo.kernels(module, step),
        "graphs": started.graphs if started else None,
        "launches": started.all if started else None,
        "temporaries_mb": found.temporaries / 1e6,
        "bf16_sums": hlo.narrow_sums(found.stablehlo, batch_size),
        "scatters": hlo.scatters(found.stablehlo),
        "host_transfers": hlo.host_transfers(module, step),
        "dynamic_loops": hlo.dynamic_loops(module, step) if on_gpu else None,
        "wide_windows": hlo.wide_windows(module, step) if on_gpu else None,
        "gflop": estimate.operations / 1e9,
        "gb": estimate.bytes / 1e9,
        "least_ms": 1e3 * estimate.seconds,
        "xla_ms": 1e3 * estimate.cycles if estimate.cycles else None,
        "collectives": {kind: each._asdict() for kind, each in moved.items()},
    }


def broken(name: str, platform: str, numbers: Mapping[str, Any], *, tiny: bool = False) -> list[str]:
    """Return a line for each figure of a program that is above its bound."""
    bounds = {**COMMON, **EXCEPT.get((name, platform), {})}
    bounds |= {} if tiny else BOUNDS.get((name, platform), {})
    return [
        f"{name} on {platform}: {HEADINGS[figure]} = {numbers[figure]:g}, bound {bound.most:g}: {bound.why}"
        for figure, bound in bounds.items()
        if numbers[figure] is not None and numbers[figure] > bound.most
    ]


def table(platform: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    grid = Table(title=f"a step, for {TOPOLOGIES[platform]}, each figure of one device")
    grid.add_column("program")
    grid.add_column("chips", justify="right")
    shown = [figure for figure in HEADINGS if any(row["figures"][figure] is not None for row in rows)]
    for figure in shown:
        grid.add_column(HEADINGS[figure], justify="right")
    for row in rows:
        grid.add_row(row["program"], str(row["chips"]), *(_short(row["figures"][figure]) for figure in shown))
    return grid


def _short(number: float | None) -> str:
    if number is None:
        return "-"
    digits = 0 if number == int(number) else max(0, 2 - int(math.log10(max(abs(number), 1e-9))))
    return f"{number:,.{digits}f}"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__.splitlines()[0])
    names = [program.name for program in PROGRAMS]
    parser.add_argument(
        "--only", action="append", choices=names, metavar="NAME", help=f"may be repeated: {', '.join(names)}"
    )
    parser.add_argument("--platform", choices=PLATFORMS, help="default: both")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, a minute or two each")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--keep", type=Path, help="folder for the compiled programs' text")
    args = parser.parse_args(argv)
    set_up()
    origin: dict[str, Any] = {**provenance.of("compiled", argv), "device": "none: compiled only", "num_devices": 0}
    origin["versions"] = {**origin["versions"], **{name: _version(name) for name in PACKAGES.values()}}
    console, rows, failed = Console(width=None if sys.stdout.isatty() else 240), [], []
    for platform in [args.platform] if args.platform else PLATFORMS:
        for program in PROGRAMS:
            if platform not in program.chips or (args.only and program.name not in args.only):
                continue
            try:
                lowered = lower(program, platform, tiny=args.tiny)
            except Missing as error:
                parser.error(str(error))
            found = compile_it(lowered, platform)
            if args.keep:
                _keep(args.keep / f"{program.name}-{platform}", found)
            size = settings_of(program, platform, args.tiny)["batch_size"]
            numbers = figures(found, platform, program.chips[platform], size)
            above = broken(program.name, platform, numbers, tiny=args.tiny)
            console.print(f"{program.name} for {platform}: compiled in {found.seconds:.0f} s", highlight=False)
            rows.append({"program": program.name, "platform": platform, "chips": program.chips[platform]})
            rows[-1].update(compile_seconds=found.seconds, figures=numbers, broken=above)
            failed += above
            provenance.write(args.json, {**origin, "tiny": args.tiny, "programs": rows})
    for platform in PLATFORMS:
        if compiled := [row for row in rows if row["platform"] == platform]:
            console.print(table(platform, compiled))
    for line in failed:
        console.print(line, highlight=False, soft_wrap=True)
    return 1 if failed else 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _keep(folder: Path, found: Compiled) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("stablehlo", "hlo", "thunks", "thunk_metadata"):
        (folder / f"{name}.txt").write_text(getattr(found, name))


if __name__ == "__main__":
    sys.exit(main())
