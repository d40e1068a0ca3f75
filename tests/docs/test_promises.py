"""Every promise of docs/promises.md names its test."""

import ast
import itertools
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))


def test_the_test_of_each_promise_exists():
    for file, names in itertools.groupby(TESTS, key=lambda test: test[0]):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        for _, name in names:
            assert name in functions, f"{file}::{name}"
            checks = [node for node in ast.walk(functions[name]) if isinstance(node, ast.Assert) or _is_check(node)]
            assert checks, f"{file}::{name}"


def _is_check(node):
    """Return whether a node is a call of `pytest.raises`, `np.testing.assert_...` or a helper that asserts."""
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    return name == "raises" or name.startswith(("assert", "check", "same", "agree"))


def test_every_promise_has_a_test():
    rows = [line for line in PAGE.partition("## Tried at random")[0].splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not row.startswith(("| Promise", "| ---", "| File"))]
    assert len(promises) > 20
    assert not [row for row in promises if not re.search(r"`tests/[\w/]+\.py::\w+`", row)]
