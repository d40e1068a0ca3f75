"""Loss kernels: pure functions of arrays, for any JAX project. This module needs jax alone.

Per-example losses return [B]; the caller reduces. Arrays are positional, hyper-parameters keyword-only. Labels become
one-hot rows rather than indices, so that the kernels work under automatic and explicit sharding alike; an example whose
label is outside 0..C-1 has loss 0.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

SMOOTHING_SHAPES = ("concave", "linear", "convex", "exp")


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Softmax cross-entropy `-log p_y`: logits [B, C], integer labels [B] -> [B].

    Examples:
      >>> losses.cross_entropy(jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([0, 1]))
      Array([0.127, 0.693], dtype=float32)
    """
    return -_own(jax.nn.log_softmax(logits), labels)


def mixed(loss: Callable[[jax.Array], jax.Array], labels: jax.Array, partner_labels=None, lam=None) -> jax.Array:
    """The loss of a mixup batch: `lam * loss(labels) + (1 - lam) * loss(partner_labels)`.

    Args:
      loss: labels [B] -> per-example loss [B], with the logits of the mixed images inside.
      labels: [B]. partner_labels: [B], or None where the batch was not mixed: then plain `loss(labels)`.
      lam: the weight of the image's own label, scalar or [B].
    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018.

    Examples:
      >>> logits, own, partner = jnp.array([[2.0, 0.0]]), jnp.array([0]), jnp.array([1])
      >>> losses.mixed(lambda labels: losses.cross_entropy(logits, labels), own, partner, 0.75)
      Array([0.627], dtype=float32)
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
    """Cross-entropy against labels smoothed by an amount of their class: `(1 - e_y)(-log p_y) + e_y mean_c(-log p_c)`.

    Args:
      logits: [B, C]. labels: [B] integers. smoothing: e [C], see `smoothing_by_count`.
    Returns: [B].
    The smoothed share goes to all C classes, as in the authors' code; their paper spreads it over the C - 1 others.
    Source: Zhong et al., CVPR 2021, equation 4.

    Examples:
      >>> smoothing = losses.smoothing_by_count(jnp.array([1000, 100, 10]), head=0.3, tail=0.0)
      >>> losses.label_aware_smoothing(jnp.array([[2.0, 0.5, -1.0]]), jnp.array([0]), smoothing=smoothing)
      Array([0.691], dtype=float32)
    """
    log_p = jax.nn.log_softmax(logits)  # [B, C]
    share = _own(jnp.broadcast_to(jnp.asarray(smoothing).astype(log_p.dtype), log_p.shape), labels)  # [B]
    # C goes inside the sum: far-apart logits have a finite mean although their sum overflows
    uniform = -(log_p / log_p.shape[-1]).sum(-1)  # [B], infinite where a class is masked by a logit of -inf
    return (1 - share) * -_own(log_p, labels) + jnp.where(share > 0, share * uniform, 0)


def kl_divergence(p_logits: jax.Array, q_logits: jax.Array) -> jax.Array:
    """`KL(p || q) = sum_c p_c (log p_c - log q_c)` of two softmaxes, [B]: how far q has moved from p.

    Args: p_logits [B, C], of the prediction held to be right; q_logits [B, C]. Differentiable in both.
    Both gradients stay finite where a logit is -inf in both: that class counts as 0.
    Source: Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy" (TRADES), ICML 2019.

    Examples:
      >>> losses.kl_divergence(jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 0.0]]))
      Array([0.328], dtype=float32)
    """
    log_p, log_q = jax.nn.log_softmax(p_logits), jax.nn.log_softmax(q_logits)
    present = jnp.isfinite(log_p)  # 0 log 0 = 0
    log_p = jnp.where(present, log_p, 0)
    return jnp.where(present, jnp.exp(log_p) * (log_p - jnp.where(present, log_q, 0)), 0).sum(-1)


def logit_pairing(logits: jax.Array, target_logits: jax.Array) -> jax.Array:
    """Mean over classes of the squared difference of logits, [B]: `|z - t|^2 / C`. Differentiable in both.

    Args: logits [B, C], target_logits [B, C]: LBGAT has the robust model's on adversarial images and the natural
      model's on clean ones; ALP one model's on both.
    Source: Cui et al., "Learnable Boundary Guided Adversarial Training", ICCV 2021, equation 2; Kannan et al.,
      "Adversarial Logit Pairing", 2018.

    Examples:
      >>> losses.logit_pairing(jnp.array([[3.0, 0.0]]), jnp.array([[1.0, 0.0]]))
      Array([2.], dtype=float32)
    """
    return jnp.square(logits - target_logits).mean(-1)


def class_means(features: jax.Array, labels: jax.Array, num_classes: int) -> tuple[jax.Array, jax.Array]:
    """Mean feature of each class: features [B, D], labels [B] -> means [C, D], counts [C].

    A class without examples has mean 0 and count 0.

    Examples:
      >>> means, counts = losses.class_means(jnp.array([[1.0, 0.0], [3.0, 0.0]]), jnp.array([0, 0]), 2)
      >>> means
      Array([[2., 0.],
             [0., 0.]], dtype=float32)
      >>> counts
      Array([2., 0.], dtype=float32)
    """
    features, labels = _whole(features), _whole(labels)
    member = jax.nn.one_hot(labels, num_classes, dtype=features.dtype)  # [B, C]
    counts = member.sum(0)
    sums = jnp.matmul(member.T, features, precision="highest")  # [C, D]
    return sums / jnp.maximum(counts, 1)[:, None], counts


def balanced_softmax(logits: jax.Array, labels: jax.Array, *, class_counts: ArrayLike) -> jax.Array:
    """Cross-entropy of a softmax weighted by class counts: `-log(n_y exp z_y / sum_c n_c exp z_c)`, [B].

    Args: logits [B, C], labels [B], class_counts [C], at least 1 each.
    Source: Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020.

    Examples:
      >>> losses.balanced_softmax(jnp.zeros((2, 2)), jnp.array([0, 1]), class_counts=jnp.array([90, 10]))
      Array([0.105, 2.303], dtype=float32)
    """
    return logit_adjusted(logits, labels, class_counts=class_counts, tau=1.0)


def logit_adjusted(logits: jax.Array, labels: jax.Array, *, class_counts: ArrayLike, tau: float = 1.0) -> jax.Array:
    """Cross-entropy of logits plus `tau * log prior`: trains `z` to be right under balanced classes, [B].

    Args: logits [B, C], labels [B], class_counts [C], at least 1 each. tau: strength; 0 is cross-entropy, 1 balanced
      softmax.
    Source: Menon et al., "Long-Tail Learning via Logit Adjustment", ICLR 2021, equation 10.

    Examples:
      >>> losses.logit_adjusted(jnp.zeros((2, 2)), jnp.array([0, 1]), class_counts=jnp.array([90, 10]), tau=0.5)
      Array([0.288, 1.386], dtype=float32)
    """
    return cross_entropy(logits + tau * log_prior(class_counts).astype(logits.dtype), labels)


def log_prior(class_counts: ArrayLike) -> jax.Array:
    """Logarithm of each class's share of the training images, [C] float32.

    Examples:
      >>> losses.log_prior(jnp.array([90, 10]))
      Array([-0.105, -2.303], dtype=float32)
    """
    counts = jnp.asarray(class_counts).astype(jnp.float32)
    return jnp.log(counts) - jnp.log(counts.sum())


def focal(logits: jax.Array, labels: jax.Array, *, gamma: float = 2.0) -> jax.Array:
    """Focal loss `-(1 - p_y)^gamma log p_y`, [B]: examples that are right already count less.

    Args: logits [B, C], labels [B]. gamma: 0 is cross-entropy. 1 - p_y is the sum of the other classes' softmax, so
      that value and gradient stay exact where p_y is near 1.
    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, with a softmax as in LDAM's comparison.

    Examples:
      >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([0, 0])
      >>> losses.focal(logits, labels, gamma=2.0)
      Array([0.002, 0.173], dtype=float32)
    """
    log_p = jax.nn.log_softmax(logits)  # [B, C]
    own = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    # The floor is far below where float32 tells 1 - p_y from 0; without it, the gradient would be nan where every other
    # class is masked by a logit of -inf.
    log_rest = jax.nn.logsumexp(jnp.where(own, -1e4, jnp.maximum(log_p, -1e4)), axis=-1)  # [B], log(1 - p_y)
    return jnp.exp(gamma * log_rest) * -_own(log_p, labels)


def ldam_margins(class_counts: ArrayLike, *, max_margin: float = 0.5) -> jax.Array:
    """LDAM's margin of each class, [C]: `max_margin * (n_min / n_c)^(1/4)`.

    Examples:
      >>> losses.ldam_margins([1600, 100]).tolist()
      [0.25, 0.5]
    """
    counts = jnp.asarray(class_counts).astype(jnp.float32)  # half precision does not hold large counts
    return max_margin * (counts.min() / counts) ** 0.25


def ldam(
    logits: jax.Array, labels: jax.Array, *, class_counts: ArrayLike, max_margin: float = 0.5, scale: float = 30.0
) -> jax.Array:
    """Cross-entropy with a larger margin for rarer classes: `-log softmax(scale * (z - m_y [c = y]))_y`, [B].

    The margin m is that of `ldam_margins`.

    Args: logits [B, C], cosines in the paper (a cosine classifier of scale 1). labels [B]. class_counts [C].
      scale: on logits that are scaled already (`models.create(..., cosine_scale=30)`) the same loss is `scale=1` and
      `max_margin=0.5 * 30`.
    Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019.

    Examples:
      >>> cosines, labels = jnp.array([[0.5, 0.3], [0.3, 0.5]]), jnp.array([0, 1])
      >>> losses.ldam(cosines, labels, class_counts=jnp.array([160, 10]))
      Array([1.701, 9.   ], dtype=float32)
    """
    margins = ldam_margins(class_counts, max_margin=max_margin)
    own = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)  # [B, C]
    return cross_entropy(scale * (logits - own * margins.astype(logits.dtype)), labels)


def effective_number_weights(class_counts: ArrayLike, *, beta: float = 0.9999) -> jax.Array:
    """Class weights `(1 - beta) / (1 - beta^n_c)`, scaled to mean 1: [C] -> [C] float32.

    Args: class_counts [C], at least 1 each. beta: in [0, 1); 0 weights all classes alike, towards 1 the weights become
      `1 / n_c`.
    Raises: ValueError for a beta outside [0, 1).
    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019.

    Examples:
      >>> losses.effective_number_weights(jnp.array([1000, 100, 10]), beta=0.999)
      Array([0.042, 0.28 , 2.678], dtype=float32)
    """
    if not 0 <= beta < 1:
        raise ValueError(f"effective number beta = {beta}: from 0 up to, not including, 1")
    counts = jnp.asarray(class_counts).astype(jnp.float32)
    # 1 - beta^n through expm1: at beta = 1 - 1e-7 the plain form is rounding noise
    weights = 1 / -jnp.expm1(counts * math.log(beta)) if beta else jnp.ones_like(counts)
    return weights / weights.mean()


def dro_bound(
    features: jax.Array, labels: jax.Array, centroids: jax.Array, *, margins: ArrayLike = 0.0, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """DRO-LT's bound on the loss of each class under the worst centroid in a ball around the empirical one.

    For the B_c features z of class c, with centroid m_c and Euclidean distance d,

        L_c = 1/B_c sum_z -log( exp(-(d(m_c, z) + margin_c)/T) / sum_z' exp(-(d(m_c, z') + margin_c [z' in c])/T) )

    where z' runs over the whole batch.

    Args:
      features: [B, D]. labels: [B]; an example whose label is outside 0..C-1 takes no part. centroids: [C, D].
      margins: scalar or [C], twice the ball's radius. temperature: T.
    Returns: the bound of each class [C], 0 where absent; and which classes the batch has [C] bool.
    Only the centroids of classes in the batch are looked at: B^2 distances, from a matrix product. The authors' plain
    `log(sum(exp))` underflows from d/T of about 88 on, and gives margins to the wrong samples unless the batch is
    sorted by class; neither happens here.
    Source: Samuel & Chechik, "Distributional Robustness Loss for Long-tail Learning", ICCV 2021, equation 10.

    Examples:
      >>> features, labels = jnp.array([[0.0, 0.0], [0.0, 1.0], [4.0, 0.0]]), jnp.array([0, 0, 1])
      >>> centroids = jnp.array([[0.0, 0.5], [4.0, 0.0], [9.0, 9.0]])
      >>> bound, present = losses.dro_bound(features, labels, centroids, margins=1.0)
      >>> bound
      Array([0.732, 0.09 , 0.   ], dtype=float32)
      >>> present
      Array([ True,  True, False], dtype=bool)
    """
    features, labels, centroids = _whole(features), _whole(labels), _whole(centroids)  # every pair of examples meets
    num_classes, dtype = centroids.shape[0], features.dtype
    own = jax.nn.one_hot(labels, num_classes, dtype=dtype)  # [B, C]
    known = own.sum(-1) > 0  # [B]
    anchors = centroids.astype(dtype)[jnp.clip(labels, 0, num_classes - 1)]  # [B, D], each example's own centroid
    margin = jnp.where(own > 0, jnp.broadcast_to(jnp.asarray(margins, dtype), (num_classes,)), 0).sum(-1)  # [B]

    # |a|^2 + |z|^2 - 2 a.z loses digits where the origin is far away, and everything where z sits on its centroid: so
    # move the origin between them, and take each example's distance to its own centroid from the difference.
    origin = jax.lax.stop_gradient(anchors.mean(0))
    a, z = anchors - origin, features - origin
    product = jnp.matmul(a, z.T, precision="highest")  # [B, B], row: anchor, column: example
    squared = jnp.square(a).sum(-1)[:, None] + jnp.square(z).sum(-1)[None] - 2 * product
    itself = jnp.eye(len(labels), dtype=bool)
    squared = jnp.where(itself, jnp.square(anchors - features).sum(-1)[None], squared)
    distance = jnp.sqrt(jnp.maximum(squared, 1e-12))  # the floor gives a feature on its centroid gradient 0, not nan

    same = labels[:, None] == labels[None]  # [B, B]
    similarity = -(distance + jnp.where(same, margin[:, None], 0)) / temperature
    total = jax.nn.logsumexp(jnp.where(known[None], similarity, -jnp.inf), axis=-1, where=known[:, None] | itself)
    per_example = jnp.where(known, total - jnp.where(itself, similarity, 0).sum(-1), 0)  # [B]
    count = own.sum(0)  # [C]
    return jnp.matmul(per_example, own, precision="highest") / jnp.maximum(count, 1), count > 0


def dro_loss(
    features: jax.Array,
    labels: jax.Array,
    centroids: jax.Array,
    *,
    margins: ArrayLike = 0.0,
    temperature: float = 1.0,
    class_weights: ArrayLike | None = None,
) -> jax.Array:
    """DRO-LT's robustness loss of a batch, scalar: the mean of `dro_bound` over the classes in it.

    class_weights: w [C]; then `sum_c w_c L_c / sum_c w_c`, where the sum of weights runs over all C classes and not
      just those in the batch, as in the authors' code. Other arguments: see `dro_bound`.

    Examples:
      >>> features, labels = jnp.array([[0.0, 0.0], [0.0, 1.0], [4.0, 0.0]]), jnp.array([0, 0, 1])
      >>> centroids = jnp.array([[0.0, 0.5], [4.0, 0.0]])
      >>> losses.dro_loss(features, labels, centroids, margins=1.0)
      Array(0.411, dtype=float32)
    """
    bound, present = dro_bound(features, labels, centroids, margins=margins, temperature=temperature)
    if class_weights is None:
        return bound.sum() / jnp.maximum(present.sum(), 1).astype(bound.dtype)
    weights = jnp.asarray(class_weights).astype(bound.dtype)
    return (weights * bound).sum() / weights.sum()


def branch_masks(class_counts: ArrayLike, *, medium_start: int, tail_start: int) -> jax.Array:
    """The classes that each of ResLT's three branches is responsible for: bool [3, C], all; medium and tail; tail.

    Classes are ranked by count, most frequent first (ties: lower class number first); medium begins at rank
    `medium_start`, tail at rank `tail_start`.
    Raises: ValueError unless 0 <= medium_start <= tail_start.
    Source: Cui et al., "ResLT: Residual Learning for Long-Tailed Recognition", TPAMI 2022, section 3.2.

    Examples:
      >>> losses.branch_masks(jnp.array([5, 500, 50]), medium_start=1, tail_start=2)
      Array([[ True,  True,  True],
             [ True, False,  True],
             [ True, False, False]], dtype=bool)
    """
    if not 0 <= medium_start <= tail_start:
        raise ValueError(f"branches medium_start = {medium_start}, tail_start = {tail_start}: ranks, in this order")
    order = jnp.argsort(-jnp.asarray(class_counts).astype(jnp.float32), stable=True)
    rank = jnp.argsort(order)  # [C]
    return jnp.stack([rank >= start for start in (0, medium_start, tail_start)])


def residual_fusion(branch_logits: jax.Array, labels: jax.Array, *, masks: ArrayLike, beta: float) -> jax.Array:
    """ResLT's loss, scalar: `beta * L_branch + (1 - beta) * CE(sum of the branches' logits)`.

    L_branch adds each branch's cross-entropy over the examples whose class it is responsible for, and divides by the
    number of such (example, branch) pairs.

    Args:
      branch_logits: [R, B, C]. labels: [B]. masks: bool [R, C], see `branch_masks`. beta: in [0, 1].
    In log-softmax form; the authors' `log(softmax + 1e-7)` cannot pass 16.1 and has no gradient there.
    Source: Cui et al., TPAMI 2022, equations 2 to 4.

    Examples:
      >>> masks = losses.branch_masks(jnp.array([500, 50, 5]), medium_start=1, tail_start=2)
      >>> branch_logits = jnp.zeros((3, 2, 3)).at[:, 0, 0].set(2.0)  # of two examples
      >>> losses.residual_fusion(branch_logits, jnp.array([0, 2]), masks=masks, beta=0.9)
      Array(0.851, dtype=float32)
    """
    own = jax.nn.one_hot(labels, branch_logits.shape[-1], dtype=branch_logits.dtype)  # [B, C]
    responsible = jnp.asarray(masks).astype(own.dtype) @ own.T  # [R, B], 1 or 0
    per_branch = jax.vmap(cross_entropy, in_axes=(0, None))(branch_logits, labels)  # [R, B]
    branch_loss = (responsible * per_branch).sum() / jnp.maximum(responsible.sum(), 1)
    return beta * branch_loss + (1 - beta) * cross_entropy(branch_logits.sum(0), labels).mean()


def _whole(x: ArrayLike) -> jax.Array:
    """x on every device, where explicit sharding makes that our decision; elsewhere the compiler's."""
    x = jnp.asarray(x)
    spec = jax.typeof(x).sharding.spec
    return jax.sharding.reshard(x, PartitionSpec()) if any(axis is not None for axis in spec) else x


def _own(values: jax.Array, labels: jax.Array) -> jax.Array:
    """Each row's value at its label: [B, C], [B] -> [B]. Masked, not multiplied, so that an infinite value elsewhere in
    the row does not become nan."""
    own = jax.nn.one_hot(labels, values.shape[-1], dtype=bool)  # [B, C]
    return jnp.where(own, values, jnp.zeros((), values.dtype)).sum(-1)
