"""Contrastive losses of unit features: with the other images of the batch, or with a model of each class."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ltjax.losses.arrays import at_least_float32, check_temperature, length, whole

LEAST_ORDER = 10  # of the Bessel functions that `_log_ratio` expands; smaller ones follow by recurrence


def balanced_contrast(
    features: jax.Array, labels: jax.Array, centres: jax.Array, *, temperature: float | jax.Array
) -> jax.Array:
    """Compute balanced supervised contrast of a batch, scalar: each class weighs the same in the denominator.

    The anchors f_i are the V B views. The columns x_j are the views and one centre for each class, n_j of j's class in
    all. P_i are the columns of i's class without i itself, and T is the temperature:

        loss = mean_i 1/|P_i| sum_{j in P_i} -( f_i.x_j / T - log sum_{j != i} exp(f_i.x_j / T) / (n_j - [y_j = y_i]) )

    All pairs meet: the largest arrays are [V B, V B + C]. The result has the features' type; bfloat16 and float16 are
    computed in float32.

    Source: Zhu et al., "Balanced Contrastive Learning for Long-Tailed Visual Recognition", CVPR 2022.

    Args:
      features: f [V, B, P] of V views of each image, of length 1.
      labels: [B]. An example is left out, also as a column, if its label is outside 0..C-1.
      centres: [C, P], of length 1.
      temperature: T, above 0.

    Raises:
      ValueError: The temperature is not above 0.

    Examples:
      >>> features = jnp.array([[[1.0, 0.0], [0.0, 1.0]], [[0.8, 0.6], [0.6, 0.8]]])  # two views of two images
      >>> losses.balanced_contrast(features, jnp.array([0, 1]), jnp.eye(2), temperature=0.5)
      Array(0.459, dtype=float32)
    """
    check_temperature(temperature)
    return _of_all_pairs(features, labels, centres, temperature)


@functools.partial(jax.jit, inline=True)  # one program, also for a caller without `jit`
def _of_all_pairs(
    features: jax.Array, labels: jax.Array, centres: jax.Array, temperature: float | jax.Array
) -> jax.Array:
    """Compute `balanced_contrast`."""
    x, labels, centres = whole(at_least_float32(features)), whole(labels), whole(centres)  # for all pairs
    num_views, num_classes = len(x), len(centres)
    anchors = x.reshape(-1, x.shape[-1])  # [N, P] with N = V B
    columns = jnp.concatenate([anchors, centres.astype(x.dtype)])  # [N + C, P]
    similarity = jnp.matmul(anchors, columns.T, precision="highest") / temperature  # [N, N + C]

    member = jax.nn.one_hot(labels, num_classes, dtype=x.dtype)  # [B, C]
    of_class = num_views * member.sum(0) + 1  # [C] columns
    of_anchor = jnp.tile(jnp.matmul(member, of_class, precision="highest"), num_views)  # [N], 0 if it has no class
    count = jnp.concatenate([of_anchor, of_class])  # [N + C], columns of the column's class
    label = jnp.concatenate([jnp.tile(labels, num_views), jnp.arange(num_classes, dtype=labels.dtype)])
    same = label[: len(anchors), None] == label  # [N, N + C]
    used = (count > 0) & ~jnp.eye(len(anchors), len(columns), dtype=bool)

    # A class of an anchor has 2 columns or more, because of its centre.
    log_count = jnp.where(same, jnp.log(jnp.maximum(count - 1, 1)), jnp.log(jnp.maximum(count, 1)))
    total = jax.nn.logsumexp(jnp.where(used, similarity - log_count, -jnp.inf), axis=-1)  # [N]
    positive = jnp.where(same & used, similarity, 0).sum(-1) / jnp.maximum(of_anchor - 1, 1)  # [N]
    known = of_anchor > 0
    loss = jnp.where(known, total - positive, 0).sum() / jnp.maximum(known.sum(), 1).astype(x.dtype)
    return loss.astype(features.dtype)


def vmf_kappas(means: jax.Array, *, largest: float = 1e5) -> jax.Array:
    """Estimate the concentration of each class's von Mises-Fisher distribution: mean unit features [C, P] -> [C].

    `kappa = P R / (1 - R^2)` with the mean's length R, and `largest` if that is more or if R is 1. The usual estimate
    is `R (P - R^2) / (1 - R^2)`; ProCo's authors leave out the R^2, which is below 1 % if P is 128.

    Source: Du et al. (ProCo), TPAMI 2024, as in the authors' code.

    Args:
      means: [C, P] means of unit features, not normalised, see `running_class_means`.
      largest: Upper bound. A class with one example has R = 1.

    Returns:
      [C] in float32 at least. A mean of 0 gives 0, the uniform distribution.

    Examples:
      >>> losses.vmf_kappas(jnp.array([[0.5, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
      Array([     2., 100000.,      0.], dtype=float32)
    """
    means = at_least_float32(means)
    above = means.shape[-1] * length(means)  # [C]
    below = 1 - jnp.square(means).sum(-1)
    return jnp.where(above < largest * below, above / jnp.maximum(below, 1e-12), largest)


def vmf_contrast(
    features: jax.Array, means: jax.Array, kappas: ArrayLike, *, temperature: float | jax.Array
) -> jax.Array:
    """Compute the logits of ProCo: contrast with infinitely many images of each class, [B, C].

    Class c is a von Mises-Fisher distribution with mean direction m_c and concentration k_c. The mean of
    `exp(z.x / T)` over its x has a closed form with the modified Bessel function I of order `nu = P/2 - 1`:

        l_c = log(I(q) / q^nu) - log(I(k_c) / k_c^nu),    q = |k_c m_c + z / T|

    The loss is `logit_adjusted(l, labels, class_counts=class_counts)`. z has a gradient, also along z; means and kappas
    have none. In float32 the error is below 1e-6 of the larger of 1 and 1/T, for any P, kappas to 1e6 and temperatures
    from 0.001 on. The authors' recurrence in float64 is short: its derivative is off by 2 % for P = 128 and q = 3,000.
    No array is larger than the arguments or [B, C]. The result has the features' type; bfloat16 and float16 are
    computed in float32.

    Source: Du et al., "Probabilistic Contrastive Learning for Long-Tailed Visual Recognition" (ProCo), TPAMI 2024.

    Args:
      features: z [B, P], of length 1.
      means: [C, P] of any length, see `running_class_means`. A mean of 0 has no direction: its class has the same logit
        for every feature.
      kappas: k [C], 0 or more, see `vmf_kappas`.
      temperature: T, above 0.

    Raises:
      ValueError: The temperature is not above 0.

    Examples:
      >>> features, means = jnp.array([[1.0, 0.0, 0.0]]), jnp.eye(3)[:2]
      >>> losses.vmf_contrast(features, means, jnp.array([5.0, 0.0]), temperature=0.5)
      Array([[1.664, 0.595]], dtype=float32)
    """
    check_temperature(temperature)
    z = at_least_float32(features)
    means, kappas = (jax.lax.stop_gradient(jnp.asarray(x).astype(z.dtype)) for x in (means, kappas))
    means_length = length(means)[:, None]
    directions = means / jnp.where(means_length > 0, means_length, 1)  # [C, P]
    cosines = jnp.matmul(z, directions.T, precision="highest")  # [B, C]
    squares = jnp.square(z).sum(-1, keepdims=True) / temperature**2  # [B, 1]
    difference = 2 * kappas * cosines / temperature + squares  # q^2 - k^2
    return _log_ratio(difference, kappas, z.shape[-1] / 2 - 1).astype(features.dtype)


@functools.partial(jax.jit, static_argnames="order", inline=True)  # one program, also for a caller without `jit`
def _log_ratio(difference: jax.Array, kappas: jax.Array, order: float) -> jax.Array:
    """Compute `log(I(q) / q^order) - log(I(k) / k^order)`: q^2 - k^2 [B, C], k [C] -> [B, C].

    Debye's uniform expansion, with four terms and the difference of its parts taken first, has an error of 1e-7 from
    order `LEAST_ORDER` on. Its slope gives the ratio of neighbouring orders, and with that the recurrence of Bessel
    functions leads down to smaller ones; it is stable in this direction.
    """
    num_steps = max(0, math.ceil(LEAST_ORDER - order))
    top = order + num_steps
    k_squared = jnp.square(kappas)  # [C]
    s0 = jnp.sqrt(top**2 + k_squared)

    def q_squared(difference: jax.Array) -> jax.Array:
        total = k_squared + difference
        return jnp.where(total >= 0, total, 0)  # rounding may leave less than 0

    def expansion(difference: jax.Array) -> jax.Array:
        s1 = jnp.sqrt(top**2 + q_squared(difference))
        d = difference / (s1 + s0)  # s1 - s0
        lead = d - top * jnp.log1p(d / (top + s0)) - jnp.log1p(d / s0) / 2
        return lead + _correction(s1, top) - _correction(s0, top)

    if not num_steps:
        return expansion(difference)
    ratio, slope = jax.jvp(expansion, (difference,), (jnp.ones_like(difference),))
    _, slope_at_k = jax.jvp(expansion, (jnp.zeros_like(k_squared),), (jnp.ones_like(k_squared),))
    squared = q_squared(difference)
    at_q, at_k = 2 * (top + squared * slope), 2 * (top + k_squared * slope_at_k)  # x I(x) of the order below / I(x)
    for step in range(1, num_steps + 1):
        ratio = ratio + jnp.log(at_q / at_k)
        at_q, at_k = (2 * (top - step) + x / at for x, at in ((squared, at_q), (k_squared, at_k)))
    return ratio


def _correction(s: jax.Array, order: float) -> jax.Array:
    """Compute `log(1 + u_1 / order + ... + u_4 / order^4)` of Debye's expansion at `s = sqrt(order^2 + x^2)`."""
    w = jnp.square(order / s)
    terms = (  # u_n (s / order)^n
        (3 - 5 * w) / 24,
        (81 - w * (462 - w * 385)) / 1152,
        (30375 - w * (369603 - w * (765765 - w * 425425))) / 414720,
        (4465125 - w * (94121676 - w * (349922430 - w * (446185740 - w * 185910725)))) / 39813120,
    )
    total = jnp.zeros_like(s)
    for term in reversed(terms):
        total = (total + term) / s
    return jnp.log1p(total)
