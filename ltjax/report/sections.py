"""The sections of a page: figures, and the same as tables. A new one is a function here, listed in `SECTIONS`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from ltjax.report import charts, plots
from ltjax.report.panels import Panel
from ltjax.runs.results import GROUPS, accuracy_after, attack_cells, in_words, percent

MOST_ROWS = 200  # of a table of classes
MOST_NUMBERS = 30  # classes of a confusion matrix with numbers; for more it is a picture
WORST = 50  # classes to name if there are too many for a mark each


class Table(NamedTuple):
    caption: str
    header: list[str]
    rows: list[list[str]]


class Section(NamedTuple):
    id: str
    title: str
    about: str  # how to read it
    figures: list[tuple[str, Markup]]  # heading, chart
    tables: list[Table]  # the same as numbers
    listings: Sequence[Table] = ()  # long tables, shown with the figures: the reader can sort and search them
    pairs: Sequence[Mapping[str, Any]] = ()  # confused classes, see `ltjax.report.page.confused`
    pictures: Sequence[Mapping[str, str]] = ()  # of single images, see `mistakes`
    image: str = ""  # a data URI


class Attacked(NamedTuple):
    key: str  # unique on the page
    title: str  # of the stage, or of the row
    results: Mapping[str, Any]  # the contents of attack.json


class Content(NamedTuple):
    """The input of all sections."""

    panels: Sequence[Panel]  # stages of a run, or rows of a comparison
    ends: Sequence[Panel]  # their worst classes are named if there are many: the final stage, or all rows
    pairs: Sequence[Mapping[str, Any]] = ()
    attacked: Sequence[Attacked] = ()
    confusion: Mapping[str, Any] | None = None  # see `ltjax.report.analysis.confusion_numbers`
    mistakes: Mapping[str, Any] | None = None  # {"wrong": number of images, "shown": the most confident of them}
    num_images: int = 0  # of the test set
    comparison: bool = False
    image: str = ""  # of the attack, a data URI


def build(content: Content) -> list[Section]:
    """Return the sections in the order of a reader's questions, without those that have neither charts nor pictures."""
    built = [section(content) for section in SECTIONS]
    return [section for section in built if section.figures or section.pictures]


def accuracy(content: Content) -> Section:
    about = (
        "Each mark is a class, the most frequent at the left; the bars are the means of the groups. "
        f'Point at a mark for its name, or see "As numbers".{_ranges(content.panels)}'
    )
    if any(map(_many_classes, content.ends)):
        about += f' The {WORST} worst classes are named under "As numbers".'
    return Section(
        "accuracy",
        "Accuracy by class",
        about,
        _figures(content, "accuracy", plots.accuracy_by_count, lambda p: bool(np.isfinite(p.per_class).any())),
        [*_worst_tables(content.ends), *map(_class_table, _same_classes(content.panels))],
    )


def scores(content: Content) -> Section:
    """Precision, recall and F1 of each class: of the final stage, or F1 alone of each row of a comparison."""
    about = (
        "Recall: the share of a class's test images that is right, its accuracy. Precision: the share of the images "
        "predicted as the class that is right; 0 if there are none. F1: their harmonic mean; the curves join equal F1. "
        "Classes without test images have none, and count in no mean. "
    )
    many = any(map(_many_classes, content.panels))
    about += "A mark is the mean of a range of counts." if many else "Point at a mark for the name of its class."
    measured = [panel for panel in content.ends if panel.scores]
    return Section(
        "scores",
        "Precision, recall and F1 by class",
        about,
        _figures(content, "scores", plots.precision_and_recall, lambda p: bool(p.scores)),
        [_score_means(content.panels)],
        [_score_listing(same) for same in _same_classes(measured)],
    )


def calibration(content: Content) -> Section:
    return Section(
        "calibration",
        "Calibration",
        "Below the dashed line, confidence is higher than accuracy. ECE: mean gap over 15 bins of the confidence "
        "in the predicted class; small dots hold less than 1 % of the images. "
        "Class-wise ECE: the same of the probability of every class, mean over classes.",
        _figures(content, "calibration", plots.reliability, lambda p: bool(p.bins), _calibration_title),
        [_bins_table(panel) for panel in content.panels if panel.bins],
    )


def learning(content: Content) -> Section:
    return Section(
        "learning",
        "Learning curves",
        "The learning rate is drawn on its own scale.",
        _figures(content, "learning", plots.learning, lambda p: any(curve["train"] for curve in p.curves)),
        [_curve_table(panel) for panel in content.panels if any(curve["test"] for curve in panel.curves)],
    )


def errors(content: Content) -> Section:
    return Section(
        "errors",
        "Where the errors go",
        "A bar is the test images of a group, from the left: right (grey), then wrongly taken for a class of many, "
        "of medium and of few (coloured).",
        _figures(content, "errors", plots.errors, lambda p: bool(p.errors)),
        _errors_tables(content.panels),
        pairs=content.pairs,
    )


