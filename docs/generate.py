"""Write the generated blocks of the pages: recipes, settings and figures.

    python -m docs.generate

Run it after a change of a config. It replaces the text between `<!-- recipe: cifar100_lt:method=mislas -->` and
`<!-- end -->`; a test checks that the pages are up to date. Our figures are from the archives in `results/`
(`ltjax.runs.archive`), the papers' from the configs' docstrings.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks import thinned
from configs import common, recipes
from docs import authors
from docs.settings import BALANCED, LONG_TAILED, ROOT, TITLES, across, command, module, recipe
from ltjax import compare
from ltjax.report.tables import markdown
from ltjax.runs.results import percent
from ltjax.system.files import read_json

RESULTS = ROOT / "results"
NOT_RUN = "not yet run"
SHORT = "budget=short"


def sections(name: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the figures of a config's docstring: a heading that ends with a colon, and its indented lines."""
    for paragraph in module(name)["__doc__"].split("\n\n"):
        lines = paragraph.strip("\n").split("\n")
        first = next((n for n, line in enumerate(lines) if line.startswith("  ") and line.strip()), 0)
        if first and lines[first - 1].endswith(":"):
            yield " ".join(lines[:first]).rstrip(":"), [line.strip() for line in lines[first:] if line[:2] == "  "]


def published(name: str, method: str) -> list[str]:
    """Return the paper's figures on this data set, from the config's docstring."""
    return [value for title, value in _lines(name, "paper") if _is(title, method)]


def ours(name: str, method: str) -> list[str]:
    """Return the figures of our full-length runs, or [NOT_RUN]."""
    written = [value for title, value in _lines(name, "ours") if _is(title, method) and value != NOT_RUN]
    return written + archived(name, method, "-bf16") + archived(name, method, "") or [NOT_RUN]


def archived(name: str, method: str, ending: str) -> list[str]:
    """Return accuracy and ECE of archives, such as ["47.1 / 4.7; 52.0 / 2.3; - (bf16, 3 seeds)"], or [].

    The figures are at imbalance 100, 50 and 10. `ending` is that of the run's name: "-bf16", "" for float32, or
    "-bf16-short".
    """
    by_name = {row.name: row for row in result_rows(f"{name}-{method}-if*")}
    rows = [by_name.get(f"{name}-{method}-if{imbalance}{ending}") for imbalance in (100, 50, 10)]
    cells = [
        "-" if row is None else " / ".join(percent(*row.figures[key]) for key in ("all", "ece") if key in row.figures)
        for row in rows
    ]
    seeds = max((len(row.seeds) for row in rows if row), default=0)
    kind = f"{'bf16' if '-bf16' in ending else 'float32'}, {seeds} seed{'s' * (seeds > 1)}"
    return [f"{'; '.join(cells)} ({kind})"] if seeds else []


def result_rows(pattern: str, *, stages: bool = False) -> list[compare.Row]:
    """Return the rows of archives whose name without the seed matches a glob, such as "cifar100_lt-*-if100"."""
    folders = sorted(RESULTS.glob(f"{pattern}-seed*"))
    return compare.rows(folders, stages=stages) if folders else []


def best_first(pattern: str) -> list[compare.Row]:
    """Return `result_rows` by falling accuracy. A method that `*` stands for is named by its title."""
    before, _, after = pattern.partition("*")

    def name(row: compare.Row) -> str:
        method = row.name.removeprefix(before).removesuffix(after)
        recipe = recipes.RECIPES.get(method)
        return recipe.title if recipe else f"recipe={method}" if method in recipes.FIRST else row.name

    rows = sorted(result_rows(pattern), key=lambda row: -row.figures["all"].mean)
    return [row._replace(name=name(row)) for row in rows]


def results_table(text: str) -> str:
    """Return a table of archives, best first, for "cifar100_lt-*-if100-bf16" or "stages: cifar100_lt-*"."""
    stages, _, pattern = text.rpartition(": ")
    rows = result_rows(pattern, stages=True) if stages else best_first(pattern)
    if not rows:
        return f"No runs yet: `python -m benchmarks.reproduce` makes them in `results/{pattern}-seed*`."
    sources = [read_json(folder / "results.json") for row in rows for folder in row.runs]
    commits = sorted({source["git_commit"][:7] for source in sources if source["git_commit"]})
    versions = sorted({f"jax {source['versions']['jax']}" for source in sources})
    devices = sorted({f"{source['num_devices']} x {source['device'].partition(':')[0]}" for source in sources})
    origin = [f"Commit{'s' * (len(commits) > 1)} {', '.join(commits)}", *versions, *devices]
    return f"{markdown(compare.cells(rows))}\n{compare.NOTES} {'; '.join(origin)}."


def ours_short(name: str, method: str) -> list[str]:
    """Return the figures of budget=short with their names, and the commit if the line has one."""
    texts = archived(name, method, "-bf16-short")
    for heading, lines in sections(name):
        if SHORT in heading:
            names = re.split(r" (?:of|on|in) ", heading)[0].split(" / ")  # Top-1 / ECE of the last epoch in %, ...
            pattern = rf"\b{method}(, \w[\w ,]*?)?\s+(\d+\.\d+(?: / \d+\.\d+)+)(?:\s+(?:commit )?([0-9a-f]{{7}}))?"
            for variant, values, commit in re.findall(pattern, "\n".join(lines)):
                pairs = zip(names, values.split(" / "), strict=True)
                figure = ", ".join(f"{key} {value}" for key, value in pairs)
                texts.append(figure + (f" ({variant[2:]})" if variant else "") + (f", {commit}" if commit else ""))
    return texts


