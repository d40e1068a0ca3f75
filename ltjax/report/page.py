"""`report/index.html`: one file without references to others, made from a run's folder."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from ltjax.report import charts, panels, plots, sections
from ltjax.report.sections import Attacked, Content, Table
from ltjax.runs.results import COLUMNS, GROUPS, LEGACY_BEST, percent
from ltjax.system.files import holding, read_json, write_atomic

PICTURE_WIDTH = 640  # of the attack's picture, in pixels


def write(workdir: Path, results: Mapping[str, Any] | None = None) -> Path:
    """Write the page of the run in `workdir`. results: the content of results.json; None: read it."""
    folder = workdir / "report"
    if results is None:
        with holding(workdir / "results.json"):
            html = _html(workdir, read_json(workdir / "results.json"))
    else:
        html = _html(workdir, results)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    write_atomic(path, html, errors="replace")  # class names may not be valid UTF-8
    return path


def _html(workdir: Path, results: Mapping[str, Any]) -> str:
    folder = workdir / "report"
    return of_run(
        results,
        groups_of(read_json(workdir / "split.json"), len(results["class_names"])),
        read_json(folder / "numbers.json") if (folder / "numbers.json").exists() else {},
        panels.read_curves(workdir / "metrics.jsonl"),
        attack_image(folder / "attack.png") if "robustness" in results else "",
    )


def groups_of(split: Mapping[str, Any], num_classes: int) -> dict[str, np.ndarray]:
    """Return {name: bool [C]} from split.json, without groups that have no class."""
    groups = {name: np.isin(np.arange(num_classes), members) for name, members in split["groups"].items()}
    return {name: member for name, member in groups.items() if member.any()}


def attack_image(path: Path) -> str:
    """Return the picture of `--mode=attack`, made smaller, as a data URI; "" if there is none."""
    try:
        with Image.open(path) as picture:
            picture = picture.convert("RGB")
    except OSError:  # also if the file is no image
        return ""
    picture.thumbnail((PICTURE_WIDTH, picture.height))
    return charts.data_uri(picture, "jpeg")


def of_run(
    results: Mapping[str, Any],
    groups: Mapping[str, np.ndarray],
    numbers: Mapping[str, Any],
    curves: Mapping[str, Any],
    image: str = "",
) -> str:
    """Return the page of one run as HTML.

    Args:
      groups: {name: bool [C]}.
      numbers: What report/numbers.json holds; may be {}.
      curves: What `ltjax.report.panels.read_curves` returns.
    """
    stages = [panels.of_stage(results, name, groups, numbers, curves) for name in results["stages"]]
    attacked = []
    if "robustness" in results:
        title = results["stages"].get(results["robustness"]["stage"], {}).get("title", "")
        attacked.append(Attacked("robust", title, results["robustness"]))
    content = Content(
        stages,
        stages[-1:],
        confused(results, numbers),
        attacked,
        confusion=numbers.get("confusion"),
        mistakes=numbers.get("mistakes"),
        num_images=results["num_images"],
        image=image,
    )
    by_group = sections.group_counts(stages[0])
    counts = np.asarray(results["class_counts"])
    seeds = f", mean ± standard deviation of {len(results['seeds'])} seeds" if "seeds" in results else ""
    imbalance = counts.max() / counts.min()
    sizes = f"{counts.max():,} down to {counts.min():,} a class (imbalance factor {imbalance:.4g})"
    sizes = sizes if imbalance > 1 else f"{counts.max():,} of each"
    return render(
        title=results["name"],
        subtitle=f"{counts.sum():,} training images of {len(counts):,} classes, {sizes}; "
        f"{results['num_images']:,} test images{seeds}.",
        main=stage_table(results, stages),
        notes=[
            *unfinished(results),
            *([f"Training images a class: {by_group}."] if by_group else []),
            f"{when(results).capitalize()}. {LEGACY_BEST}",
        ],
        sections=sections.build(content),
        how_first=True,
        how_title="How to get this again" if results["command"] else "What evaluated it",
        commands=[results["command"]] if results["command"] else [],
        facts=facts(results),
    )


def unfinished(results: Mapping[str, Any]) -> list[str]:
    """Return a warning if the run is not trained to its end, see `ltjax.modes.report.report_workdir`."""
    reached = results.get("unfinished")
    if not reached:
        return []
    where = f"{reached['stage']} (stage {reached['number']} of {reached['stages']})"
    at = f"at epoch {reached['epoch']:g} of {reached['epochs']}" if reached["epochs"] else "the last one done"
    return [f"warning: not trained to its end: {where} is {at}."]


def when(results: Mapping[str, Any]) -> str:
    return "newest checkpoint" if results.get("unfinished") else "last epoch"


def stage_table(results: Mapping[str, Any], stages: Sequence[panels.Panel]) -> Table:
    columns = [column for column in COLUMNS if column.shown(results) and column.key != "ece"]
    sizes = results["group_sizes"]
    groups = [group for group in GROUPS if any(group in panel.accuracy for panel in stages)]
    size = Markup("{} <small>({:,})</small>")
    header = ["", *(size.format(group, sizes[group]) if group in sizes else group for group in groups)]
    header += ["ECE", "class-wise ECE", *(column.title for column in columns)]
    header += ["legacy best", "seconds"]
    rows = []
    for panel, stage in zip(stages, results["stages"].values(), strict=True):
        cells = [percent(*panel.accuracy[group]) if group in panel.accuracy else "-" for group in groups]
        cells += [plots.shown_figure(panel.ece)]
        cells += ["-" if panel.classwise_ece is None else sections.small(panel.classwise_ece)]
        cells += [percent(column.figure(stage), column.figure(stage.get("std", {}))) for column in columns]
        cells += [plots.shown_figure(panel.best), f"{panel.seconds:,.0f}"]
        rows.append([panel.title, *cells])
    return Table(f"Test accuracy (number of classes) and calibration, {when(results)}, %", header, rows)


def facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    seeds = results.get("seeds")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return [
        ("commit", results["git_commit"] or "not a checkout"),
        ("seeds" if seeds else "seed", ", ".join(map(str, seeds)) if seeds else str(results["seed"])),
        ("device", f"{results['num_devices']} x {results['device']}"),
        ("versions", versions),
    ]


def confused(results: Mapping[str, Any], numbers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the most confused pairs of classes, as the page shows them."""
    lists = [
        {"title": group["title"], "pairs": [_pair(pair, results, numbers["final_stage"]) for pair in group["pairs"]]}
        for group in numbers.get("pairs", [])
    ]
    return [group for group in lists if group["pairs"]]


