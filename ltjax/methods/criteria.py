"""Classification losses by their names in a config, for use in all methods."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ltjax import losses, registry
from ltjax.types import Batch, Settings, UserError

CROSS_ENTROPY: Settings = MappingProxyType({"name": "cross_entropy"})


class Criterion(NamedTuple):
    """A loss `criterion(logits [B, C], batch) -> scalar`.

    Attributes:
      mean: The loss.
      per_class: {title: [C]}, see `ltjax.types.Method`.
    """

    mean: Callable[[jax.Array, Batch], jax.Array]
    per_class: dict[str, jax.Array]

    def __call__(self, logits: jax.Array, batch: Batch) -> jax.Array:
        return self.mean(logits, batch)


# {name: (class_counts, *, settings) -> (loss of each image (logits, labels) -> [B], {title: [C]})}


def _cross_entropy(class_counts):
    return losses.cross_entropy, {}


def _focal(class_counts, *, gamma: float = 2.0):
    return partial(losses.focal, gamma=gamma), {}


def _balanced_softmax(class_counts):
    return partial(losses.balanced_softmax, class_counts=class_counts), {}


def _logit_adjusted(class_counts, *, tau: float = 1.0):
    return partial(losses.logit_adjusted, class_counts=class_counts, tau=tau), {}


def _ldam(class_counts, *, max_margin: float = 0.5, scale: float = 30.0):
    margins = losses.ldam_margins(class_counts, max_margin=max_margin)  # [C]
    per_image = partial(losses.ldam, class_counts=class_counts, max_margin=max_margin, scale=scale)
    return per_image, {"LDAM's margin": margins}


def _label_aware_smoothing(class_counts, *, head: float, tail: float, shape: str = "concave", power: float = 1.0):
    by_count = partial(losses.smoothing_by_count, head=head, tail=tail, shape=shape, power=power)
    smoothing = jax.jit(by_count)(class_counts)  # [C]; one program instead of twelve
    return partial(losses.label_aware_smoothing, smoothing=smoothing), {"Label smoothing": smoothing}


CRITERIA: dict[str, Callable] = {
    "cross_entropy": _cross_entropy,
    "focal": _focal,
    "balanced_softmax": _balanced_softmax,
    "logit_adjusted": _logit_adjusted,
    "ldam": _ldam,
    "label_aware_smoothing": _label_aware_smoothing,
}


def _class_weights(class_counts: np.ndarray, *, kind: str, beta: float = 0.9999) -> jax.Array:
    """Compute weights [C]. "effective_number" favours rare classes; "count", n_c / n_max, frequent ones (DRO-LT)."""
    if kind == "effective_number":
        return losses.effective_number_weights(class_counts, beta=beta)
    if kind == "count":
        counts = jnp.asarray(class_counts, jnp.float32)
        return counts / counts.max()
    raise UserError(f"unknown class weights {kind!r}; known: effective_number, count")


def class_weights(class_counts: np.ndarray, settings: Settings | None) -> jax.Array | None:
    """Compute weights [C] from {"kind": "effective_number", "beta": ...} or {"kind": "count"}; None for None."""
    if settings is None:
        return None
    if not isinstance(settings, Mapping) or "kind" not in settings:
        shown = dict(settings) if isinstance(settings, Mapping) else settings
        raise UserError(f"class_weights = {shown!r}: needs a kind, effective_number or count")
    return registry.bind("class_weights", _class_weights, settings)(class_counts)


def create(class_counts: np.ndarray, settings: Settings) -> Criterion:
    """Create the mean loss of a batch, with or without mixup.

    Args:
      class_counts: [C] training images.
      settings: {"name": one of `CRITERIA`, its settings, optionally "class_weights": {"kind": ..., "beta": ...}}. With
        class weights w, the mean is `sum_i w_yi loss_i / sum_i w_yi` over the batch, as in PyTorch.

    Raises:
      UserError: The name or a setting is unknown.
      ValueError: The loss rejects a value.
    """
    settings = dict(settings)
    name, weighting = settings.pop("name", "cross_entropy"), settings.pop("class_weights", None)
    function = registry.choose("loss", CRITERIA, name)
    per_image, per_class = registry.bind(f"loss {name!r}", function, settings)(class_counts)
    weights = class_weights(class_counts, weighting)

    def batch_mean(logits: jax.Array, batch: Batch) -> jax.Array:
        def mean(labels):
            values = per_image(logits, labels)  # [B]
            if weights is None:
                return values.mean()
            is_label = jax.nn.one_hot(labels, weights.shape[0], dtype=values.dtype)  # [B, C]
            weight = jnp.matmul(is_label, weights.astype(values.dtype), precision="highest")  # [B]; else TPUs round it
            return (weight * values).sum() / weight.sum()

        return losses.mixed(mean, batch.labels, batch.partner_labels, batch.lam)

    return Criterion(batch_mean, per_class if weights is None else {**per_class, "Class weight": weights})
