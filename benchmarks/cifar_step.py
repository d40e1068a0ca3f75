"""The training step of CIFAR-100-LT in numbers, for both stages of MiSLAS. From the root of the checkout:

    python -m benchmarks.cifar_step                                         # ResNet-32, batch 128: minutes on a CPU
    python -m benchmarks.cifar_step --depth=8 --batch_size=32 --max_count=50        # a quick look
    python -m benchmarks.cifar_step --dtype=bfloat16 --out=step.json

The images are random: the speed does not depend on what they show. Per stage it measures

- images a second: steps in the compiled loop that training dispatches, over the time until the device is done;
- that step beside the same step dispatched alone, in turns, by the median of `--repeats`. XLA makes of a loop of one
  step the step itself, so `run(state, source, 1)` is it. A dispatch waits for no other, only the last for the device;
- dispatches of an epoch: calls of the compiled function while `ltjax.train.train` trains one;
- image bytes from host to device between the epoch's first dispatch and the end of its last, as `jax.transfer_guard`
  reports them, for implicit and explicit transfers alike. Before, a deliberate transfer must show up in that report;
- operations an image, by XLA and by hand: see `benchmarks/flops.py`.
"""

import argparse
import contextlib
import io
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
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
from ltjax import config as config_module
from ltjax import problem, stage, train
from ltjax.data.source import Images


def write_random_images(data_dir: Path, *, per_class: int, num_classes: int = 100, num_test: int = 1000) -> None:
    """`<data_dir>/cifar100.npz` as `ltjax.data.cifar` reads it: noise in the shape of CIFAR-100."""
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
    *, depth: int, width: int = 16, batch_size: int = 128, dtype: str = "float32", steps: int = 0, max_count: int = 500
) -> dict[str, Any]:
    """`configs/cifar100_lt.py:method=mislas` with one epoch of each stage; arguments as on the command line."""
    config = cifar100_lt.get_config(f"method=mislas,imbalance={min(100, max_count)}")  # no class is empty
    config.model.update(depth=depth, width=width, dtype=dtype)
    config.update(batch_size=batch_size, dispatch_steps=steps, epochs=1)
    config.classifier.epochs = 1
    return config.to_dict()


class Transfer(NamedTuple):
    shape: tuple[int, ...]
    size: int | None  # bytes; None where the guard does not say what it saw


@contextlib.contextmanager
def host_to_device() -> Iterator[list[Transfer]]:
    """Within the block, what goes from host to device, implicitly or by `device_put`; the list fills at its end.

    `jax.transfer_guard` writes a line on the process's stderr for each transfer to each device, whole sizes where a
    transfer is split: an upper bound.
    """
    found: list[Transfer] = []
    sys.stderr.flush()
    with tempfile.TemporaryFile() as log:
        stderr = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            with jax.transfer_guard_host_to_device("log_explicit"):
                yield found
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
                    found.append(Transfer(shape, jnp.dtype(match[1]).itemsize * math.prod(shape)))
                else:
                    found.append(Transfer((), None))


def check_the_guard(image_shape: tuple[int, ...], batch_size: int) -> None:
    """Raises RuntimeError where a batch of images can go to the device without being reported."""
    batch = np.zeros((batch_size, *image_shape), np.uint8)
    with host_to_device() as put:
        jax.device_put(batch).block_until_ready()
    first = jax.jit(lambda images: images[0, 0, 0, 0])
    with host_to_device() as passed:
        first(batch).block_until_ready()
    if not passed or sum(t.size or 0 for t in put) < batch.nbytes:
        raise RuntimeError(
            f"this JAX does not report transfers as it should: {put}, {passed}, {batch.nbytes} bytes each"
        )


def time_steps(built: stage.Stage, state: stage.State, source: stage.Resident, steps: int, repeats: int):
    """Seconds a step, [repeats] each: of a dispatch of `steps`, and of `steps` dispatches of one."""

    def scanned(state):
        return built.run(state, source, steps)

    def single(state):
        metrics = {}
        for _ in range(steps):
            state, metrics = built.run(state, source, 1)
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