def _pair(pair: Mapping[str, Any], results: Mapping[str, Any], final: str) -> dict[str, Any]:
    """Replace class numbers by names and counts. pair: of report/numbers.json."""
    counts, stages = results["class_counts"], results["stages"]
    true, predicted = (results["class_names"][pair[key]] for key in ("true", "predicted"))
    share = f"{100 * pair['shares'][final]:.0f} % of its {pair['total']:,} test images"
    others = [f"{stages[s]['title']}: {100 * value:.0f} %" for s, value in pair["shares"].items() if s != final]
    images = []
    for image in pair["images"]:
        if image["confidence"] is None:
            text = {"caption": predicted, "alt": f"test image of {predicted}, for comparison"}
        else:
            text = {"caption": f"{image['confidence']:.0%} sure", "alt": f"test image of {true}"}
        images.append({"uri": image["uri"], "small": image["small"], **text})
    return {
        "true": true,
        "true_count": f"{counts[pair['true']]:,} training images",
        "predicted": predicted,
        "predicted_count": f"{counts[pair['predicted']]:,}",
        "share": share + (f" ({'; '.join(others)})" if others else ""),
        "images": images,
    }


def render(**context: Any) -> str:
    """Return the page's HTML. context: title, subtitle, main (a Table), notes, sections, how_title, commands, facts,
    and how_first: whether commands and facts come right after the table, not last.
    """
    return _template().render(listed=sections.MOST_ROWS, **context)


@functools.cache
def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.get_template("page.html")
