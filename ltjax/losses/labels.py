"""Losses of logits and integer labels, and the class weights, margins and masks that they take."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ltjax.losses.arrays import at_label, positive_counts

SMOOTHING_SHAPES = ("concave", "linear", "convex", "exp")


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute softmax cross-entropy `-log p_y`: logits [B, C], integer labels [B] -> [B].

    Examples:
      >>> losses.cross_entropy(jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([0, 1]))
      Array([0.127, 0.693], dtype=float32)
    """
    return -at_label(jax.nn.log_softmax(logits), labels)


def mixed(
    loss: Callable[[jax.Array], jax.Array],
    labels: jax.Array,
    partner_labels: jax.Array | None = None,
    lam: ArrayLike | None = None,
) -> jax.Array:
    """Compute the loss of a mixup batch: `lam * loss(labels) + (1 - lam) * loss(partner_labels)`.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018.

    Args:
      loss: Function of labels [B] that returns the loss [B] (or its mean) of the mixed images.
      labels: [B].
      partner_labels: [B]. None: the batch is not mixed, and the result is `loss(labels)`.
      lam: Weight of `labels`, scalar or [B].

    Examples:
      >>> logits, labels, partner_labels = jnp.array([[2.0, 0.0]]), jnp.array([0]), jnp.array([1])
      >>> losses.mixed(lambda labels: losses.cross_entropy(logits, labels), labels, partner_labels, 0.75)
      Array([0.627], dtype=float32)
    """
    value = loss(labels)
    if partner_labels is None:
        return value
    lam = jnp.asarray(lam, value.dtype)
    return lam * value + (1 - lam) * loss(partner_labels)


