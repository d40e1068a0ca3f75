"""A table of texts, with the best of each column marked: for a terminal, in Markdown and in LaTeX."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich.table import Table
from rich.text import Text


class Cell(NamedTuple):
    text: str
    best: bool = False  # of its column


def plain(table: Sequence[Sequence[Cell]]) -> Table:
    """Return a table for a rich console. table: rows of cells, header first."""
    (first, *others), *body = table
    rich_table = Table()
    rich_table.add_column(first.text, overflow="fold")
    for header in others:
        rich_table.add_column(header.text, justify="right", no_wrap=True)
    for row in body:
        rich_table.add_row(*(Text(cell.text, style="bold" if cell.best else "") for cell in row))
    return rich_table


def markdown(table: Sequence[Sequence[Cell]]) -> str:
    """Return a table in GitHub's Markdown."""

    def line(texts: Iterable[str]) -> str:
        return f"| {' | '.join(texts)} |\n"

    def text(cell: Cell) -> str:
        escaped = re.sub(r"([\\|*<`\[\]])", r"\\\1", cell.text)
        return f"**{escaped}**" if cell.best else escaped

    header, *body = ([text(cell) for cell in row] for row in table)
    rule = ["---", *("---:" for _ in header[1:])]
    return "".join(line(texts) for texts in (header, rule, *body))


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}"},
    **{"±": r"$\pm$", "→": r"$\to$"},
}


def latex(table: Sequence[Sequence[Cell]]) -> str:
    """Return a LaTeX tabular with the rules of the package booktabs."""

    def text(cell: Cell) -> str:
        escaped = cell.text.replace("->", "→").translate(str.maketrans(_LATEX))
        return f"\\textbf{{{escaped}}}" if cell.best else escaped

    def line(row: Sequence[Cell]) -> str:
        return " & ".join(text(cell) for cell in row) + " \\\\\n"

    header, *body = table
    inner = f"\\toprule\n{line(header)}\\midrule\n{''.join(line(row) for row in body)}\\bottomrule\n"
    return f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}\n{inner}\\end{{tabular}}\n"
