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


def load(tmp_path, code):
    from docs import docstrings

    (tmp_path / "found.py").write_text(code)
    return griffe.load("found", search_paths=[tmp_path], extensions=griffe.load_extensions(docstrings.Sections))


def test_comments_on_fields_and_lines_of_the_docstring_become_attributes(tmp_path):
    text, section = load(tmp_path, CODE)["Found"].docstring.parse("google")
    assert text.value == "What was found."
    told = {one.name: one.description for one in section.value}
    assert told == {"names": "as they stand, on two lines.", "scores": "[N], of each name", "rest": "as named"}


def test_lines_that_begin_with_a_parameter_become_parameters(tmp_path):
    code = 'def draw(a, b, c):\n  """Draws: all.\n\n  a: one,\n  two. b: 3.\n  c: four.\n  Raises: no.\n  """'
    text, section, raises = load(tmp_path, code)["draw"].docstring.parse("google")
    assert {one.name: one.description for one in section.value} == {"a": "one, two. b: 3.", "c": "four."}
    assert (text.value, raises.value) == ("Draws: all.", "**Raises:** no.")
