"""The page of `python -m ltjax.compare RUN... --html=FILE`: several runs side by side, seeds of a config together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from ltjax.report import page, panels, sections
from ltjax.report.sections import Attacked, Content, Table
from ltjax.runs.seeds import mean_and_std, pool
from ltjax.system.files import holding, read_json, write_atomic

MOST_PAIRS = 3  # of confused classes, in each list of a run: a page may have many rows


class Loaded(NamedTuple):
    """The contents of a run for the page."""

    results: Mapping[str, Any]  # the contents of results.json
    panel: panels.Panel  # of one stage
    pairs: list[dict[str, Any]]  # classes that the final stage confuses, see `ltjax.report.page.confused`


def write(
    file: Path,
    header: Sequence[str],
    body: Sequence[Sequence[tuple[str, bool]]],
    rows: Sequence[Any],
    notes: Sequence[str],
    command: str,
) -> None:
    """Write the page.

    Args:
      header: First row of `ltjax.compare.cells`, as text.
      body: The other rows: (text, whether it is the best of its column).
      rows: A `ltjax.compare.Row` for each row of `body`.
    """
    cells = [[Markup("<strong>{}</strong>").format(text) if best else text for text, best in row] for row in body]
    loaded = [{run: load(run, row.stage, row.name) for run in row.runs} for row in rows]
    row_panels = [row_panel(row, list(runs.values())) for row, runs in zip(rows, loaded, strict=True)]
    pairs = [group for row, runs in zip(rows, loaded, strict=True) for group in row_pairs(row, list(runs.values()))]
    attacked, left_out = [], []
    for number, (row, runs) in enumerate(zip(rows, loaded, strict=True)):
        alike, others = attacked_alike(row.stage, runs)
        if alike:
            attacked.append(Attacked(f"robust{number}", row.name, pooled(alike)))
        if others:
            which = f"{row.name}: {', '.join(map(str, others))} left out below, Under attack"
            left_out.append(f"warning: {which} (another radius, norm or number of images)")
    how = {str(path): trained(run.results) for runs in loaded for path, run in runs.items()}
    text = page.render(
        title="Comparison",
        subtitle=f"{counted(len(rows), 'row')}, {counted(sum(map(len, loaded)), 'run')}.",
        main=Table("Last epoch; mean ± sample standard deviation over seeds, %", list(header), cells),
        notes=[*notes, *left_out, *group_notes(row_panels)],
        sections=sections.build(Content(row_panels, row_panels, pairs, attacked, comparison=True)),
        how_first=False,
        how_title="Where this comes from",
        commands=[command],
        facts=[*((row.name, ", ".join(map(str, row.runs))) for row in rows), *how.items()],
    )
    write_atomic(file, text, errors="replace")


def load(run: Path, stage: str | None, title: str) -> Loaded:
    """Read what the page takes from a run, with the panel of one stage; None: the final one."""
    folder, file = (run, run / "results.json") if run.is_dir() else (run.parent, run)
    results, numbers, split = read_json(file), folder / "report" / "numbers.json", folder / "split.json"
    with holding(file, f"leave {title} out"):
        groups = page.groups_of(read_json(split), len(results["class_names"])) if split.exists() else {}
        measured = read_json(numbers) if numbers.exists() else {}
        curves = panels.read_curves(folder / "metrics.jsonl")
        panel = panels.of_stage(results, stage or results["final_stage"], groups, measured, curves)
        return Loaded(results, panel, page.confused(results, measured))


def row_panel(row: Any, runs: Sequence[Loaded]) -> panels.Panel:
    seeds = [len(run.results.get("seeds", [0])) for run in runs]
    return panels.pooled(row.name, [run.panel for run in runs], seeds, row.figures)


def row_pairs(row: Any, runs: Sequence[Loaded]) -> list[dict[str, Any]]:
    """Return the confused classes of a row's first run, if the row is of its final stage."""
    if row.stage not in (None, runs[0].results["final_stage"]):
        return []
    name = f"{row.name}, first run" if len(runs) > 1 else row.name
    return [{"title": f"{name}: {p['title']}", "pairs": p["pairs"][:MOST_PAIRS]} for p in runs[0].pairs]


def attacked_alike(stage: str | None, runs: Mapping[Path, Loaded]) -> tuple[list[Mapping[str, Any]], list[Path]]:
    """Return the attack results of the runs attacked as the first one was, and the runs attacked otherwise."""
    attacked = {
        path: run.results["robustness"]
        for path, run in runs.items()
        if run.results.get("robustness", {}).get("stage") == (stage or run.results["final_stage"])
    }
    keys = ("norm", "epsilon", "num_images", "images_sha256")
    settings = {path: [each.get(key) for key in keys] for path, each in attacked.items()}
    alike = [path for path in settings if settings[path] == next(iter(settings.values()))]
    return [attacked[path] for path in alike], [path for path in attacked if path not in alike]


def pooled(attacked: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Average the results of `--mode=attack` over seeds; deviations if there are two or more.

    A test that some seed lacks is left out, and so is the curve if radii differ.

    Args:
      attacked: "robustness" of each run's results.json, see `attacked_alike`.
    """
    first, tests = attacked[0], {}
    for name, test in first["tests"].items():
        if all(name in each["tests"] for each in attacked):
            seeds = [seed for each in attacked for seed in each["tests"][name].get("replicas") or [each["tests"][name]]]
            ece = mean_and_std([seed["ece"] for seed in seeds]).mean
            tests[name] = {"title": test["title"], **_over_seeds(seeds), "ece": ece}
    curve = first.get("curve", [])
    if len(attacked) > 1:
        radii = [[point["epsilon"] for point in each.get("curve", ())] for each in attacked]
        same = radii.count(radii[0]) == len(radii)
        curve = [
            {"epsilon": points[0]["epsilon"], **_over_seeds(points)}
            for points in (zip(*(each.get("curve", ()) for each in attacked), strict=True) if same else ())
        ]
        for point in curve:
            point["std"] = point["std"]["accuracy"]
    return {**first, "tests": tests, "curve": curve}


def _over_seeds(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    figures = pool([seed["accuracy"] for seed in seeds], mean_and_std)
    averaged: dict[str, Any] = {"accuracy": {group: figure.mean for group, figure in figures.items()}}
    if len(seeds) > 1:
        averaged["std"] = {"accuracy": {group: figure.std for group, figure in figures.items()}}
    return averaged


def group_notes(row_panels: Sequence[panels.Panel]) -> list[str]:
    """Return the training images of each group's classes, a line for each set of rows that share them."""
    titles: dict[str, list[str]] = {}
    for panel in row_panels:
        titles.setdefault(sections.group_counts(panel), []).append(panel.title)
    whose = {counts: f" ({', '.join(rows)})" if len(titles) > 1 else "" for counts, rows in titles.items()}
    return [f"Training images a class{rows}: {counts}." for counts, rows in whose.items() if counts]


def counted(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def trained(results: Mapping[str, Any]) -> str:
    """Return how a run was trained: seeds, commit, device and command, as far as its results.json says."""
    seeds = results.get("seeds") or [results.get("seed", "unknown")]
    known = {
        "seeds" if len(seeds) > 1 else "seed": ", ".join(map(str, seeds)),
        "commit": results.get("git_commit") or "unknown",
        "device": f"{results.get('num_devices', 1)} x {results.get('device', 'unknown')}",
        "command:": results.get("command") or "unknown",
    }
    return "; ".join(f"{name} {value}" for name, value in known.items())
