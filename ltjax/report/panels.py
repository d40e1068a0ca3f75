"""The contents of one panel of a figure: a stage of a run, or the same stage of several runs with other seeds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ltjax.runs.results import GROUPS
from ltjax.runs.seeds import MeanStd, mean_and_std, pool, pooled_bins

MOST_POINTS = 160  # of a learning curve


class Panel(NamedTuple):
    """Arrays [C] have nan for classes without test images; what was not measured is empty or None."""

    title: str
    accuracy: dict[str, MeanStd]  # of all classes and of each group
    ece: MeanStd | None
    classwise_ece: MeanStd | None
    best: MeanStd | None  # legacy: best epoch as picked on the test set
    seconds: float
    per_class: np.ndarray
    bins: dict[str, np.ndarray]  # of calibration: accuracies, confidences, counts
    class_counts: np.ndarray
    class_names: tuple[str, ...]
    groups: dict[str, np.ndarray]  # {name: bool [C]}
    scores: dict[str, np.ndarray]  # see `ltjax.report.analysis.scores_by_class`
    errors: dict[str, dict[str, float]]  # see `ltjax.report.analysis.errors_by_group`
    own: np.ndarray  # [C], mean distance of a class's test features to its own class mean
    wrong: np.ndarray  # [C], to the nearest mean of another class
    nearest_is_own: dict[str, float]
    learned: dict[str, np.ndarray]
    curves: list[dict[str, Any]]  # of each seed, see `read_curves`


def of_stage(
    results: Mapping[str, Any],
    stage: str,
    groups: Mapping[str, np.ndarray],
    numbers: Mapping[str, Any],
    curves: Mapping[str, Any],
) -> Panel:
    """Return the panel of one stage of one run.

    Args:
      groups: {name: bool [C]}.
      numbers: What report/numbers.json holds, or {}.
      curves: What `read_curves` returns, or {}.
    """
    measured, observed = results["stages"][stage], numbers.get("stages", {}).get(stage, {})
    calibrated = measured["ece"] is not None
    spread = measured.get("std", {"accuracy": {}})
    best, distances = measured.get("best_on_test"), observed.get("distances", {})
    classwise = observed.get("classwise_ece")
    return Panel(
        title=measured["title"],
        accuracy={name: MeanStd(mean, spread["accuracy"].get(name)) for name, mean in measured["accuracy"].items()},
        ece=MeanStd(measured["ece"], spread.get("ece")) if calibrated else None,
        classwise_ece=MeanStd(classwise) if calibrated and classwise is not None else None,
        best=MeanStd(best["accuracy"]) if best is not None and measured.get("epochs") else None,
        seconds=measured["seconds"],
        per_class=array(measured["per_class_accuracy"]),
        bins={key: array(values) for key, values in measured["calibration_bins"].items()} if calibrated else {},
        class_counts=np.asarray(results["class_counts"]),
        class_names=tuple(results["class_names"]),
        groups={name: groups[name] for name in GROUPS if name in groups},
        scores={name: array(values) for name, values in observed.get("scores", {}).items()},
        errors=observed.get("errors", {}),
        own=array(distances.get("own", ())),
        wrong=array(distances.get("wrong", ())),
        nearest_is_own=distances.get("nearest_is_own", {}),
        learned={title: array(values) for title, values in observed.get("learned", {}).items()},
        curves=[curves[stage]] if stage in curves else [],
    )


def array(values: Sequence[float | None]) -> np.ndarray:
    return np.asarray([np.nan if value is None else value for value in values], np.float64)


def pooled(title: str, panels: Sequence[Panel], seeds: Sequence[int], known: Mapping[str, MeanStd]) -> Panel:
    """Return one panel of several runs of a config.

    Args:
      seeds: Number of seeds of each run.
      known: Figures over all seeds.
    """

    def mean(parts: Sequence[Any]) -> Any:
        shapes = {np.shape(part) for part in parts}
        return np.average(parts, axis=0, weights=seeds) if len(shapes) == 1 else np.empty(0)

    classwise = [panel.classwise_ece.mean for panel in panels if panel.classwise_ece is not None]
    return panels[0]._replace(
        title=title,
        accuracy={name: known[name] for name in GROUPS if name in known},
        ece=known.get("ece"),
        classwise_ece=mean_and_std(classwise) if len(classwise) == len(panels) else None,
        best=known.get("best"),
        bins=pooled_bins([panel.bins for panel in panels]) if all(panel.bins for panel in panels) else {},
        curves=[curve for panel in panels for curve in panel.curves],
        **{
            name: pool([getattr(panel, name) for panel in panels], mean)
            for name in ("per_class", "scores", "errors", "own", "wrong", "nearest_is_own", "learned")
        },
    )


def read_curves(path: Path) -> dict[str, dict[str, list]]:
    """Read learning curves from metrics.jsonl; without that file there are none.

    Returns:
      {stage: {"train": [(epoch, loss, lr)], "test": [(epoch, {group: accuracy})]}}. Epochs of training are
      fractions; neighbours are averaged if there are many.
    """
    curves: dict[str, dict[str, list]] = {}
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            entry = json.loads(line)
            stage, values = curves.setdefault(entry["stage"], {"train": [], "test": []}), entry["values"]
            if entry["split"] == "train":
                numbers = int(entry["epoch"]), int(entry["step"]), float(values["loss"]), float(values["lr"])
                stage["train"].append(numbers)
            elif entry["split"] == "test":
                stage["test"].append((entry["epoch"], dict(values["accuracy"])))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue  # a killed process can leave half a line
    for stage in curves.values():
        stage["train"] = thinned(stage["train"])
    return curves


def thinned(entries: Sequence[tuple[int, int, float, float]]) -> list[tuple[float, float, float]]:
    """Average (epoch, last step, loss, rate) of each dispatch; at most `MOST_POINTS` (place in epochs, loss, rate)."""
    if not entries:
        return []
    epochs, steps, losses, rates = (np.asarray(values, np.float64) for values in zip(*entries, strict=True))
    last = np.flatnonzero(np.diff(epochs, append=np.inf))  # last dispatch of each epoch
    per_epoch = steps[last[0]] / max(epochs[last[0]], 1.0)
    before = np.r_[0.0, steps[:-1]]
    middle = (steps + before) / 2 / max(per_epoch, 1e-9)
    parts = np.array_split(np.arange(len(entries)), min(len(entries), MOST_POINTS))
    lengths = np.maximum(steps - before, 1e-9)
    return [
        (
            float(np.average(middle[part], weights=lengths[part])),
            float(np.average(losses[part], weights=lengths[part])),
            float(rates[part[len(part) // 2]]),
        )
        for part in parts
    ]
