"""Pictures of a run. Functions import Matplotlib themselves, because its import takes half a second."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's, safe if colour-blind
COLOURS = ("#7a7a7a", "#56b4e9", "#0072b2", "#d55e00", "#009e73", "#cc79a7")


def summary(results: dict[str, Any]) -> "Figure":
    """Draw accuracy of each class, most frequent first, and accuracy against confidence, by stage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
    _accuracy_by_class(left, results)
    _reliability(right, results)
    figure.suptitle(results["name"])
    return figure


def _accuracy_by_class(axes: "Axes", results: dict[str, Any]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    counts = np.asarray(results["class_counts"])
    order = np.argsort(-counts, kind="stable")
    places = np.arange(len(order))
    behind = axes.twinx()
    behind.bar(places, counts[order], width=0.9, color="#e8e4da", zorder=0)
    behind.set(yscale="log", ylabel="training images")
    behind.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    behind.yaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
    behind.yaxis.set_minor_formatter(NullFormatter())
    axes.set_zorder(behind.get_zorder() + 1)  # draw lines in front of the bars
    axes.patch.set_visible(False)
    window = max(1, len(order) // 20)
    for colour, stage in zip(COLOURS, results["stages"].values(), strict=False):
        accuracy = np.asarray([np.nan if a is None else a for a in stage["per_class_accuracy"]])[order]
        padded = np.pad(accuracy, window // 2, mode="edge")
        smooth = np.convolve(padded, np.ones(window) / window, "valid")[: len(order)]
        axes.plot(places, 100 * smooth, color=colour, marker="o" if window == 1 else "", label=stage["title"])
    smoothed = f", mean of {window} neighbours" if window > 1 else ""
    axes.set(ylim=(0, 100), xlabel="classes, most frequent first", ylabel=f"test accuracy (%){smoothed}")
    if len(order) <= 20:
        axes.set_xticks(places, [results["class_names"][c] for c in order], rotation=30, ha="right")
    axes.legend(loc="lower left", framealpha=0.9)


def _reliability(axes: "Axes", results: dict[str, Any]) -> None:
    axes.plot((0, 100), (0, 100), color="#bbbbbb", linestyle="--")
    for colour, stage in zip(COLOURS, results["stages"].values(), strict=False):
        if stage["ece"] is None:
            continue
        bins = {name: np.asarray(values) for name, values in stage["calibration_bins"].items()}
        confidences, accuracies = (100 * bins[name][bins["counts"] > 0] for name in ("confidences", "accuracies"))
        label = f"{stage['title']}: ECE {100 * stage['ece']:.1f} %"
        axes.plot(confidences, accuracies, color=colour, marker="o", ms=4, label=label)
    axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="confidence (%)", ylabel="accuracy (%)")
    axes.legend(loc="upper left", fontsize="small")


class AttackedImage(NamedTuple):
    """One image before and after an attack."""

    image: np.ndarray  # [H, W, channels] in [0, 1]
    adversarial: np.ndarray
    label: int
    before: tuple[int, float]  # predicted class and its confidence
    after: tuple[int, float]


def attacked(shown: Sequence[AttackedImage], class_names: Sequence[str]) -> "Figure":
    """Draw a row for each image: the image, what the attack adds (grey: nothing), and their sum, with predictions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6, 2.3 * len(shown)), layout="constrained")
    rows = figure.subplots(len(shown), 3, squeeze=False)
    for row, each in zip(rows, shown, strict=True):
        change = each.adversarial - each.image
        largest = float(np.abs(change).max())
        enlarged = 0.5 + 0.5 * change / largest if largest else np.full_like(change, 0.5)
        for axes, pixels in zip(row, (each.image, enlarged, each.adversarial), strict=True):
            axes.imshow(pixels.squeeze().clip(0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        for axes, (predicted, confidence) in ((row[0], each.before), (row[2], each.after)):
            colour = "#009e73" if predicted == each.label else "#d55e00"
            axes.set_title(f"{class_names[predicted]}, {confidence:.0%}", color=colour, fontsize="small")
        row[0].set_ylabel(class_names[each.label], fontsize="small")
        untouched = "stood: left as it is" if each.before[0] == each.label else "wrong anyway: left as it is"
        row[1].set_title(f"at most {largest:.4f}, enlarged" if largest else untouched, fontsize="small")
    about = "image with its prediction; what the attack adds; both, with their prediction\nat the left the true class"
    figure.supxlabel(about, fontsize="small")
    return figure


def write_attack(shown: Sequence[AttackedImage], class_names: Sequence[str], folder: Path) -> Path:
    return _write(lambda: attacked(shown, class_names), folder / "attack.png")


def write_summary(results: dict[str, Any], folder: Path) -> Path:
    return _write(lambda: summary(results), folder / "summary.png")


def _write(draw: "Callable[[], Figure]", path: Path) -> Path:
    """Save a picture; in class names a dollar sign starts no formula, and a missing glyph is a box."""
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        draw().savefig(path, dpi=110)
    return path
