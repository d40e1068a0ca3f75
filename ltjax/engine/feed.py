"""Images on their way to a run: those that fit, put on the devices once; the others, streamed from disk."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ltjax.config import RunConfig
from ltjax.data import splits
from ltjax.data.source import ImageFiles, Images, Stored
from ltjax.engine import evaluate, stage
from ltjax.hashing import hash32
from ltjax.system import parallel, xla
from ltjax.types import Apply, UserError, Variables

DISPATCH_STEPS = 4  # batches that go to the devices together


class Ready(NamedTuple):
    """Training, test and held-out images, ready for use."""

    shape: tuple[int, ...]  # [H, W, channels]
    train: stage.Resident | evaluate.StoredSet  # the latter in order, and cut as for evaluation
    test: evaluate.EvaluationSet | evaluate.StoredSet
    holdout: evaluate.EvaluationSet | evaluate.StoredSet | None


def resident(run: RunConfig, images: Images, split: splits.Split, mesh: Mesh) -> Ready:
    """Everything on the devices."""
    shown = np.concatenate([split.train, split.holdout])
    black = int((~images.train_images[shown].any(axis=(1, 2, 3))).sum())
    if black > 0.01 * len(shown):
        raise UserError(
            f"{black} of the {len(shown)} chosen images of {run.data.name!r} are black: this may be a part of the data "
            "that was packed for another config.data; prepare all of it"
        )
    everywhere, holdout = parallel.replicated(mesh), None
    train = stage.Resident(
        parallel.put(images.train_images[split.train], everywhere),
        parallel.put(images.train_labels[split.train].astype(np.int32), everywhere),
    )
    if run.data.holdout:
        kept = images.train_images[split.holdout], images.train_labels[split.holdout]
        holdout = evaluate.place(*kept, run.eval_batch_size, mesh)
    test = evaluate.place(images.test_images, images.test_labels, run.eval_batch_size, mesh)
    return Ready(images.train_images.shape[1:], train, test, holdout)


def stored(run: RunConfig, data: Stored, split: splits.Split, mesh: Mesh) -> Ready:
    """Nothing on the devices yet: all images are decoded when they are needed."""
    if run.replicas > 1:
        raise UserError(
            f"config.replicas = {run.replicas}: replicas share images on the device, but those of {run.data.name!r} "
            "stay on disk; run the seeds one after the other with --config.seed"
        )
    held, train = partial(_in_order, run, mesh), (data.train_files, data.train_labels)
    return Ready(
        shape=(run.data.size, run.data.size, 3),
        train=held(*train, split.train),
        test=held(data.test_files, data.test_labels, np.arange(len(data.test_labels))),
        holdout=held(*train, split.holdout) if run.data.holdout else None,
    )


def _in_order(
    run: RunConfig, mesh: Mesh, files: ImageFiles, labels: np.ndarray, order: np.ndarray
) -> evaluate.StoredSet:
    """The images `order`, to be decoded one after the other and cut as for evaluation."""
    from ltjax.data import pipeline  # its decoders are not for everybody
    from ltjax.data.decode import View

    view = View(run.data.size, run.data.resize, run.data.min_area)
    size = evaluate.shared_batch(run.eval_batch_size, len(order), mesh)
    plan = pipeline.once(files, labels, order, size, view)
    opened = partial(pipeline.Stream, plan, parallel.split_batch(mesh, axis=1), run.data.threads)
    return evaluate.StoredSet(opened, len(order), labels[order].astype(np.int32))


def some_of_each_class(run: RunConfig, data: Any, split: splits.Split, mesh: Mesh, most: int) -> evaluate.StoredSet:
    """Training images on disk, `most` of each class or all it has."""
    starts = np.cumsum(split.class_counts) - split.class_counts
    some = [split.train[start : start + min(n, most)] for start, n in zip(starts, split.class_counts, strict=True)]
    return _in_order(run, mesh, data.train_files, data.train_labels, np.concatenate(some))


def picture(run: RunConfig, data: Images | Stored, index: int) -> np.ndarray:
    """One test image, uint8 [H, W, channels], as the network sees it."""
    if isinstance(data, Images):
        return data.test_images[index]
    from ltjax.data.decode import View, center_crop, decode

    return center_crop(decode(data.test_files[index]), View(run.data.size, run.data.resize, run.data.min_area))


def class_means(
    apply: Apply, images: stage.Resident | evaluate.StoredSet, mesh: Mesh, *, replicas: int = 1, batch_size: int = 500
) -> Callable[..., Any]:
    """`(variables, layers=(), go_on=...) -> mean feature of each class` of training images, see `stage.means_of`.

    batch_size: about how many images at a time, over all devices, of those that are there; see `evaluate.shared_batch`.
    go_on: called before each dispatch; may raise to stop.
    """
    if isinstance(images, stage.Resident):
        size = evaluate.shared_batch(batch_size, images.labels.shape[0], mesh)

        def resident_means(layers: tuple[str, ...], variables: Variables, source: stage.Resident) -> Any:
            one = lambda variables, source: stage.feature_means(apply, variables, source, mesh, layers, size)  # noqa: E731
            return parallel.over_replicas(one, replicas=replicas, mesh=mesh)(variables, source)

        compiled = xla.jit(resident_means, static_argnums=0)

        def means(variables: Variables, layers: tuple[str, ...] = (), go_on: Callable[[], None] = lambda: None) -> Any:
            go_on()
            return compiled(layers, variables, images)

        return means

    @partial(xla.jit, static_argnums=0, out_shardings=parallel.replicated(mesh))
    def sums(layers: tuple[str, ...], variables: Variables, pixels: jax.Array, labels: jax.Array) -> stage.FeatureSums:
        return stage.feature_sums(apply, variables, pixels[0], labels[0], layers)

    def streamed_means(
        variables: Variables, layers: tuple[str, ...] = (), go_on: Callable[[], None] = lambda: None
    ) -> Any:
        variables, total = variables._replace(arrays={}), None
        for part in images.parts():
            go_on()
            found = sums(layers, variables, *part)
            total = found if total is None else jax.tree.map(jax.numpy.add, total, found)
            jax.block_until_ready(total)
        return stage.means_of(total or {}, layers)

    return streamed_means


class Feed:
    """What the dispatches of a stage draw from: always the same images, or a stream's next batches."""

    def __init__(self, resident: Any, stream: Any = None, mesh: Mesh | None = None):
        self._resident, self._stream, self._mesh = resident, stream, mesh

    @property
    def waited(self) -> float:
        """Seconds that the devices have waited for batches."""
        return 0.0 if self._stream is None else self._stream.waited

    def take(
        self, step: int, num_steps: int, then: int, busy: Callable[[], bool] = lambda: False
    ) -> stage.Resident | stage.Chunk:
        """For the `num_steps` steps from `step` on. then: how many steps come next; 0: none.

        busy: whether the devices have something to do, so that waiting does not count yet.
        """
        if self._stream is None or self._mesh is None:
            return self._resident
        images, labels = self._stream.take(step, num_steps, then, busy)
        return stage.Chunk(parallel.put(np.int32(step), parallel.replicated(self._mesh)), images, labels)

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_) -> None:
        if self._stream is not None:
            self._stream.close()


def streamed(
    run: RunConfig, data: Stored, split: splits.Split, mesh: Mesh, *, sampler: Callable, number: int, num_steps: int
) -> Feed:
    """Random windows of the training images, as stage `number` draws them."""
    from ltjax.data import pipeline
    from ltjax.data.decode import View

    plan = pipeline.training(
        data,
        split.train,
        split.class_counts,
        sampler,
        hash32(np.uint32(run.seed), np.uint32(number)),
        batch_size=run.batch_size,
        num_steps=num_steps,
        view=View(run.data.size, run.data.resize, run.data.min_area),
    )
    return Feed(None, pipeline.Stream(plan, parallel.split_batch(mesh, axis=1), run.data.threads), mesh)