def _lines(name: str, whose: str) -> Iterator[tuple[str, str]]:
    """Parse `MiSLAS, ResNet-50, paper    52.7 / 1.78` as ("MiSLAS", "ResNet-50: 52.7 / 1.78")."""
    for _, lines in sections(name):
        for line in lines:
            if match := re.match(rf"(.*?), {whose}[^ ]*\s{{2,}}(.*)", line):
                title, _, variant = match[1].partition(", ")
                parts = re.split(r"\s{2,}", match[2])
                values = "".join(part + ("; " if re.search(r"\d\.\d|^-$", part) else " ") for part in parts)
                values = values.rstrip("; ").replace("; (", " (")
                yield title, (f"{variant}: " if variant else "") + values


def _is(title: str, method: str) -> bool:
    return title in (recipes.RECIPES[method].title, method, "any method")


def headings(name: str) -> list[str]:
    return [heading for heading, _ in sections(name)]


def abouts(name: str) -> list[tuple[bool, str]]:
    """Return (is of budget=short, content) for each column of figures."""
    return [(SHORT in heading, re.sub(rf"{SHORT} \((.*?)\)", r"\1", heading)) for heading in headings(name)]


def methods_of(name: str) -> list[str]:
    """Return the methods that a config allows, its default first."""
    try:
        module(name)["get_config"]("help")
    except common.Help as answer:
        return answer.arguments["method"][1].split(", ")
    raise ValueError(f"{name} answers no help")


def reproduction(name: str) -> str:
    """Return a table of all methods on a data set: the paper's figure, ours, and the argument."""
    methods = methods_of(name)
    columns = {False: "Published, and ours at full length", True: f"Ours with `{SHORT}`"}
    lines = [f"{columns[short]}: {about}.\n" for short, about in abouts(name)] or ["No figures yet.\n"]
    lines += ["This command makes the first row:\n", f"    {command(f'{name}:method={methods[0]}')}\n"]
    lines.append("| method | published | ours, full length | ours, budget=short | argument |")
    lines.append("|---|---|---|---|---|")
    for method in methods:
        cells = (published(name, method), ours(name, method), ours_short(name, method))
        values = ["<br>".join(cell) or "-" for cell in cells]
        lines.append(f"| {recipes.RECIPES[method].title} | {' | '.join(values)} | `method={method}` |")
    return "\n".join(lines)


def figures(method: str) -> str:
    """Return a table of a method's figures on all data sets with any."""
    lines = ["| data set | published | ours, full length | ours, budget=short |", "|---|---|---|---|"]
    notes = []
    for name in (*LONG_TAILED, *BALANCED):
        cells = (published(name, method), ours(name, method), ours_short(name, method))
        if cells[0] or cells[2] or cells[1] != [NOT_RUN]:
            about = dict(abouts(name))
            long = f": {about[False].partition(', full length')[0]}" if cells[0] or cells[1] != [NOT_RUN] else ""
            lines.append(f"| {TITLES[name]}{long} | {' | '.join('<br>'.join(cell) or '-' for cell in cells)} |")
            notes += [f"`{SHORT}` on {TITLES[name]}: {about[True]}."] if cells[2] else []
    if len(lines) == 2:
        return "We know of no published figures on these data sets with these networks. Ours: not yet run."
    return "\n".join([*lines, *(f"\n{note}" for note in notes)])


def full(text: str) -> str:
    """Return a table of figures at full length, for "cifar100_lt: mislas, drolt"."""
    name, _, methods = text.partition(": ")
    lines = [f"| {TITLES[name]}: {dict(abouts(name))[False]} | published | ours |", "|---|---|---|"]
    for method in methods.split(", "):
        cells = ("<br>".join(cell) for cell in (published(name, method), ours(name, method)))
        lines.append(f"| {recipes.RECIPES[method].title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def docstring(name: str) -> str:
    """Return the figures of a config's docstring as lists."""
    return "\n\n".join(
        "\n".join([f"{heading}:\n", *(f"- {part.strip()}" for line in lines for part in line.split(";"))])
        for heading, lines in sections(name)
    )


def photographs(_: str) -> str:
    """Return the table of `benchmarks.thinned`."""
    measured = read_json(ROOT / "benchmarks" / "thinned.json")
    about = f"{len({row['draw'] for row in measured['rows']})} draws, jax {measured['versions']['jax']}, commit "
    about += measured["git_commit"].replace(measured["git_commit"][:40], measured["git_commit"][:7])
    return f"{thinned.summary(measured['rows'])}\n\nMeans of {about}; ± is the sample standard deviation over draws."


BLOCKS = {
    "results": results_table,
    "recipe": recipe,
    "across": across,
    "reproduction": reproduction,
    "figures": figures,
    "full": full,
    "docstring": docstring,
    "differences": authors.differences,
    "values": authors.values,
    "alone": authors.alone,
    "photographs": photographs,
}
PATTERN = re.compile(r"(<!-- (?P<kind>\w+): (?P<what>.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(markdown: str) -> str:
    """Return a page with its blocks generated."""
    return PATTERN.sub(lambda match: f"{match[1]}\n{BLOCKS[match['kind']](match['what'])}\n\n{match[4]}", markdown)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    for page in pages():
        before = page.read_text()
        after = filled(before)
        if before != after:
            page.write_text(after)
            print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