def confusion(content: Content) -> Section:
    """Show a run's final confusion matrix: with numbers, as a picture, or summed over ranges of classes."""
    figures, listings, about = [], [], []
    if content.confusion:
        panel, cells = content.ends[0], content.confusion
        names, counts = panel.class_names, panel.class_counts
        few = len(names) <= MOST_NUMBERS
        chart = plots.confusion_table(panel, cells) if few else plots.confusion_map("confusion0", panel, cells)
        figures.append((panel.title, chart))
        about = [
            "A row is the test images of a class, a column what they are predicted as; both are sorted by group and by "
            "training images. Right: grey. Wrong: orange, stronger for a larger share of the row."
        ]
        if cells["classes"] > 1:
            about.append(f"A row is {cells['classes']} classes: the diagonal also has the mistakes within a row.")
        if cells["seeds"] > 1:
            about.append(f"Images of {cells['seeds']} seeds together.")
        images = cells["seeds"] * panel.scores["images"]
        rows = [
            [names[true], names[other], f"{wrong:,}", _percent(wrong / images[true]), f"{back:,}"]
            + [f"{counts[true]:,}", f"{counts[other]:,}"]
            for true, other, wrong, back in cells["pairs"]
        ]
        header = ["class", "taken for", "test images", "% of the class", "the other way round"]
        header += ["training images", "of the other class"]
        listings = [Table(f"{panel.title}: the {len(rows)} pairs confused most often", header, rows)] if rows else []
    return Section("confusion", "Confusion matrix", " ".join(about), figures, [], listings)


def mistakes(content: Content) -> Section:
    """Show the wrong test images with the highest confidences in a run's final stage."""
    pictures, about = [], ""
    if content.mistakes and content.mistakes["shown"]:
        panel, shown = content.ends[0], content.mistakes["shown"]
        names = panel.class_names
        about = (
            f"{panel.title}: {len(shown):,} of the {content.mistakes['wrong']:,} wrong predictions for "
            f"{content.num_images:,} test images, those with the highest confidence. They are extremes, not typical "
            "mistakes, and some may be right and labelled wrongly: look at the label first. Confidence is the largest "
            "probability, without a fitted temperature. Images are cropped as the network sees them."
        )
        pictures = [
            {
                **each,
                "alt": f"test image of {names[each['true']]}",
                "true": names[each["true"]],
                "predicted": names[each["predicted"]],
                "about": f"{percent(each['confidence'])}\u00a0%\u00a0sure",
            }
            for each in shown
        ]
    return Section("mistakes", "Most confident mistakes", about, [], [], pictures=pictures)


def geometry(content: Content) -> Section:
    return Section(
        "geometry",
        "Distances to class means",
        "Mean distance of a class's test features to the mean training feature of the class (filled) and to the "
        "nearest mean of another class (hollow), in units of the median of the latter. Where the filled mark "
        f"is the higher one, features are nearer to a wrong class than to their own.{_ranges(content.panels)}",
        _figures(content, "geometry", plots.geometry, _has_distances),
        _geometry_tables(content.panels),
    )


def learned(content: Content) -> Section:
    figures = [
        (panel.title, plots.learned(f"learned{number}-{place}", panel, title))
        for number, panel in enumerate(content.panels)
        for place, title in enumerate(panel.learned)
    ]
    tables = _learned_tables(content.panels)
    return Section("learned", "Learned values of each class", "Learned or set by count.", figures, tables)


def robustness(content: Content) -> Section:
    """Show the results of `--mode=attack` by group, and accuracy against the radius."""
    figures, tables, abouts = [], [], []
    for attacked in content.attacked:
        title, results = attacked.title or "Attacked", attacked.results
        heading = f"{attacked.title}: " if content.comparison else ""
        chart = plots.clean_and_robust(f"{attacked.key}-tests", title, results["tests"])
        figures.append((f"{heading}Clean and attacked", chart))
        tables.append(_tests_table(title, results["tests"]))
        radius = plots.in_255ths(results["epsilon"])
        about = f"{results['norm']} radius {radius}, {results['num_images']:,} test images."
        if curve := results.get("curve"):
            chart = plots.against_epsilon(f"{attacked.key}-curve", title, curve, results["epsilon"])
            figures.append((f"{heading}Accuracy against the radius", chart))
            tables.append(_radius_table(curve))
            about += " Accuracy should fall to 0 where the radius is large: if it does not, the attack is too weak."
        abouts.append(about if content.comparison or not attacked.title else f"{attacked.title}: {about}")
    about = " ".join(dict.fromkeys(abouts))
    return Section("robust", "Under attack", about, figures, tables, image=content.image)


