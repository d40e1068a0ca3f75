"""The figures of the report, each of one panel: a stage of a run, or a row of a comparison."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from ltjax.report import charts
from ltjax.report.charts import LEFT, RIGHT, TOP, WIDTH, Scale, line, mark, path, tag, text
from ltjax.report.panels import GROUPS, Figure, Panel
from ltjax.runs.results import percent

BOTTOM = 196  # of a usual chart's frame
LABELS = 60  # room for the groups' names at the right


def accuracy_by_count(key: str, panel: Panel) -> Markup:
    """Accuracy of each class against its training images, and the mean of each group."""
    across, up = charts.counts_scale(panel.class_counts), Scale(0, 100, BOTTOM, TOP + 26)
    found = charts.points(100 * panel.per_class, panel.class_counts, panel.groups, panel.class_names, across)
    parts = charts.y_axis(up, "test accuracy, %")
    parts += charts.count_axis(across, BOTTOM)
    parts += charts.draw_points(found, up)
    labels = []
    for group in panel.groups:
        own = [p.x for p in found if p.group == group]
        if group in panel.accuracy and own:
            mean = 100 * panel.accuracy[group].mean
            ends = max(LEFT + 2, min(own) - 9), min(WIDTH - RIGHT, max(own) + 9)
            spread = 100 * (panel.accuracy[group].std or 0.0)
            if spread > 0:
                high, low = up(min(mean + spread, 100)), up(max(mean - spread, 0))
                box = dict(x=float(ends[0]), y=high, width=float(ends[1] - ends[0]), height=low - high)
                parts.append(tag("rect", **box, class_=f"band {group}"))
            parts.append(line(ends[0], up(mean), ends[1], up(mean), f"mean {group}"))
            labels.append(((ends[0] + ends[1]) / 2, group))
    for x, group in apart(sorted(labels), 84, WIDTH - RIGHT - 40):
        parts.append(text(x, 31, f"{group} {percent(panel.accuracy[group].mean)}", class_=f"label {group}"))
    about = ", ".join(f"{g} {percent(*panel.accuracy[g])}" for g in ("all", *GROUPS) if g in panel.accuracy)
    title = f"{panel.title}: accuracy of classes by training images"
    return charts.picture(key, title, f"Means in %: {about}.", 230, parts)


def reliability(key: str, panel: Panel) -> Markup:
    """Accuracy against confidence in bins, with the share of images in each below."""
    across, up = Scale(0, 100, LEFT, WIDTH - RIGHT), Scale(0, 100, BOTTOM, TOP + 8)
    low, high = BOTTOM + 50, BOTTOM + 14
    counts = panel.bins["counts"]
    parts = charts.y_axis(up, "accuracy, %")
    parts.append(line(across(0), up(0), across(100), up(100), "ideal"))
    shares, number = counts / max(counts.sum(), 1), len(counts)
    seen = [b for b in range(number) if counts[b] > 0]
    for b in seen:
        confidence, accuracy = 100 * panel.bins["confidences"][b], 100 * panel.bins["accuracies"][b]
        side = "over" if confidence > accuracy else "under"
        about = f"{counts[b]:,.0f} images: confidence {confidence:.1f} %, accuracy {accuracy:.1f} %"
        gap = line(across(confidence), up(confidence), across(confidence), up(accuracy), f"gap {side}")
        dot = tag(
            "circle",
            cx=float(across(confidence)),
            cy=float(up(accuracy)),
            r=3.5 if shares[b] >= 0.01 else 1.8,
            class_="dot",
        )
        left, right = across(100 * b / number), across(100 * (b + 1) / number)
        height = (low - high) * shares[b] / shares.max()
        bar = tag("rect", x=left + 1, y=low - height, width=right - left - 2, height=height, class_="share")
        parts.append(tag("g", Markup("").join([tag("title", about), gap, dot, bar])))
    parts.append(
        path(
            [(across(100 * panel.bins["confidences"][b]), up(100 * panel.bins["accuracies"][b])) for b in seen], "curve"
        )
    )
    parts += charts.x_axis(across, low, "confidence, %; bars: share of images", range(0, 101, 20))
    confidence = float((panel.bins["confidences"] * shares).sum() - (panel.bins["accuracies"] * shares).sum())
    word = "above" if confidence > 0 else "below"
    about = f"On the mean, confidence is {100 * abs(confidence):.1f} points {word} accuracy."
    about = f"ECE {shown_figure(panel.ece)} %. {about}"
    return charts.picture(key, f"{panel.title}: reliability", about, BOTTOM + 86, parts)


def learning(key: str, panel: Panel) -> Markup:
    """Accuracy by group, training loss and learning rate, against epochs; several seeds side by side."""
    train = [one["train"] for one in panel.curves if one["train"]]
    test = [one["test"] for one in panel.curves if one["test"]]
    last = max([p[0] for one in train for p in one] + [float(p[0]) for one in test for p in one] + [1.0])
    across = Scale(0, last, LEFT, WIDTH - LABELS)
    up = Scale(0, 100, 130, TOP + 8)
    parts = charts.y_axis(up, "test accuracy, %", WIDTH - LABELS, 4)
    ends, once = [], all(len(one) == 1 for one in test)
    for group in ("all", *GROUPS):
        lines = [[(across(e), up(100 * values[group])) for e, values in one if group in values] for one in test]
        for found in filter(None, lines):
            parts.append(path(found, f"series {group}"))
            small = len(found) <= 30 and len(lines) == 1
            parts += [mark(x, y, group, size=4.0 if once else 2.5) for x, y in found if small or once]
        shown = [found[-1] for found in lines if found]
        if shown:
            ends.append((float(np.mean([y for _, y in shown])), group))
    for y, group in apart(sorted(ends), 13, 132):
        x = WIDTH - LABELS + (8 if once else 4)
        parts.append(text(x, y + 4, group, "start", f"label {group}"))
    if once and ends:
        parts.append(text((LEFT + WIDTH - LABELS) / 2, 80, "evaluated once, at the end", class_="axis"))
    losses = [p[1] for one in train for p in one]
    if losses:
        low, high = min(losses), max(losses)
        down = Scale(min(0.0, low), high * 1.05 if high > 0 else 1.0, 210, 158)
        parts.append(text(2, 150, "training loss", "start", "axis"))
        for tick in charts.round_ticks(down.low, down.high, 3):
            parts += [
                line(LEFT, down(tick), WIDTH - LABELS, down(tick), "grid"),
                text(LEFT - 5, down(tick) + 4, charts.number(tick), "end"),
            ]
        parts += [path([(across(e), down(v)) for e, v, _ in one], "curve") for one in train]
        rates = [(e, r) for e, _, r in train[0]]
        top = max(r for _, r in rates)
        rate = Scale(0, top or 1, 262, 238)
        parts += [
            text(2, 230, f"learning rate, up to {charts.number(top)}", "start", "axis"),
            line(LEFT, 262, WIDTH - LABELS, 262, "grid"),
        ]
        parts.append(path([(across(e), rate(r)) for e, r in rates], "rate"))
    for tick in charts.round_ticks(0, last, 5):
        if tick == int(tick):
            parts += [line(across(tick), 266, across(tick), 269, "axis"), text(across(tick), 281, charts.number(tick))]
    parts.append(text((LEFT + WIDTH - LABELS) / 2, 296, "epochs", class_="axis"))
    final = ", ".join(f"{g} {percent(*panel.accuracy[g])}" for g in ("all", *GROUPS) if g in panel.accuracy)
    about = (
        f"Test accuracy at the end in %: {final}. Training loss from {losses[0]:.3g} to {losses[-1]:.3g}."
        if losses
        else ""
    )
    return charts.picture(key, f"{panel.title}: learning curves", about, 300, parts)


def apart(labels: Sequence[tuple[float, str]], least: float, most: float) -> list[tuple[float, str]]:
    """Labels at sorted places, moved so that no two are nearer than `least`, and none lies beyond `most`."""
    moved: list[tuple[float, str]] = []
    for place, label in labels:
        moved.append((max(place, moved[-1][0] + least) if moved else place, label))
    for n in range(len(moved) - 1, -1, -1):
        moved[n] = (min(moved[n][0], most - least * (len(moved) - 1 - n)), moved[n][1])
    return moved


def errors(key: str, panel: Panel) -> Markup:
    """For each group, how many of its test images are right, and which group the others are taken for."""
    left, parts = 62, []
    across = Scale(0, 100, left, WIDTH - RIGHT)
    for row, (group, shares) in enumerate(panel.errors.items()):
        y, at = 22 + 44 * row, 0.0
        parts.append(text(left - 6, y + 17, group, "end", f"label {group}"))
        for other in ("right", *GROUPS):
            share = 100 * shares.get(other, 0.0)
            if share <= 0:
                continue
            width = across(at + share) - across(at)
            title = tag(
                "title",
                f"{group}: {share:.1f} % " + ("right" if other == "right" else f"taken for another class, {other}"),
            )
            parts.append(
                tag(
                    "rect",
                    title,
                    x=across(at),
                    y=float(y),
                    width=max(width - 1, 0.5),
                    height=26.0,
                    class_=f"part {other}",
                )
            )
            named = f"{other} {share:.0f}"
            inside = named if width > 7.5 * len(named) + 6 else f"{share:.0f}" if width > 24 else ""
            if inside:
                parts.append(text(across(at) + width / 2, y + 17, inside, class_=f"inside {other}"))
            at += share
    bottom = 22 + 44 * len(panel.errors)
    for tick in range(0, 101, 25):
        parts.append(text(across(tick), bottom + 8, str(tick), "end" if tick == 100 else "middle"))
    parts.append(text((left + WIDTH - RIGHT) / 2, bottom + 24, "test images of the group, %", class_="axis"))
    told = [
        f"{group}: "
        + ", ".join(
            f"{100 * share:.0f} {'right' if other == 'right' else 'as ' + other}" for other, share in shares.items()
        )
        for group, shares in panel.errors.items()
    ]
    return charts.picture(key, f"{panel.title}: where errors go", "In %. " + "; ".join(told) + ".", bottom + 30, parts)


def geometry(key: str, panel: Panel) -> Markup:
    """Distance of test features to their own class's mean (filled) and to the nearest wrong one (hollow)."""
    unit = float(np.nanmedian(panel.wrong)) or 1.0
    own, wrong = panel.own / unit, panel.wrong / unit
    highest = float(np.nanmax([own, wrong]))
    across, up = charts.counts_scale(panel.class_counts), Scale(0, highest * 1.05, BOTTOM, TOP + 8)
    parts = charts.y_axis(up, "distance")
    parts += charts.count_axis(across, BOTTOM)
    if len(own) <= charts.MOST_DOTS:
        at = charts.places(panel.class_counts, np.nan_to_num(own), across)
        groups = charts.group_names(panel.groups, len(own))
        for c in np.flatnonzero(np.isfinite(own) & np.isfinite(wrong)):
            size = 4.0 if len(own) <= 40 else 2.6
            about = f"{panel.class_names[c]}: own mean {own[c]:.2f}, nearest wrong mean {wrong[c]:.2f}"
            pair = [line(at[c], up(own[c]), at[c], up(wrong[c]), f"bar {groups[c]}")]
            pair += [
                mark(at[c], up(wrong[c]), groups[c], hollow=True, size=size),
                mark(at[c], up(own[c]), groups[c], size=size),
            ]
            parts.append(tag("g", Markup("").join([tag("title", about), *pair])))
    else:
        for values, hollow in ((wrong, True), (own, False)):
            found = charts.points(values, panel.class_counts, panel.groups, panel.class_names, across)
            parts += charts.draw_points(found, up, hollow=hollow)
    told = ", ".join(f"{g} {100 * share:.1f}" for g, share in panel.nearest_is_own.items())
    about = f"Test images nearer to their own class's mean than to any other, in %: {told}."
    return charts.picture(key, f"{panel.title}: distances to class means", about, 230, parts)


