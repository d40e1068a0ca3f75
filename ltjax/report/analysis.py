"""The numbers of the report from predictions and distances: plain NumPy in, JSON-ready values out.

`report/numbers.json` stores them; the page of a run and that of a comparison read it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ltjax import metrics

PAIRS = 6  # classes shown as most confused, in the tail and elsewhere
SAMPLES = 3  # images of each
MOST_CELLS = 400  # classes with a row each in the confusion matrix; more are summed to ranges
RANGES = 100  # rows of the confusion matrix if there are more
MISTAKES = 24  # pictures of images that are wrong with the highest confidence
LISTED_PAIRS = 200  # of classes, in the table of those confused most often
SCORES = ("images", "predicted", "precision", "recall", "f1")  # of `ltjax.metrics.ClassScores`


class Confusions(NamedTuple):
    """The cells of a confusion matrix that are not 0, by class: K of them, at most one for each image."""

    true: np.ndarray  # [K]
    predicted: np.ndarray  # [K]
    images: np.ndarray  # [K]


class Pair(NamedTuple):
    """Test images of class `true` that are predicted as class `predicted`."""

    true: int
    predicted: int
    share: float  # of the class's test images


def stage_numbers(
    observed: Sequence[Mapping[str, np.ndarray]],
    labels: np.ndarray,
    groups: Mapping[str, np.ndarray],
    learned: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Return the page's numbers of one stage, averaged over replicas.

    Args:
      observed: For each replica, see `ltjax.engine.observe.Observer`.
      labels: [N].
      groups: {name: bool [C]}.
      learned: {title: [C]}.
    """
    num_classes = len(next(iter(groups.values())))
    keys = [key for key in ("predictions", "own", "wrong") if key in observed[0]]
    joined = {key: np.concatenate([replica[key] for replica in observed]) for key in keys}
    repeated = np.tile(labels, len(observed))
    classwise = [metrics.classwise_ece(replica["gaps"], len(labels)) for replica in observed]
    numbers: dict[str, Any] = {
        "classwise_ece": float(np.mean(classwise)),
        "scores": {name: brief(values) for name, values in scores_by_class(observed, labels, num_classes).items()},
        "errors": errors_by_group(joined["predictions"], repeated, groups),
        "learned": {title: brief(values) for title, values in learned.items()},
    }
    if "own" in joined:
        numbers["distances"] = {
            "own": brief(by_class(joined["own"], repeated, num_classes)),
            "wrong": brief(by_class(joined["wrong"], repeated, num_classes)),
            "nearest_is_own": metrics.accuracy_by_group(joined["own"] < joined["wrong"], repeated, groups),
        }
    return numbers


def scores_by_class(
    observed: Sequence[Mapping[str, np.ndarray]], labels: np.ndarray, num_classes: int
) -> dict[str, np.ndarray]:
    """Return `ltjax.metrics.class_scores`, means over replicas; nan for a class without test images.

    Args:
      observed: For each replica, {"predictions": [N]}.
      labels: [N].

    Returns:
      {"images", "predicted", "precision", "recall", "f1": [C]}.
    """
    of_replicas = [metrics.class_scores(replica["predictions"], labels) for replica in observed]
    scores = {}
    for name in SCORES:
        values = np.full(num_classes, np.nan)
        values[of_replicas[0].classes] = np.mean([getattr(each, name) for each in of_replicas], axis=0)
        scores[name] = values
    return scores


