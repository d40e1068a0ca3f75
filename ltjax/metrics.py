"""Metrics of result tables: calibration, accuracy by group, precision, recall and F1. Needs only jax and numpy."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


class Calibration(NamedTuple):
    """Accuracy and confidence in bins of confidence.

    Attributes:
      ece: Expected calibration error, in [0, 1].
      mce: Largest |accuracy - confidence| of a bin.
      accuracies: [bins], 0 for empty bins.
      confidences: [bins], mean confidence, 0 for empty bins.
      counts: [bins] int.
      edges: [bins + 1].
    """

    ece: jax.Array
    mce: jax.Array
    accuracies: jax.Array
    confidences: jax.Array
    counts: jax.Array
    edges: jax.Array


def calibration(confidences: ArrayLike, correct: ArrayLike, *, num_bins: int = 15) -> Calibration:
    """Compute the expected calibration error over equal bins: `sum_b n_b / N |accuracy_b - mean confidence_b|`.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017; MiSLAS reports it with 15 bins.

    Args:
      confidences: [N] maximum softmax probability, in [0, 1].
      correct: [N] bool or 0/1.
      num_bins: Bins are right-closed, `(lo, hi]`. A confidence of exactly 0 counts in the first bin; the authors' code
        leaves it out.

    Examples:
      >>> result = metrics.calibration(jnp.array([0.9, 0.9, 0.6]), jnp.array([True, False, True]), num_bins=10)
      >>> result.ece
      Array(0.4, dtype=float32)
      >>> result.counts
      Array([0, 0, 0, 0, 0, 1, 0, 0, 2, 0], dtype=int32)
    """
    return _calibration(jnp.asarray(confidences), jnp.asarray(correct), num_bins)


@functools.partial(jax.jit, static_argnames="num_bins", inline=True)  # one program, also for a caller without `jit`
def _calibration(values: jax.Array, correct: jax.Array, num_bins: int) -> Calibration:
    dtype = jnp.float64 if values.dtype == jnp.float64 else jnp.float32  # half precision cannot count to 3,000 by ones
    values = values.astype(dtype)  # [N]
    edges, index = _bins(values, num_bins)
    member = jax.nn.one_hot(index, num_bins, dtype=dtype)  # [N, bins]
    counts = member.sum(0)
    pairs = jnp.stack([correct.astype(dtype), values])  # [2, N]
    hits, mass = jnp.matmul(pairs, member, precision="highest")  # [bins]; else accelerators round the confidences
    accuracies, means = hits / jnp.maximum(counts, 1), mass / jnp.maximum(counts, 1)
    gaps = jnp.abs(accuracies - means)
    ece = jnp.abs(hits - mass).sum() / jnp.maximum(counts.sum(), 1)
    return Calibration(ece, gaps.max(), accuracies, means, counts.astype(jnp.int32), edges)


def _bins(values: jax.Array, num_bins: int) -> tuple[jax.Array, jax.Array]:
    """Return edges [num_bins + 1] of equal right-closed bins of [0, 1], and the bin of each value."""
    edges = jnp.asarray(np.linspace(0, 1, num_bins + 1), values.dtype)  # NumPy's is exact
    return edges, jnp.clip(jnp.searchsorted(edges, values, side="left") - 1, 0, num_bins - 1)


def classwise_gaps(probabilities: ArrayLike, labels: ArrayLike, *, num_bins: int = 15) -> jax.Array:
    """Sum `[y = c] - p_c` over images, by class c and by bin of p_c: [C, bins] float32.

    Add the gaps of several batches to get those of all their images, and pass the sum to `classwise_ece`.

    Args:
      probabilities: [N, C], softmax.
      labels: [N]. Images with label -1 do not count.
      num_bins: See `calibration`.

    Examples:
      >>> np.asarray(metrics.classwise_gaps([[0.75, 0.25], [0.75, 0.25]], [0, 1], num_bins=2)).tolist()
      [[0.0, -0.5], [0.5, 0.0]]
    """
    values, labels = jnp.asarray(probabilities).astype(jnp.float32), jnp.asarray(labels)
    is_label = jax.nn.one_hot(labels, values.shape[1], dtype=values.dtype)  # [N, C]
    gaps = jnp.where((labels >= 0)[:, None], is_label - values, 0)
    index = _bins(values, num_bins)[1]  # [N, C]
    # One bin at a time: with 8,142 classes, [N, C, bins] would take gigabytes.
    return jax.lax.map(lambda b: jnp.where(index == b, gaps, 0).sum(0), jnp.arange(num_bins)).T


def classwise_ece(gaps: ArrayLike, num_images: int) -> float:
    """Compute class-wise expected calibration error: `1/C sum_c sum_b n_cb / N |share of class c - mean p_c|`.

    Bins are of p_c. The error covers the probability of every class; `calibration` covers only the predicted class.
    Most probabilities are near 0 if there are many classes, and the error is then small: compare models, not data sets.

    Source: Kull et al., "Beyond Temperature Scaling", NeurIPS 2019, equation 4.

    Args:
      gaps: [C, bins] from `classwise_gaps`.
      num_images: N.

    Examples:
      >>> gaps = metrics.classwise_gaps([[0.9, 0.1], [0.8, 0.2]], [0, 1], num_bins=2)
      >>> round(metrics.classwise_ece(gaps, num_images=2), 3)
      0.35
    """
    gaps = np.asarray(gaps, np.float64)
    return float(np.abs(gaps).sum(1).mean() / num_images)


def count_groups(class_counts: ArrayLike, *, few_below: int = 20, many_above: int = 100) -> dict[str, np.ndarray]:
    """Group classes by training images: many > `many_above`, few < `few_below`, medium between -> {name: bool [C]}.

    Raises:
      ValueError: A class would be both many and few.

    Examples:
      >>> {name: member.tolist() for name, member in metrics.count_groups([500, 50, 5]).items()}
      {'many': [True, False, False], 'medium': [False, True, False], 'few': [False, False, True]}
    """
    if few_below > many_above + 1:
        raise ValueError(f"few_below = {few_below}, many_above = {many_above}: a class would be both many and few")
    counts = np.asarray(class_counts)
    many, few = counts > many_above, counts < few_below
    return {"many": many, "medium": ~many & ~few, "few": few}


def range_groups(num_classes: int, bounds: Sequence[int]) -> dict[str, np.ndarray]:
    """Group classes by number, as some papers do: many [0, a), medium [a, b), few [b, C), for `bounds = (a, b)`.

    Raises:
      ValueError: The bounds are not two integers from 0 up, a not above b.

    Examples:
      >>> {name: member.tolist() for name, member in metrics.range_groups(4, (1, 3)).items()}
      {'many': [True, False, False, False], 'medium': [False, True, True, False], 'few': [False, False, False, True]}
    """
    if len(bounds) != 2 or np.asarray(bounds).dtype.kind not in "iu" or not 0 <= bounds[0] <= bounds[1]:
        raise ValueError(
            f"bounds of the groups = {tuple(bounds)}: two numbers of classes, the first not above the second"
        )
    index = np.arange(num_classes)
    return {"many": index < bounds[0], "medium": (index >= bounds[0]) & (index < bounds[1]), "few": index >= bounds[1]}


def rank_groups(class_counts: ArrayLike, bounds: Sequence[int]) -> dict[str, np.ndarray]:
    """Group classes by rank with `range_groups`. The most frequent class is first; ties go to the lower number.

    Examples:
      >>> {name: member.tolist() for name, member in metrics.rank_groups([5, 500, 50], (1, 2)).items()}
      {'many': [False, True, False], 'medium': [False, False, True], 'few': [True, False, False]}
    """
    order = np.argsort(-np.asarray(class_counts), kind="stable")
    groups = range_groups(len(order), bounds)
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order))
    return {name: member[ranks] for name, member in groups.items()}


def accuracy_by_group(correct: ArrayLike, labels: ArrayLike, groups: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Compute accuracy over the classes of each group, and over `all` images. Not for `jit`.

    A group's accuracy is the mean of its classes' accuracies, as the field reports it; this is also the share of right
    images if the classes have equally many. Classes and groups without images are left out.

    Args:
      correct: [N] bool or 0/1.
      labels: [N].
      groups: {name: bool [C]}.

    Examples:
      >>> metrics.accuracy_by_group([1, 0, 1], [0, 0, 1], {"even": np.array([True, False])})
      {'even': 0.5, 'all': 0.6666666666666666}
    """
    correct, labels = np.asarray(correct).astype(np.float64), np.asarray(labels)
    present, by_class = accuracy_by_class(correct, labels)
    members = {name: np.asarray(member)[present] for name, member in groups.items()}
    accuracies = {name: _mean(by_class[member]) for name, member in members.items() if member.any()}
    return {**accuracies, "all": float(correct.mean())} if len(labels) else {}


