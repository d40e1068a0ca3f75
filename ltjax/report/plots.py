"""The charts of the report, each of one panel: a stage of a run, or a row of a comparison."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from ltjax.report import charts
from ltjax.report.charts import LEFT, RIGHT, TOP, WIDTH, Scale, line, mark, path, tag, text
from ltjax.report.panels import Panel
from ltjax.runs.results import GROUPS, percent
from ltjax.runs.seeds import MeanStd

BOTTOM = 196  # of a usual chart's frame
GREY, ORANGE = (128, 136, 146), (222, 94, 20)  # of pixels, on light and dark pages
LABELS = 60  # room for the groups' names at the right
NAMES = 62  # the same at the left


def accuracy_by_count(key: str, panel: Panel) -> Markup:
    """Draw the accuracy of each class against its training images, and the mean of each group."""
    up = Scale(0, 100, BOTTOM, TOP + 26)
    parts, points = _by_count(panel, 100 * panel.per_class, "test accuracy, %", up)
    labels = []
    for group in panel.groups:
        places = [p.x for p in points if p.group == group]
        if group in panel.accuracy and places:
            mean = 100 * panel.accuracy[group].mean
            ends = max(LEFT + 2, min(places) - 9), min(WIDTH - RIGHT, max(places) + 9)
            spread = 100 * (panel.accuracy[group].std or 0.0)
            if spread > 0:
                high, low = up(min(mean + spread, 100)), up(max(mean - spread, 0))
                width, height = ends[1] - ends[0], low - high
                parts.append(tag("rect", x=ends[0], y=high, width=width, height=height, class_=f"band {group}"))
            parts.append(line(ends[0], up(mean), ends[1], up(mean), f"mean {group}"))
            labels.append(((ends[0] + ends[1]) / 2, group))
    for x, group in apart(sorted(labels), 84, WIDTH - RIGHT - 40):
        parts.append(text(x, 31, f"{group} {percent(panel.accuracy[group].mean)}", class_=f"label {group}"))
    title = f"{panel.title}: accuracy of classes by training images"
    return charts.picture(key, title, f"Means in %: {_accuracies(panel)}.", 230, parts)


def _by_count(panel: Panel, values: np.ndarray, title: str, up: Scale) -> tuple[list[Markup], list[charts.Point]]:
    """Draw axes and a point for each class, or for each range of counts."""
    across = charts.counts_scale(panel.class_counts)
    points = charts.points(values, panel.class_counts, panel.groups, panel.class_names, across)
    axes = charts.y_axis(up, title) + charts.count_axis(across, BOTTOM)
    return axes + charts.draw_points(points, up), points


def _accuracies(panel: Panel) -> str:
    return ", ".join(f"{group} {percent(*panel.accuracy[group])}" for group in GROUPS if group in panel.accuracy)


def reliability(key: str, panel: Panel) -> Markup:
    """Draw accuracy against confidence in bins, with the share of images in each below."""
    across, up = Scale(0, 100, LEFT, WIDTH - RIGHT), Scale(0, 100, BOTTOM, TOP + 8)
    low, high = BOTTOM + 50, BOTTOM + 14
    counts, confidences, accuracies = (panel.bins[name] for name in ("counts", "confidences", "accuracies"))
    parts = charts.y_axis(up, "accuracy, %")
    parts.append(line(across(0), up(0), across(100), up(100), "ideal"))
    shares, number = counts / max(counts.sum(), 1), len(counts)
    curve = []
    for b in np.flatnonzero(counts > 0).tolist():
        confidence, accuracy = 100 * confidences[b], 100 * accuracies[b]
        x, y = across(confidence), up(accuracy)
        curve.append((x, y))
        side = "over" if confidence > accuracy else "under"
        about = f"{counts[b]:,.0f} images: confidence {confidence:.1f} %, accuracy {accuracy:.1f} %"
        gap = line(x, up(confidence), x, y, f"gap {side}")
        dot = tag("circle", cx=x, cy=y, r=3.5 if shares[b] >= 0.01 else 1.8, class_="dot")
        left, right = across(100 * b / number), across(100 * (b + 1) / number)
        height = (low - high) * shares[b] / shares.max()
        bar = tag("rect", x=left + 1, y=low - height, width=right - left - 2, height=height, class_="share")
        parts.append(tag("g", [tag("title", about), gap, dot, bar]))
    parts.append(path(curve, "curve"))
    parts += charts.x_axis(across, low, "confidence, %; bars: share of images", range(0, 101, 20))
    gap = float((confidences * shares).sum() - (accuracies * shares).sum())
    word = "above" if gap > 0 else "below"
    about = f"ECE {shown_figure(panel.ece)} %. On the mean, confidence is {100 * abs(gap):.1f} points {word} accuracy."
    return charts.picture(key, f"{panel.title}: reliability", about, BOTTOM + 86, parts)


def precision_and_recall(key: str, panel: Panel) -> Markup:
    """Draw the precision of each class, or of each range of counts, against its recall, with curves of equal F1."""
    bottom = 2 * BOTTOM - TOP - 108.0  # so that both scales are about equal
    across, up = Scale(0, 100, LEFT, WIDTH - RIGHT), Scale(0, 100, bottom, TOP + 8)
    parts = charts.y_axis(up, "precision, %")
    for f1 in (20, 40, 60, 80):
        recalls = np.geomspace(f1 / (2 - f1 / 100), 100, 40)  # from where precision is 100
        precisions = recalls * f1 / (2 * recalls - f1)
        parts.append(path([(across(r), up(p)) for r, p in zip(recalls, precisions, strict=True)], "equal"))
        parts.append(text(across(100) - 2, up(precisions[-1]) + 13, f"F1 {f1}", "end"))
    counts, (precision, recall) = panel.class_counts, (100 * panel.scores[name] for name in ("precision", "recall"))
    groups, seen = charts.group_names(panel.groups, len(counts)), np.isfinite(recall)
    each = len(counts) <= charts.MOST_DOTS
    sets = [np.array([c]) for c in range(len(counts))] if each else charts.count_ranges(counts)
    for members in (members[seen[members]] for members in sets):
        if not len(members):
            continue
        x, y = float(recall[members].mean()), float(precision[members].mean())
        name = panel.class_names[members[0]] if each else f"{len(members):,} classes"
        images = f"{charts.between(counts[members])} training images"
        about = f"{name}, {images}: recall {x:.1f} %, precision {y:.1f} %"
        group = charts.most_frequent([groups[c] for c in members])
        parts.append(mark(across(x), up(y), group, about, size=4.5 if len(counts) <= 40 else 3.0))
    parts += charts.x_axis(across, bottom, "recall, %", range(0, 101, 20))
    means = [
        f"{group}: precision {precision[member & seen].mean():.1f}, recall {recall[member & seen].mean():.1f}"
        for group, member in panel.groups.items()
        if (member & seen).any()
    ]
    about = f"Means over classes in %. {'; '.join(means)}."
    return charts.picture(key, f"{panel.title}: precision and recall of classes", about, bottom + 36, parts)


def learning(key: str, panel: Panel) -> Markup:
    """Draw accuracy by group, training loss and learning rate against epochs; several seeds side by side."""
    train = [curve["train"] for curve in panel.curves if curve["train"]]
    test = [curve["test"] for curve in panel.curves if curve["test"]]
    last = max([float(entry[0]) for curve in (*train, *test) for entry in curve] + [1.0])
    across, right = Scale(0, last, LEFT, WIDTH - LABELS), WIDTH - LABELS
    parts = _test_accuracies(test, across)
    losses = [loss for curve in train for _, loss, _ in curve]
    about = ""
    if losses:
        low, high = min(losses), max(losses)
        down = Scale(min(0.0, low), high * 1.05 if high > 0 else 1.0, 210, 158)
        parts += charts.y_axis(down, "training loss", right, 3, top=154)
        parts += [path([(across(epoch), down(loss)) for epoch, loss, _ in curve], "curve") for curve in train]
        top = max(rate for _, _, rate in train[0])
        scale = Scale(0, top or 1, 262, 238)
        parts.append(text(2, 230, f"learning rate, up to {charts.number(top)}", "start", "axis"))
        parts.append(line(LEFT, 262, right, 262, "grid"))
        parts.append(path([(across(epoch), scale(rate)) for epoch, _, rate in train[0]], "rate"))
        about = f"Test accuracy at the end in %: {_accuracies(panel)}. "
        about += f"Training loss from {losses[0]:.3g} to {losses[-1]:.3g}."
    for tick in charts.round_ticks(0, last, 5):
        if tick == int(tick):
            parts += [line(across(tick), 266, across(tick), 269, "axis"), text(across(tick), 281, charts.number(tick))]
    parts.append(text((LEFT + right) / 2, 296, "epochs", class_="axis"))
    return charts.picture(key, f"{panel.title}: learning curves", about, 300, parts)


def _test_accuracies(test: Sequence[Any], across: Scale) -> list[Markup]:
    """Draw the upper part of the learning curves. test: of each seed, [(epoch, {group: accuracy})]."""
    up = Scale(0, 100, 130, TOP + 8)
    parts = charts.y_axis(up, "test accuracy, %", WIDTH - LABELS, 4)
    ends, once = [], all(len(curve) == 1 for curve in test)
    for group in GROUPS:
        lines = [[(across(e), up(100 * values[group])) for e, values in curve if group in values] for curve in test]
        for points in filter(None, lines):
            parts.append(path(points, f"series {group}"))
            if once or (len(points) <= 30 and len(lines) == 1):
                parts += [mark(x, y, group, size=4.0 if once else 2.5) for x, y in points]
        heights = [points[-1][1] for points in lines if points]
        if heights:
            ends.append((float(np.mean(heights)), group))
    parts += _labels(ends, 132, 8 if once else 4)
    if once and ends:
        parts.append(text((LEFT + WIDTH - LABELS) / 2, 80, "evaluated once, at the end", class_="axis"))
    return parts


def _labels(ends: Sequence[tuple[float, str]], lowest: float, gap: float = 4) -> list[Markup]:
    """Write the groups' names at the right ends of their lines. ends: (height, group)."""
    x = WIDTH - LABELS + gap
    return [text(x, y + 4, group, "start", f"label {group}") for y, group in apart(sorted(ends), 13, lowest)]


