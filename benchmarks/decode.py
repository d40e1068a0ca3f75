"""Measure images decoded and cropped for each second of CPU time, in several ways. From the checkout's root:

    python -m benchmarks.decode --root=DIR            # a folder of images with DIR/train/<class>/*.jpg
    python -m benchmarks.decode --made_up             # 500x375 JPEGs of smooth noise, 95 KB each
    python -m benchmarks.decode --made_up=800x600     # 245 KB each, near iNaturalist's 260 KB
    python -m benchmarks.decode --stream              # the pipeline's own cost, by batch size

There are six ways from the bytes of a file to a square of 224 pixels, a random window of the image:

- ltjax: simplejpeg and OpenCV, see `ltjax.data.decode`;
- upright: the same, and reads the orientation tag, as for folders of images;
- opencv: the same windows, decoded by OpenCV alone;
- torchvision: its RandomResizedCrop if it is installed; otherwise Pillow's decoder, `crop` and `resize`;
- pillow: its decoder and `resize(box=...)`, which filters only the window;
- decoding alone: by simplejpeg, without cropping.

They take turns on one thread, with a chunk of images each. The table has medians over the turns, and ratios to ltjax's.
It counts the thread's CPU time, so other work on the machine matters little: it only shares caches and memory. Then
`ltjax.data.pipeline` is measured with a thread for each core, as in training.

--stream passes 64x64 JPEGs, which decode in almost no time, through `ltjax.data.pipeline` as in training: 437,513
images, random windows enlarged to 224 pixels, chunks of four batches. It counts images for each second of CPU time of
all threads, and the time in Python: reading a file, drawing a window, and calling decoder and resizing, without their
own time. Threads do this part one at a time, so it bounds the speed of a process with any number of cores.
"""

import argparse
import contextlib
import io
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import jax
import numpy as np
import simplejpeg
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks import provenance
from ltjax.data import decode, image_folder, pipeline, samplers
from ltjax.data.decode import View
from ltjax.data.source import Stored
from ltjax.engine import feed
from ltjax.system import parallel
from ltjax.system.cores import num_cores
from ltjax.types import UserError

RandomResizedCrop: Any = None
with contextlib.suppress(ImportError, RuntimeError):  # RuntimeError: built for another PyTorch
    from torchvision.transforms import RandomResizedCrop  # pyrefly: ignore[missing-import]

VIEW = View(size=224, resize=256)
BATCH_SIZE = 64


