"""Loss kernels: pure functions of arrays, for any JAX project. This module needs jax alone.

Per-example losses return [B]; the caller reduces. Arrays are positional, hyper-parameters keyword-only. Labels become
one-hot rows rather than indices, so that the kernels work under automatic and explicit sharding alike; an example whose
label is outside 0..C-1 has loss 0.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

SMOOTHING_SHAPES = ("concave", "linear", "convex", "exp")


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Softmax cross-entropy `-log p_y`: logits [B, C], integer labels [B] -> [B]."""
    return -_own(jax.nn.log_softmax(logits), labels)


def mixed(loss: Callable[[jax.Array], jax.Array], labels: jax.Array, partner_labels=None, lam=None) -> jax.Array:
    """The loss of a mixup batch: `lam * loss(labels) + (1 - lam) * loss(partner_labels)`.

    Args:
      loss: labels [B] -> per-example loss [B], with the logits of the mixed images inside.
      labels: [B]. partner_labels: [B], or None where the batch was not mixed: then plain `loss(labels)`.
      lam: the weight of the image's own label, scalar or [B].
    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018.
    """
    if partner_labels is None:
        return loss(labels)
    own = loss(labels)
    lam = jnp.asarray(lam).astype(own.dtype)
    return lam * own + (1 - lam) * loss(partner_labels)


def smoothing_by_count(
    class_counts: ArrayLike, *, head: float, tail: float, shape: str = "concave", power: float = 1.0
) -> jax.Array:
    """MiSLAS's label smoothing of each class, growing with its number of training images.

    With `x = (n_c - n_min) / (n_max - n_min)`:
      concave  tail + (head - tail) sin(pi x / 2)
      linear   tail + (head - tail) x
      convex   head + (head - tail) sin(3 pi / 2 + pi x / 2)
      exp      tail + (head - tail) x^power

    Args:
      class_counts: [C] training images of each class.
      head, tail: smoothing of the most and the least frequent class, in [0, 1].
      shape: one of `SMOOTHING_SHAPES`. power: exponent of `exp`.
    Returns: [C] float32. Balanced counts give every class `head` (the authors' code divides by zero there).
    Raises: ValueError for an unknown shape or a smoothing outside [0, 1].
    Source: Zhong et al., "Improving Calibration for Long-Tailed Recognition", CVPR 2021, section 3.3.
    """
    if shape not in SMOOTHING_SHAPES:
        raise ValueError(f"unknown smoothing shape {shape!r}; known: {', '.join(SMOOTHING_SHAPES)}")
    for name, value in (("head", head), ("tail", tail)):
        if isinstance(value, (int, float)) and not 0 <= value <= 1:
            raise ValueError(f"smoothing {name} = {value}: a share of the label, from 0 to 1")
    counts = jnp.asarray(class_counts).astype(jnp.float32)
    spread = counts.max() - counts.min()
    x = jnp.where(spread > 0, (counts - counts.min()) / jnp.maximum(spread, 1e-12), 1.0)  # [C]
    match shape:
        case "concave":
            return tail + (head - tail) * jnp.sin(x * (jnp.pi / 2))
        case "linear":
            return tail + (head - tail) * x
        case "convex":
            return head + (head - tail) * jnp.sin(1.5 * jnp.pi + x * (jnp.pi / 2))
        case _:
            return tail + (head - tail) * x**power


def label_aware_smoothing(logits: jax.Array, labels: jax.Array, *, smoothing: ArrayLike) -> jax.Array:
    """Cross-entropy against labels smoothed by an amount of their class: `(1 - e_y)(-log p_y) + e_y mean_c(-log p_c)`.

    Args:
      logits: [B, C]. labels: [B] integers. smoothing: e [C], see `smoothing_by_count`.
    Returns: [B].
    The smoothed share goes to all C classes, as in the authors' code; their paper spreads it over the C - 1 others.
    Source: Zhong et al., CVPR 2021, equation 4.
    """
    log_p = jax.nn.log_softmax(logits)  # [B, C]
    share = _own(jnp.broadcast_to(jnp.asarray(smoothing).astype(log_p.dtype), log_p.shape), labels)  # [B]
    # C goes inside the sum: far-apart logits have a finite mean although their sum overflows
    uniform = -(log_p / log_p.shape[-1]).sum(-1)  # [B], infinite where a class is masked by a logit of -inf
    return (1 - share) * -_own(log_p, labels) + jnp.where(share > 0, share * uniform, 0)


def class_means(features: jax.Array, labels: jax.Array, num_classes: int) -> tuple[jax.Array, jax.Array]:
    """Mean feature of each class: features [B, D], labels [B] -> means [C, D], counts [C].

    A class without examples has mean 0 and count 0.
    """
    member = jax.nn.one_hot(labels, num_classes, dtype=features.dtype)  # [B, C]
    counts = member.sum(0)
    return (member.T @ features) / jnp.maximum(counts, 1)[:, None], counts


def _own(values: jax.Array, labels: jax.Array) -> jax.Array:
    """Each row's value at its label: [B, C], [B] -> [B]. Masked, not multiplied, so that an infinite value elsewhere in
    the row does not become nan."""
    own = jax.nn.one_hot(labels, values.shape[-1], dtype=bool)  # [B, C]
    return jnp.where(own, values, jnp.zeros((), values.dtype)).sum(-1)
