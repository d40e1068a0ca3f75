"""Docstrings as Markdown: one-line sections such as `Source: ...`, which the code keeps together, become paragraphs; of
a NamedTuple, the comments on its fields become a list of attributes, and lines `name: ...` one of parameters."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import griffe

SECTION = re.compile(r"\n+(Args|Returns|Raises|Warns|Source|Examples|Attributes):(?=[ \n])")
ONE_LINE = re.compile(r"^(Args|Returns|Raises|Warns|Source): (?=\S)", re.MULTILINE)
COMMENT = re.compile(r"(?:^|  )# (.*)")


class Sections(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            text = obj.docstring.value
            if isinstance(obj, griffe.Class) and "NamedTuple" in map(str, obj.bases):
                comments = fields(obj)
                rest, told = parted(text, comments)
                told = {name: told.get(name) or comment or "as named" for name, comment in comments.items()}
                text = f"{rest}\n\n{listed('Attributes', told)}"
            elif isinstance(obj, griffe.Function) and "Args:" not in text:
                rest, told = parted(text, [parameter.name for parameter in obj.parameters], "\f")
                text = rest.replace("\f", f"\n{listed('Args', told)}\n", 1).replace("\f", "")
            spaced = SECTION.sub(r"\n\n\1:", text)
            obj.docstring.value = ONE_LINE.sub(r"**\1:** ", spaced)


def fields(made: griffe.Class) -> dict[str, str]:
    """{field: its comment, on its line or on those above}, without private ones."""
    assert isinstance(made.filepath, Path)
    found, lines = {}, made.lines_collection[made.filepath]
    for name, member in made.members.items():
        if isinstance(member, griffe.Attribute) and member.lineno and member.endlineno and name[0] != "_":
            own = COMMENT.search(" ".join(lines[member.lineno - 1 : member.endlineno]))
            above, at = [], member.lineno - 2
            while (line := lines[at].strip()).startswith("# "):
                above.insert(0, line.removeprefix("# "))
                at -= 1
            found[name] = " ".join(above + ([own[1]] if own else []))
    return found


def parted(text: str, names: Iterable[str], mark: str = "") -> tuple[str, dict[str, str]]:
    """A docstring with `mark` in place of its lines `name: ...` and the rest of their paragraphs; and {name: ...}."""
    any_name = "|".join(map(re.escape, names)) or "(?!)"
    head = rf"(?:{any_name})(?:, (?:{any_name}))*"
    end = rf"(?:{head}|Args|Returns|Raises|Warns|Source|Examples):"
    lines = re.compile(rf"^({head}): (.*(?:\n(?!{end}).+)*)\n?", re.MULTILINE)
    return lines.sub(mark, text).rstrip(" \n"), {name: " ".join(about.split()) for name, about in lines.findall(text)}


def listed(section: str, told: Mapping[str, str]) -> str:
    return "\n".join([f"{section}:", *(f"    {name}: {about}" for name, about in told.items())])