def apart(labels: Sequence[tuple[float, str]], least: float, most: float) -> list[tuple[float, str]]:
    """Move labels at sorted places so that no two are nearer than `least`, and none lies beyond `most`."""
    moved: list[tuple[float, str]] = []
    for place, label in labels:
        moved.append((max(place, moved[-1][0] + least) if moved else place, label))
    for n in range(len(moved) - 1, -1, -1):
        moved[n] = (min(moved[n][0], most - least * (len(moved) - 1 - n)), moved[n][1])
    return moved


def errors(key: str, panel: Panel) -> Markup:
    """Draw for each group how many of its test images are right, and which group the others are taken for."""
    across, parts, shown = Scale(0, 100, NAMES, WIDTH - RIGHT), [], []
    for row, (group, shares) in enumerate(panel.errors.items()):
        words = [f"{100 * share:.0f} {'' if other == 'right' else 'as '}{other}" for other, share in shares.items()]
        shown.append(f"{group}: {', '.join(words)}")
        y, at = 22.0 + 44 * row, 0.0
        parts.append(text(NAMES - 6, y + 17, group, "end", f"label {group}"))
        for other in ("right", *GROUPS[1:]):
            share = 100 * shares.get(other, 0.0)
            if share <= 0:
                continue
            width = across(at + share) - across(at)
            what = "right" if other == "right" else f"taken for another class, {other}"
            box = dict(x=across(at), y=y, width=max(width - 1, 0.5), height=26.0, class_=f"part {other}")
            parts.append(tag("rect", tag("title", f"{group}: {share:.1f} % {what}"), **box))
            named = f"{other} {share:.0f}"
            inside = named if width > 7.5 * len(named) + 6 else f"{share:.0f}" if width > 24 else ""
            if inside:
                parts.append(text(across(at) + width / 2, y + 17, inside, class_=f"inside {other}"))
            at += share
    bottom = 22 + 44 * len(panel.errors)
    parts += _percent_axis(across, bottom + 8, bottom + 24, "test images of the group, %")
    about = f"In %. {'; '.join(shown)}."
    return charts.picture(key, f"{panel.title}: where errors go", about, bottom + 30, parts)


