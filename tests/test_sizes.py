"""Functions fit on a screen, and few of them take many parameters."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST = 60  # lines
MOST = 8  # parameters
SETTINGS = "keywords are the settings of a config, which `registry.bind` checks"
PUBLIC = "public, with keywords that have defaults"
REASONS = {  # of functions that take more
    "attacks/autoattack.py::autoattack": PUBLIC,
    "attacks/pgd.py::pgd_attack": PUBLIC,
    "attacks/slots.py::run": "the attack's input and its layout on the devices",
    "data/augment.py::augment": SETTINGS,
    "engine/stage.py::build": "tests and other trainers call it without data sets",
    "methods/distil.py::create": SETTINGS,
    "methods/drolt.py::create": SETTINGS,
    "methods/gkl_at.py::create": SETTINGS,
    "models/__init__.py::create": SETTINGS,
    "models/resnet.py::backbone": SETTINGS,
    "models/vit.py::backbone": SETTINGS,
    "runs/weights.py::save_weights": PUBLIC,
}


def functions():
    """Yield (place, definition) of all functions and methods."""
    for path in (*sorted((ROOT / "ltjax").rglob("*.py")), ROOT / "run.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                place = path.relative_to(ROOT).as_posix().removeprefix("ltjax/")
                yield f"{place}::{node.name}", node


def length(function):
    """Count the lines of a body, without its docstring."""
    body = function.body[ast.get_docstring(function, clean=False) is not None :]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def num_parameters(function):
    arguments = function.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def test_no_function_is_longer_than_a_screen():
    assert {place: length(node) for place, node in functions() if length(node) > LONGEST} == {}


def test_functions_with_many_parameters_have_a_reason():
    assert {place for place, node in functions() if num_parameters(node) > MOST} == set(REASONS)


def test_sizes_count_lines_and_parameters():
    (function,) = ast.parse("def f(self, a, *, b=1):\n    '''Two\n    lines.'''\n    return a\n").body
    assert (length(function), num_parameters(function)) == (1, 2)
