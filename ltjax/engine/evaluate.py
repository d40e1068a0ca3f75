"""Evaluate a network on images on the device or on disk, every image counted once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from ltjax import losses, metrics
from ltjax.data.augment import as_float
from ltjax.engine.stage import make_apply
from ltjax.runs.seeds import mean_and_std, pool, pooled_bins
from ltjax.system import xla
from ltjax.system.parallel import BATCH_AXIS, over_replicas, put, replicated, split_batch
from ltjax.types import Variables


class EvaluationSet(NamedTuple):
    """N images in full batches, the last one padded with black images of label -1."""

    images: jax.Array  # uint8 [batches, B, H, W, channels], each batch split over the devices
    labels: jax.Array  # int32 [batches, B]
    size: int  # N
    host_labels: np.ndarray  # int32 [N]

    def parts(self) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Yield images and labels, with the leading axis of batches."""
        yield self.images, self.labels


class StoredSet(NamedTuple):
    """N images that are decoded for every evaluation, a batch at a time."""

    open: Callable[[], AbstractContextManager[Any]]  # -> `ltjax.data.pipeline.Stream`
    size: int  # N
    host_labels: np.ndarray  # int32 [N]

    def parts(self) -> Iterator[tuple[jax.Array, jax.Array]]:
        with self.open() as stream:
            yield from stream.each()