def _percent_axis(across: Scale, ticks: float, bottom: float, title: str) -> list[Markup]:
    """Write 0 to 100 at the height `ticks`, and a title below."""
    parts = [text(across(n), ticks, str(n), "end" if n == 100 else "middle") for n in range(0, 101, 25)]
    return [*parts, text((NAMES + WIDTH - RIGHT) / 2, bottom, title, class_="axis")]


def _matrix(cells: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return rows, columns, images and shares of the row's images, each [K]."""
    rows, columns, images = np.asarray(cells["cells"], np.int64).reshape(-1, 3).T
    return rows, columns, images, images / np.bincount(rows, images)[rows]


def confusion_table(panel: Panel, cells: Mapping[str, Any]) -> Markup:
    """Return a confusion matrix of few classes as an HTML table; cells: see `analysis.confusion_numbers`."""
    names = [panel.class_names[c] for c in charts.class_order(panel.groups, panel.class_counts)]
    found: dict[tuple[int, int], Markup] = {}
    for row, column, number, share in zip(*(values.tolist() for values in _matrix(cells)), strict=True):
        about = f"{names[row]}{f' taken for {names[column]}' if row != column else ''}: {number:,}, {percent(share)} %"
        depth = dict(title=about, style=f"--depth: {100 * math.sqrt(share):.0f}%")
        found[row, column] = tag("td", f"{number:,}", class_="right" if row == column else "wrong", **depth)
    head = [tag("th", tag("span", name), scope="col", title=name) for name in names]
    body = []
    for row, name in enumerate(names):
        numbers = [found.get((row, column), tag("td")) for column in range(len(names))]
        body.append(tag("tr", [tag("th", name, scope="row"), *numbers]))
    label = f"{panel.title}: confusion matrix"
    parts = [tag("thead", tag("tr", [tag("td", "true, predicted"), *head])), tag("tbody", body)]
    table = tag("table", parts, class_="confusion", aria_label=label)
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=label)