def errors_by_group(
    predictions: np.ndarray, labels: np.ndarray, groups: Mapping[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    """Return {group: {"right": share, group: share of its test images that are taken for a class of that group}}."""
    errors = {}
    for name, member in groups.items():
        inside = member[labels]
        if inside.any():
            wrong = inside & (predictions != labels)
            shares = {other: float((wrong & to[predictions]).sum() / inside.sum()) for other, to in groups.items()}
            errors[name] = {"right": float(1 - wrong.sum() / inside.sum()), **shares}
    return errors


def by_class(values: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the mean value of each class, [C]; nan if it has no image."""
    counts = np.bincount(labels, minlength=num_classes)
    sums = np.bincount(labels, weights=values, minlength=num_classes)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def brief(values: np.ndarray) -> list[float | None]:
    """Round to four digits, enough for a chart, but never to tens; nan becomes None."""

    def rounded(value: float) -> float:
        return float(f"{value:.4g}") if abs(value) < 1000 else float(round(value))

    return [rounded(value) if np.isfinite(value) else None for value in np.asarray(values, np.float64)]


def confusions(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> Confusions:
    """Count the images [N] of each class that are predicted as each class, without a matrix [C, C]."""
    codes, images = np.unique(labels.astype(np.int64) * num_classes + predictions, return_counts=True)
    return Confusions(*np.divmod(codes, num_classes), images)


def confusion_numbers(cells: Confusions, order: np.ndarray) -> dict[str, Any]:
    """Return the page's numbers of a confusion matrix. Many classes are summed to ranges of classes.

    Args:
      order: The classes in the order of rows and columns, [C].

    Returns:
      {"classes": number of classes in a row, "cells": [(row, column, images)] without zeros,
      "pairs": [(true, predicted, images, images the other way round)] of the classes that are confused most often}.
    """
    num_classes = len(order)
    each = 1 if num_classes <= MOST_CELLS else -(-num_classes // RANGES)
    row_of, rows = np.empty(num_classes, np.int64), -(-num_classes // each)
    row_of[order] = np.arange(num_classes) // each
    codes, inverse = np.unique(row_of[cells.true] * rows + row_of[cells.predicted], return_inverse=True)
    sums = np.bincount(inverse, cells.images).astype(np.int64)
    return {
        "classes": each,
        "cells": np.stack([*np.divmod(codes, rows), sums], axis=-1).tolist(),
        "pairs": _most_confused(cells, num_classes),
    }


def _most_confused(cells: Confusions, num_classes: int) -> list[list[int]]:
    codes, mirrored = cells.true * num_classes + cells.predicted, cells.predicted * num_classes + cells.true
    place = np.searchsorted(codes, mirrored).clip(max=len(codes) - 1)
    back = np.where(codes[place] == mirrored, cells.images[place], 0)
    wrong = np.flatnonzero(cells.true != cells.predicted)
    worst = wrong[np.argsort(-cells.images[wrong], kind="stable")][:LISTED_PAIRS]
    return np.stack([cells.true, cells.predicted, cells.images, back], axis=-1)[worst].tolist()


def surest_mistakes(predictions: np.ndarray, confidences: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return all images that are predicted wrongly, the most confident first."""
    wrong = np.flatnonzero(predictions != labels)
    return wrong[np.argsort(-confidences[wrong], kind="stable")]


def confused_pairs(predictions: np.ndarray, labels: np.ndarray, members: np.ndarray) -> list[Pair]:
    """Return the pairs with the largest share of a class's images, for true classes in members (bool [C])."""
    num_classes = len(members)
    wrong = (predictions != labels) & members[labels]
    true, predicted, counts = confusions(predictions[wrong], labels[wrong], num_classes)
    shares = counts / np.bincount(labels, minlength=num_classes)[true]
    order = np.lexsort((predicted, true, -counts, -shares))[:PAIRS]
    return [Pair(int(true[i]), int(predicted[i]), float(shares[i])) for i in order]


def rarest(groups: Mapping[str, np.ndarray]) -> str:
    """Return the last group that has classes: few, else medium, else many."""
    return [name for name, member in groups.items() if member.any()][-1]


def samples(pair: Pair, predictions: np.ndarray, confidences: np.ndarray, labels: np.ndarray) -> list[int]:
    """Return test images of a pair, most confident first."""
    images = np.flatnonzero((labels == pair.true) & (predictions == pair.predicted))
    return images[np.argsort(-confidences[images], kind="stable")][:SAMPLES].tolist()
