"""What `mkdocs build` does beyond its plugins: formulas become MathML, files that lie outside docs/ pages."""

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
    "README.md": "index.md",  # whose place on the site the home page takes
    "benchmarks/README.md": "benchmarks.md",
    "tests/golden/README.md": "golden.md",
}


def on_files(files, config):
    for name, page in OUTSIDE.items():
        if not files.get_file_from_path(page):
            files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links between files of the repository -> links between pages, so that both work where they are read."""
    places = {page_name: name for name, page_name in OUTSIDE.items() if page_name != "index.md"}
    here = places.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def link(found):
        target, anchor = found[1], found[2] or ""
        if re.match(r"[a-z]+:", target) or not target:
            return found[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        to = OUTSIDE.get(there, there.removeprefix("docs/"))
        return f"]({posixpath.relpath(to, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    return re.sub(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", link, markdown)


def on_page_content(content, page, config, files):
    """`arithmatex` elements -> MathML, which browsers show without a script and without a network."""

    def formula(found):
        display = "block" if found["open"] == r"\[" else "inline"
        return found["tag"] + convert(html.unescape(found["latex"]).strip(), display=display) + found["end"]

    pattern = (
        r'(?P<tag><(?:span|div) class="arithmatex">)(?P<open>\\[\[(])(?P<latex>.*?)\\[\])](?P<end></(?:span|div)>)'
    )
    return re.sub(pattern, formula, content, flags=re.DOTALL)
