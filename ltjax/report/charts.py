"""Charts as inline SVG: functions from numbers to markup. Colours are CSS classes, so that a page can be light or dark.

Groups of classes differ by colour and by shape; all texts are escaped, whatever a class is called.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

WIDTH = 340
LEFT, RIGHT, TOP = 38, 12, 17
MOST_DOTS = 150  # classes that get a dot each; beyond, ranges of counts do
BINS = 24  # ranges of counts


class Scale(NamedTuple):
    """From a quantity to a place in the picture."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (value - low) / ((high - low) or 1) * (self.end - self.start)


class Point(NamedTuple):
    """A class, or several of about the same count."""

    x: float  # in the picture
    value: float
    group: str
    about: str  # for whoever points at it
    low: float | None = None  # quartiles of several classes
    high: float | None = None


def tag(name: str, content: Any = "", **attributes: Any) -> Markup:
    """One element; `class_` for class, and text_anchor for text-anchor. Floats get one decimal."""

    def shown(value: Any) -> Any:
        return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value

    names = {key: key.rstrip("_").replace("_", "-") for key in attributes}
    parts = [Markup(' {}="{}"').format(names[key], shown(value)) for key, value in attributes.items()]
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), Markup("").join(parts), content)


def text(x: float, y: float, content: str, anchor: str = "middle", class_: str = "") -> Markup:
    more = {"class_": class_} if class_ else {}
    return tag("text", content, x=float(x), y=float(y), text_anchor=anchor, **more)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def path(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    return tag("path", d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points), class_=class_)


def mark(x: float, y: float, group: str, about: str = "", *, hollow: bool = False, size: float = 4.0) -> Markup:
    """A group's shape: many a circle, medium a square, few a triangle."""
    class_ = f"mark {group}" + (" hollow" if hollow else "")
    title = tag("title", about) if about else ""
    if group == "medium":
        side = 1.8 * size
        return tag("rect", title, x=float(x - side / 2), y=float(y - side / 2), width=side, height=side, class_=class_)
    if group == "few":
        corners = ((0, -1.2), (1.1, 0.8), (-1.1, 0.8))
        return tag(
            "polygon",
            title,
            points=" ".join(f"{x + a * size:.1f},{y + b * size:.1f}" for a, b in corners),
            class_=class_,
        )
    return tag("circle", title, cx=float(x), cy=float(y), r=float(size), class_=class_)


def picture(key: str, title: str, about: str, height: float, parts: Sequence[Markup], width: float = WIDTH) -> Markup:
    """The SVG around some parts. key: unique on the page. about: what a person who does not see it should know."""
    head = [tag("title", title, id=f"{key}-t"), tag("desc", about, id=f"{key}-d")]
    return tag(
        "svg",
        Markup("").join([*head, *parts]),
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_labelledby=f"{key}-t {key}-d",
    )


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from low to high."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = min((power * times for times in (1, 2, 5, 10)), key=lambda s: abs(s - rough))
    first = math.ceil(low / step - 1e-9)
    return [step * n for n in range(first, math.floor(high / step + 1e-9) + 1)]


def count_ticks(scale: Scale, least: float = 32.0) -> list[float]:
    """The largest and the smallest count, and 1, 2 or 5 times a power of ten where there is room."""
    ticks = [scale.low] if scale.low == scale.high else [scale.low, scale.high]
    steps = [m * 10**e for e in range(7) for m in (1, 2, 5)]
    for value in sorted(steps, key=lambda v: (not math.log10(v).is_integer(), v)):
        inside = min(scale.low, scale.high) < value < max(scale.low, scale.high)
        if inside and all(abs(scale(value) - scale(t)) >= least for t in ticks):
            ticks.append(value)
    return sorted(ticks)


def number(value: float) -> str:
    """1,000, 0.031, 12: as short as it can be told."""
    return f"{value:,.0f}" if value == int(value) else f"{value:.3g}"


def y_axis(scale: Scale, title: str, right: float = WIDTH - RIGHT, count: int = 5) -> list[Markup]:
    ticks = round_ticks(scale.low, scale.high, count)
    parts = [text(2, TOP - 4, title, "start", "axis")]
    for tick in ticks:
        parts += [line(LEFT, scale(tick), right, scale(tick), "grid")]
        parts += [text(LEFT - 5, scale(tick) + 4, number(tick), "end")]
    return parts


