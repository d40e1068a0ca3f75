"""Hooks of `mkdocs build`: formulas become MathML, and files outside docs/ become pages."""

import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = {  # file of the repository: its page
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",  # the home page replaces it
    "benchmarks/README.md": "benchmarks.md",
    "tests/golden/README.md": "golden.md",
}


def on_files(files, config):
    for name, page in OUTSIDE.items():
        if not files.get_file_from_path(page):
            files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links between files of the repository into links between pages."""
    places = {page_name: name for name, page_name in OUTSIDE.items() if page_name != "index.md"}
    here = places.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def link(match):
        target, anchor = match[1], match[2] or ""
        if re.match(r"[a-z]+:", target) or not target:
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        to = OUTSIDE.get(file, file.removeprefix("docs/"))
        return f"]({posixpath.relpath(to, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    return re.sub(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", link, markdown)


def on_page_content(content, page, config, files):
    """Turn `arithmatex` elements into MathML, which needs no script and no network."""

    def formula(match):
        display = "block" if match["open"] == r"\[" else "inline"
        return match["tag"] + convert(html.unescape(match["latex"]).strip(), display=display) + match["end"]

    pattern = (
        r'(?P<tag><(?:span|div) class="arithmatex">)(?P<open>\\[\[(])(?P<latex>.*?)\\[\])](?P<end></(?:span|div)>)'
    )
    return re.sub(pattern, formula, content, flags=re.DOTALL)
