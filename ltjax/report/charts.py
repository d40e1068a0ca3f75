"""Parts of charts as inline SVG. Colours are CSS classes, so a page can be light or dark.

Groups of classes differ by colour and by shape; all texts are escaped.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from PIL import Image

WIDTH = 340
LEFT, RIGHT, TOP = 38, 12, 17
MOST_DOTS = 150  # classes with a mark each; more share marks by ranges of counts
BINS = 24  # ranges of counts


class Scale(NamedTuple):
    """Map a quantity to a place in the picture."""

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
    about: str  # shown under the pointer
    quartiles: tuple[float, float] | None = None  # if it stands for several classes


def tag(name: str, content: Any = "", **attributes: Any) -> Markup:
    """Write one element; `class_` is class, text_anchor is text-anchor. Floats get one decimal.

    Args:
      content: A text, an element, or a list of elements.
    """

    def shown(value: Any) -> Any:
        return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value

    written = {key.rstrip("_").replace("_", "-"): shown(value) for key, value in attributes.items()}
    parts = [Markup(' {}="{}"').format(key, value) for key, value in written.items()]
    inside = Markup("").join(content) if isinstance(content, list) else content
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), Markup("").join(parts), inside)


def text(x: float, y: float, content: str, anchor: str = "middle", class_: str = "") -> Markup:
    more = {"class_": class_} if class_ else {}
    return tag("text", content, x=x, y=y, text_anchor=anchor, **more)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def path(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    return tag("path", d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points), class_=class_)


def mark(x: float, y: float, group: str, about: str = "", *, hollow: bool = False, size: float = 4.0) -> Markup:
    """Draw a group's shape: many a circle, medium a square, few a triangle."""
    class_ = f"mark {group}" + (" hollow" if hollow else "")
    title = tag("title", about) if about else ""
    if group == "medium":
        side = 1.8 * size
        return tag("rect", title, x=x - side / 2, y=y - side / 2, width=side, height=side, class_=class_)
    if group == "few":
        corners = " ".join(f"{x + a * size:.1f},{y + b * size:.1f}" for a, b in ((0, -1.2), (1.1, 0.8), (-1.1, 0.8)))
        return tag("polygon", title, points=corners, class_=class_)
    return tag("circle", title, cx=x, cy=y, r=size, class_=class_)


def picture(key: str, title: str, about: str, height: float, parts: Sequence[Markup], width: float = WIDTH) -> Markup:
    """Put parts into an SVG. key: unique on the page. about: the text alternative."""
    head = [tag("title", title, id=f"{key}-t"), tag("desc", about, id=f"{key}-d")]
    box, named_by = f"0 0 {width:g} {height:g}", f"{key}-t {key}-d"
    return tag("svg", [*head, *parts], viewBox=box, role="img", aria_labelledby=named_by)


