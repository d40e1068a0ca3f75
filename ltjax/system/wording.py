"""Words for messages: an exception in one line, a few names of many, the nearest ones, names in one Unicode form."""

import difflib
import unicodedata
from collections.abc import Iterable, Sequence


def one_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def some(items: Sequence[str], separator: str = ", ") -> str:
    """Join up to 5 items and count the rest, for messages: "a, b, c, d, e and 3 more"."""
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return separator.join(items[:5]) + more


def nearest(name: str, names: Sequence[str]) -> str:
    """Name those of `names` that a misspelt one may mean, for messages: "the nearest are cat, cart"."""
    near = difflib.get_close_matches(name, names)
    return f"the nearest are {', '.join(near)}" if near else f"they are {some(names)}"


def plain(name: str) -> str:
    """Return a name in one Unicode form (NFC) with single spaces, to compare names that people write with others."""
    return unicodedata.normalize("NFC", " ".join(name.split()))


def form_only(names: Iterable[str], others: Iterable[str]) -> str:
    """Return a remark for messages if two lists of names differ in the Unicode form of accents only, else ""."""
    first, second = ([unicodedata.normalize("NFC", name) for name in each] for each in (names, others))
    same = first != [] and sorted(first) == sorted(second)
    return " (the names differ in Unicode form only: write their accents in one way, NFC or NFD)" if same else ""
