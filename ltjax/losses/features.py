"""Losses of features, and the class means that they compare features with."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ltjax.losses.arrays import whole


@partial(jax.jit, static_argnames="num_classes", inline=True)  # one program, also for a caller without `jit`
def class_means(features: jax.Array, labels: jax.Array, num_classes: int) -> tuple[jax.Array, jax.Array]:
    """Compute the mean feature of each class: features [B, D], labels [B] -> means [C, D], counts [C].

    A class without examples has mean 0 and count 0.

    Examples:
      >>> means, counts = losses.class_means(jnp.array([[1.0, 0.0], [3.0, 0.0]]), jnp.array([0, 0]), 2)
      >>> means
      Array([[2., 0.],
             [0., 0.]], dtype=float32)
      >>> counts
      Array([2., 0.], dtype=float32)
    """
    features, labels = whole(features), whole(labels)
    # On a CPU a scatter is 40 times as fast for 8,142 classes. On a GPU it would add in a random order.
    ways = {"cpu": partial(_scatter, num_classes), "default": partial(_product, num_classes)}
    sums, counts = jax.lax.platform_dependent(features, labels, **ways)
    return sums / jnp.maximum(counts, 1)[:, None], counts


def _scatter(num_classes: int, features: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum the features of each class -> sums [C, D], counts [C]."""
    ones = jnp.ones(labels.shape, features.dtype)
    sums, counts = (jax.ops.segment_sum(values, labels, num_classes) for values in (features, ones))
    return sums, counts


