"""Every function in CONTRIBUTING's "Where to look" exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Where to look")[2].partition("\n## ")[0]
PLACES = re.findall(r"`((?:ltjax|configs)/[\w/]+\.py)::([\w.]+)`", SECTION)


@pytest.mark.parametrize("file, name", PLACES, ids=["::".join(place) for place in PLACES])
def test_a_named_function_is_there(file, name):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    functions = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    for kind in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        functions += [f"{kind.name}.{node.name}" for node in kind.body if isinstance(node, ast.FunctionDef)]
    tables = [ast.unparse(target) for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    assert name in functions + tables


def test_every_question_has_an_answer():
    rows = [line for line in SECTION.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 20 and all("::" in row for row in rows)
