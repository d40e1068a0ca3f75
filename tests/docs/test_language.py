"""The language of docstrings, comments and pages: short, plain, and in the words of a JAX engineer.

Ruff's D401 checks that docstrings are imperative. These tests list words that are never right here, and better ones.
"""

import ast
import io
import json
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BETTER = {
    "anew": "again, new",
    "mend(s|ed|ing)?": "fix",
    "heed(s|ed|ing)?": "use, apply; ignore",
    "told": "given, printed",
    "judg(e|es|ed|ing)": "evaluate",
    "passed over": "ignore, leave out",
    "wants?": "need",
    "as it comes": "unchanged",
    "(has|have|had) come to": "the results, the state",
    "whoever|(no|any|some|every)body": "the name of the actor, or the passive",
    "so many": "the name of the number",
    "under way": "running",
    "comes? along": "included",
    r"where (it|there|one|none|nothing|that|they) (is|are|has|have) (no|none|not|one|any)": "if",
}
WORDS = re.compile("|".join(rf"(?P<w{n}>\b({word})\b)" for n, word in enumerate(BETTER)), re.IGNORECASE)
TEXTS = ("*.md", "*.toml", "*.yml", "*.ipynb", ".ci/run")
# A function's docstring begins with a verb: "Return whether ...", "Return {name: value} ...".
NO_VERB = re.compile(r"(Whether|Of|What|Where|Who|By|To) |->|[({\[]")


def files(*patterns):
    """List the repository's files that match patterns of git."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone of the repository")
    command = ["git", "ls-files", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert listed
    return [name for name in listed if name != Path(__file__).relative_to(ROOT).as_posix()]


def docstrings(tree):
    """Yield (node, docstring) of a module and its classes and functions."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            yield node, text


def prose(name):
    """Return the text of a file that people read: docstrings and comments of code, cells of notebooks, or all."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".py"):
        comments = [
            token.string
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type == tokenize.COMMENT
        ]
        return "\n".join([*(text for _, text in docstrings(ast.parse(text))), *comments])
    if name.endswith(".ipynb"):
        return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return text


def wrong_words(text):
    """Return a line for each banned word of a text, with the better one."""
    better = list(BETTER.values())
    return [
        f"...{text[max(0, match.start() - 40) : match.end() + 20]!r}: better {better[int(match.lastgroup[1:])]}"
        for match in WORDS.finditer(text)
    ]


def test_no_file_has_a_banned_word():
    wrong = [f"{name}: {line}" for name in files("*.py", *TEXTS) for line in wrong_words(prose(name))]
    assert not wrong, "\n".join(wrong)


def test_a_functions_docstring_begins_with_a_verb():
    wrong = []
    for name in files("*.py", ":!tests"):
        for node, text in docstrings(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and NO_VERB.match(text):
                if not any("property" in ast.unparse(each) for each in node.decorator_list):
                    wrong.append(f"{name}, {node.name}: {text.splitlines()[0]}")
    assert not wrong, "\n".join(wrong)


def test_a_banned_word_is_found_with_a_better_one():
    (line,) = wrong_words("A tag is not heeded here.")
    assert "heeded" in line and "better use, apply; ignore" in line
    assert not wrong_words("The mind of a judgement-free wantonness.")
