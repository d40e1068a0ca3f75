"""Images for each second of CPU time that are decoded and cut for training, several ways. From the checkout's root:

    python -m benchmarks.decode --root=DIR            # a folder of images with DIR/train/<class>/*.jpg
    python -m benchmarks.decode --made_up             # 500x375 JPEGs of smooth noise, 95 KB each
    python -m benchmarks.decode --made_up=800x600     # 245 KB each, near iNaturalist's 260 KB

Five ways from the bytes of a file to a square of 224 pixels, a random window of the image:

- ltjax: simplejpeg and OpenCV, see `ltjax.data.decode`;
- opencv: the same windows, decoded by OpenCV alone;
- torchvision: its RandomResizedCrop where it can be imported, else the same steps: Pillow's decoder, `crop`, `resize`;
- pillow: its decoder and `resize(box=...)`, which filters the window alone;
- decoding alone: by simplejpeg, without cutting.

They take turns, a chunk of images each, on one thread; the table has medians over the turns, and ratios to ltjax's.
Seconds are those that the thread was computing, so that other work on the machine counts little: it shares caches and
memory, and no more. Then `ltjax.data.pipeline` with a thread for each core: what training gets.
"""

import argparse
import contextlib
import io
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
import simplejpeg
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks import provenance
from ltjax import parallel
from ltjax.data import decode, image_folder, pipeline
from ltjax.data.decode import View
from ltjax.types import UserError

RandomResizedCrop: Any = None
with contextlib.suppress(ImportError, RuntimeError):  # RuntimeError: built for another PyTorch
    from torchvision.transforms import RandomResizedCrop  # pyrefly: ignore[missing-import]

VIEW = View(size=224, resize=256)
BATCH_SIZE = 64


def made_up(count: int, width: int, height: int) -> list[bytes]:
    """JPEGs of half a byte a pixel: noise in patches of 4 pixels and of 31, smoothed."""
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        patches = ((-(-height // size), -(-width // size), 3) for size in (31, 4))
        noise = [rng.integers(0, 255, shape).astype(np.uint8) for shape in patches]
        pixels = sum(0.5 * cv2.resize(each, (width, height), interpolation=cv2.INTER_CUBIC) for each in noise)
        files.append(cv2.imencode(".jpg", np.asarray(pixels, np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes())
    return files


def by_ltjax(content: bytes, key: np.uint32) -> np.ndarray:
    return decode.random_resized_crop(decode.decode(content), key, VIEW)


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
    """A random window as torchvision draws it: left, top, right, bottom."""
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
    "opencv": by_opencv,
    "torchvision": by_torchvision,
    "pillow": by_pillow,
    "decoding alone": decoding_alone,
}


def rates(files: list[bytes], *, turns: int, chunk: int) -> dict[str, float]:
    """{way: images for each second of CPU time}."""
    cv2.setNumThreads(0)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(turns + 1):  # the first one warms up
        for name, way in WAYS.items():
            began = time.thread_time()
            for number in range(turn * chunk, (turn + 1) * chunk):
                way(files[number % len(files)], np.uint32(number))
            seconds[name].append((time.thread_time() - began) / chunk)
    return {name: 1 / statistics.median(each[1:]) for name, each in seconds.items()}


class _Held:
    """Files in memory, for the pipeline."""

    def __init__(self, files: list[bytes]):
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> bytes:
        return self._files[index]

    def name(self, index: int) -> str:
        return f"image {index}"


def pipeline_rates(files: list[bytes], batches: int) -> tuple[float, float]:
    """Images that arrive on the device, for each second and for each second of CPU time of all threads."""
    labels = np.zeros(len(files), np.int32)

    def positions(step: int) -> np.ndarray:
        return (step * BATCH_SIZE + np.arange(BATCH_SIZE)) % len(files)

    def cut(image: np.ndarray, key: np.uint32) -> np.ndarray:
        return decode.random_resized_crop(image, key, VIEW)

    plan = pipeline.Plan(_Held(files), labels, positions, cut, VIEW.size, np.uint32(0), BATCH_SIZE, batches + 2)
    with pipeline.Stream(plan, parallel.split_batch(parallel.make_mesh(jax.devices()[:1]), axis=1)) as stream:
        stream.take(0, 1, 1)
        stream.take(1, 1, 1)
        began, computed = time.perf_counter(), time.process_time()
        for step in range(2, batches + 2):
            jax.block_until_ready(stream.take(step, 1, int(step < batches + 1)))
        took = time.perf_counter() - began, time.process_time() - computed
    return batches * BATCH_SIZE / took[0], batches * BATCH_SIZE / took[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="a folder of images, as configs/image_folder.py takes it")
    parser.add_argument("--made_up", nargs="?", const="500x375", metavar="WIDTHxHEIGHT", help="made-up images instead")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--chunk", type=int, default=100, help="images a turn")
    parser.add_argument("--batches", type=int, default=20, help="of 64 images, through the pipeline")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if (args.made_up is None) == (args.root is None):
        parser.error("give one of --root=DIR and --made_up")
    size = re.fullmatch(r"(\d+)x(\d+)", args.made_up or "1x1")
    if not size:
        parser.error(f"--made_up={args.made_up}: a size in pixels such as 800x600")
    console, origin = Console(), provenance.of("decode")
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
    found, cores = rates(files, turns=args.turns, chunk=args.chunk), len(os.sched_getaffinity(0))
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
