"""What one panel of a figure shows: a stage of a run, or the same stage of several runs with other seeds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

GROUPS = ("many", "medium", "few")
MOST_POINTS = 160  # of a learning curve


class Figure(NamedTuple):
    mean: float
    std: float | None = None  # over seeds


class Panel(NamedTuple):
    """Arrays [C] have nan for classes without test images. What was not measured is empty."""

    title: str
    accuracy: dict[str, Figure]  # of all and of each group
    ece: Figure | None
    classwise_ece: Figure | None
    best: Figure | None  # legacy: best epoch as picked on the test set
    seconds: float
    per_class: np.ndarray
    bins: dict[str, np.ndarray]  # of calibration: accuracies, confidences, counts
    class_counts: np.ndarray
    class_names: tuple[str, ...]
    groups: dict[str, np.ndarray]  # {name: bool [C]}
    errors: dict[str, dict[str, float]]  # see `ltjax.report.analysis.errors_by_group`
    own: np.ndarray  # distances to class means; empty where not measured
    wrong: np.ndarray
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
    """A panel of one stage of one run.

    results: what results.json holds. groups: {name: bool [C]}. numbers: what report/numbers.json holds, or {}.
    curves: of `read_curves`, or {}.
    """
    own, measured = results["stages"][stage], numbers.get("stages", {}).get(stage, {})
    spread = own.get("std", {"accuracy": {}})
    accuracy = {name: Figure(own["accuracy"][name], spread["accuracy"].get(name)) for name in own["accuracy"]}
    best, distances = own.get("best_on_test"), measured.get("distances", {})
    classwise = measured.get("classwise_ece")
    return Panel(
        title=own["title"],
        accuracy=accuracy,
        ece=None if own["ece"] is None else Figure(own["ece"], spread.get("ece")),
        classwise_ece=None if classwise is None or own["ece"] is None else Figure(classwise),
        best=None if best is None or not own.get("epochs") else Figure(best["accuracy"]),
        seconds=own["seconds"],
        per_class=array(own["per_class_accuracy"]),
        bins={}
        if own["ece"] is None
        else {key: array(own["calibration_bins"][key]) for key in own["calibration_bins"]},
        class_counts=np.asarray(results["class_counts"]),
        class_names=tuple(results["class_names"]),
        groups={name: groups[name] for name in GROUPS if name in groups},
        errors=measured.get("errors", {}),
        own=array(distances.get("own", ())),
        wrong=array(distances.get("wrong", ())),
        nearest_is_own=distances.get("nearest_is_own", {}),
        learned={title: array(values) for title, values in measured.get("learned", {}).items()},
        curves=[curves[stage]] if stage in curves else [],
    )


def array(values: Sequence[float | None]) -> np.ndarray:
    return np.asarray([np.nan if value is None else value for value in values], np.float64)


def pooled(title: str, panels: Sequence[Panel], seeds: Sequence[int], known: Mapping[str, Figure]) -> Panel:
    """One panel of several runs of a config. seeds: how many each of them has. known: figures over all seeds."""
    weights = np.asarray(seeds, np.float64)
    first = panels[0]

    def mean(arrays: Sequence[np.ndarray]) -> np.ndarray:
        same = [a for a in arrays if a.shape == arrays[0].shape]
        return np.average(same, axis=0, weights=weights) if len(same) == len(arrays) else np.empty(0)

    def by_key(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        return {
            key: float(np.average([part[key] for part in parts], weights=weights))
            for key in parts[0]
            if all(key in part for part in parts)
        }

    bins: dict[str, np.ndarray] = {}
    if all(panel.bins for panel in panels):
        counts = np.sum([panel.bins["counts"] for panel in panels], axis=0)
        total = np.maximum(counts, 1)
        bins = {
            key: np.sum([panel.bins[key] * panel.bins["counts"] for panel in panels], axis=0) / total
            for key in ("accuracies", "confidences")
        } | {"counts": counts}
    classwise = [panel.classwise_ece.mean for panel in panels if panel.classwise_ece is not None]
    spread = float(np.std(classwise, ddof=1)) if len(classwise) > 1 else None
    errors = [panel.errors for panel in panels]
    return first._replace(
        title=title,
        accuracy={name: known[name] for name in ("all", *GROUPS) if name in known},
        ece=known.get("ece"),
        classwise_ece=Figure(float(np.mean(classwise)), spread) if len(classwise) == len(panels) else None,
        best=known.get("best"),
        per_class=mean([panel.per_class for panel in panels]),
        bins=bins,
        errors={
            group: by_key([one[group] for one in errors]) for group in errors[0] if all(group in one for one in errors)
        },
        own=mean([panel.own for panel in panels]),
        wrong=mean([panel.wrong for panel in panels]),
        nearest_is_own=by_key([panel.nearest_is_own for panel in panels]),
        learned={
            key: mean([panel.learned[key] for panel in panels])
            for key in first.learned
            if all(key in panel.learned for panel in panels)
        },
        curves=[curve for panel in panels for curve in panel.curves],
    )


def read_curves(path: Path) -> dict[str, dict[str, list]]:
    """Learning curves from metrics.jsonl -> {stage: {"train": [(epoch, loss, lr)], "test": [(epoch, {group: acc})]}}.

    Epochs are fractions where steps were logged; of long runs neighbours are averaged. No file: no curves.
    """
    found: dict[str, dict[str, list]] = {}
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    for one in lines:
        try:
            entry = json.loads(one)
            stage, values = found.setdefault(entry["stage"], {"train": [], "test": []}), entry["values"]
            if entry["split"] == "train":
                stage["train"].append((entry["epoch"], entry["step"], values["loss"], values["lr"]))
            elif entry["split"] == "test":
                stage["test"].append((entry["epoch"], dict(values["accuracy"])))
        except (ValueError, KeyError, TypeError):
            continue  # cut short by a kill
    for stage in found.values():
        stage["train"] = thinned(stage["train"])
    return found


def thinned(entries: Sequence[tuple[int, int, float, float]]) -> list[tuple[float, float, float]]:
    """(epoch, last step, loss, rate) of each dispatch -> (place in epochs, loss, rate), at most `MOST_POINTS`."""
    if not entries:
        return []
    epochs, steps, losses, rates = (np.asarray(values, np.float64) for values in zip(*entries, strict=True))
    whole = np.flatnonzero(np.diff(epochs, append=np.inf))  # where an epoch ends
    per_epoch = steps[whole[0]] / epochs[whole[0]] if len(whole) else 1.0
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
