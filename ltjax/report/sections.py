"""The sections of a page: figures and tables of panels, which are the stages of a run or the rows of a comparison."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from ltjax.report import charts, plots
from ltjax.report.panels import GROUPS, Panel
from ltjax.runs.results import in_words, percent

MOST_ROWS = 200  # of a table of classes
WORST = 50  # classes named where each has no mark of its own


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
    pairs: Sequence[Mapping[str, Any]] = ()  # of confused classes, see `ltjax.modes.report`
    image: str = ""  # a data URI


def of_panels(panels: Sequence[Panel], ends: Sequence[Panel]) -> list[Section]:
    """What can be shown of any panels, in the order of a reader's questions. Sections without figures are left out.

    ends: those whose worst classes are named where there are many: the final stage, or the rows of a comparison.
    """
    made = [
        Section(
            "accuracy",
            "Accuracy by class",
            "Each mark is a class, the most frequent at the left; the bars are the means of the groups. "
            f'Point at a mark for its name, or see "As numbers".{_ranges(panels)}{_worst_hint(ends)}',
            _figures(panels, "accuracy", plots.accuracy_by_count, lambda p: bool(np.isfinite(p.per_class).any())),
            [*_worst_tables(ends), *_class_tables(panels)],
        ),
        Section(
            "calibration",
            "Is it as sure as it is right?",
            "Below the dashed line, confidence is higher than accuracy. ECE: mean gap over 15 bins of the confidence "
            "in the predicted class; small dots hold less than 1 % of the images. "
            "Class-wise ECE: the same of the probability of every class, mean over classes.",
            _figures(panels, "calibration", plots.reliability, lambda p: bool(p.bins), _calibration_title),
            [_bins_table(panel) for panel in panels if panel.bins],
        ),
        Section(
            "learning",
            "Learning curves",
            "The learning rate is drawn on its own scale.",
            _figures(panels, "learning", plots.learning, lambda p: any(one["train"] for one in p.curves)),
            [_curve_table(panel) for panel in panels if any(one["test"] for one in panel.curves)],
        ),
        Section(
            "errors",
            "Where the errors go",
            "A bar is the test images of a group, from the left: right (grey), then wrongly taken for a class of many, "
            "of medium and of few (coloured).",
            _figures(panels, "errors", plots.errors, lambda p: bool(p.errors)),
            [table for table in [_errors_table(panels)] if table.rows],
        ),
        Section(
            "geometry",
            "Distances to class means",
            "Mean distance of a class's test features to the mean training feature of the class (filled) and to the "
            "nearest mean of another class (hollow), in units of the median of the latter. Where the filled mark "
            f"is the higher one, features are nearer to a wrong class than to their own.{_ranges(panels)}",
            _figures(panels, "geometry", plots.geometry, _has_distances),
            [table for table in [_geometry_table(panels)] if table.rows],
        ),
    ]
    found = []
    for number, panel in enumerate(panels):
        for place, title in enumerate(panel.learned):
            chart = plots.learned(f"learned{number}-{place}", panel, title)
            found.append((panel.title, chart))
    made.append(
        Section("learned", "What classes have of their own", "Learned or set by count.", found, _learned_tables(panels))
    )
    return [section for section in made if section.figures]


def group_counts(panel: Panel) -> str:
    """How many training images the classes of each group have, in words."""
    counts = {name: panel.class_counts[member] for name, member in panel.groups.items() if member.any()}
    return in_words({name: (int(own.min()), int(own.max())) for name, own in counts.items()})


def _figures(
    panels: Sequence[Panel],
    key: str,
    draw: Callable[[str, Panel], Markup],
    shown: Callable[[Panel], bool],
    heading: Callable[[Panel], str] = lambda panel: panel.title,
) -> list[tuple[str, Markup]]:
    return [(heading(p), draw(f"{key}{n}", p)) for n, p in enumerate(panels) if shown(p)]


def _many_classes(panel: Panel) -> bool:
    """Whether a mark is a range of counts instead of a class, see `ltjax.report.charts.points`."""
    return len(panel.class_counts) > charts.MOST_DOTS


def _ranges(panels: Sequence[Panel]) -> str:
    many = any(map(_many_classes, panels))
    return " Of many classes, a mark is the mean of a range of counts, with quartiles." if many else ""


def _worst_hint(panels: Sequence[Panel]) -> str:
    return f' The {WORST} worst classes are named under "As numbers".' if any(map(_many_classes, panels)) else ""


def _has_distances(panel: Panel) -> bool:
    return bool(panel.own.size and np.isfinite(panel.own).any() and np.isfinite(panel.wrong).any())


def _calibration_title(panel: Panel) -> str:
    classwise = f", class-wise {small(panel.classwise_ece)}" if panel.classwise_ece else ""
    return f"{panel.title}: ECE {plots.shown_figure(panel.ece)}{classwise}"


def small(figure: Any) -> str:
    """Class-wise ECE of many classes is far below 0.1 %."""
    return percent(*figure) if figure.mean >= 0.001 else f"{100 * figure.mean:.2g}"


def _class_tables(panels: Sequence[Panel]) -> list[Table]:
    """A table for all panels that share their classes: a row a class, or a range of counts where there are many."""
    tables: list[Table] = []
    while panels:
        first, same = panels[0], [_same_classes(panels[0], panel) for panel in panels]
        tables.append(_class_table(first, [panel for panel, mate in zip(panels, same, strict=True) if mate]))
        panels = [panel for panel, mate in zip(panels, same, strict=True) if not mate]
    return tables


def _worst_tables(panels: Sequence[Panel]) -> list[Table]:
    """The classes of lowest accuracy of panels with no mark for each; of equals, the most frequent first."""
    tables = []
    for panel in filter(_many_classes, panels):
        order = np.lexsort((-panel.class_counts, panel.per_class))  # nan last
        worst = [c for c in order[:WORST] if np.isfinite(panel.per_class[c])]
        rows = [[panel.class_names[c], f"{panel.class_counts[c]:,}", _percent(panel.per_class[c])] for c in worst]
        caption = f"{panel.title}: the {len(rows)} classes of lowest test accuracy, %"
        tables += [Table(caption, ["class", "training images", "accuracy"], rows)] if rows else []
    return tables


def _same_classes(a: Panel, b: Panel) -> bool:
    return a.class_names == b.class_names and np.array_equal(a.class_counts, b.class_counts)


def _class_table(first: Panel, mates: Sequence[Panel]) -> Table:
    order = np.argsort(-first.class_counts, kind="stable")
    groups = charts.group_names(first.groups, len(order))
    header = ["class", "training images", "group", *(p.title for p in mates)]
    if len(order) <= MOST_ROWS:
        rows = [
            [first.class_names[c], f"{first.class_counts[c]:,}", groups[c], *(_percent(p.per_class[c]) for p in mates)]
            for c in order
        ]
        return Table("Test accuracy of each class, %", header, rows)
    rows = []
    for members in charts.count_ranges(first.class_counts):
        counts = first.class_counts[members]
        means = [_percent(_nanmean(p.per_class[members])) for p in mates]
        between = f"{counts.min():,} to {counts.max():,}"
        rows.append([f"{len(members):,}", between, groups[members[0]], *means])
    header[0] = "classes"
    return Table("Mean test accuracy of classes by training images, %", header, rows)


def _nanmean(values: np.ndarray) -> float:
    seen = values[np.isfinite(values)]
    return float(seen.mean()) if seen.size else float("nan")


def _percent(value: float) -> str:
    return percent(value if np.isfinite(value) else None)


def _bins_table(panel: Panel) -> Table:
    number = len(panel.bins["counts"])
    rows = [
        [
            f"{100 * b / number:.0f} to {100 * (b + 1) / number:.0f}",
            f"{panel.bins['counts'][b]:,.0f}",
            _percent(panel.bins["confidences"][b]),
            _percent(panel.bins["accuracies"][b]),
        ]
        for b in range(number)
        if panel.bins["counts"][b]
    ]
    return Table(f"{panel.title}: bins of confidence, %", ["bin", "images", "confidence", "accuracy"], rows)


def _curve_table(panel: Panel) -> Table:
    tested = [one["test"] for one in panel.curves if one["test"]]
    test = tested[0]
    shown = [test[i] for i in np.unique(np.linspace(0, len(test) - 1, min(len(test), 20)).astype(int))]
    groups = [group for group in ("all", *GROUPS) if group in shown[-1][1]]
    rows = [[f"{epoch:g}", *(percent(values.get(group)) for group in groups)] for epoch, values in shown]
    which = ", first run" if len(tested) > 1 else ""
    return Table(f"{panel.title}: test accuracy by epoch, %{which}", ["epoch", *groups], rows)


def _errors_table(panels: Sequence[Panel]) -> Table:
    others = [g for g in GROUPS if any(g in shares for p in panels for shares in p.errors.values())]
    rows = [
        [panel.title, group, percent(shares["right"]), *(percent(shares.get(other)) for other in others)]
        for panel in panels
        for group, shares in panel.errors.items()
    ]
    header = ["", "test images of", "right", *(f"taken for {other}" for other in others)]
    return Table("Shares of each group's test images, %", header, rows)


def _geometry_table(panels: Sequence[Panel]) -> Table:
    rows = []
    for panel in panels:
        if not _has_distances(panel):
            continue
        unit = float(np.nanmedian(panel.wrong)) or 1.0
        for group, member in panel.groups.items():
            if group in panel.nearest_is_own:
                means = [f"{_nanmean(values[member]) / unit:.2f}" for values in (panel.own, panel.wrong)]
                rows.append([panel.title, group, *means, percent(panel.nearest_is_own[group])])
    header = ["", "group", "to own mean", "to nearest wrong mean", "nearest is own, %"]
    return Table("Mean distance by group, in units of the median distance to the nearest wrong mean", header, rows)


def _learned_tables(panels: Sequence[Panel]) -> list[Table]:
    rows = []
    for panel in panels:
        for title, values in panel.learned.items():
            means = [f"{_nanmean(values[member]):.3g}" if member.any() else "-" for member in panel.groups.values()]
            rows.append([panel.title, title, *means])
    return [Table("Means by group", ["", "", *panels[0].groups], rows)] if rows else []


def robustness(about: Mapping[str, Any], key: str = "robust", image: str = "", title: str = "") -> Section:
    """What `--mode=attack` found, by group, and accuracy against the radius. about: what attack.json holds."""
    tests, curve = about["tests"], about.get("curve") or []
    title = title or "Attacked"
    figures = [("Clean and attacked", plots.clean_and_robust(f"{key}-tests", title, tests))]
    tables = [_tests_table(title, tests)]
    if curve:
        chart = plots.against_epsilon(f"{key}-curve", title, curve, about["epsilon"])
        figures.append(("Accuracy against the radius", chart))
        groups = [g for g in ("all", *GROUPS) if g in curve[0]["accuracy"]]
        rows = [
            [f"{255 * p['epsilon']:.3g}/255", *(percent(p["accuracy"].get(g), p.get("std", {}).get(g)) for g in groups)]
            for p in curve
        ]
        tables.append(Table("Accuracy under PGD-20 by radius, %", ["radius", *groups], rows))
    where = f"{about['norm']} radius {255 * about['epsilon']:.3g}/255, {about['num_images']:,} test images."
    hint = (
        " Accuracy should fall to 0 where the radius is large: if it does not, the attack is too weak." if curve else ""
    )
    return Section("robust", "Under attack", where + hint, figures, tables, image=image)


def _tests_table(title: str, tests: Mapping[str, Any]) -> Table:
    rows = []
    for test in tests.values():
        spread = test.get("std", {"accuracy": {}})
        cells = [percent(test["accuracy"].get(g), spread["accuracy"].get(g)) for g in ("all", *GROUPS)]
        rows.append([test["title"], *cells, percent(test["ece"], spread.get("ece"))])
        for attack, share in list(test.get("robust_after", {}).items())[:-1]:
            rows.append([f"after {attack.upper()}", percent(share), *[""] * 4])
    return Table(f"{title}: accuracy and calibration, %", ["", "all", *GROUPS, "ECE"], rows)
