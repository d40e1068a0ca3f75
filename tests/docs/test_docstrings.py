"""What docs/docstrings.py makes of a NamedTuple, for the pages of the API."""

import pytest

griffe = pytest.importorskip("griffe")

CODE = '''
class Found(NamedTuple):
    """What was found.

    names: as they stand,
      on two lines.
    """

    names: tuple[str, ...]
    # [N], of
    scores: Array  # each name
    rest: int = 0
'''


def test_comments_on_fields_and_lines_of_the_docstring_become_attributes(tmp_path):
    from docs import docstrings

    (tmp_path / "found.py").write_text(CODE)
    extensions = griffe.load_extensions(docstrings.Sections)
    found = griffe.load("found", search_paths=[tmp_path], extensions=extensions)["Found"]
    text, section = found.docstring.parse("google")
    assert text.value == "What was found."
    told = {one.name: one.description for one in section.value}
    assert told == {"names": "as they stand, on two lines.", "scores": "[N], of each name", "rest": "as named"}
