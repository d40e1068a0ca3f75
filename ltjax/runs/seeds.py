"""Means over seeds."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class MeanStd(NamedTuple):
    mean: float
    std: float | None = None  # over seeds, with ddof=1; None for one seed


def mean_and_std(values: Sequence[float]) -> MeanStd:
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return MeanStd(mean)
    return MeanStd(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)))


def pool(parts: Sequence[Any], average: Callable[[Sequence[Any]], Any]) -> Any:
    """Average nested dicts leaf by leaf; keys that some part lacks are left out."""
    if not isinstance(parts[0], Mapping):
        return average(parts)
    keys = [key for key in parts[0] if all(key in part for part in parts)]
    return {key: pool([part[key] for part in parts], average) for key in keys}


def pooled_bins(bins: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the calibration bins of all predictions together: {"accuracies", "confidences", "counts": [bins]}."""
    import numpy as np  # `ltjax.compare` starts without it

    counts = np.stack([each["counts"] for each in bins])  # [seeds, bins]
    total = counts.sum(0)
    means = {
        name: (np.stack([each[name] for each in bins]) * counts).sum(0) / np.maximum(total, 1)
        for name in ("accuracies", "confidences")
    }
    return {**means, "counts": total}