def learned(key: str, panel: Panel, title: str) -> Markup:
    """A number of each class against its training images."""
    values = panel.learned[title]
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    room = 0.08 * (high - low) or 0.1 * max(abs(high), 0.1)
    across, up = charts.counts_scale(panel.class_counts), Scale(low - room, high + room, BOTTOM, TOP + 8)
    found = charts.points(values, panel.class_counts, panel.groups, panel.class_names, across)
    parts = charts.y_axis(up, title)
    parts += charts.count_axis(across, BOTTOM)
    parts += charts.draw_points(found, up)
    order = np.argsort(-panel.class_counts, kind="stable")
    ends = f"{values[order[0]]:.3g} for the most frequent class, {values[order[-1]]:.3g} for the rarest"
    about = f"{ends}; {low:.3g} to {high:.3g}."
    return charts.picture(key, f"{panel.title}: {title}", about, 230, parts)


def against_epsilon(key: str, title: str, curve: Sequence[Mapping[str, Any]], attacked_at: float) -> Markup:
    """Accuracy under attack against the radius, by group."""
    last = max(point["epsilon"] for point in curve)
    across, up = Scale(0, 255 * last, LEFT, WIDTH - LABELS), Scale(0, 100, BOTTOM, TOP + 8)
    parts = charts.y_axis(up, "accuracy under PGD-20, %", WIDTH - LABELS)
    parts += [line(across(255 * attacked_at), TOP + 8, across(255 * attacked_at), BOTTOM, "ideal")]
    ends = []
    shown = [group for group in ("all", *GROUPS) if any(group in point["accuracy"] for point in curve)]
    for group in shown:
        found = [(across(255 * p["epsilon"]), up(100 * p["accuracy"][group])) for p in curve if group in p["accuracy"]]
        parts.append(path(found, f"series {group}"))
        for (x, y), point in zip(found, curve, strict=True):
            spread = point.get("std", {}).get(group)
            about = f"{group}, radius {255 * point['epsilon']:.3g}/255: {percent(point['accuracy'][group], spread)} %"
            parts.append(mark(x, y, group, about, size=3.5))
        ends.append((found[-1][1], group))
    for y, group in apart(sorted(ends), 13, BOTTOM - 10):
        parts.append(text(WIDTH - LABELS + 4, y + 4, group, "start", f"label {group}"))
    ticks = charts.round_ticks(0, 255 * last, 5)
    parts += charts.x_axis(across, BOTTOM, "radius, in 255ths; dashed: that of the other tests", ticks)
    told = "; ".join(f"{255 * p['epsilon']:.3g}/255: {percent(p['accuracy']['all'])}" for p in curve)
    return charts.picture(
        key, f"{title}: accuracy against the radius of the attack", f"All classes, in %: {told}.", 230, parts
    )