# The sections of a page, in this order.
SECTIONS = (accuracy, scores, calibration, learning, errors, confusion, mistakes, geometry, learned, robustness)


def group_counts(panel: Panel) -> str:
    """Return how many training images the classes of each group have, in words; "" without groups."""
    counts = {name: panel.class_counts[member] for name, member in panel.groups.items() if member.any()}
    return in_words({name: (int(each.min()), int(each.max())) for name, each in counts.items()})


def _figures(
    content: Content,
    key: str,
    draw: Callable[[str, Panel], Markup],
    shown: Callable[[Panel], bool],
    heading: Callable[[Panel], str] = lambda panel: panel.title,
) -> list[tuple[str, Markup]]:
    return [(heading(p), draw(f"{key}{n}", p)) for n, p in enumerate(content.panels) if shown(p)]


def _many_classes(panel: Panel) -> bool:
    """Return whether a mark is a range of counts instead of a class, see `ltjax.report.charts.points`."""
    return len(panel.class_counts) > charts.MOST_DOTS


def _ranges(panels: Sequence[Panel]) -> str:
    many = any(map(_many_classes, panels))
    return " Of many classes, a mark is the mean of a range of counts, with quartiles." if many else ""


def _has_distances(panel: Panel) -> bool:
    return bool(panel.own.size and np.isfinite(panel.own).any() and np.isfinite(panel.wrong).any())


def _calibration_title(panel: Panel) -> str:
    classwise = f", class-wise {small(panel.classwise_ece)}" if panel.classwise_ece else ""
    return f"{panel.title}: ECE {plots.shown_figure(panel.ece)}{classwise}"


def small(figure: Any) -> str:
    """Format a class-wise ECE: with many classes it is far below 0.1 %."""
    return percent(*figure) if figure.mean >= 0.001 else f"{100 * figure.mean:.2g}"


def _same_classes(panels: Sequence[Panel]) -> list[list[Panel]]:
    """Return sets of panels that share their classes."""
    sets: dict[tuple, list[Panel]] = {}
    for panel in panels:
        sets.setdefault((panel.class_names, panel.class_counts.tobytes()), []).append(panel)
    return list(sets.values())


def _score_means(panels: Sequence[Panel]) -> Table:
    """Return the means over classes; that of the recalls is balanced accuracy."""
    rows = [
        [panel.title, *(_percent(_nanmean(panel.scores[name])) for name in ("precision", "recall", "f1"))]
        for panel in panels
        if panel.scores
    ]
    header = ["", "precision", "recall (balanced accuracy)", "F1 (macro F1)"]
    return Table("Means over classes with test images, %", header, rows)


def _score_listing(panels: Sequence[Panel]) -> Table:
    """Return a row for each class, the lowest F1 first and among equals the most frequent. panels: of the same classes.

    Of one panel all scores are shown, of several the F1 of each.
    """
    first = panels[0]
    groups = charts.group_names(first.groups, len(first.class_names))
    order = np.lexsort((-first.class_counts, first.scores["f1"]))  # nan last
    header = ["class", "training images", "group"]
    if len(panels) == 1:
        header += ["test images", "predicted as it", "precision", "recall", "F1"]
        columns = [*(map(_count, first.scores[name]) for name in ("images", "predicted"))]
        columns += [map(_percent, first.scores[name]) for name in ("precision", "recall", "f1")]
    else:
        header += [panel.title for panel in panels]
        columns = [map(_percent, panel.scores["f1"]) for panel in panels]
    cells = list(zip(*columns, strict=True))
    rows = [[first.class_names[c], f"{first.class_counts[c]:,}", groups[c], *cells[c]] for c in order]
    what = f"{first.title}: precision, recall and F1" if len(panels) == 1 else "F1"
    return Table(f"{what} of each class, %", header, rows)


def _count(value: float) -> str:
    return f"{value:,.0f}" if np.isfinite(value) else "-"


def _worst_tables(panels: Sequence[Panel]) -> list[Table]:
    """Return the classes of lowest accuracy if they have no mark each; among equals, the most frequent first."""
    tables = []
    for panel in filter(_many_classes, panels):
        order = np.lexsort((-panel.class_counts, panel.per_class))  # nan last
        worst = [c for c in order[:WORST] if np.isfinite(panel.per_class[c])]
        rows = [[panel.class_names[c], f"{panel.class_counts[c]:,}", _percent(panel.per_class[c])] for c in worst]
        caption = f"{panel.title}: the {len(rows)} classes of lowest test accuracy, %"
        tables += [Table(caption, ["class", "training images", "accuracy"], rows)] if rows else []
    return tables


