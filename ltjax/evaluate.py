"""Evaluate a network on images that stay on the device, every image counted once."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from ltjax import losses, metrics
from ltjax.stage import make_apply, replicated, split_batch
from ltjax.types import Variables


class EvaluationSet(NamedTuple):
    """N images in full batches, the last one padded with zeros."""

    images: jax.Array  # uint8 [batches, B, H, W, channels], each batch split over the devices
    labels: jax.Array  # int32 [batches, B]
    size: int  # N


def place(images: np.ndarray, labels: np.ndarray, batch_size: int, mesh: Mesh) -> EvaluationSet:
    """Put images uint8 [N, H, W, channels] and labels [N] on the devices, in batches of about `batch_size`."""
    devices = mesh.devices.size
    batch_size = min(batch_size, len(images))
    batch_size = -(-batch_size // devices) * devices
    batches = -(-len(images) // batch_size)
    pad = batches * batch_size - len(images)

    def batched(values):
        values = np.pad(values, ((0, pad), *((0, 0),) * (values.ndim - 1)))
        return jax.device_put(values.reshape(batches, batch_size, *values.shape[1:]), split_batch(mesh, axis=1))

    return EvaluationSet(batched(images), batched(labels.astype(np.int32)), len(images))


def evaluator(nets: Mapping[str, nn.Module], mesh: Mesh) -> Callable[[Variables, EvaluationSet], dict[str, np.ndarray]]:
    """`evaluate(variables, evaluation_set) -> {"predictions", "confidences", "losses": [N]}`, one dispatch."""
    apply = make_apply(nets, "eval")

    def outcome(variables: Variables, images: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        def batch(image_batch, label_batch):
            outputs, _ = apply(variables, image_batch.astype(jnp.float32) / 255)
            return {
                "predictions": outputs.logits.argmax(-1),
                "confidences": jax.nn.softmax(outputs.logits).max(-1),
                "losses": losses.cross_entropy(outputs.logits, label_batch),
            }

        return jax.lax.map(lambda pair: batch(*pair), (images, labels))

    compiled = jax.jit(outcome, out_shardings=replicated(mesh))

    def evaluate(variables: Variables, data: EvaluationSet) -> dict[str, np.ndarray]:
        values = compiled(variables, data.images, data.labels)
        return {name: np.asarray(value).reshape(-1)[: data.size] for name, value in values.items()}

    return evaluate


def summarise(
    outcome: Mapping[str, np.ndarray], labels: np.ndarray, groups: Mapping[str, np.ndarray], num_classes: int
) -> dict[str, Any]:
    """The figures of a table, JSON-ready: accuracy by group, ECE and its bins, mean loss, accuracy of each class.

    outcome: from `evaluator`. labels: [N]. groups: {name: bool [C]}. A class without test images has accuracy None.
    """
    correct = outcome["predictions"] == labels
    bins = metrics.calibration(outcome["confidences"], correct)
    totals = np.bincount(labels, minlength=num_classes)
    hits = np.bincount(labels, weights=correct, minlength=num_classes)
    return {
        "accuracy": metrics.accuracy_by_group(correct, labels, groups),
        "ece": float(bins.ece),
        "mce": float(bins.mce),
        "loss": float(outcome["losses"].mean()),
        "num_images": len(labels),
        "per_class_accuracy": [float(h / n) if n else None for h, n in zip(hits, totals, strict=True)],
        "calibration_bins": {
            "accuracies": np.asarray(bins.accuracies).tolist(),
            "confidences": np.asarray(bins.confidences).tolist(),
            "counts": np.asarray(bins.counts).tolist(),
        },
    }