def made_up(count: int, width: int, height: int) -> list[bytes]:
    """Make JPEGs of half a byte a pixel: smoothed noise in patches of 4 and of 31 pixels."""
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        patches = ((-(-height // size), -(-width // size), 3) for size in (31, 4))
        noise = [rng.integers(0, 255, shape).astype(np.uint8) for shape in patches]
        pixels = sum(0.5 * cv2.resize(each, (width, height), interpolation=cv2.INTER_CUBIC) for each in noise)
        files.append(cv2.imencode(".jpg", np.asarray(pixels, np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes())
    return files


def by_ltjax(content: bytes, key: np.uint32) -> np.ndarray:
    return decode.random_resized_crop(decode.decode(content), key, VIEW)


def by_ltjax_upright(content: bytes, key: np.uint32) -> np.ndarray:
    return decode.random_resized_crop(decode.decode(content, upright=True), key, VIEW)


def by_opencv(content: bytes, key: np.uint32) -> np.ndarray:
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    return decode.random_resized_crop(np.asarray(pixels), key, VIEW)


def by_torchvision(content: bytes, key: np.uint32) -> np.ndarray:
    image = Image.open(io.BytesIO(content)).convert("RGB")
    if RandomResizedCrop is not None:
        return np.asarray(RandomResizedCrop(VIEW.size, (VIEW.min_area, 1.0), decode.SHAPES)(image))
    return np.asarray(image.crop(window(image, key)).resize((VIEW.size, VIEW.size), Image.Resampling.BILINEAR))


def by_pillow(content: bytes, key: np.uint32) -> np.ndarray:
    image = Image.open(io.BytesIO(content)).convert("RGB")
    return np.asarray(image.resize((VIEW.size, VIEW.size), Image.Resampling.BILINEAR, box=window(image, key)))


def window(image: Image.Image, key: np.uint32) -> tuple[int, int, int, int]:
    """Draw a random window like torchvision: left, top, right, bottom."""
    rng = np.random.default_rng(int(key))
    for _ in range(decode.ATTEMPTS):
        area = rng.uniform(VIEW.min_area, 1) * image.width * image.height
        shape = np.exp(rng.uniform(*np.log(decode.SHAPES)))
        width, height = round((area * shape) ** 0.5), round((area / shape) ** 0.5)
        if width <= image.width and height <= image.height:
            break
    else:
        width, height = image.size
    left, top = rng.integers(0, image.width - width + 1), rng.integers(0, image.height - height + 1)
    return int(left), int(top), int(left + width), int(top + height)


def decoding_alone(content: bytes, key: np.uint32) -> np.ndarray:
    del key
    return simplejpeg.decode_jpeg(content, colorspace="RGB")


WAYS: dict[str, Callable[[bytes, np.uint32], np.ndarray]] = {
    "ltjax": by_ltjax,
    "upright": by_ltjax_upright,
    "opencv": by_opencv,
    "torchvision": by_torchvision,
    "pillow": by_pillow,
    "decoding alone": decoding_alone,
}


def rates(files: list[bytes], *, turns: int, chunk: int) -> dict[str, float]:
    """Return {way: images for each second of CPU time}."""
    cv2.setNumThreads(0)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(turns + 1):  # the first one warms up
        for name, way in WAYS.items():
            began = time.thread_time()
            for number in range(turn * chunk, (turn + 1) * chunk):
                way(files[number % len(files)], np.uint32(number))
            seconds[name].append((time.thread_time() - began) / chunk)
    return {name: 1 / statistics.median(each[1:]) for name, each in seconds.items()}


class Held:
    """Files in memory, for the pipeline, in a cycle."""

    def __init__(self, files: list[bytes]):
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> bytes:
        return self._files[index % len(self._files)]

    def name(self, index: int) -> str:
        return f"image {index}"

    def identity(self, index: int) -> bytes:
        return b"%16d" % index


def pipeline_rates(files: list[bytes], batches: int) -> tuple[float, float]:
    """Count images on the device for each second, and for each second of CPU time of all threads."""
    labels = np.zeros(len(files), np.int32)

    def positions(step: int) -> np.ndarray:
        return (step * BATCH_SIZE + np.arange(BATCH_SIZE)) % len(files)

    def cut(image: np.ndarray, draws: np.ndarray, out: np.ndarray) -> np.ndarray:
        return decode.random_window(image, draws, VIEW, out)

    plan = pipeline.Plan(Held(files), labels, positions, cut, VIEW, np.uint32(0), BATCH_SIZE, batches + 2)
    with pipeline.Stream(plan, parallel.split_batch(parallel.make_mesh(jax.devices()[:1]), axis=1)) as stream:
        stream.take(0, 1, 1)
        stream.take(1, 1, 1)
        began, computed = time.perf_counter(), time.process_time()
        for step in range(2, batches + 2):
            jax.block_until_ready(stream.take(step, 1, int(step < batches + 1)))
        took = time.perf_counter() - began, time.process_time() - computed
    return batches * BATCH_SIZE / took[0], batches * BATCH_SIZE / took[1]


def inaturalist(files: Any) -> Stored:
    """Return iNaturalist 2018's numbers of images and classes, with `files` as its images."""
    counts = np.full(8142, 53)
    counts[0] += 437_513 - counts.sum()
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    return Stored(files, labels, files, labels, tuple(map(str, range(len(counts)))))


def stream_plan(files: Any, batch_size: int) -> pipeline.Plan:
    data = inaturalist(files)
    sampler, order = samplers.create("instance_balanced"), np.arange(len(data.train_labels))
    sizes = dict(batch_size=batch_size, num_steps=10**6, view=VIEW)
    return pipeline.training(data, order, np.bincount(data.train_labels), sampler, np.uint32(0), **sizes)


def stream_rates(content: bytes, batch_size: int, images: int) -> tuple[float, float]:
    """Measure `pipeline_rates` for about `images` images of the same content, in chunks as in training."""
    steps, plan = feed.MOST_STREAMED_STEPS, stream_plan(Held([content]), batch_size)
    chunks = max(2, images // (batch_size * steps))
    with pipeline.Stream(plan, parallel.split_batch(parallel.make_mesh(jax.devices()[:1]), axis=1)) as stream:
        jax.block_until_ready(stream.take(0, steps, 0))
        began, computed = time.perf_counter(), time.process_time()
        for number in range(1, chunks + 1):
            jax.block_until_ready(stream.take(number * steps, steps, steps if number < chunks else 0))
        took = time.perf_counter() - began, time.process_time() - computed
    return chunks * steps * batch_size / took[0], chunks * steps * batch_size / took[1]


def python_seconds(content: bytes, batch_size: int, turns: int) -> float:
    """Time a thread's work in Python for an image, by the median over turns of a batch each."""
    tasks = np.split(np.arange(batch_size), range(pipeline.TASK_ROWS, batch_size, pipeline.TASK_ROWS))
    seconds, most = [], len(tasks[0])
    images, labels = np.empty((most, VIEW.size, VIEW.size, 3), np.uint8), np.empty(most, np.int32)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "image.jpg").write_bytes(content)
        plan = stream_plan(image_folder.FilesInFolder(Path(folder), ["image.jpg"] * 437_513, np.empty(0)), batch_size)
        pixels = decode.decode(content)
        with (
            mock.patch.object(simplejpeg, "decode_jpeg", lambda *_, **__: pixels),
            mock.patch.object(cv2, "resize", lambda image, size, dst, interpolation: dst),
        ):
            for step in range(turns + 1):
                began = time.thread_time()
                positions = plan.positions(step)
                for rows in tasks:
                    pipeline.fill(plan, step, rows, positions[rows], images[: len(rows)], labels[: len(rows)])
                seconds.append((time.thread_time() - began) / batch_size)
    return statistics.median(seconds[1:])


def stream(console: Console, batch_sizes: list[int], images: int, turns: int) -> dict[str, Any]:
    """Measure --stream, with batch sizes in turns; print and return the figures."""
    content = made_up(1, 64, 64)[0]
    turns_of: dict[int, list[tuple[float, float]]] = {size: [] for size in batch_sizes}
    for _ in range(turns):
        for size in batch_sizes:
            turns_of[size].append(stream_rates(content, size, images))
    python = python_seconds(content, max(batch_sizes), turns)
    rates = {size: [statistics.median(each) for each in zip(*rates, strict=True)] for size, rates in turns_of.items()}
    table = Table()
    for column in ("batch", "images/s", "images/CPU s"):
        table.add_column(column, justify="right")
    for size, (whole, computing) in rates.items():
        table.add_row(f"{size:,}", f"{whole:,.0f}", f"{computing:,.0f}")
    console.print(f"JPEGs of 64x64 and {len(content) / 1000:.1f} KB to windows of {VIEW.size} pixels")
    console.print(table)
    console.print(f"Python's part: {python * 1e6:.0f} us an image, so at most {1 / python:,.0f} images/s a process")
    return {
        "images_per_second": {size: whole for size, (whole, _) in rates.items()},
        "images_per_cpu_second": {size: computing for size, (_, computing) in rates.items()},
        "python_seconds_per_image": python,
    }


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="a folder of images, as for configs/image_folder.py")
    parser.add_argument("--made_up", nargs="?", const="500x375", metavar="WIDTHxHEIGHT", help="synthetic images")
    parser.add_argument("--stream", action="store_true", help="the pipeline's own cost")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[256, 1024], help="with --stream")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--chunk", type=int, default=100, help="images a turn")
    parser.add_argument("--batches", type=int, default=20, help="batches of 64 images through the pipeline")
    parser.add_argument("--out", type=Path)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = arguments_parser()
    args = parser.parse_args(arguments)
    if (args.made_up is not None) + (args.root is not None) + args.stream != 1:
        parser.error("give one of --root=DIR, --made_up and --stream")
    size = re.fullmatch(r"(\d+)x(\d+)", args.made_up or "1x1")
    if not size:
        parser.error(f"--made_up={args.made_up}: a size in pixels such as 800x600")
    console, origin = Console(), provenance.of("decode", arguments)
    if args.stream:
        numbers = stream(console, args.batch_size, images=16 * args.turns * args.chunk, turns=args.turns)
        provenance.write(args.out, {**origin, **numbers, "threads": num_cores()})
        return
    try:
        stored = None if args.made_up else image_folder.load(root=args.root)
    except UserError as error:
        parser.error(str(error))
    files = (
        made_up(200, int(size[1]), int(size[2]))
        if stored is None
        else [stored.train_files[i] for i in range(len(stored.train_files))]
    )
    sizes = [simplejpeg.decode_jpeg_header(content)[:2] for content in files]
    height, width = (int(statistics.median(side)) for side in zip(*sizes, strict=True))
    found, cores = rates(files, turns=args.turns, chunk=args.chunk), num_cores()
    whole, computing = pipeline_rates(files, args.batches)
    kilobytes = statistics.median(map(len, files)) / 1000
    images = f"{len(files)} JPEGs, {width}x{height} and {kilobytes:.0f} KB by the median"
    console.print(f"{images}, to windows of {VIEW.size} pixels, one thread")
    table = Table()
    for column in ("", "images/CPU s", "to ltjax"):
        table.add_column(column, justify="left" if not column else "right")
    for name, rate in found.items():
        table.add_row(name, f"{rate:,.0f}", f"{rate / found['ltjax']:.2f}")
    console.print(table)
    console.print(f"pipeline, {cores} threads: {whole:,.0f} images/s, {computing:,.0f} for each second of CPU time")
    numbers = {"images": len(files), "median_size": [height, width], "median_kilobytes": kilobytes}
    numbers |= {"images_per_cpu_second": found, "torchvision": RandomResizedCrop is not None, "threads": cores}
    numbers |= {"pipeline_images_per_second": whole, "pipeline_images_per_cpu_second": computing}
    provenance.write(args.out, {**origin, **numbers})


if __name__ == "__main__":
    main()
