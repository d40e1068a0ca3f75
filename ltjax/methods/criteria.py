"""Classification losses by the name that a config gives them: the part of a method that other methods share."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ltjax import losses, registry
from ltjax.types import Batch, UserError


class Criterion(NamedTuple):
    """`criterion(logits [B, C], batch) -> scalar`, and what it has for each class."""

    mean: Callable[[jax.Array, Batch], jax.Array]
    per_class: dict[str, jax.Array]  # {title: [C]}, see `ltjax.types.Method`

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
    """[C]. kind: "effective_number" favours rare classes; "count", n_c / n_max, frequent ones (DRO-LT, stage 2)."""
    if kind == "effective_number":
        return losses.effective_number_weights(class_counts, beta=beta)
    if kind == "count":
        counts = jnp.asarray(class_counts, jnp.float32)
        return counts / counts.max()
    raise UserError(f"unknown class weights {kind!r}; known: effective_number, count")


def class_weights(class_counts: np.ndarray, settings: Mapping[str, Any] | None) -> jax.Array | None:
    """[C] from {"kind": "effective_number", "beta": ...} or {"kind": "count"}; None for None."""
    if settings is None:
        return None
    if not isinstance(settings, Mapping) or "kind" not in settings:
        shown = dict(settings) if isinstance(settings, Mapping) else settings
        raise UserError(f"class_weights = {shown!r}: needs a kind, effective_number or count")
    return registry.bind("class_weights", _class_weights, settings)(class_counts)


def create(class_counts: np.ndarray, settings: Mapping[str, Any]) -> Criterion:
    """The mean loss of a batch, mixed by mixup or not.

    Args:
      class_counts: [C] training images.
      settings: {"name": one of `CRITERIA`, its own settings, optionally "class_weights": {"kind": ..., "beta": ...}}.
        With class weights w the mean is `sum_i w_yi loss_i / sum_i w_yi` over the batch, as in PyTorch.
    Raises: UserError (or the loss's ValueError) for a name or setting that is not known.
    """
    if not isinstance(settings, Mapping):
        raise UserError(f"loss = {settings!r}: needs settings, such as {{'name': {str(settings)!r}}}")
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
            own = jax.nn.one_hot(labels, weights.shape[0], dtype=values.dtype)  # [B, C]
            own = jnp.matmul(own, weights.astype(values.dtype), precision="highest")  # [B]; else a TPU rounds weights
            return (own * values).sum() / own.sum()

        return losses.mixed(mean, batch.labels, batch.partner_labels, batch.lam)

    return Criterion(batch_mean, per_class if weights is None else {**per_class, "Class weight": weights})