def data_uri(picture: Image.Image, kind: str) -> str:
    """Encode a picture. kind: "png" or "jpeg"."""
    file = io.BytesIO()
    picture.save(file, kind, **(dict(quality=85) if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers from low to high."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = min((power * times for times in (1, 2, 5, 10)), key=lambda s: abs(s - rough))
    first = math.ceil(low / step - 1e-9)
    return [step * n for n in range(first, math.floor(high / step + 1e-9) + 1)]


def count_ticks(scale: Scale, least: float = 32.0) -> list[float]:
    """Return the largest and the smallest count, and 1, 2 or 5 times powers of ten that are `least` apart."""
    ticks = [scale.low] if scale.low == scale.high else [scale.low, scale.high]
    steps = [m * 10**e for e in range(7) for m in (1, 2, 5)]
    for value in sorted(steps, key=lambda v: (not math.log10(v).is_integer(), v)):
        inside = min(scale.low, scale.high) < value < max(scale.low, scale.high)
        if inside and all(abs(scale(value) - scale(t)) >= least for t in ticks):
            ticks.append(value)
    return sorted(ticks)


def number(value: float) -> str:
    """Format a number briefly: 1,000, 0.031, 12."""
    return f"{value:,.0f}" if value == int(value) else f"{value:.3g}"


def y_axis(scale: Scale, title: str, right: float = WIDTH - RIGHT, count: int = 5, top: float = TOP) -> list[Markup]:
    ticks = round_ticks(scale.low, scale.high, count)
    parts = [text(2, top - 4, title, "start", "axis")]
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
    """Draw the axis of training images, see `places`."""
    if scale.low == scale.high:
        return x_axis(scale, bottom, f"classes of {number(scale.low)} training images each, highest first", [])
    return x_axis(scale, bottom, "training images of the class", count_ticks(scale))


def counts_scale(counts: np.ndarray) -> Scale:
    """Return the scale of training images: most frequent classes at the left, with a margin for the outermost marks."""
    return Scale(float(counts.max()), float(counts.min()), LEFT + 10, WIDTH - RIGHT - 10, log=True)


def places(counts: np.ndarray, order_by: np.ndarray, scale: Scale) -> np.ndarray:
    """Return the place of each class, [C]: at its count; equal counts side by side, the highest `order_by` first."""
    values = np.unique(counts)
    if len(values) == 1:
        centres = np.array([(scale.start + scale.end) / 2])
        room = np.array([scale.end - scale.start])
    else:
        centres = np.array([scale(float(value)) for value in values])
        gaps = np.abs(np.diff(centres))
        room = 0.8 * np.minimum(np.r_[gaps[0], gaps], np.r_[gaps, gaps[-1]])
    at = np.empty(len(counts))
    for value, centre, space in zip(values, centres, room, strict=True):
        members = np.flatnonzero(counts == value)
        members = members[np.argsort(-order_by[members], kind="stable")]
        offsets = (np.arange(len(members)) - (len(members) - 1) / 2) / max(len(members) - 1, 1)
        at[members] = np.clip(centre + offsets * space, scale.start, scale.end)
    return at


def points(
    values: np.ndarray, counts: np.ndarray, groups: Mapping[str, np.ndarray], names: Sequence[str], scale: Scale
) -> list[Point]:
    """Return a point for each class, or, if there are many, for each range of counts; nan has none."""
    values = np.asarray(values, np.float64)
    seen, group_of = np.isfinite(values), group_names(groups, len(values))
    if len(values) <= MOST_DOTS:
        at = places(counts, np.nan_to_num(values), scale)
        return [
            Point(at[c], values[c], group_of[c], f"{names[c]}: {values[c]:.3g}, {counts[c]:,} training images")
            for c in np.flatnonzero(seen).tolist()
        ]
    ranges = [members[seen[members]] for members in count_ranges(counts)]
    return [_range_point(values, counts, group_of, scale, members) for members in ranges if len(members)]


def _range_point(
    values: np.ndarray, counts: np.ndarray, group_of: Sequence[str], scale: Scale, members: np.ndarray
) -> Point:
    mean, quartiles = float(values[members].mean()), np.quantile(values[members], (0.25, 0.75))
    about = f"{len(members):,} classes of {between(counts[members])} training images: mean {mean:.3g}"
    x = float(np.mean([scale(float(counts[c])) for c in members]))
    return Point(x, mean, most_frequent([group_of[c] for c in members]), about, tuple(quartiles.tolist()))


def between(counts: np.ndarray) -> str:
    """Return the smallest and the largest count, as text."""
    fewest, most = int(counts.min()), int(counts.max())
    return f"{fewest:,} to {most:,}" if fewest < most else f"{fewest:,}"


def most_frequent(names: Sequence[str]) -> str:
    return max(set(names), key=names.count)


def count_ranges(counts: np.ndarray) -> list[np.ndarray]:
    """Return sets of classes of about the same count, most frequent first; equal counts stay together."""
    low, high = math.log(counts.min()), math.log(counts.max())
    place = (np.log(counts) - low) / ((high - low) or 1) * BINS
    index = np.minimum(np.floor(place + 1e-9).astype(int), BINS - 1)
    return [np.flatnonzero(index == b) for b in range(BINS - 1, -1, -1) if (index == b).any()]


def group_names(groups: Mapping[str, np.ndarray], num_classes: int) -> list[str]:
    """Return the group of each class; "" if it has none."""
    names = [""] * num_classes
    for name, member in groups.items():
        for c in np.flatnonzero(member):
            names[c] = name
    return names


def class_order(groups: Mapping[str, np.ndarray], counts: np.ndarray) -> np.ndarray:
    """Return the classes [C] group by group, in each the most frequent first."""
    names = group_names(groups, len(counts))
    place = {name: number for number, name in enumerate((*groups, ""))}
    return np.lexsort((-counts, np.array([place[name] for name in names])))


def draw_points(points: Sequence[Point], scale: Scale, **settings: Any) -> list[Markup]:
    ranges = [(p, *map(scale, p.quartiles)) for p in points if p.quartiles]
    bars = [line(p.x, low, p.x, high, f"bar {p.group}") for p, low, high in ranges]
    size = 4.5 if len(points) <= 40 else 3.0
    return bars + [mark(p.x, scale(p.value), p.group, p.about, size=size, **settings) for p in points]
