"""Docstrings as Markdown: one-line sections such as `Source: ...`, which the code keeps together, become paragraphs."""

import re
from typing import Any

import griffe

SECTION = re.compile(r"\n+(Args|Returns|Raises|Warns|Source|Examples):(?=[ \n])")
ONE_LINE = re.compile(r"^(Args|Returns|Raises|Warns|Source): (?=\S)", re.MULTILINE)


class Sections(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            spaced = SECTION.sub(r"\n\n\1:", obj.docstring.value)
            obj.docstring.value = ONE_LINE.sub(r"**\1:** ", spaced)
