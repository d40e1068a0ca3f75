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
from ltjax.system import xla
from ltjax.system.parallel import BATCH_AXIS, over_replicas, put, replicated, split_batch
from ltjax.types import Variables


class EvaluationSet(NamedTuple):
    """N images in full batches, the last one padded with zeros."""

    images: jax.Array  # uint8 [batches, B, H, W, channels], each batch split over the devices
    labels: jax.Array  # int32 [batches, B]
    size: int  # N
    host_labels: np.ndarray  # int32 [N]

    def parts(self) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Images and labels, with the leading axis of batches."""
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

    def batched(values):
        values = np.pad(values, ((0, pad), *((0, 0),) * (values.ndim - 1)))
        return put(values.reshape(batches, batch_size, *values.shape[1:]), split_batch(mesh, axis=1))

    labels = labels.astype(np.int32)
    return EvaluationSet(batched(images), batched(labels), len(images), labels)


def shared_batch(batch_size: int, size: int, mesh: Mesh) -> int:
    """About `batch_size`, not much above `size`, and a share for each device. On a CPU a share is at most 100 images,
    so that their maps stay in its cache."""
    devices = mesh.shape[BATCH_AXIS]
    if mesh.devices.flat[0].platform == "cpu":
        batch_size = min(batch_size, 100 * devices)
    return -(-min(batch_size, size) // devices) * devices


def outcome(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Compute what figures are made of: logits [B, C], labels [B] -> {"predictions", "confidences", "losses": [B]}."""
    return {
        "predictions": logits.argmax(-1),
        "confidences": jax.nn.softmax(logits).max(-1),
        "losses": losses.cross_entropy(logits, labels),
    }


def evaluator(
    nets: Mapping[str, nn.Module], mesh: Mesh, *, replicas: int = 1, net: str = "net"
) -> Callable[..., dict[str, np.ndarray]]:
    """`evaluate(variables, evaluation_set, means=None, go_on) -> {"predictions", "confidences", "losses": [N]}`; one
    dispatch where the images are on the devices.

    Products of float32 are float32's on every platform (`xla.float32_products`).
    With means, those of the training images' features of each class [C, D], also "nearest": the class of the nearest.
    net: which network. Several replicas: a leading axis in variables, means and everything returned.
    go_on: called before each dispatch; may raise to stop.
    """
    apply, platform = make_apply(nets, "eval"), mesh.devices.flat[0].platform

    def run(own: tuple[Variables, jax.Array | None], data: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
        variables, means = own

        def batch(image_batch, label_batch):
            with xla.float32_products(platform):
                outputs, _ = apply(variables, as_float(image_batch), net=net)
            found = outcome(outputs.logits, label_batch)
            if means is not None:  # |z - m|^2 without |z|^2, which all classes share
                product = jnp.matmul(outputs.features, means.T, precision="highest")
                found["nearest"] = (product - jnp.square(means).sum(-1) / 2).argmax(-1)
            return found

        return jax.lax.map(lambda pair: batch(*pair), data)

    compiled = xla.jit(over_replicas(run, replicas=replicas, mesh=mesh), out_shardings=replicated(mesh))

    def evaluate(
        variables: Variables,
        data: EvaluationSet | StoredSet,
        means: jax.Array | None = None,
        go_on: Callable[[], None] = lambda: None,
    ) -> dict[str, np.ndarray]:
        leading, found = (replicas,) if replicas > 1 else (), []
        for part in data.parts():
            go_on()
            found.append(compiled((variables, means), part))
            jax.block_until_ready(found[-2:-1])  # one batch in work, one on its way, and no more
        each = [{name: np.asarray(value).reshape(*leading, -1) for name, value in one.items()} for one in found]
        return {name: np.concatenate([one[name] for one in each], -1)[..., : data.size] for name in each[0]}

    return evaluate


_calibration = jax.jit(metrics.calibration)  # one program instead of twenty


# Scalar figures of a table: {key in results.json: function of (outcome, labels)}; `runs.results.COLUMNS` shows them.
METRICS: dict[str, Callable[[Mapping[str, np.ndarray], np.ndarray], float]] = {
    "loss": lambda outcome, labels: float(outcome["losses"].mean()),
    "balanced_accuracy": lambda outcome, labels: metrics.balanced_accuracy(outcome["predictions"] == labels, labels),
    "macro_f1": lambda outcome, labels: metrics.macro_f1(outcome["predictions"], labels),
}
_BINNED = ("ece", "mce")


def summarise(
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


_OF_BINS = ("accuracies", "confidences", "counts")


def over_seeds(summaries: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """Average the summaries of replicas; "std" has sample standard deviations, "replicas" each summary with its seed.

    Calibration bins are those of all replicas' predictions together.
    """

    def combined(combine: Callable) -> dict[str, Any]:
        def by_key(part: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> dict[str, Any]:
            return {key: combine([part(s)[key] for s in summaries]) for key in part(summaries[0])}

        scalars = (*_BINNED, *METRICS)
        result = {"accuracy": by_key(lambda s: s["accuracy"]), **by_key(lambda s: {key: s[key] for key in scalars})}
        if "nearest_mean" in summaries[0]:
            result["nearest_mean"] = {"accuracy": by_key(lambda s: s["nearest_mean"]["accuracy"])}
        return result

    bins = {name: np.stack([s["calibration_bins"][name] for s in summaries]) for name in _OF_BINS}  # [replicas, bins]
    counts = bins["counts"].sum(0)
    pooled = {
        name: ((bins[name] * bins["counts"]).sum(0) / np.maximum(counts, 1)).tolist()
        for name in ("accuracies", "confidences")
    }
    return {
        **combined(_mean),
        "num_images": summaries[0]["num_images"],
        "per_class_accuracy": [_mean(each) for each in zip(*(s["per_class_accuracy"] for s in summaries), strict=True)],
        "calibration_bins": {**pooled, "counts": counts.tolist()},
        "std": combined(_deviation),
        "replicas": [{"seed": seed, **summary} for seed, summary in zip(seeds, summaries, strict=True)],
    }


def _mean(values: Sequence[float | None]) -> float | None:
    return None if values[0] is None else float(np.mean(np.asarray(values, np.float64)))


def _deviation(values: Sequence[float | None]) -> float | None:
    return None if values[0] is None else float(np.std(np.asarray(values, np.float64), ddof=1))
