"""The page of `python -m ltjax.compare RUN... --html=FILE`: several runs side by side, seeds of a config together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from ltjax.report import page, panels, sections
from ltjax.report.sections import Section, Table
from ltjax.runs.checkpoint import read_json
from ltjax.types import UserError, one_line

MOST_PAIRS = 3  # of confused classes, of each list of a run: a page may have many rows


class Found(NamedTuple):
    """What the page takes from a run."""

    results: Mapping[str, Any]  # what results.json holds
    panel: panels.Panel  # of one stage
    pairs: list[dict[str, Any]]  # of classes that the final stage confuses, see `ltjax.report.page.confused`


def write(
    file: Path,
    header: Sequence[str],
    body: Sequence[Sequence[tuple[str, bool]]],
    rows: Sequence[Any],
    notes: Sequence[str],
    command: str,
) -> None:
    """Write the page.

    header, body: the table of `ltjax.compare.cells`: (text, whether it is the best of its column).
    rows: `ltjax.compare.Row`s, one for each row of body. command: that made the page.
    """
    cells = [[Markup("<strong>{}</strong>").format(text) if best else text for text, best in row] for row in body]
    notes, runs = list(notes), {}
    made: list[panels.Panel] = []
    pairs: list[dict[str, Any]] = []
    robust: list[tuple[str, Section]] = []
    for number, row in enumerate(rows):
        found = [of_row(run, row.stage, row.name) for run in row.runs]
        runs.update({str(run): trained(one.results) for run, one in zip(row.runs, found, strict=True)})
        seeds = [len(one.results.get("seeds", [0])) for one in found]
        made.append(panels.pooled(row.name, [one.panel for one in found], seeds, row.figures))
        if row.stage in (None, found[0].results["final_stage"]):
            name = f"{row.name}, first run" if len(found) > 1 else row.name
            pairs += [{"title": f"{name}: {p['title']}", "pairs": p["pairs"][:MOST_PAIRS]} for p in found[0].pairs]
        attacked = {
            run: one.results["robustness"]
            for run, one in zip(row.runs, found, strict=True)
            if "robustness" in one.results
            and one.results["robustness"]["stage"] == (row.stage or one.results["final_stage"])
        }
        if attacked:
            alike, others = parted(attacked)
            robust.append((row.name, sections.robustness(pooled(alike), key=f"robust{number}", title=row.name)))
            left_out = "left out below, Under attack (another radius, norm or number of images)"
            notes += [f"warning: {row.name}: {', '.join(map(str, others))} {left_out}"] if others else []
    groups: dict[str, list[str]] = {}
    for panel in made:
        groups.setdefault(sections.group_counts(panel), []).append(panel.title)
    for counts, titles in groups.items():
        whose = f" ({', '.join(titles)})" if len(groups) > 1 else ""
        notes += [f"Training images a class{whose}: {counts}."] if counts else []
    shown = sections.of_panels(made, ends=made)
    shown = [one._replace(pairs=pairs) if one.id == "errors" else one for one in shown]
    if robust:
        figures = [(f"{name}: {heading}", chart) for name, one in robust for heading, chart in one.figures]
        tables = [table for _, one in robust for table in one.tables]
        about = " ".join(dict.fromkeys(one.about for _, one in robust))
        shown.append(Section("robust", "Under attack", about, figures, tables))
    text = page.render(
        title="Comparison",
        subtitle=f"{counted(len(rows), 'row')}, {counted(sum(len(row.runs) for row in rows), 'run')}.",
        main=Table("Last epoch; mean ± sample standard deviation over seeds, %", list(header), cells),
        notes=notes,
        sections=shown,
        how_first=False,
        how_title="Where this comes from",
        commands=[command],
        facts=[(row.name, ", ".join(map(str, row.runs))) for row in rows] + list(runs.items()),
    )
    file.write_text(text, encoding="utf-8", errors="replace")


def counted(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def trained(results: Mapping[str, Any]) -> str:
    """How a run was trained: seeds, commit, device and command, as far as its results.json tells."""
    seeds = results.get("seeds") or [results.get("seed", "unknown")]
    known = {
        "seeds" if len(seeds) > 1 else "seed": ", ".join(map(str, seeds)),
        "commit": results.get("git_commit") or "unknown",
        "device": f"{results.get('num_devices', 1)} x {results.get('device', 'unknown')}",
        "command:": results.get("command") or "unknown",
    }
    return "; ".join(f"{name} {value}" for name, value in known.items())


def of_row(run: Path, stage: str | None, title: str) -> Found:
    """What the page takes from a run, with the panel of one stage, or of the final one for None.

    Raises: UserError where a file is not what ltjax writes.
    """
    folder, file = (run, run / "results.json") if run.is_dir() else (run.parent, run)
    results, numbers, split = read_json(file), folder / "report" / "numbers.json", folder / "split.json"
    try:
        groups = page.groups_of(read_json(split), len(results["class_names"])) if split.exists() else {}
        measured = read_json(numbers) if numbers.exists() else {}
        panel = panels.of_stage(
            results,
            stage or results["final_stage"],
            groups,
            measured,
            panels.read_curves(folder / "metrics.jsonl"),
        )
        return Found(results, panel, page.confused(results, measured))
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} does not hold what --html draws ({one_line(error)}): leave {title} out") from error


def parted(attacked: Mapping[Path, Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Path]]:
    """Those attacked as the first is, and the runs that are not. attacked: "robustness" of each run's results.json."""
    first = next(iter(attacked.values()))
    same = {
        run: all(one[key] == first[key] for key in ("norm", "epsilon", "num_images")) for run, one in attacked.items()
    }
    return [one for run, one in attacked.items() if same[run]], [run for run in attacked if not same[run]]


def pooled(same: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """What `--mode=attack` found for several seeds: means, and deviations where there are two seeds or more.

    Only of what every seed has. same: "robustness" of each run's results.json, see `parted`.
    """
    first, tests = same[0], {}
    for name in first["tests"]:
        if all(name in one["tests"] for one in same):
            seeds = [seed for one in same for seed in one["tests"][name].get("replicas") or [one["tests"][name]]]
            tests[name] = {"title": first["tests"][name]["title"], **_over_seeds(seeds)}
            tests[name]["ece"] = float(np.mean([seed["ece"] for seed in seeds]))
    radii = [[point["epsilon"] for point in one.get("curve", ())] for one in same]
    curve = first.get("curve", [])
    if len(same) > 1:
        together = (
            zip(*(one.get("curve", ()) for one in same), strict=True) if radii.count(radii[0]) == len(radii) else ()
        )
        curve = [{"epsilon": points[0]["epsilon"], **_over_seeds(points)} for points in together]
        for point in curve:
            point["std"] = point["std"]["accuracy"]
    return {**first, "tests": tests, "curve": curve}


def _over_seeds(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values = {group: [seed["accuracy"][group] for seed in seeds] for group in seeds[0]["accuracy"]}
    made: dict[str, Any] = {"accuracy": {group: float(np.mean(each)) for group, each in values.items()}}
    if len(seeds) > 1:
        made["std"] = {"accuracy": {group: float(np.std(each, ddof=1)) for group, each in values.items()}}
    return made