def _class_table(panels: Sequence[Panel]) -> Table:
    """Return a row for each class, or for each range of counts if there are many."""
    first = panels[0]
    order = np.argsort(-first.class_counts, kind="stable")
    groups = charts.group_names(first.groups, len(order))
    header = ["class", "training images", "group", *(p.title for p in panels)]
    if len(order) <= MOST_ROWS:
        rows = [
            [first.class_names[c], f"{first.class_counts[c]:,}", groups[c], *(_percent(p.per_class[c]) for p in panels)]
            for c in order
        ]
        return Table("Test accuracy of each class, %", header, rows)
    rows = []
    for members in charts.count_ranges(first.class_counts):
        counts = first.class_counts[members]
        means = [_percent(_nanmean(p.per_class[members])) for p in panels]
        rows.append([f"{len(members):,}", charts.between(counts), groups[members[0]], *means])
    header[0] = "classes"
    return Table("Mean test accuracy of classes by training images, %", header, rows)


def _nanmean(values: np.ndarray) -> float:
    seen = values[np.isfinite(values)]
    return float(seen.mean()) if seen.size else float("nan")


def _percent(value: float) -> str:
    return percent(value if np.isfinite(value) else None)


def _bins_table(panel: Panel) -> Table:
    number = len(panel.bins["counts"])
    bins = zip(*(panel.bins[name] for name in ("counts", "confidences", "accuracies")), strict=True)
    rows = [
        [f"{100 * b / number:.0f} to {100 * (b + 1) / number:.0f}", f"{count:,.0f}", _percent(sure), _percent(right)]
        for b, (count, sure, right) in enumerate(bins)
        if count
    ]
    return Table(f"{panel.title}: bins of confidence, %", ["bin", "images", "confidence", "accuracy"], rows)


def _curve_table(panel: Panel) -> Table:
    tested = [curve["test"] for curve in panel.curves if curve["test"]]
    test = tested[0]
    shown = [test[i] for i in np.unique(np.linspace(0, len(test) - 1, min(len(test), 20)).astype(int))]
    groups = [group for group in GROUPS if group in shown[-1][1]]
    rows = [[f"{epoch:g}", *(percent(values.get(group)) for group in groups)] for epoch, values in shown]
    which = ", first run" if len(tested) > 1 else ""
    return Table(f"{panel.title}: test accuracy by epoch, %{which}", ["epoch", *groups], rows)


def _errors_tables(panels: Sequence[Panel]) -> list[Table]:
    others = [g for g in GROUPS if any(g in shares for p in panels for shares in p.errors.values())]
    rows = [
        [panel.title, group, percent(shares["right"]), *(percent(shares.get(other)) for other in others)]
        for panel in panels
        for group, shares in panel.errors.items()
    ]
    header = ["", "test images of", "right", *(f"taken for {other}" for other in others)]
    return [Table("Shares of each group's test images, %", header, rows)] if rows else []


def _geometry_tables(panels: Sequence[Panel]) -> list[Table]:
    rows = []
    for panel in filter(_has_distances, panels):
        unit = float(np.nanmedian(panel.wrong)) or 1.0
        for group, member in panel.groups.items():
            if group in panel.nearest_is_own:
                means = [f"{_nanmean(values[member]) / unit:.2f}" for values in (panel.own, panel.wrong)]
                rows.append([panel.title, group, *means, percent(panel.nearest_is_own[group])])
    header = ["", "group", "to own mean", "to nearest wrong mean", "nearest is own, %"]
    caption = "Mean distance by group, in units of the median distance to the nearest wrong mean"
    return [Table(caption, header, rows)] if rows else []


def _learned_tables(panels: Sequence[Panel]) -> list[Table]:
    rows = []
    for panel in panels:
        for title, values in panel.learned.items():
            means = [f"{_nanmean(values[member]):.3g}" if member.any() else "-" for member in panel.groups.values()]
            rows.append([panel.title, title, *means])
    return [Table("Means by group", ["", "", *panels[0].groups], rows)] if rows else []


def _radius_table(curve: Sequence[Mapping[str, Any]]) -> Table:
    groups = [group for group in GROUPS if group in curve[0]["accuracy"]]
    rows = [
        [plots.in_255ths(point["epsilon"])]
        + [percent(point["accuracy"].get(group), point.get("std", {}).get(group)) for group in groups]
        for point in curve
    ]
    return Table("Accuracy under PGD-20 by radius, %", ["radius", *groups], rows)


def _tests_table(title: str, tests: Mapping[str, Any]) -> Table:
    rows = []
    for test in tests.values():
        rows.append([test["title"], *attack_cells(test)])
        rows += [[f"after {attack}", accuracy, *[""] * len(GROUPS)] for attack, accuracy in accuracy_after(test)]
    return Table(f"{title}: accuracy and calibration, %", ["", *GROUPS, "ECE"], rows)