def clean_and_robust(key: str, title: str, tests: Mapping[str, Mapping[str, Any]]) -> Markup:
    """For each group, accuracy on clean images and under each attack, on one line."""
    left, parts = 62, []
    across, row = Scale(0, 100, left + 6, WIDTH - RIGHT), 0
    names = list(tests)
    groups = [g for g in ("all", *GROUPS) if any(g in test["accuracy"] for test in tests.values())]
    for row, group in enumerate(groups):
        y = 30 + 40 * row
        found = [(100 * tests[name]["accuracy"][group], name) for name in names if group in tests[name]["accuracy"]]
        parts.append(text(left - 6, y + 4, group, "end", f"label {group}"))
        parts += [line(across(0), y, across(100), y, "grid")]
        if found:
            parts.append(
                line(across(min(v for v, _ in found)), y, across(max(v for v, _ in found)), y, f"mean {group}")
            )
        for number, (value, name) in enumerate(found):
            clean = name == "clean"
            about = f"{group}, {tests[name]['title']}: {percent(tests[name]['accuracy'][group])} %"
            parts.append(mark(across(value), y, group, about, hollow=clean, size=5.0))
            if clean or number == len(found) - 1:
                label = f"{value:.1f}"
                crowded = clean and min(v for v, _ in found) > value - 16
                at = across(value) + (10 if clean and not crowded else 0)
                parts.append(
                    text(
                        at,
                        y + 4 if clean and not crowded else y - 9 if not clean else y + 19,
                        label,
                        "start" if clean and not crowded else "middle",
                        f"label {group}",
                    )
                )
    bottom = 30 + 40 * len(groups)
    for tick in range(0, 101, 25):
        parts.append(text(across(tick), bottom, str(tick), "end" if tick == 100 else "middle"))
    parts.append(
        text((left + WIDTH - RIGHT) / 2, bottom + 17, "accuracy, %; hollow: clean, filled: attacked", class_="axis")
    )
    told = "; ".join(f"{t['title']}: {percent(t['accuracy'].get('all'))}" for t in tests.values())
    return charts.picture(key, f"{title}: clean and attacked", f"All classes, in %: {told}.", bottom + 24, parts)


def shown_figure(figure: Figure | None) -> str:
    return "-" if figure is None else percent(*figure)