def accuracy_by_class(correct: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Compute the accuracy of each class that has images. Not for `jit`.

    Args:
      correct: [N] bool or 0/1.
      labels: [N].

    Returns:
      The classes, sorted, and their accuracies, both [number of classes with images].

    Examples:
      >>> metrics.accuracy_by_class([1, 0, 1], [2, 2, 0])
      (array([0, 2]), array([1. , 0.5]))
    """
    present, index, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    return present, np.bincount(index, np.asarray(correct, np.float64), len(present)) / counts


def balanced_accuracy(correct: ArrayLike, labels: ArrayLike) -> float:
    """Average the accuracies of all classes that have images. Not for `jit`.

    Args:
      correct: [N] bool or 0/1.
      labels: [N].

    Examples:
      >>> metrics.balanced_accuracy([1, 1, 1, 0], [0, 0, 0, 1])  # accuracy is 0.75
      0.5
    """
    return _mean(accuracy_by_class(correct, labels)[1])


class ClassScores(NamedTuple):
    """Precision, recall and F1 of the classes that have images, see `class_scores`.

    Attributes:
      classes: [P] int, sorted.
      images: [P] int, images of the class.
      predicted: [P] int, images predicted as the class.
      precision: [P], share of `predicted` that is right; 0 for a class that is never predicted.
      recall: [P], share of `images` that is right: the accuracy of the class.
      f1: [P], harmonic mean of precision and recall; 0 if both are 0.
    """

    classes: np.ndarray
    images: np.ndarray
    predicted: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


def class_scores(predictions: ArrayLike, labels: ArrayLike) -> ClassScores:
    """Compute precision, recall and F1 of each class that has images. Not for `jit`.

    A class that is never predicted has precision 0, as with scikit-learn's `zero_division=0`. A class without images
    has no scores; images that are predicted as such a class are errors of their own class. scikit-learn's
    `precision_recall_fscore_support(labels, predictions, labels=np.unique(labels), zero_division=0)` gives the same;
    without its `labels=`, predicted classes without images count as 0.

    Args:
      predictions: [N].
      labels: [N].

    Examples:
      >>> scores = metrics.class_scores([0, 0, 0, 3], [0, 0, 1, 2])
      >>> scores.precision.round(2), scores.recall, scores.f1
      (array([0.67, 0.  , 0.  ]), array([1., 0., 0.]), array([0.8, 0. , 0. ]))
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    classes, index, images = np.unique(labels, return_inverse=True, return_counts=True)
    place = np.searchsorted(classes, predictions)
    known = np.isin(predictions, classes)
    predicted = np.bincount(place[known], minlength=len(classes))
    right = np.bincount(index[predictions == labels], minlength=len(classes))
    return ClassScores(
        classes, images, predicted, right / np.maximum(predicted, 1), right / images, 2 * right / (images + predicted)
    )


def macro_f1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Average the F1 scores of all classes that have images, see `class_scores`. Not for `jit`.

    Args:
      predictions: [N].
      labels: [N].

    Examples:
      >>> metrics.macro_f1([0, 0, 0, 1], [0, 0, 1, 1])
      0.7333333333333334
    """
    return _mean(class_scores(predictions, labels).f1)


def _mean(values: np.ndarray) -> float:
    return math.fsum(values) / len(values)  # exact sum: the order of classes changes no digit


def group_accuracy(
    correct: ArrayLike, labels: ArrayLike, class_counts: ArrayLike, *, few_below: int = 20, many_above: int = 100
) -> dict[str, float]:
    """Compute accuracy over many-, medium- and few-shot classes and over all. Groups without images are left out.

    Args:
      correct: [N] bool or 0/1.
      labels: [N].
      class_counts: [C] *training* images, which define the groups by `count_groups`.

    Examples:
      >>> metrics.group_accuracy([True, False, True, True], [0, 0, 1, 2], [500, 50, 5])
      {'many': 0.5, 'medium': 1.0, 'few': 1.0, 'all': 0.75}
    """
    groups = count_groups(class_counts, few_below=few_below, many_above=many_above)
    return accuracy_by_group(correct, labels, groups)
