"""Docstrings as Markdown: one-line sections such as `Source: ...`, which the code keeps together, become paragraphs; of
a NamedTuple, the comments on its fields become a list of attributes."""

import re
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
                text = with_fields(text, fields(obj))
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


def with_fields(text: str, comments: dict[str, str]) -> str:
    """A class's docstring with a section of attributes: `comments`, or what the docstring has as `field: ...`."""
    named = "|".join(comments)
    told = {
        found[1]: " ".join(found[2].split())
        for found in re.finditer(rf"^({named}): (.*(?:\n[ ]+.*)*)", text, re.MULTILINE)
    }
    rest = re.sub(rf"^(?:{named}): .*(?:\n[ ]+.*)*\n?", "", text, flags=re.MULTILINE).rstrip()
    listed = [f"    {name}: {told.get(name) or comment or 'as named'}" for name, comment in comments.items()]
    return "\n".join([rest, "", "Attributes:", *listed])
