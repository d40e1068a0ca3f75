"""Wording that several data sets share in their messages."""

from collections.abc import Sequence

SHOWN = 5


def some(items: Sequence[str], separator: str = ", ") -> str:
    """Join the first `SHOWN` items and count the rest: "a, b, c, d, e and 3 more"."""
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return separator.join(items[:SHOWN]) + more
