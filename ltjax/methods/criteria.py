"""Classification losses by their names in a config, for use in all methods."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ltjax import losses
from ltjax.system import registry
from ltjax.system.wording import nearest, plain
from ltjax.types import Batch, Settings, UserError

CROSS_ENTROPY: Settings = MappingProxyType({"name": "cross_entropy"})
LOGIT_ADJUSTED: Settings = MappingProxyType({"name": "logit_adjusted"})


class Criterion(NamedTuple):
    """A loss `criterion(logits [B, C], batch) -> scalar`.

    Attributes:
      mean: The loss.
      per_class: {title: [C]}, see `ltjax.types.Method`.
      prior: [C] or None, see `ltjax.types.Method`.
    """

    mean: Callable[[jax.Array, Batch], jax.Array]
    per_class: dict[str, jax.Array]
    prior: np.ndarray | None = None

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


# {name: (class_counts, *, settings) -> `ltjax.types.Method.prior` of the loss, [C]}. With other losses, predictions are
# no probabilities; with smoothed labels, nearly.
PRIORS: dict[str, Callable[..., np.ndarray]] = {
    "cross_entropy": lambda class_counts: np.ones(len(class_counts)),
    "label_aware_smoothing": lambda class_counts, **_: np.ones(len(class_counts)),
    "balanced_softmax": lambda class_counts: 1 / np.asarray(class_counts, np.float64),
    "logit_adjusted": lambda class_counts, tau=1.0: np.asarray(class_counts, np.float64) ** -tau,
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


def weights_by_name(
    asked: Mapping[str, float] | str, class_names: Sequence[str], class_counts: np.ndarray
) -> tuple[float, ...] | None:
    """Compute the weights of `config.class_weights`: C weights, or None for equal ones.

    Args:
      asked: {name of a class: its weight}, 1 for the others. "auto": `N / (C n_c)`, N images in all, whose mean over
        the training images is 1; scikit-learn calls these weights "balanced". "" or {}: None.
      class_names: C names.
      class_counts: [C] training images.

    Raises:
      UserError: A name is that of no class.

    Examples:
      >>> criteria.weights_by_name("auto", ("cat", "owl"), np.array([90, 10]))
      (0.5555555555555556, 5.0)
      >>> criteria.weights_by_name({"owl": 2.0}, ("cat", "owl"), np.array([90, 10]))
      (1.0, 2.0)
    """
    if not asked:
        return None
    if asked == "auto":
        return tuple((np.sum(class_counts) / (len(class_counts) * np.asarray(class_counts, np.float64))).tolist())
    assert not isinstance(asked, str)  # `ltjax.config` has checked
    weights, names = {plain(name): float(weight) for name, weight in asked.items()}, list(map(plain, class_names))
    for name in weights:
        if name not in names:
            raise UserError(f"config.class_weights names {name!r}, none of the classes: {nearest(name, names)}")
    return tuple(weights.get(name, 1.0) for name in names)


def create(class_counts: np.ndarray, settings: Settings, factors: Sequence[float] | None = None) -> Criterion:
    """Create the mean loss of a batch, with or without mixup.

    Args:
      class_counts: [C] training images.
      settings: {"name": one of `CRITERIA`, its settings, optionally "class_weights": {"kind": ..., "beta": ...}}. With
        these class weights v, the mean is `sum_i v_yi loss_i / sum_i v_yi` over the batch, as in PyTorch.
      factors: C numbers, by which the losses of each class's images are multiplied. The divisor of the mean stays.

    Raises:
      UserError: The name or a setting is unknown.
      ValueError: The loss rejects a value.
    """
    settings = dict(settings)
    name, weighting = settings.pop("name", "cross_entropy"), settings.pop("class_weights", None)
    function = registry.choose("loss", CRITERIA, name)
    per_image, per_class = registry.bind(f"loss {name!r}", function, settings)(class_counts)
    weights, table = class_weights(class_counts, weighting), _table(class_counts, factors)

    def batch_mean(logits: jax.Array, batch: Batch) -> jax.Array:
        def mean(labels):
            values = per_image(logits, labels)  # [B]
            if table is not None:
                values = values * _of_labels(table, labels, values.dtype)
            if weights is None:
                return values.mean()
            weight = _of_labels(weights, labels, values.dtype)
            return (weight * values).sum() / weight.sum()

        return losses.mixed(mean, batch.labels, batch.partner_labels, batch.lam)

    prior = PRIORS[name](class_counts, **settings) if name in PRIORS else None
    if weights is None and table is None:
        return Criterion(batch_mean, per_class, prior)
    product = jnp.ones(len(class_counts)) if weights is None else weights
    product = product if table is None else product * table
    prior = None if prior is None else prior * np.asarray(product, np.float64)
    return Criterion(batch_mean, {**per_class, "Class weight": product}, prior)


def _of_labels(table: jax.Array, labels: jax.Array, dtype: Any) -> jax.Array:
    """Look up the values [C] of labels [B]."""
    is_label = jax.nn.one_hot(labels, table.shape[0], dtype=dtype)  # [B, C]
    return jnp.matmul(is_label, table.astype(dtype), precision="highest")  # [B]; else TPUs round it


def _table(class_counts: np.ndarray, factors: Sequence[float] | None) -> jax.Array | None:
    if factors is None:
        return None
    if len(factors) != len(class_counts) or not all(0 < factor < math.inf for factor in factors):
        raise UserError(f"class_weights = {tuple(factors)}: {len(class_counts)} numbers above 0, one for each class")
    return jnp.asarray(factors, jnp.float32)