def _product(num_classes: int, features: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Do the same as `_scatter`, by a matrix product."""
    member = jax.nn.one_hot(labels, num_classes, dtype=features.dtype)  # [B, C]
    return jnp.matmul(member.T, features, precision="highest"), member.sum(0)


def running_class_means(
    means: jax.Array, counts: jax.Array, features: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Add a batch to the mean of each class: means [C, D], counts [C] -> new means [C, D], new counts [C].

    With b_c examples of class c in the batch, `m_c <- (n_c m_c + sum of them) / (n_c + b_c)` and `n_c <- n_c + b_c`. A
    class that the batch lacks keeps its mean. A class with count 0 forgets its first mean. Begin with counts of 0.

    ProCo adds the projections of a batch before it computes `vmf_contrast`. GKL's weights are means of the softmax:
    `features = jax.nn.softmax(logits / temperature)`.

    Source: Du et al., "Probabilistic Contrastive Learning for Long-Tailed Visual Recognition" (ProCo), TPAMI 2024.

    Args:
      means: [C, D].
      counts: [C] examples so far, of the type of `means`. float32 counts to 16,777,216.
      features: [B, D].
      labels: [B]. An example is left out if its label is outside 0..C-1.

    Examples:
      >>> means, counts = jnp.array([[1.0, 0.0], [9.0, 9.0]]), jnp.array([3.0, 0.0])
      >>> means, counts = losses.running_class_means(means, counts, jnp.array([[5.0, 4.0]]), jnp.array([0]))
      >>> means
      Array([[2., 1.],
             [9., 9.]], dtype=float32)
      >>> counts
      Array([4., 0.], dtype=float32)
    """
    of_batch, added = class_means(features.astype(means.dtype), labels, len(means))
    total = counts + added
    mean = (counts[:, None] * means + added[:, None] * of_batch) / jnp.maximum(total, 1)[:, None]
    return jnp.where(added[:, None] > 0, mean, means), total


def dro_bound(
    features: jax.Array, labels: jax.Array, centroids: jax.Array, *, margins: ArrayLike = 0.0, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Compute DRO-LT's bound on each class's loss under the worst centroid in a ball around the empirical one.

    For the B_c features z of class c, with centroid m_c, Euclidean distance d and z' over the whole batch,

        L_c = 1/B_c sum_z -log( exp(-(d(m_c, z) + margin_c)/T) / sum_z' exp(-(d(m_c, z') + margin_c [z' in c])/T) )

    The cost is B^2 distances from one matrix product; centroids of classes outside the batch are not used. The authors'
    `log(sum(exp))` underflows if d/T exceeds about 88, and applies margins to the wrong samples unless the batch is
    sorted by class. This function does neither.

    Source: Samuel & Chechik, "Distributional Robustness Loss for Long-tail Learning", ICCV 2021, equation 10.

    Args:
      features: [B, D].
      labels: [B]. An example is left out if its label is outside 0..C-1.
      centroids: [C, D].
      margins: Twice the ball's radius, scalar or [C].
      temperature: T.

    Returns:
      The bound of each class, [C], 0 if the batch has no example of it; and whether it has one, bool [C].

    Examples:
      >>> features, labels = jnp.array([[0.0, 0.0], [0.0, 1.0], [4.0, 0.0]]), jnp.array([0, 0, 1])
      >>> centroids = jnp.array([[0.0, 0.5], [4.0, 0.0], [9.0, 9.0]])
      >>> bound, present = losses.dro_bound(features, labels, centroids, margins=1.0)
      >>> bound
      Array([0.732, 0.09 , 0.   ], dtype=float32)
      >>> present
      Array([ True,  True, False], dtype=bool)
    """
    features, labels, centroids = whole(features), whole(labels), whole(centroids)  # for all pairs of examples
    num_classes, dtype = centroids.shape[0], features.dtype
    member = jax.nn.one_hot(labels, num_classes, dtype=dtype)  # [B, C]
    known = member.sum(-1) > 0  # [B]
    anchors = centroids.astype(dtype)[jnp.clip(labels, 0, num_classes - 1)]  # [B, D], centroid of each example's class
    margin = jnp.where(member > 0, jnp.broadcast_to(jnp.asarray(margins, dtype), (num_classes,)), 0).sum(-1)  # [B]

    # |a|^2 + |z|^2 - 2 a.z loses digits if the origin is far away, and all of them if z is at its centroid. So shift
    # the origin to the mean anchor, and compute the distance to the example's own centroid from the difference.
    origin = jax.lax.stop_gradient(anchors.mean(0))
    a, z = anchors - origin, features - origin
    product = jnp.matmul(a, z.T, precision="highest")  # [B, B], row: anchor, column: example
    squared = jnp.square(a).sum(-1)[:, None] + jnp.square(z).sum(-1)[None] - 2 * product
    diagonal = jnp.eye(len(labels), dtype=bool)
    squared = jnp.where(diagonal, jnp.square(anchors - features).sum(-1)[None], squared)
    distance = jnp.sqrt(jnp.maximum(squared, 1e-12))  # at a distance of 0 the gradient is 0, not nan

    same = labels[:, None] == labels[None]  # [B, B]
    similarity = -(distance + jnp.where(same, margin[:, None], 0)) / temperature
    total = jax.nn.logsumexp(jnp.where(known[None], similarity, -jnp.inf), axis=-1, where=known[:, None] | diagonal)
    per_example = jnp.where(known, total - jnp.where(diagonal, similarity, 0).sum(-1), 0)  # [B]
    count = member.sum(0)  # [C]
    return jnp.matmul(per_example, member, precision="highest") / jnp.maximum(count, 1), count > 0


def dro_loss(
    features: jax.Array,
    labels: jax.Array,
    centroids: jax.Array,
    *,
    margins: ArrayLike = 0.0,
    temperature: float = 1.0,
    class_weights: ArrayLike | None = None,
) -> jax.Array:
    """Compute DRO-LT's robustness loss of a batch, scalar: the mean of `dro_bound` over the classes in it.

    Other arguments: see `dro_bound`.

    Args:
      class_weights: w [C]. If given, the loss is `sum_c w_c L_c / sum_c w_c`. The sum of weights covers all C classes,
        not only those in the batch, as in the authors' code.

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