def place(images: np.ndarray, labels: np.ndarray, batch_size: int, mesh: Mesh) -> EvaluationSet:
    """Put images uint8 [N, H, W, channels] and labels [N] on the devices, in batches of about `batch_size`."""
    batch_size = shared_batch(batch_size, len(images), mesh)
    batches = -(-len(images) // batch_size)
    pad = batches * batch_size - len(images)

    def batched(values: np.ndarray, padding: int) -> jax.Array:
        values = np.pad(values, ((0, pad), *((0, 0),) * (values.ndim - 1)), constant_values=padding)
        return put(values.reshape(batches, batch_size, *values.shape[1:]), split_batch(mesh, axis=1))

    labels = labels.astype(np.int32)
    return EvaluationSet(batched(images, 0), batched(labels, -1), len(images), labels)


def shared_batch(batch_size: int, size: int, mesh: Mesh) -> int:
    """Return about `batch_size`, not much above `size`, and divisible by the devices.

    On a CPU a device has at most 100 images, so that their maps fit its cache.
    """
    devices = mesh.shape[BATCH_AXIS]
    if mesh.devices.flat[0].platform == "cpu":
        batch_size = min(batch_size, 100 * devices)
    return -(-min(batch_size, size) // devices) * devices


def outcome(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Compute the inputs of figures: logits [B, C], labels [B] -> {"predictions", "confidences", "losses": [B]}."""
    return {
        "predictions": logits.argmax(-1),
        "confidences": jax.nn.softmax(logits).max(-1),
        "losses": losses.cross_entropy(logits, labels),
    }


def over_batches(
    nets: Mapping[str, nn.Module],
    mesh: Mesh,
    figures: Callable[[Any, jax.Array, Any], dict[str, jax.Array]],
    *,
    replicas: int = 1,
    net: str = "net",
) -> Callable[..., list[dict[str, jax.Array]]]:
    """Make a function that runs a network on a set of images, one dispatch for each of its `parts`.

    Products of float32 are float32's on every platform (`xla.float32_products`).

    Args:
      figures: `(outputs, labels, means) -> {name: array}` of a batch. Padding has the label -1.
      replicas: With several, variables, means and all results have a leading axis.

    Returns:
      `(variables, images, means=None, check_stop) -> [{name: [batches, ...]}]`, on all devices. `check_stop` is called
      before each dispatch; it may raise to stop.
    """
    apply, platform = make_apply(nets, "eval"), mesh.devices.flat[0].platform

    def of_replica(arguments: tuple[Variables, Any], part: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
        variables, means = arguments

        def of_batch(batch: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
            images, labels = batch
            with xla.float32_products(platform):
                outputs, _ = apply(variables, as_float(images), net=net)
            return figures(outputs, labels, means)

        return jax.lax.map(of_batch, part)

    compiled = xla.jit(over_replicas(of_replica, replicas=replicas, mesh=mesh), out_shardings=replicated(mesh))

    def run(
        variables: Variables,
        images: EvaluationSet | StoredSet,
        means: Any = None,
        check_stop: Callable[[], None] = lambda: None,
    ) -> list[dict[str, jax.Array]]:
        parts = []
        for part in images.parts():
            check_stop()
            parts.append(compiled((variables, means), part))
            jax.block_until_ready(parts[-2:-1])  # at most two batches on the devices
        return parts

    return run


def joined(parts: Sequence[Mapping[str, Any]], size: int, replicas: int) -> dict[str, np.ndarray]:
    """Join the figures of parts [batches, B] to those of `size` images, [N] or [replicas, N]."""
    leading = (replicas,) if replicas > 1 else ()
    each = [{name: np.asarray(value).reshape(*leading, -1) for name, value in part.items()} for part in parts]
    return {name: np.concatenate([part[name] for part in each], -1)[..., :size] for name in each[0]}


def evaluator(
    nets: Mapping[str, nn.Module], mesh: Mesh, *, replicas: int = 1, net: str = "net"
) -> Callable[..., dict[str, np.ndarray]]:
    """Make a function that computes the `outcome` of each image.

    Args:
      replicas: See `over_batches`.

    Returns:
      `(variables, images, means=None, check_stop) -> {"predictions", "confidences", "losses": [N]}`. With means, the
      class means [C, D] of the training images' features, also "nearest": the class of the nearest mean.
    """

    def figures(outputs: Any, labels: jax.Array, means: jax.Array | None) -> dict[str, jax.Array]:
        nearest = {} if means is None else {"nearest": closeness(outputs.features, means).argmax(-1)}
        return {**outcome(outputs.logits, labels), **nearest}

    run = over_batches(nets, mesh, figures, replicas=replicas, net=net)
    return lambda variables, images, *more: joined(run(variables, images, *more), images.size, replicas)


def closeness(features: jax.Array, means: jax.Array) -> jax.Array:
    """Compute -|z - m|^2 / 2 without |z|^2, which all classes share: features [B, D], means [C, D] -> [B, C]."""
    product = jnp.matmul(features, means.T, precision="highest")
    return product - jnp.square(means).sum(-1) / 2


_calibration = jax.jit(metrics.calibration)  # one program instead of twenty


# {key in results.json: function of (outcome, labels)}; a column of `runs.results.COLUMNS` shows one in tables.
METRICS: dict[str, Callable[[Mapping[str, np.ndarray], np.ndarray], float]] = {
    "loss": lambda outcome, labels: float(outcome["losses"].mean()),
    "balanced_accuracy": lambda outcome, labels: metrics.balanced_accuracy(outcome["predictions"] == labels, labels),
    "macro_f1": lambda outcome, labels: metrics.macro_f1(outcome["predictions"], labels),
}
_OF_BINS = ("accuracies", "confidences", "counts")


def figures_of(
    outcome: Mapping[str, np.ndarray], labels: np.ndarray, groups: Mapping[str, np.ndarray], num_classes: int
) -> dict[str, Any]:
    """Compute the figures of a table, JSON-ready: accuracy by group and class, ECE and its bins, `METRICS`.

    Args:
      outcome: From `evaluator`.
      labels: [N].
      groups: {name: bool [C]}.
      num_classes: C. A class without test images has accuracy None.
    """
    correct = outcome["predictions"] == labels
    bins = _calibration(outcome["confidences"], correct)
    by_class = dict(zip(*(values.tolist() for values in metrics.accuracy_by_class(correct, labels)), strict=True))
    summary = {
        "accuracy": metrics.accuracy_by_group(correct, labels, groups),
        "ece": float(bins.ece),
        "mce": float(bins.mce),
        **{name: metric(outcome, labels) for name, metric in METRICS.items()},
        "num_images": len(labels),
        "per_class_accuracy": [by_class.get(c) for c in range(num_classes)],
        "calibration_bins": {name: np.asarray(getattr(bins, name)).tolist() for name in _OF_BINS},
    }
    if "nearest" in outcome:
        accuracy = metrics.accuracy_by_group(outcome["nearest"] == labels, labels, groups)
        summary["nearest_mean"] = {"accuracy": accuracy}
    return summary


def over_seeds(summaries: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """Average the summaries of replicas; "std" has sample standard deviations, "replicas" each summary with its seed.

    Calibration bins are those of all replicas' predictions together.
    """
    keys = ("accuracy", "ece", "mce", *METRICS, "nearest_mean")
    figures = [{key: summary[key] for key in keys if key in summary} for summary in summaries]
    mean, std = (pool(figures, lambda values, k=k: mean_and_std(values)[k]) for k in range(2))
    bins = pooled_bins([summary["calibration_bins"] for summary in summaries])
    of_classes = zip(*(summary["per_class_accuracy"] for summary in summaries), strict=True)
    return {
        **mean,
        "num_images": summaries[0]["num_images"],
        "per_class_accuracy": [None if values[0] is None else mean_and_std(values).mean for values in of_classes],
        "calibration_bins": {name: values.tolist() for name, values in bins.items()},
        "std": std,
        "replicas": [{"seed": seed, **summary} for seed, summary in zip(seeds, summaries, strict=True)],
    }
