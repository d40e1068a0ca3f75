"""Measure the speed of `--mode=predict`, compared with decoding its images alone.

    python -m benchmarks.predict                      # 10,000 photographs of 500x375, 95 KB each, and a tiny network
    python -m benchmarks.predict --images=1000 --turns=1

The photographs are synthetic (see `benchmarks.decode`): 200 files under 10,000 names. The network is a ResNet-8 of
width 2 on 16 pixels, so that decoding is the limit. Four programs run in turns:

- decoding: a thread for each core reads, decodes and crops all files;
- prediction: `--mode=predict` on their folder, up to the rows of the table, with a compiled network;
- network alone: the same number of batches, sent to the device, classified and ranked;
- rows alone: the rows of the table, formatted and written.

Images/s are by the clock. CPU time is that of all threads of the process; other work on the machine affects it less.
Both are medians over the turns. The ratio is 1 if only decoding takes time.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import decode, provenance
from ltjax import models
from ltjax.data.decode import View
from ltjax.interop.weights import Weights
from ltjax.modes.predict import as_table
from ltjax.predictor import Model, files
from ltjax.system.cores import num_cores
from ltjax.types import Variables

DISTINCT = 200  # photographs with different contents
SETTINGS = dict(name="resnet_cifar", depth=8, width=2)
TOP_K = 5


def photographs(folder: Path, count: int, width: int, height: int) -> list[str]:
    """Write `count` names of a few different JPEGs, and return their paths."""
    distinct = decode.made_up(min(count, DISTINCT), width, height)
    paths = [folder / f"{number}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        if number < len(distinct):
            path.write_bytes(distinct[number])
        else:
            os.link(paths[number % len(distinct)], path)
    return list(map(str, paths))


def tiny_model(size: int, batch_size: int) -> Model:
    """Return an untrained network of 10 classes for images of `size` pixels."""
    net = models.create(num_classes=10, **SETTINGS)
    collections = net.init(jax.random.key(0), jnp.zeros((1, size, size, 3)))
    variables = Variables({"net": collections["params"]}, {"net": collections["batch_stats"]}, {})
    view = View(size, round(size * 8 / 7))
    return Model(Weights(variables, SETTINGS, 10), view=view, batch_size=batch_size, about="a tiny network")


def decode_all(paths: Sequence[str], view: View) -> None:
    """Read, decode and crop files with a thread for each core, 16 at a time."""

    def some(first: int) -> None:
        for path in paths[first : first + 16]:
            assert not isinstance(files.read_image(path, view, 3), str), path

    with ThreadPoolExecutor(num_cores()) as pool:
        for _ in pool.map(some, range(0, len(paths), 16)):
            pass


def predict_all(paths: Iterable[str], model: Model, out: Path) -> None:
    """Predict files, and write the table as `--mode=predict` does."""
    with open(out, "wb", buffering=0) as file:
        for batch in files.predictions(model, paths):
            file.write(as_table(batch, TOP_K).encode())


def classify(batches: int, model: Model, size: int) -> None:
    """Start black batches and wait for the ranked classes, one batch behind."""
    images = np.zeros((model.batch_size, size, size, model.channels), np.uint8)
    before: tuple[jax.Array, ...] = ()
    for _ in range(batches):
        ranked = files._rank(model.start(images), np.float32(model.temperature), model.shift, k=TOP_K)
        jax.block_until_ready(before)
        before = ranked
    jax.block_until_ready(before)


def write_rows(batch: Sequence[files.Prediction], times: int, out: Path) -> None:
    with open(out, "wb", buffering=0) as file:
        for _ in range(times):
            file.write(as_table(batch, TOP_K).encode())


def seconds(work: Callable[[], None]) -> tuple[float, float]:
    """Time `work`: by the clock, and in CPU time of all threads."""
    began = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--width", type=int, default=500, help="width of a photograph")
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--size", type=int, default=16, help="side of the network's images")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    console, origin = Console(), provenance.of("predict", arguments)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        photos.mkdir()
        paths = photographs(photos, args.images, args.width, args.height)
        model, table = tiny_model(args.size, args.batch_size), Path(folder) / "predictions.csv"
        startup, _ = seconds(lambda: predict_all(paths[: 2 * args.batch_size], model, table))  # compiles
        batches, view = -(-args.images // model.batch_size), model.view or View(args.size, args.size)
        batch = next(files.predictions(model, paths))
        ways: dict[str, Callable[[], None]] = {
            "decoding": lambda: decode_all(paths, view),
            "prediction": lambda: predict_all(files.find(str(photos)), model, table),
            "network alone": lambda: classify(batches, model, view.size),
            "rows alone": lambda: write_rows(batch, batches, table),
        }
        timings: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(args.turns):
            for name, work in ways.items():
                timings[name].append(seconds(work))
        kilobytes = statistics.median(os.path.getsize(path) for path in paths) / 1000
    medians = {name: [statistics.median(each) for each in zip(*turns, strict=True)] for name, turns in timings.items()}
    rates = {name: args.images / clock for name, (clock, _) in medians.items()}
    cpu = {name: 1e6 * cpu / args.images for name, (_, cpu) in medians.items()}
    grid = Table("", "images/s", "ratio", "CPU µs an image", "ratio")
    for name in ways:
        by_clock, by_cpu = rates[name] / rates["decoding"], cpu[name] / cpu["decoding"]
        grid.add_row(name, f"{rates[name]:,.0f}", f"{by_clock:.2f}", f"{cpu[name]:,.0f}", f"{by_cpu:.3f}")
    console.print(f"{args.images:,} JPEGs of {args.width}x{args.height}, {kilobytes:.0f} KB; {num_cores()} threads")
    console.print(grid)
    console.print(f"compiling and the first {2 * args.batch_size} images: {startup:.1f} s")
    numbers = {"images": args.images, "median_kilobytes": kilobytes, "threads": num_cores(), "startup_seconds": startup}
    numbers |= {"images_per_second": rates, "cpu_microseconds_per_image": cpu, "turns": timings}
    provenance.write(args.out, {**origin, **numbers})


if __name__ == "__main__":
    main()
