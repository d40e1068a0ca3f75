"""Every function in CONTRIBUTING's "Where to look" exists."""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Where to look")[2].partition("\n## ")[0]
PLACES = re.findall(r"`((?:ltjax|configs)/[\w/]+\.py)::([\w.]+)`", SECTION)


@functools.cache
def names(file):
    """Return the functions, methods, classes and tables of a file."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    functions = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    for kind in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        functions += [f"{kind.name}.{node.name}" for node in kind.body if isinstance(node, ast.FunctionDef)]
    tables = [ast.unparse(target) for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    return functions + tables


def test_every_named_function_is_there():
    assert PLACES and not [f"{file}::{name}" for file, name in PLACES if name not in names(file)]


def test_every_question_has_an_answer():
    rows = [line for line in SECTION.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 20 and all("::" in row for row in rows)
