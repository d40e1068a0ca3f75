"""The docstrings on the pages of the API are Google style and name parameters that exist."""

import logging
import re
from pathlib import Path

import pytest

griffe = pytest.importorskip("griffe")

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^::: (?P<module>[\w.]+)(?:\n    options:\n      members: \[(?P<members>.*?)\])?", re.MULTILINE)
SECTION = re.compile(r"^ *(Args|Arguments|Attributes|Examples|Raises|Returns|Warns|Yields):", re.MULTILINE)
OPTIONS = {"returns_multiple_items": False, "warn_missing_types": False}  # as in mkdocs.yml


def public(owner):
    """Return the public members of a module or class, and __call__, without imports."""
    return [
        member
        for name, member in owner.members.items()
        if not member.is_alias and (name[0] != "_" or name == "__call__")
    ]


def shown():
    """Return {path: object} of the modules, classes, functions and methods with a docstring that docs/api shows."""
    package = griffe.load("ltjax", search_paths=[ROOT], try_relative_path=False)
    actual = {}

    def add(member):
        if member.docstring:
            actual[member.path] = member
        for below in public(member) if member.is_class else ():
            add(below)

    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for block in BLOCK.finditer(page.read_text()):
            module = package[block["module"].removeprefix("ltjax.")]
            add(module)
            names = block["members"].split(", ") if block["members"] else []
            for member in [module[name] for name in names] or public(module):
                add(member.final_target if member.is_alias else member)
    return actual


SHOWN = shown()


def problems(member, caplog):
    """Return griffe's warnings about a docstring, and the sections that it takes for text."""
    with caplog.at_level(logging.WARNING):
        sections = member.docstring.parse("google", **OPTIONS)
    actual = [record.getMessage() for record in caplog.records]
    caplog.clear()
    for section in sections:
        if section.kind.value == "text":
            actual += [f"{name}: is not a section" for name in SECTION.findall(section.value)]
    return actual


def test_docstrings_parse_and_name_parameters_that_exist(caplog):
    wrong = {path: found for path, member in SHOWN.items() if (found := problems(member, caplog))}
    assert not wrong


@pytest.mark.parametrize(
    "path", [path for path, member in SHOWN.items() if member.is_class and "NamedTuple" in map(str, member.bases)]
)
def test_a_named_tuple_describes_each_field(path):
    member = SHOWN[path]
    fields = [field.name for field in public(member) if field.is_attribute]
    sections = member.docstring.parse("google", warnings=False)
    described = [each.name for section in sections if section.kind.value == "attributes" for each in section.value]
    assert described == fields


@pytest.mark.parametrize(
    "docstring, problem",
    [
        ("Draw.\n\n    Args:\n        b: there is none.\n    ", "Parameter 'b' does not appear"),
        ("Draw.\n\n    Args:\n        a, in pixels.\n    ", "Failed to get 'name: description' pair"),
        ("Draw.\n\n    Args: a: in pixels.\n    ", "Args: is not a section"),
        ("Draw.\n\n    Raises:\n        never.\n    ", "Failed to get 'exception: description' pair"),
        ("Draw.\n\n    Args:\n        a: in pixels.\n\n    Returns:\n        The pixels.\n    ", None),
    ],
)
def test_a_wrong_docstring_is_found(tmp_path, caplog, docstring, problem):
    (tmp_path / "drawing.py").write_text(f'def draw(a: int) -> int:\n    """{docstring}"""\n')
    actual = problems(griffe.load("drawing", search_paths=[tmp_path])["draw"], caplog)
    assert any(problem in each for each in actual) if problem else not actual
