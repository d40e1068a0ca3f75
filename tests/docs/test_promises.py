"""Every promise of docs/promises.md names the test that holds it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))


@pytest.mark.parametrize("file, name", TESTS, ids=[name for _, name in TESTS])
def test_the_test_of_a_promise_exists(file, name):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert name in functions
    asserts = [node for node in ast.walk(functions[name]) if isinstance(node, (ast.Assert, ast.With, ast.Call))]
    assert asserts


def test_every_promise_has_a_test():
    promises = PAGE.partition("## Files from others")[0]
    rows = [
        line for line in promises.splitlines() if line.startswith("| ") and not line.startswith(("| Promise", "| ---"))
    ]
    assert len(rows) > 20
    assert not [row for row in rows if not re.search(r"`tests/[\w/]+\.py::\w+`", row)]