def confusion_map(key: str, panel: Panel, cells: Mapping[str, Any]) -> Markup:
    """Draw a confusion matrix of many classes, a pixel for each class or for each range of classes."""
    order, each = charts.class_order(panel.groups, panel.class_counts), cells["classes"]
    rows, columns, _, shares = _matrix(cells)
    side = -(-len(order) // each)
    pixels = np.zeros((side, side, 4), np.uint8)  # transparent, for a light page or a dark one
    pixels[rows, columns, :3] = np.where((rows == columns)[:, None], GREY, ORANGE)
    pixels[rows, columns, 3] = np.rint(90 + 165 * np.sqrt(shares))
    left, top = NAMES + 2.0, 34.0
    length = WIDTH - RIGHT - left
    box = dict(x=left, y=top, width=length, height=length)
    parts = [tag("image", href=charts.data_uri(Image.fromarray(pixels), "png"), **box, class_="pixels")]
    parts.append(tag("rect", **box, class_="frame"))
    names = charts.group_names(panel.groups, len(order))
    starts = [0, *(n for n in range(1, len(order)) if names[order[n]] != names[order[n - 1]])]
    middles = []
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        at = length * start / each / side
        if start:
            parts.append(line(left + at, top, left + at, top + length, "axis"))
            parts.append(line(left, top + at, left + length, top + at, "axis"))
        middles.append((at + length * (end - start) / each / side / 2, names[order[start]]))
    for place, group in apart(middles, 13, length - 6):
        parts.append(text(left - 6, top + place + 4, group, "end", f"label {group}"))
    for place, group in apart(middles, 50, length - 20):
        parts.append(text(left + place, top - 6, group, class_=f"label {group}"))
    parts += [text(2, 12, "true", "start", "axis"), text(left, 12, "predicted as", "start", "axis")]
    right = shares[rows == columns].sum() / side
    about = f"On the mean over rows, {100 * right:.1f} % of the images are on the diagonal."
    return charts.picture(key, f"{panel.title}: confusion matrix", about, top + length + 8, parts)


def geometry(key: str, panel: Panel) -> Markup:
    """Draw the distance of test features to their own class's mean (filled) and to the nearest wrong one (hollow)."""
    unit = float(np.nanmedian(panel.wrong)) or 1.0
    own, wrong = panel.own / unit, panel.wrong / unit
    across = charts.counts_scale(panel.class_counts)
    up = Scale(0, float(np.nanmax([own, wrong])) * 1.05, BOTTOM, TOP + 8)
    parts = charts.y_axis(up, "distance") + charts.count_axis(across, BOTTOM)
    if len(own) <= charts.MOST_DOTS:
        at = charts.places(panel.class_counts, np.nan_to_num(own), across)
        groups = charts.group_names(panel.groups, len(own))
        size = 4.0 if len(own) <= 40 else 2.6
        for c in np.flatnonzero(np.isfinite(own) & np.isfinite(wrong)):
            about = f"{panel.class_names[c]}: own mean {own[c]:.2f}, nearest wrong mean {wrong[c]:.2f}"
            bar = line(at[c], up(own[c]), at[c], up(wrong[c]), f"bar {groups[c]}")
            hollow = mark(at[c], up(wrong[c]), groups[c], hollow=True, size=size)
            filled = mark(at[c], up(own[c]), groups[c], size=size)
            parts.append(tag("g", [tag("title", about), bar, hollow, filled]))
    else:
        for values, hollow in ((wrong, True), (own, False)):
            points = charts.points(values, panel.class_counts, panel.groups, panel.class_names, across)
            parts += charts.draw_points(points, up, hollow=hollow)
    shares = ", ".join(f"{group} {100 * share:.1f}" for group, share in panel.nearest_is_own.items())
    about = f"Test images nearer to their own class's mean than to any other, in %: {shares}."
    return charts.picture(key, f"{panel.title}: distances to class means", about, 230, parts)


def learned(key: str, panel: Panel, title: str) -> Markup:
    """Draw a number of each class against its training images."""
    values = panel.learned[title]
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    room = 0.08 * (high - low) or 0.1 * max(abs(high), 0.1)
    parts, _ = _by_count(panel, values, title, Scale(low - room, high + room, BOTTOM, TOP + 8))
    order = np.argsort(-panel.class_counts, kind="stable")
    ends = f"{values[order[0]]:.3g} for the most frequent class, {values[order[-1]]:.3g} for the rarest"
    return charts.picture(key, f"{panel.title}: {title}", f"{ends}; {low:.3g} to {high:.3g}.", 230, parts)


def against_epsilon(key: str, title: str, curve: Sequence[Mapping[str, Any]], attacked_at: float) -> Markup:
    """Draw accuracy under attack against the radius, by group."""
    last = max(point["epsilon"] for point in curve)
    across, up = Scale(0, 255 * last, LEFT, WIDTH - LABELS), Scale(0, 100, BOTTOM, TOP + 8)
    parts = charts.y_axis(up, "accuracy under PGD-20, %", WIDTH - LABELS)
    parts += [line(across(255 * attacked_at), TOP + 8, across(255 * attacked_at), BOTTOM, "ideal")]
    ends = []
    for group in GROUPS:
        measured = [point for point in curve if group in point["accuracy"]]
        if not measured:
            continue
        points = [(across(255 * point["epsilon"]), up(100 * point["accuracy"][group])) for point in measured]
        parts.append(path(points, f"series {group}"))
        for (x, y), point in zip(points, measured, strict=True):
            value = percent(point["accuracy"][group], point.get("std", {}).get(group))
            parts.append(mark(x, y, group, f"{group}, radius {in_255ths(point['epsilon'])}: {value} %", size=3.5))
        ends.append((points[-1][1], group))
    parts += _labels(ends, BOTTOM - 10)
    ticks = charts.round_ticks(0, 255 * last, 5)
    parts += charts.x_axis(across, BOTTOM, "radius, in 255ths; dashed: that of the other tests", ticks)
    values = "; ".join(f"{in_255ths(p['epsilon'])}: {percent(p['accuracy']['all'])}" for p in curve)
    name = f"{title}: accuracy against the radius of the attack"
    return charts.picture(key, name, f"All classes, in %: {values}.", 230, parts)


def clean_and_robust(key: str, title: str, tests: Mapping[str, Mapping[str, Any]]) -> Markup:
    """Draw for each group the accuracy on clean images and under each attack, on one line."""
    across, parts = Scale(0, 100, NAMES + 6, WIDTH - RIGHT), []
    groups = [group for group in GROUPS if any(group in test["accuracy"] for test in tests.values())]
    for row, group in enumerate(groups):
        y = 30 + 40 * row
        values = {name: 100 * test["accuracy"][group] for name, test in tests.items() if group in test["accuracy"]}
        lowest, highest, last = min(values.values()), max(values.values()), list(values)[-1]
        parts.append(text(NAMES - 6, y + 4, group, "end", f"label {group}"))
        parts.append(line(across(0), y, across(100), y, "grid"))
        parts.append(line(across(lowest), y, across(highest), y, f"mean {group}"))
        for name, value in values.items():
            clean = name == "clean"
            about = f"{group}, {tests[name]['title']}: {percent(tests[name]['accuracy'][group])} %"
            parts.append(mark(across(value), y, group, about, hollow=clean, size=5.0))
            label = partial(text, content=f"{value:.1f}", class_=f"label {group}")
            if clean and lowest <= value - 16:
                parts.append(label(across(value) + 10, y + 4, anchor="start"))
            elif clean:  # below the others, which are near
                parts.append(label(across(value), y + 19))
            elif name == last:
                parts.append(label(across(value), y - 9))
    bottom = 30 + 40 * len(groups)
    parts += _percent_axis(across, bottom, bottom + 17, "accuracy, %; hollow: clean, filled: attacked")
    shown = "; ".join(f"{test['title']}: {percent(test['accuracy'].get('all'))}" for test in tests.values())
    return charts.picture(key, f"{title}: clean and attacked", f"All classes, in %: {shown}.", bottom + 24, parts)


def in_255ths(epsilon: float) -> str:
    return f"{255 * epsilon:.3g}/255"


def shown_figure(figure: MeanStd | None) -> str:
    return "-" if figure is None else percent(*figure)
