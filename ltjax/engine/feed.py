"""Bring images to the devices, and draw the batches of training.

Data sets in memory are placed once, at the start, and each step gathers and augments its batch from them. Data sets on
disk come as a stream of batches, of which each step augments its own.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ltjax.config import RunConfig, StageConfig
from ltjax.data import samplers, splits
from ltjax.data.source import ImageFiles, Images, Stored
from ltjax.engine import evaluate
from ltjax.engine import stage as stages
from ltjax.system import parallel
from ltjax.system.hashing import hash32
from ltjax.system.paths import local
from ltjax.types import Batch, UserError

PARTNER_SALT = 1  # hashed into the seed of a batch's second draw, which gives each image a partner
MOST_STREAMED_STEPS = 4  # in a dispatch whose batches are streamed, unless config.dispatch_steps says more


def image_shape(run: RunConfig, data: Images | Stored) -> tuple[int, ...]:
    """Return the shape [H, W, channels] of the images that the networks take."""
    return data.train_images.shape[1:] if isinstance(data, Images) else (run.data.size, run.data.size, 3)


class Resident(NamedTuple):
    """Training images on the device, sorted by class."""

    images: jax.Array  # uint8 [N, H, W, channels]
    labels: jax.Array  # int32 [N]


class ImageSets(NamedTuple):
    """Training, test and held-out images, on the devices or ready to be streamed."""

    shape: tuple[int, ...]  # [H, W, channels]
    train: Resident | evaluate.StoredSet  # a StoredSet: in order, cropped as for evaluation
    test: evaluate.EvaluationSet | evaluate.StoredSet
    holdout: evaluate.EvaluationSet | evaluate.StoredSet | None


def resident(run: RunConfig, images: Images, split: splits.Split, mesh: Mesh) -> ImageSets:
    """Put all images of a run on the devices. UserError if many are black."""
    chosen = np.concatenate([split.train, split.holdout])
    black = int((~images.train_images[chosen].any(axis=(1, 2, 3))).sum())
    if black > 0.01 * len(chosen):
        raise UserError(
            f"{black} of the {len(chosen)} chosen images of {run.data.name!r} are black: this may be a part of the "
            "data that was packed for another config.data; prepare all of it"
        )
    everywhere, holdout = parallel.replicated(mesh), None
    train = Resident(
        parallel.put(images.train_images[split.train], everywhere),
        parallel.put(images.train_labels[split.train].astype(np.int32), everywhere),
    )
    if run.data.holdout:
        held_out = images.train_images[split.holdout], images.train_labels[split.holdout]
        holdout = evaluate.place(*held_out, run.eval_batch_size, mesh)
    test = evaluate.place(images.test_images, images.test_labels, run.eval_batch_size, mesh)
    return ImageSets(image_shape(run, images), train, test, holdout)


def stored(run: RunConfig, data: Stored, split: splits.Split, mesh: Mesh) -> ImageSets:
    """Prepare the streams of a run whose images are decoded when they are needed. UserError with several replicas."""
    if run.replicas > 1:
        raise UserError(
            f"config.replicas = {run.replicas}: replicas share images on the device, but those of {run.data.name!r} "
            "stay on disk; run the seeds one after the other with --config.seed"
        )
    stream, train = partial(in_order, run, mesh), (data.train_files, data.train_labels)
    return ImageSets(
        shape=image_shape(run, data),
        train=stream(*train, split.train),
        test=stream(data.test_files, data.test_labels, np.arange(len(data.test_labels))),
        holdout=stream(*train, split.holdout) if run.data.holdout else None,
    )


def in_order(
    run: RunConfig, mesh: Mesh, files: ImageFiles, labels: np.ndarray, order: np.ndarray
) -> evaluate.StoredSet:
    """Prepare a stream of the images with the indices `order`, cropped as for evaluation."""
    from ltjax.data import pipeline  # loads decoders, which images in memory do not need

    size = evaluate.shared_batch(run.eval_batch_size, len(order), mesh)
    plan = pipeline.once(files, labels, order, size, _view(run))
    opened = partial(pipeline.Stream, plan, parallel.split_batch(mesh, axis=1), run.data.threads)
    return evaluate.StoredSet(opened, len(order), labels[order].astype(np.int32))


def some_of_each_class(run: RunConfig, data: Any, split: splits.Split, mesh: Mesh, most: int) -> evaluate.StoredSet:
    """Choose the first `most` training images of each class, or all of a smaller class, from images on disk."""
    starts = np.cumsum(split.class_counts) - split.class_counts
    some = [split.train[start : start + min(n, most)] for start, n in zip(starts, split.class_counts, strict=True)]
    return in_order(run, mesh, data.train_files, data.train_labels, np.concatenate(some))


def _view(run: RunConfig) -> Any:
    from ltjax.data.decode import View

    return View(run.data.size, run.data.resize, run.data.min_area, run.data.upright)


# A batch, drawn inside the compiled step.


def resident_draw(
    sampler: Callable,
    augment: Callable,
    *,
    batch_size: int,
    class_counts: np.ndarray,
    mesh: Mesh,
    others: Callable | None = None,
) -> Callable[[Resident, Any, jax.Array, jax.Array], Batch]:
    """Make `draw(source, seed, step, rng) -> Batch` for images on the devices.

    Args:
      sampler: See `ltjax.data.samplers`.
      augment: `(rng, uint8 images, labels) -> Batch`, or with a second pair of images and labels.
      others: Sampler of that second pair, if there is one.
    """

    def draw(source, seed, step, rng):
        def drawn(sampler, seed):
            index = sampler(seed, step, batch_size=batch_size, class_counts=class_counts)
            index = parallel.split(index, mesh)  # each device gathers its share of the batch
            return source.images[index], source.labels[index]

        if others is None:
            return augment(rng, *drawn(sampler, seed))
        return augment(rng, *drawn(sampler, seed), drawn(others, hash32(seed, np.uint32(PARTNER_SALT))))

    return draw


class Chunk(NamedTuple):
    """The batches of K steps, split over the devices."""

    first: jax.Array  # int32, the step of the first batch
    images: jax.Array  # uint8 [K, B, H, W, channels]
    labels: jax.Array  # int32 [K, B]


def streamed_draw(augment: Callable, mesh: Mesh) -> Callable[[Chunk, Any, jax.Array, jax.Array], Batch]:
    """Make `draw(source, seed, step, rng) -> Batch` for batches streamed from disk. augment: see `resident_draw`."""

    def draw(source, seed, step, rng):
        images, labels = (
            parallel.split(jax.lax.dynamic_index_in_dim(x, step - source.first, keepdims=False), mesh)
            for x in (source.images, source.labels)
        )
        return augment(rng, images, labels)

    return draw


# The batches of a dispatch.


def dispatch_length(
    steps_per_epoch: int, asked: int, replicas: int = 1, *, streamed: bool = False, attacks: bool = False
) -> int:
    """Choose the number of steps in a dispatch.

    It is at most 100 on accelerators and 16 on a CPU, divided by the number of replicas; a fifth of that if each step
    attacks its images; at most 4 if batches are streamed, because they take memory. After a signal, up to two
    dispatches have to finish (see `ltjax.train.runs_ahead`).

    Prefer a divisor of the epoch, so that one compiled function serves all dispatches. If all divisors are much
    smaller, divide the epoch into nearly equal parts, of which the last is shorter.

    Args:
      asked: `config.dispatch_steps`; 0: choose.
    """
    usual = 16 if jax.default_backend() == "cpu" else 100
    usual = max(1, usual // (replicas * (5 if attacks else 1)))
    most = min(asked or (min(usual, MOST_STREAMED_STEPS) if streamed else usual), steps_per_epoch)
    divisor = max(n for n in range(1, most + 1) if steps_per_epoch % n == 0)
    parts = -(-steps_per_epoch // most)
    return divisor if 2 * divisor >= most else -(-steps_per_epoch // parts)


class Feed:
    """The source of a stage's batches: images on the devices, or a stream from disk."""

    def __init__(self, resident: Any, stream: Any = None, mesh: Mesh | None = None):
        self._resident, self._stream, self._mesh = resident, stream, mesh

    @property
    def waited(self) -> float:
        """Seconds that the devices have waited for batches."""
        return 0.0 if self._stream is None else self._stream.waited

    def take(
        self, step: int, num_steps: int, next_steps: int, busy: Callable[[], bool] = lambda: False
    ) -> Resident | Chunk:
        """Return the source of the next dispatch's batches.

        Args:
          next_steps: The number of steps in the dispatch after it; 0 if there is none.
          busy: Whether the devices are still at work. Waiting counts from the moment when they are not.
        """
        if self._stream is None or self._mesh is None:
            return self._resident
        images, labels = self._stream.take(step, num_steps, next_steps, busy)
        return Chunk(parallel.put(np.int32(step), parallel.replicated(self._mesh)), images, labels)

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_) -> None:
        if self._stream is not None:
            self._stream.close()