def train_one_epoch(config, data_dir: Path, built: dict[str, stage.Stage]):
    """Train one epoch of each stage, by `ltjax.train.train` -> {stage: (dispatches, transfers to the device)}.

    Transfers are those from the start of a stage's first dispatch to the end of its last.
    """
    found: dict[str, tuple[list[int], list[Transfer]]] = {}
    with contextlib.ExitStack() as capture:

        def counted_stage(run, name, settings, problem):
            def counted(state, source, num_steps):
                if name not in found:
                    found[name] = ([], capture.enter_context(host_to_device()))
                found[name][0].append(num_steps)
                state, metrics = built[name].run(state, source, num_steps)
                if sum(found[name][0]) == built[name].num_steps:
                    jax.block_until_ready(metrics)
                    capture.close()
                return state, metrics

            return built[name]._replace(run=counted)

        with (
            tempfile.TemporaryDirectory() as workdir,
            mock.patch.object(train, "build_stage", counted_stage),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            train.train(config, workdir, data_dir)
    return found


def measure(config, data_dir: Path, *, repeats: int, with_flops: bool) -> dict[str, Any]:
    """The numbers of both stages, {stage: {...}}, and what they were measured on."""
    run, stages = config_module.parse(config)
    ready = train.setup(run, data_dir)
    check_the_guard(ready.image_shape, run.batch_size)
    built = {name: train.build_stage(run, name, settings, ready) for name, settings in stages.items()}
    seconds, operations = {}, {}
    for name, settings in stages.items():
        if with_flops:
            operations[name] = flops.by_xla(run, name, settings, ready)
        steps = train.chunk_length(built[name].steps_per_epoch, run.dispatch_steps)
        state = built[name].init(train.seeds(run), train.initial_variables(run, name, ready))
        seconds[name] = time_steps(built[name], state, ready.train_data, steps, repeats)
    epochs = train_one_epoch(config, data_dir, built)

    numbers = {}
    for name, settings in stages.items():
        dispatches, transfers = epochs[name]
        images = [t.size for t in transfers if t.size is None or t.shape[-3:] == ready.image_shape]
        median = {key: statistics.median(values) for key, values in seconds[name].items()}
        numbers[name] = {
            "title": settings.title,
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
            trains = any("backbone" in path for path in built[name].trained)
            size = {key: run.model[key] for key in ("depth", "width")}
            by_hand = flops.by_hand(**size, num_classes=len(ready.class_names), backbone_trains=trains)
            numbers[name]["flops_per_image"] = {
                "by_xla": operations[name],
                "by_hand": by_hand,
                "xla_over_hand": operations[name] / by_hand,
            }
    return {
        "stages": numbers,
        "num_images": int(ready.split.class_counts.sum()),
    }


def table(numbers: dict[str, Any]) -> Table:
    model = numbers["config"]["model"]
    made = Table(
        title=f"ResNet-{model['depth']}, batch {numbers['config']['batch_size']}, {model['dtype']}, "
        f"{numbers['num_devices']} x {numbers['device']}"
    )
    made.add_column("")
    rows = list(numbers["stages"].values())
    for row in rows:
        made.add_column(row["title"], justify="right")

    def add(label, show):
        made.add_row(label, *(show(row) for row in rows))

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
    if all("flops_per_image" in row for row in rows):
        add("MFLOP an image, by XLA", lambda row: f"{row['flops_per_image']['by_xla'] / 1e6:.1f}")
        add("MFLOP an image, by hand", lambda row: f"{row['flops_per_image']['by_hand'] / 1e6:.1f}")
        add("XLA over hand", lambda row: f"{row['flops_per_image']['xla_over_hand']:.3f}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cifar_step", description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=32, help="of the ResNet: 6 n + 2")
    parser.add_argument("--width", type=int, default=16, help="channels of its first stage")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=0, help="to a dispatch; 0: what training takes")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each kind")
    parser.add_argument("--max_count", type=int, default=500, help="images of the largest class: shorter epochs")
    parser.add_argument("--no_flops", action="store_true", help="skip counting operations, which compiles for a CPU")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    problem.use_cpu_cores(args.batch_size)
    origin = provenance.of("cifar_step")
    config = one_epoch_config(
        depth=args.depth,
        width=args.width,
        batch_size=args.batch_size,
        dtype=args.dtype,
        steps=args.steps,
        max_count=args.max_count,
    )
    with tempfile.TemporaryDirectory() as data_dir:
        write_random_images(Path(data_dir), per_class=args.max_count)
        measured = measure(config, Path(data_dir), repeats=args.repeats, with_flops=not args.no_flops)
    numbers = {
        **origin,
        **measured,
        "images": "random",
        "config": config,
    }
    Console(width=None if sys.stdout.isatty() else 120).print(table(numbers))
    provenance.write(args.out, numbers)


if __name__ == "__main__":
    main()
