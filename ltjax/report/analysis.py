"""From predictions and distances to the numbers of the report: plain NumPy, JSON-ready.

They are kept in `report/numbers.json`, of which the page is made, and that of several runs together.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ltjax import metrics

PAIRS = 6  # of classes shown as most confused, in the tail and elsewhere
SAMPLES = 3  # images of each


class Pair(NamedTuple):
    """Test images of class `true` that are taken for class `predicted`."""

    true: int
    predicted: int
    count: int
    share: float  # of the class's test images


def stage_numbers(
    observed: Sequence[Mapping[str, np.ndarray]],
    labels: np.ndarray,
    groups: Mapping[str, np.ndarray],
    learned: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """What the page shows of one stage, means over replicas.

    observed: of each replica, see `ltjax.engine.measure.Observer`. groups: {name: bool [C]}. learned: {title: [C]}.
    """
    num_classes = len(next(iter(groups.values())))
    predictions = np.concatenate([one["predictions"] for one in observed])
    repeated = np.tile(labels, len(observed))
    numbers: dict[str, Any] = {
        "classwise_ece": float(np.mean([metrics.classwise_ece(one["gaps"], len(labels)) for one in observed])),
        "errors": errors_by_group(predictions, repeated, groups),
        "learned": {title: brief(values) for title, values in learned.items()},
    }
    if "own" in observed[0]:
        own, wrong = (np.concatenate([one[key] for one in observed]) for key in ("own", "wrong"))
        numbers["distances"] = {
            "own": brief(by_class(own, repeated, num_classes)),
            "wrong": brief(by_class(wrong, repeated, num_classes)),
            "nearest_is_own": metrics.accuracy_by_group(own < wrong, repeated, groups),
        }
    return numbers


def errors_by_group(
    predictions: np.ndarray, labels: np.ndarray, groups: Mapping[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    """{group: {"right": share of its test images, and for each group that of wrong ones taken for it}}, sum 1."""
    found = {}
    for name, member in groups.items():
        own = member[labels]
        if own.any():
            wrong = own & (predictions != labels)
            shares = {other: float((wrong & there[predictions]).sum() / own.sum()) for other, there in groups.items()}
            found[name] = {"right": float(1 - wrong.sum() / own.sum()), **shares}
    return found


def by_class(values: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Mean value of each class, [C]; nan where it has no image."""
    counts = np.bincount(labels, minlength=num_classes)
    sums = np.bincount(labels, weights=values, minlength=num_classes)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def brief(values: np.ndarray) -> list[float | None]:
    """Four digits are enough for a picture; None instead of nan."""
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in np.asarray(values, np.float64)]


def confused_pairs(predictions: np.ndarray, labels: np.ndarray, members: np.ndarray, most: int = PAIRS) -> list[Pair]:
    """The pairs whose errors make up the largest share of a class's images, of classes in members (bool [C])."""
    num_classes = len(members)
    wrong = (predictions != labels) & members[labels]
    codes, counts = np.unique(labels[wrong].astype(np.int64) * num_classes + predictions[wrong], return_counts=True)
    true, predicted = np.divmod(codes, num_classes)
    shares = counts / np.bincount(labels, minlength=num_classes)[true]
    order = np.lexsort((codes, -counts, -shares))[:most]
    return [Pair(int(true[i]), int(predicted[i]), int(counts[i]), float(shares[i])) for i in order]


def rarest(groups: Mapping[str, np.ndarray]) -> str:
    """The last group that has classes: few, else medium, else many."""
    return [name for name, member in groups.items() if member.any()][-1]


def samples(pair: Pair, predictions: np.ndarray, confidences: np.ndarray, labels: np.ndarray) -> list[int]:
    """Test images of a pair, the surest mistakes first."""
    there = np.flatnonzero((labels == pair.true) & (predictions == pair.predicted))
    return there[np.argsort(-confidences[there], kind="stable")][:SAMPLES].tolist()