def training_stream(
    run: RunConfig, data: Stored, split: splits.Split, mesh: Mesh, stage: StageConfig, num_steps: int
) -> Feed:
    """Open the stream of a stage: random windows of training images, `num_steps` batches."""
    from ltjax.data import pipeline

    plan = pipeline.training(
        data,
        split.train,
        split.class_counts,
        samplers.create(**stage.sampler),
        stages.sampler_seed(np.uint32(run.seed), stage.number),
        batch_size=run.batch_size,
        num_steps=num_steps,
        view=_view(run),
    )
    return Feed(None, pipeline.Stream(plan, parallel.split_batch(mesh, axis=1), run.data.threads), mesh)


# Single test images, to look at.


def picture(run: RunConfig, data: Images | Stored, index: int) -> np.ndarray:
    """Return a test image, uint8 [H, W, channels], cropped as the network sees it.

    Features become a square of grey values, from the smallest, black, to the largest, white.
    """
    if isinstance(data, Images):
        image = data.test_images[index]
        return image if image.dtype == np.uint8 else _as_greys(image.astype(np.float32).ravel())
    from ltjax.data.decode import center_crop, decode

    return center_crop(decode(data.test_files[index], upright=run.data.upright), _view(run))


def _as_greys(features: np.ndarray) -> np.ndarray:
    side = math.ceil(math.sqrt(len(features)))
    span = max(float(np.ptp(features)), 1e-12)
    greys = np.round((features - features.min()) / span * 255).astype(np.uint8)
    return np.pad(greys, (0, side * side - len(greys))).reshape(side, side, 1)


def picture_name(run: RunConfig, data: Images | Stored, index: int) -> str:
    """Return the name of a test image: of a file below `config.data.root` its path there, in memory its number."""
    if isinstance(data, Images):
        return f"test image {index}"
    root = f"{local(run.data.root)}/" if run.data.root else ""
    return data.test_files.name(index).removeprefix(root)
