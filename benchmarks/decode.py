"""Images a second that one core decodes and cuts for training, several ways. From the checkout's root:

    python -m benchmarks.decode --root=DIR      # a folder of images with DIR/train/<class>/*.jpg, such as one's own
    python -m benchmarks.decode --made_up       # 500x375 JPEGs of smooth noise

Four ways from the bytes of a file to a square of 224 pixels, a random window of the image:

- ltjax: simplejpeg and OpenCV, see `ltjax.data.decode`;
- opencv: the same windows, decoded by OpenCV alone;
- pillow: torchvision's transform as people write it, Pillow's decoder and its `resize(box=...)`, bilinear;
- decoding alone: by simplejpeg, without cutting.

They take turns, a chunk of images each, on one thread; the table has medians over the turns, and ratios to ltjax's.
Then `ltjax.data.pipeline` with a thread for each core: what training gets.
"""

import argparse
import io
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

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

VIEW = View(size=224, resize=256)
BATCH_SIZE = 64


def made_up(count: int) -> list[bytes]:
    """JPEGs of 500x375 pixels, about as detailed as photographs."""
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        coarse, fine = (rng.integers(0, 255, (*size, 3)).astype(np.uint8) for size in ((12, 16), (94, 125)))
        pixels = sum(0.5 * cv2.resize(each, (500, 375), interpolation=cv2.INTER_CUBIC) for each in (coarse, fine))
        files.append(cv2.imencode(".jpg", np.asarray(pixels, np.uint8))[1].tobytes())
    return files


def by_ltjax(content: bytes, key: np.uint32) -> np.ndarray:
    return decode.random_resized_crop(decode.decode(content), key, VIEW)


def by_opencv(content: bytes, key: np.uint32) -> np.ndarray:
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    return decode.random_resized_crop(np.asarray(pixels), key, VIEW)


def by_pillow(content: bytes, key: np.uint32) -> np.ndarray:
    image = Image.open(io.BytesIO(content)).convert("RGB")
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
    box = (int(left), int(top), int(left + width), int(top + height))
    return np.asarray(image.resize((VIEW.size, VIEW.size), Image.Resampling.BILINEAR, box=box))


def decoding_alone(content: bytes, key: np.uint32) -> np.ndarray:
    del key
    return simplejpeg.decode_jpeg(content, colorspace="RGB")


WAYS: dict[str, Callable[[bytes, np.uint32], np.ndarray]] = {
    "ltjax": by_ltjax,
    "opencv": by_opencv,
    "pillow": by_pillow,
    "decoding alone": decoding_alone,
}


def rates(files: list[bytes], *, turns: int, chunk: int) -> dict[str, float]:
    """{way: images a second on one core}."""
    cv2.setNumThreads(0)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(turns + 1):  # the first one warms up
        for name, way in WAYS.items():
            began = time.perf_counter()
            for number in range(turn * chunk, (turn + 1) * chunk):
                way(files[number % len(files)], np.uint32(number))
            seconds[name].append((time.perf_counter() - began) / chunk)
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


def pipeline_rate(files: list[bytes], batches: int) -> float:
    """Images a second that arrive on the device."""
    labels = np.zeros(len(files), np.int32)

    def positions(step: int) -> np.ndarray:
        return (step * BATCH_SIZE + np.arange(BATCH_SIZE)) % len(files)

    def cut(image: np.ndarray, key: np.uint32) -> np.ndarray:
        return decode.random_resized_crop(image, key, VIEW)

    plan = pipeline.Plan(_Held(files), labels, positions, cut, VIEW.size, np.uint32(0), BATCH_SIZE, batches + 2)
    with pipeline.Stream(plan, parallel.split_batch(parallel.make_mesh(jax.devices()[:1]), axis=1)) as stream:
        stream.take(0, 1, 1)
        stream.take(1, 1, 1)
        began = time.perf_counter()
        for step in range(2, batches + 2):
            jax.block_until_ready(stream.take(step, 1, int(step < batches + 1)))
        return batches * BATCH_SIZE / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="a folder of images, as configs/image_folder.py takes it")
    parser.add_argument("--made_up", action="store_true", help="made-up images instead")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--chunk", type=int, default=100, help="images a turn")
    parser.add_argument("--batches", type=int, default=20, help="of 64 images, through the pipeline")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.made_up == (args.root is not None):
        parser.error("give one of --root=DIR and --made_up")
    console, origin = Console(), provenance.of("decode")
    try:
        stored = None if args.made_up else image_folder.load(root=args.root)
    except UserError as error:
        parser.error(str(error))
    files = made_up(200) if stored is None else [stored.train_files[i] for i in range(len(stored.train_files))]
    sizes = [simplejpeg.decode_jpeg_header(content)[:2] for content in files]
    height, width = (int(statistics.median(side)) for side in zip(*sizes, strict=True))
    found, cores = rates(files, turns=args.turns, chunk=args.chunk), len(os.sched_getaffinity(0))
    whole = pipeline_rate(files, args.batches)
    table = Table(title=f"{len(files)} JPEGs, {width}x{height} by the median, to {VIEW.size} pixels; one core")
    for column in ("", "images/s", "to ltjax"):
        table.add_column(column, justify="left" if not column else "right")
    for name, rate in found.items():
        table.add_row(name, f"{rate:,.0f}", f"{rate / found['ltjax']:.2f}")
    console.print(table)
    console.print(f"pipeline, {cores} threads: {whole:,.0f} images/s, {whole / cores:,.0f} a core")
    numbers = {"images": len(files), "median_size": [height, width], "images_per_second": found}
    provenance.write(args.out, {**origin, **numbers, "pipeline_images_per_second": whole, "threads": cores})


if __name__ == "__main__":
    main()
