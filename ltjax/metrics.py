"""What a table reports: calibration and accuracy by group. This module needs jax (and numpy) alone."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


class Calibration(NamedTuple):
    """How far confidence and accuracy are apart, in bins of confidence."""

    ece: jax.Array  # expected calibration error, in [0, 1]
    mce: jax.Array  # largest |accuracy - confidence| of a bin
    accuracies: jax.Array  # [bins], 0 where a bin is empty
    confidences: jax.Array  # [bins], mean confidence, 0 where a bin is empty
    counts: jax.Array  # [bins] int
    edges: jax.Array  # [bins + 1]


def calibration(confidences: ArrayLike, correct: ArrayLike, *, num_bins: int = 15) -> Calibration:
    """Expected calibration error over equal bins of confidence: `sum_b n_b / N |accuracy_b - mean confidence_b|`.

    Args:
      confidences: [N] maximum softmax probability, in [0, 1]. correct: [N] bool or 0/1.
      num_bins: bins are right-closed, `(lo, hi]`; a confidence of exactly 0, in no bin of the authors' code, counts in
        the first.
    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017; MiSLAS reports it with 15 bins.

    Examples:
      >>> found = metrics.calibration(jnp.array([0.9, 0.9, 0.6]), jnp.array([True, False, True]), num_bins=10)
      >>> found.ece
      Array(0.4, dtype=float32)
      >>> found.counts
      Array([0, 0, 0, 0, 0, 1, 0, 0, 2, 0], dtype=int32)
    """
    values = jnp.asarray(confidences)
    dtype = jnp.float64 if values.dtype == jnp.float64 else jnp.float32  # half precision cannot count to 3,000
    values = values.astype(dtype)  # [N]
    edges, index = _bins(values, num_bins)
    member = jax.nn.one_hot(index, num_bins, dtype=dtype)  # [N, bins]
    counts = member.sum(0)
    pairs = jnp.stack([jnp.asarray(correct).astype(dtype), values])  # [2, N]
    hits, mass = jnp.matmul(pairs, member, precision="highest")  # [bins]; accelerators would round the confidences
    accuracies, means = hits / jnp.maximum(counts, 1), mass / jnp.maximum(counts, 1)
    gaps = jnp.abs(accuracies - means)
    ece = jnp.abs(hits - mass).sum() / jnp.maximum(counts.sum(), 1)
    return Calibration(ece, gaps.max(), accuracies, means, counts.astype(jnp.int32), edges)


def _bins(values: jax.Array, num_bins: int) -> tuple[jax.Array, jax.Array]:
    """Edges [num_bins + 1] of equal right-closed bins of [0, 1], and the bin of each value."""
    edges = jnp.asarray(np.linspace(0, 1, num_bins + 1), values.dtype)  # NumPy: k / num_bins to the last bit
    return edges, jnp.clip(jnp.searchsorted(edges, values, side="left") - 1, 0, num_bins - 1)


def classwise_gaps(probabilities: ArrayLike, labels: ArrayLike, *, num_bins: int = 15) -> jax.Array:
    """Sums over images of `[y = c] - p_c`, by class c and by the bin that p_c falls in: [C, bins] float32.

    Gaps of several batches add up to those of their union, of which `classwise_ece` makes a figure.
    probabilities: [N, C], softmax. labels: [N], -1 for images that do not count. Bins as in `calibration`.

    Examples:
      >>> np.asarray(metrics.classwise_gaps([[0.75, 0.25], [0.75, 0.25]], [0, 1], num_bins=2)).tolist()
      [[0.0, -0.5], [0.5, 0.0]]
    """
    values, labels = jnp.asarray(probabilities).astype(jnp.float32), jnp.asarray(labels)
    own = jax.nn.one_hot(labels, values.shape[1], dtype=values.dtype)  # [N, C]
    gaps = jnp.where((labels >= 0)[:, None], own - values, 0)
    index = _bins(values, num_bins)[1]  # [N, C]
    # a bin at a time: with 8,142 classes, [N, C, bins] would be gigabytes
    return jax.lax.map(lambda b: jnp.where(index == b, gaps, 0).sum(0), jnp.arange(num_bins)).T


def classwise_ece(gaps: ArrayLike, num_images: int) -> float:
    """Class-wise expected calibration error: `1/C sum_c sum_b n_cb / N |share of class c - mean p_c|` over bins of p_c.

    Looks at the probability of every class, where `calibration` looks at the predicted one's alone. It falls with the
    number of classes, since most probabilities of most classes are near 0: comparable between models, not data sets.
    gaps: [C, bins] of `classwise_gaps`, over N = num_images.
    Source: Kull et al., "Beyond Temperature Scaling", NeurIPS 2019, equation 4.

    Examples:
      >>> gaps = metrics.classwise_gaps([[0.9, 0.1], [0.8, 0.2]], [0, 1], num_bins=2)
      >>> round(metrics.classwise_ece(gaps, num_images=2), 3)
      0.35
    """
    gaps = np.asarray(gaps, np.float64)
    return float(np.abs(gaps).sum(1).mean() / num_images)


def count_groups(class_counts, *, few_below: int = 20, many_above: int = 100) -> dict[str, np.ndarray]:
    """The usual groups: many > `many_above` training images, few < `few_below`, medium between -> {name: bool [C]}.

    Examples:
      >>> {name: member.tolist() for name, member in metrics.count_groups([500, 50, 5]).items()}
      {'many': [True, False, False], 'medium': [False, True, False], 'few': [False, False, True]}
    """
    counts = np.asarray(class_counts)
    many, few = counts > many_above, counts < few_below
    return {"many": many, "medium": ~many & ~few, "few": few}


def range_groups(num_classes: int, bounds: Sequence[int]) -> dict[str, np.ndarray]:
    """Groups by fixed class numbers, as some papers have them: many [0, a), medium [a, b), few [b, C).

    Examples:
      >>> {name: member.tolist() for name, member in metrics.range_groups(4, (1, 3)).items()}
      {'many': [True, False, False, False], 'medium': [False, True, True, False], 'few': [False, False, False, True]}
    """
    index = np.arange(num_classes)
    return {"many": index < bounds[0], "medium": (index >= bounds[0]) & (index < bounds[1]), "few": index >= bounds[1]}


def rank_groups(class_counts, bounds: Sequence[int]) -> dict[str, np.ndarray]:
    """`range_groups` of the classes' ranks by count, most frequent first; of equal counts, the lower number first.

    Examples:
      >>> {name: member.tolist() for name, member in metrics.rank_groups([5, 500, 50], (1, 2)).items()}
      {'many': [False, True, False], 'medium': [False, False, True], 'few': [True, False, False]}
    """
    order = np.argsort(-np.asarray(class_counts), kind="stable")
    groups = range_groups(len(order), bounds)
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order))
    return {name: member[ranks] for name, member in groups.items()}


def accuracy_by_group(correct, labels, groups: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Share of correct images in each group of classes and in `all`; a group without images is absent, never 0.

    correct: [N] bool or 0/1. labels: [N]. groups: {name: bool [C]}. Concrete arrays, outside `jit`.

    Examples:
      >>> metrics.accuracy_by_group([1, 0, 1], [0, 0, 1], {"even": np.array([True, False])})
      {'even': 0.5, 'all': 0.6666666666666666}
    """
    correct, labels = np.asarray(correct).astype(np.float64), np.asarray(labels)
    members = {name: np.asarray(member)[labels] for name, member in groups.items()}  # {name: bool [N]}
    members["all"] = np.ones(labels.shape, bool)
    return {name: float(correct[member].mean()) for name, member in members.items() if member.any()}


def group_accuracy(correct, labels, class_counts, *, few_below: int = 20, many_above: int = 100) -> dict[str, float]:
    """Accuracy over the images of many-, medium- and few-shot classes and over all -> {"many", "medium", "few", "all"}.

    correct: [N] bool or 0/1. labels: [N]. class_counts: [C] *training* images, which define the groups
    (`count_groups`). A group without images is absent from the answer, never 0.

    Examples:
      >>> metrics.group_accuracy([True, False, True, True], [0, 0, 1, 2], [500, 50, 5])
      {'many': 0.5, 'medium': 1.0, 'few': 1.0, 'all': 0.75}
    """
    groups = count_groups(class_counts, few_below=few_below, many_above=many_above)
    return accuracy_by_group(correct, labels, groups)