def x_axis(scale: Scale, bottom: float, title: str, ticks: Sequence[float]) -> list[Markup]:
    parts = [line(LEFT, bottom, WIDTH - RIGHT, bottom, "axis")]
    for tick in ticks:
        at = scale(tick)
        anchor = "end" if at > WIDTH - RIGHT - 8 else "middle"
        parts += [line(at, bottom, at, bottom + 3, "axis"), text(at, bottom + 15, number(tick), anchor)]
    middle = (LEFT + WIDTH - RIGHT) / 2
    return [*parts, text(middle, bottom + 31, title, class_="axis")]


def count_axis(scale: Scale, bottom: float) -> list[Markup]:
    """The axis below classes that stand at their counts, see `places`."""
    if scale.low == scale.high:
        return x_axis(scale, bottom, f"classes of {number(scale.low)} training images each, highest first", [])
    return x_axis(scale, bottom, "training images of the class", count_ticks(scale))


def counts_scale(counts: np.ndarray) -> Scale:
    """Training images, the most frequent classes at the left; with a margin for the outermost marks."""
    return Scale(float(counts.max()), float(counts.min()), LEFT + 10, WIDTH - RIGHT - 10, log=True)


def places(counts: np.ndarray, order_by: np.ndarray, scale: Scale) -> np.ndarray:
    """Where each class stands, [C]: at its count; classes of one count side by side, the highest `order_by` first."""
    values = np.unique(counts)
    if len(values) == 1:
        centres = np.array([(scale.start + scale.end) / 2])
        room = np.array([scale.end - scale.start])
    else:
        centres = np.array([scale(float(value)) for value in values])
        gaps = np.abs(np.diff(centres))
        room = 0.8 * np.minimum(np.r_[gaps[0], gaps], np.r_[gaps, gaps[-1]])
    found = np.empty(len(counts))
    for value, centre, space in zip(values, centres, room, strict=True):
        members = np.flatnonzero(counts == value)
        members = members[np.argsort(-order_by[members], kind="stable")]
        offsets = (np.arange(len(members)) - (len(members) - 1) / 2) / max(len(members) - 1, 1)
        found[members] = np.clip(centre + offsets * space, scale.start, scale.end)
    return found


def points(
    values: np.ndarray, counts: np.ndarray, groups: Mapping[str, np.ndarray], names: Sequence[str], scale: Scale
) -> list[Point]:
    """A point a class, or, of many classes, one for each range of counts: mean and quartiles. nan: not drawn."""
    values = np.asarray(values, np.float64)
    seen, group_of = np.isfinite(values), group_names(groups, len(values))
    if len(values) <= MOST_DOTS:
        at = places(counts, np.nan_to_num(values), scale)
        return [
            Point(at[c], values[c], group_of[c], f"{names[c]}: {values[c]:.3g}, {counts[c]:,} training images")
            for c in np.flatnonzero(seen).tolist()
        ]
    found = []
    for members in count_ranges(counts):
        members = members[seen[members]]
        if len(members):
            own, between = values[members], (int(counts[members].min()), int(counts[members].max()))
            low, high = np.quantile(own, (0.25, 0.75))
            kinds = [group_of[c] for c in members]
            range_text = f"{between[0]:,} to {between[1]:,}" if between[0] < between[1] else f"{between[0]:,}"
            about = f"{len(members):,} classes of {range_text} training images: mean {own.mean():.3g}"
            x = float(np.mean([scale(float(counts[c])) for c in members]))
            found.append(Point(x, float(own.mean()), max(set(kinds), key=kinds.count), about, float(low), float(high)))
    return found


def count_ranges(counts: np.ndarray) -> list[np.ndarray]:
    """Classes of about the same count, most frequent first; equal counts stay together."""
    low, high = math.log(counts.min()), math.log(counts.max())
    place = (np.log(counts) - low) / ((high - low) or 1) * BINS
    index = np.minimum(np.floor(place + 1e-9).astype(int), BINS - 1)
    return [np.flatnonzero(index == b) for b in range(BINS - 1, -1, -1) if (index == b).any()]


def group_names(groups: Mapping[str, np.ndarray], num_classes: int) -> list[str]:
    found = [""] * num_classes
    for name, member in groups.items():
        for c in np.flatnonzero(member):
            found[c] = name
    return found


def draw_points(found: Sequence[Point], scale: Scale, **how: Any) -> list[Markup]:
    bars = [
        line(p.x, scale(p.low), p.x, scale(p.high), f"bar {p.group}")
        for p in found
        if p.low is not None and p.high is not None
    ]
    size = 4.5 if len(found) <= 40 else 3.0
    return bars + [mark(p.x, scale(p.value), p.group, p.about, size=size, **how) for p in found]