def smoothing_by_count(
    class_counts: ArrayLike, *, head: float, tail: float, shape: str = "concave", power: float = 1.0
) -> jax.Array:
    """Compute MiSLAS's label smoothing of each class, which grows with its number of training images.

    With `x = (n_c - n_min) / (n_max - n_min)`:

        concave  tail + (head - tail) sin(pi x / 2)
        linear   tail + (head - tail) x
        convex   head + (head - tail) sin(3 pi / 2 + pi x / 2)
        exp      tail + (head - tail) x^power

    Source: Zhong et al., "Improving Calibration for Long-Tailed Recognition", CVPR 2021, section 3.3.

    Args:
      class_counts: [C] training images of each class.
      head: Smoothing of the most frequent class, in [0, 1].
      tail: Smoothing of the least frequent class, in [0, 1].
      shape: One of `SMOOTHING_SHAPES`.
      power: Exponent of `exp`.

    Returns:
      [C] float32. Balanced counts give every class `head`; the authors' code divides by zero then.

    Raises:
      ValueError: The shape is unknown, or a smoothing is outside [0, 1].

    Examples:
      >>> losses.smoothing_by_count(jnp.array([500, 50, 5]), head=0.4, tail=0.1)
      Array([0.4  , 0.143, 0.1  ], dtype=float32)
      >>> losses.smoothing_by_count(jnp.array([500, 50, 5]), head=0.4, tail=0.1, shape="linear")
      Array([0.4  , 0.127, 0.1  ], dtype=float32)
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
    """Compute cross-entropy with a label smoothing for each class: `(1 - e_y)(-log p_y) + e_y mean_c(-log p_c)`, [B].

    The smoothed share goes to all C classes, as in the authors' code. Their paper spreads it over the C - 1 others.

    Source: Zhong et al., CVPR 2021, equation 4.

    Args:
      logits: [B, C].
      labels: [B] integers.
      smoothing: e [C], see `smoothing_by_count`.

    Examples:
      >>> smoothing = losses.smoothing_by_count(jnp.array([1000, 100, 10]), head=0.3, tail=0.0)
      >>> losses.label_aware_smoothing(jnp.array([[2.0, 0.5, -1.0]]), jnp.array([0]), smoothing=smoothing)
      Array([0.691], dtype=float32)
    """
    log_p = jax.nn.log_softmax(logits)  # [B, C]
    share = at_label(jnp.broadcast_to(jnp.asarray(smoothing).astype(log_p.dtype), log_p.shape), labels)  # [B]
    # Divide before summing: the sum of log-probabilities can overflow although their mean is finite.
    uniform = -(log_p / log_p.shape[-1]).sum(-1)  # [B], infinite if a logit of -inf masks a class
    return (1 - share) * -at_label(log_p, labels) + jnp.where(share > 0, share * uniform, 0)


def balanced_softmax(logits: jax.Array, labels: jax.Array, *, class_counts: ArrayLike) -> jax.Array:
    """Compute cross-entropy of a softmax weighted by class counts: `-log(n_y exp z_y / sum_c n_c exp z_c)`, [B].

    Source: Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020.

    Args:
      logits: [B, C].
      labels: [B].
      class_counts: [C], at least 1 each.

    Examples:
      >>> losses.balanced_softmax(jnp.zeros((2, 2)), jnp.array([0, 1]), class_counts=jnp.array([90, 10]))
      Array([0.105, 2.303], dtype=float32)
    """
    return logit_adjusted(logits, labels, class_counts=class_counts, tau=1.0)


def logit_adjusted(logits: jax.Array, labels: jax.Array, *, class_counts: ArrayLike, tau: float = 1.0) -> jax.Array:
    """Compute cross-entropy of logits plus `tau * log prior`, [B]. It trains the logits for balanced classes.

    Source: Menon et al., "Long-Tail Learning via Logit Adjustment", ICLR 2021, equation 10.

    Args:
      logits: [B, C].
      labels: [B].
      class_counts: [C], at least 1 each.
      tau: 0 is cross-entropy, 1 is balanced softmax.

    Examples:
      >>> losses.logit_adjusted(jnp.zeros((2, 2)), jnp.array([0, 1]), class_counts=jnp.array([90, 10]), tau=0.5)
      Array([0.288, 1.386], dtype=float32)
    """
    return cross_entropy(logits + tau * log_prior(class_counts).astype(logits.dtype), labels)


def log_prior(class_counts: ArrayLike) -> jax.Array:
    """Compute the logarithm of each class's share of the training images: class_counts [C] -> [C] float32.

    Raises:
      ValueError: A class has no training images.

    Examples:
      >>> losses.log_prior(jnp.array([90, 10]))
      Array([-0.105, -2.303], dtype=float32)
    """
    counts = positive_counts(class_counts)
    return jnp.log(counts) - jnp.log(counts.sum())


def focal(logits: jax.Array, labels: jax.Array, *, gamma: float = 2.0) -> jax.Array:
    """Compute the focal loss `-(1 - p_y)^gamma log p_y`, [B], which weights confident correct examples less.

    1 - p_y is the sum of the other classes' softmax, so value and gradient stay accurate if p_y is near 1.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, with a softmax as in LDAM's comparison.

    Args:
      logits: [B, C].
      labels: [B].
      gamma: 0 is cross-entropy.

    Examples:
      >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([0, 0])
      >>> losses.focal(logits, labels, gamma=2.0)
      Array([0.002, 0.173], dtype=float32)
    """
    log_p = jax.nn.log_softmax(logits)  # [B, C]
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    # exp(-1e4) is 0 in float32. Without this floor the gradient is nan if logits of -inf mask all other classes.
    log_rest = jax.nn.logsumexp(jnp.where(is_label, -1e4, jnp.maximum(log_p, -1e4)), axis=-1)  # [B], log(1 - p_y)
    return jnp.exp(gamma * log_rest) * -at_label(log_p, labels)


def ldam_margins(class_counts: ArrayLike, *, max_margin: float = 0.5) -> jax.Array:
    """Compute LDAM's margin of each class, `max_margin * (n_min / n_c)^(1/4)`: class_counts [C] -> [C].

    Raises:
      ValueError: A class has no training images.

    Examples:
      >>> losses.ldam_margins([1600, 100]).tolist()
      [0.25, 0.5]
    """
    counts = positive_counts(class_counts)
    return max_margin * (counts.min() / counts) ** 0.25


def ldam(
    logits: jax.Array, labels: jax.Array, *, class_counts: ArrayLike, max_margin: float = 0.5, scale: float = 30.0
) -> jax.Array:
    """Compute cross-entropy with larger margins for rarer classes: `-log softmax(scale * (z - m_y [c = y]))_y`, [B].

    Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019.

    Args:
      logits: z [B, C]. The paper takes cosines (a cosine classifier of scale 1).
      labels: [B].
      class_counts: [C], at least 1 each.
      max_margin: Margin of the rarest class, see `ldam_margins`.
      scale: Factor on the logits. If they are scaled already (`models.create(..., cosine_scale=30)`), the same loss
        is `scale=1, max_margin=0.5 * 30`.

    Examples:
      >>> cosines, labels = jnp.array([[0.5, 0.3], [0.3, 0.5]]), jnp.array([0, 1])
      >>> losses.ldam(cosines, labels, class_counts=jnp.array([160, 10]))
      Array([1.701, 9.   ], dtype=float32)
    """
    margins = ldam_margins(class_counts, max_margin=max_margin)
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)  # [B, C]
    return cross_entropy(scale * (logits - is_label * margins.astype(logits.dtype)), labels)


def effective_number_weights(class_counts: ArrayLike, *, beta: float = 0.9999) -> jax.Array:
    """Compute class weights `(1 - beta) / (1 - beta^n_c)`, scaled to mean 1: [C] -> [C] float32.

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019.

    Args:
      class_counts: [C], at least 1 each.
      beta: In [0, 1). 0 gives equal weights; as beta approaches 1, the weights approach `1 / n_c`.

    Raises:
      ValueError: beta is outside [0, 1), or a class has no training images.

    Examples:
      >>> losses.effective_number_weights(jnp.array([1000, 100, 10]), beta=0.999)
      Array([0.042, 0.28 , 2.678], dtype=float32)
    """
    if not 0 <= beta < 1:
        raise ValueError(f"effective number beta = {beta}: from 0 up to, not including, 1")
    counts = positive_counts(class_counts)
    # expm1 because 1 - beta^n is rounding noise at beta = 1 - 1e-7
    weights = 1 / -jnp.expm1(counts * math.log(beta)) if beta else jnp.ones_like(counts)
    return weights / weights.mean()


def branch_masks(class_counts: ArrayLike, *, medium_start: int, tail_start: int) -> jax.Array:
    """Mark the classes of each of ResLT's three branches: bool [3, C], for all; medium and tail; tail.

    Classes are ranked by count, most frequent first; equal counts are ranked by class number.

    Source: Cui et al., "ResLT: Residual Learning for Long-Tailed Recognition", TPAMI 2022, section 3.2.

    Args:
      class_counts: [C].
      medium_start: First rank of the medium classes.
      tail_start: First rank of the tail classes.

    Raises:
      ValueError: The ranks are not integers, or 0 <= medium_start <= tail_start does not hold.

    Examples:
      >>> losses.branch_masks(jnp.array([5, 500, 50]), medium_start=1, tail_start=2)
      Array([[ True,  True,  True],
             [ True, False,  True],
             [ True, False, False]], dtype=bool)
    """
    if np.asarray((medium_start, tail_start)).dtype.kind not in "iu" or not 0 <= medium_start <= tail_start:
        raise ValueError(
            f"branches medium_start = {medium_start}, tail_start = {tail_start}: ranks, in this order, such as 35 and "
            "70 of 100 classes"
        )
    order = jnp.argsort(-jnp.asarray(class_counts).astype(jnp.float32), stable=True)
    rank = jnp.argsort(order)  # [C]
    return jnp.stack([rank >= start for start in (0, medium_start, tail_start)])


def residual_fusion(branch_logits: jax.Array, labels: jax.Array, *, masks: ArrayLike, beta: float) -> jax.Array:
    """Compute ResLT's loss, scalar: `beta * L_branch + (1 - beta) * CE(sum of the branches' logits)`.

    L_branch is the mean cross-entropy over all pairs of a branch and an example of one of its classes. It uses a
    log-softmax; the authors' `log(softmax + 1e-7)` saturates at 16.1 and has no gradient there.

    Source: Cui et al., TPAMI 2022, equations 2 to 4.

    Args:
      branch_logits: [R, B, C].
      labels: [B].
      masks: bool [R, C], see `branch_masks`.
      beta: In [0, 1].

    Examples:
      >>> masks = losses.branch_masks(jnp.array([500, 50, 5]), medium_start=1, tail_start=2)
      >>> branch_logits = jnp.zeros((3, 2, 3)).at[:, 0, 0].set(2.0)  # of two examples
      >>> losses.residual_fusion(branch_logits, jnp.array([0, 2]), masks=masks, beta=0.9)
      Array(0.851, dtype=float32)
    """
    is_label = jax.nn.one_hot(labels, branch_logits.shape[-1], dtype=branch_logits.dtype)  # [B, C]
    responsible = jnp.asarray(masks).astype(is_label.dtype) @ is_label.T  # [R, B], 1 or 0
    per_branch = jax.vmap(cross_entropy, in_axes=(0, None))(branch_logits, labels)  # [R, B]
    branch_loss = (responsible * per_branch).sum() / jnp.maximum(responsible.sum(), 1)
    return beta * branch_loss + (1 - beta) * cross_entropy(branch_logits.sum(0), labels).mean()
