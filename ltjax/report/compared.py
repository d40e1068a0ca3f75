"""The page of `python -m ltjax.compare RUN... --html=FILE`: several runs side by side, seeds of a config together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from ltjax.checkpoint import read_json
from ltjax.report import page, panels, sections
from ltjax.report.sections import Section, Table
from ltjax.types import UserError, one_line


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
    made: list[panels.Panel] = []
    robust: list[tuple[str, Section]] = []
    for number, row in enumerate(rows):
        found = [of_row(run, row.stage, row.name) for run in row.runs]
        seeds = [len(results.get("seeds", [0])) for results, _ in found]
        made.append(panels.pooled(row.name, [panel for _, panel in found], seeds, row.figures))
        attacked = [
            results["robustness"]
            for results, _ in found
            if "robustness" in results and results["robustness"]["stage"] == (row.stage or results["final_stage"])
        ]
        if attacked:
            robust.append((row.name, sections.robustness(pooled(attacked), key=f"robust{number}", title=row.name)))
    shown = sections.of_panels(made, ends=made)
    if robust:
        figures = [(f"{name}: {heading}", chart) for name, one in robust for heading, chart in one.figures]
        tables = [table for _, one in robust for table in one.tables]
        about = " ".join(dict.fromkeys(one.about for _, one in robust))
        shown.append(Section("robust", "Under attack", about, figures, tables))
    text = page.render(
        title="Comparison",
        subtitle=f"{len(rows)} rows, {sum(len(row.runs) for row in rows)} runs.",
        main=Table("Last epoch; mean ± sample standard deviation over seeds, %", list(header), cells),
        notes=list(notes),
        sections=shown,
        how_title="Where this comes from",
        commands=[command],
        facts=[(row.name, ", ".join(map(str, row.runs))) for row in rows],
    )
    file.write_text(text, encoding="utf-8", errors="replace")


def of_row(run: Path, stage: str | None, title: str) -> tuple[Mapping[str, Any], panels.Panel]:
    """results.json of a run, and the panel of one stage, or of the final one for None.

    Raises: UserError where a file is not what ltjax writes.
    """
    folder, file = (run, run / "results.json") if run.is_dir() else (run.parent, run)
    results, numbers, split = read_json(file), folder / "report" / "numbers.json", folder / "split.json"
    try:
        groups = page.groups_of(read_json(split), len(results["class_names"])) if split.exists() else {}
        panel = panels.of_stage(
            results,
            stage or results["final_stage"],
            groups,
            read_json(numbers) if numbers.exists() else {},
            panels.read_curves(folder / "metrics.jsonl"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} does not hold what --html draws ({one_line(error)}): leave {title} out") from error
    return results, panel


def pooled(attacked: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """What `--mode=attack` found for several seeds: means, and deviations where there are two seeds or more.

    Only of what every seed has. attacked: "robustness" of each run's results.json.
    """
    first = attacked[0]
    same = [one for one in attacked if all(one[key] == first[key] for key in ("norm", "epsilon", "num_images"))]
    tests = {}
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
