"""Make results.json, and the table that a run ends with."""

import contextlib
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table

from ltjax.config import RunConfig, StageConfig

if TYPE_CHECKING:  # `ltjax.compare` starts without jax
    from jax.sharding import Mesh

    from ltjax.runs.checkpoint import StageRecord

GROUPS = ("all", "many", "medium", "few")
LEGACY_BEST = "Legacy best: the best epoch as picked on the test set, which no fair comparison may use."
PACKAGES = ("ltjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    installed = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def git_commit() -> str | None:
    """Return the commit of the ltjax checkout, with "-dirty" if files differ from it; None outside a checkout."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not (root / ".git").exists():
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def command() -> str:
    """Return the command line of this process."""
    return shlex.join(["python", *sys.argv])


def in_words(ranges: Mapping[str, Sequence[int]]) -> str:
    """Format {group: (fewest, most training images of a class)} as "many 359 to 1,000, medium 77 to 215, few 10"."""
    return ", ".join(f"{group} {low:,}" + f" to {high:,}" * (low < high) for group, (low, high) in ranges.items())


def print_table(results: dict[str, Any], console: Console) -> None:
    """Print a row for each stage: its figures at its last epoch, in %."""
    console.print(table(results))
    best, epochs = results["best_on_test"], results["stages"][results["final_stage"]]["epochs"]
    if epochs:
        console.print(
            f"Legacy figure, best epoch picked on the test set: {best['accuracy']:.1%} "
            f"(epoch {best['epoch']} of {epochs}).",
            style="dim",
        )


class Column(NamedTuple):
    """A column of the tables of a run, its report and `ltjax.compare`, in addition to the accuracies of groups."""

    key: str  # of the figure in a stage's summary, and in `ltjax.compare.Row.figures`
    heading: str
    note: str = ""  # below the table of `ltjax.compare`
    read: Callable[[Mapping[str, Any]], float | None] | None = None  # if the figure lies deeper in the summary
    shown: Callable[[Mapping[str, Any]], bool] = lambda results: True
    best: Callable[[Sequence[float]], float] = max

    @property
    def title(self) -> str:
        """Return the heading in one line."""
        return " ".join(self.heading.split())

    def figure(self, summary: Mapping[str, Any]) -> float | None:
        """Return the figure of a stage's summary, or of its "std"."""
        return self.read(summary) if self.read else summary.get(self.key)


def unequal_test_set(results: Mapping[str, Any]) -> bool:
    """Return whether classes have different numbers of test images, so that means over classes are not over images."""
    return len(set(results.get("test_class_counts", ())) - {0}) > 1


COLUMNS = (
    Column("balanced_accuracy", "balanced\n", "balanced: mean of the classes' accuracies.", shown=unequal_test_set),
    Column("macro_f1", "macro\nF1", "macro F1: mean of the classes' F1 scores.", shown=unequal_test_set),
    Column("ece", "ECE\n15 bins", best=min),
    Column(
        "nearest_mean",
        "nearest\nmean",
        "nearest mean: accuracy over all classes of the nearest class mean, instead of the classifier.",
        read=lambda stage: stage.get("nearest_mean", {"accuracy": {}})["accuracy"].get("all"),
        shown=lambda results: any("nearest_mean" in stage for stage in results["stages"].values()),
    ),
)


def table(results: dict[str, Any]) -> Table:
    sizes, ranges = results["group_sizes"], results.get("group_counts", {})
    seeds = f", mean ± std of {len(results['seeds'])} seeds" if "seeds" in results else ""
    columns = [column for column in COLUMNS if column.shown(results)]
    table = Table(
        title=f"{results['name']}: test accuracy and calibration, last epoch (%){seeds}",
        caption=f"Training images a class: {in_words(ranges)}." if ranges else None,
    )
    table.add_column("")
    for group in GROUPS:
        size = f"\n{sizes[group]} classes" if group in sizes else "\n"
        table.add_column(f"{group}{size}", justify="right")
    for heading in (*(column.heading for column in columns), "seconds\n"):
        table.add_column(heading, justify="right")
    for stage in results["stages"].values():
        cells = [percent(column.figure(stage), column.figure(stage.get("std", {}))) for column in columns]
        table.add_row(stage["title"], *group_cells(stage), *cells, f"{stage['seconds']:.0f}")
    return table


def group_cells(figures: Mapping[str, Any]) -> list[str]:
    """Format the accuracies of `GROUPS`, with their deviations if there are several seeds."""
    spread = figures.get("std", {}).get("accuracy", {})
    return [percent(figures["accuracy"].get(group), spread.get(group)) for group in GROUPS]


def attack_cells(test: Mapping[str, Any]) -> list[str]:
    """Format the figures of a test of `--mode=attack`: accuracies of `GROUPS`, and ECE."""
    return [*group_cells(test), percent(test["ece"], test.get("std", {}).get("ece"))]


def accuracy_after(test: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Format the accuracies after each of AutoAttack's attacks but the last: [("APGD-CE", "47.3"), ...]."""
    return [(attack.upper(), percent(share)) for attack, share in list(test.get("robust_after", {}).items())[:-1]]


def percent(value: float | None, spread: float | None = None) -> str:
    """Format a share in %: "47.3", "47.3 ± 0.4", or "-" for None."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def content(
    experiment: Any, stages: Mapping[str, StageConfig], records: Mapping[str, "StageRecord"], commit: str | None
) -> dict[str, Any]:
    """Make the content of results.json: every stage's last epoch, and the final stage's again at the top.

    Args:
      experiment: An `ltjax.engine.experiment.Experiment`.
      stages: Those that have a checkpoint.
      commit: Of ltjax, when the process started.
    """
    run, counts = experiment.config, experiment.split.class_counts
    test_counts = Counter(experiment.test_set.host_labels.tolist())
    summaries = {name: _stage_summary(run, stage, records[name]) for name, stage in stages.items()}
    final = list(summaries)[-1]
    groups = {name: counts[member] for name, member in experiment.groups.items() if member.any()}
    return {
        "name": run.name,
        "final_stage": final,
        **{key: value for key, value in summaries[final].items() if key not in ("title", "epochs", "evaluations")},
        "seconds": sum(summary["seconds"] for summary in summaries.values()),
        "stages": summaries,
        "seed": run.seed,
        **({"seeds": [run.seed + r for r in range(run.replicas)]} if run.replicas > 1 else {}),
        "class_names": list(experiment.class_names),
        "class_counts": counts.tolist(),
        "test_class_counts": [test_counts[c] for c in range(len(counts))],
        "group_sizes": {"all": len(counts), **{name: len(counts) for name, counts in groups.items()}},
        "group_counts": {name: [int(counts.min()), int(counts.max())] for name, counts in groups.items()},
        **provenance(experiment.mesh, commit),
    }


def _stage_summary(run: RunConfig, stage: StageConfig, record: "StageRecord") -> dict[str, Any]:
    evaluations, seconds = record["evaluations"], record["train_seconds"]
    summary: dict[str, Any] = {
        "title": stage.title,
        "epochs": stage.epochs,
        **evaluations[-1]["test"],
        "best_on_test": _best_on_test(evaluations, lambda test: test),
        "evaluations": [
            {"epoch": each["epoch"], "step": each["step"], **of_epoch(each["test"], replicas=False)}
            for each in evaluations
        ],
        "seconds": record["seconds"],
        "images_per_second": run.batch_size * run.replicas * record["train_steps"] / seconds if seconds else None,
        "data_wait_share": record.get("wait_seconds", 0.0) / seconds if seconds else None,
    }
    for number, replica in enumerate(summary.get("replicas", [])):
        replica["best_on_test"] = _best_on_test(evaluations, lambda test, r=number: test["replicas"][r])
    if "surgery" in record:
        summary["surgery"] = {**stage.surgery, **record["surgery"]}
    if not stage.epochs and not record.get("surgery", {}).get("calibrated", True):
        for part in (summary, *summary.get("replicas", [])):
            part.update(ece=None, mce=None)
    if "holdout" in evaluations[-1]:
        best = max(evaluations, key=lambda each: each["holdout"]["accuracy"]["all"])
        summary["best_on_holdout"] = {
            "accuracy": best["test"]["accuracy"]["all"],
            "holdout_accuracy": best["holdout"]["accuracy"]["all"],
            "epoch": best["epoch"],
        }
    return summary


def of_epoch(figures: Mapping[str, Any], *, replicas: bool = True) -> dict[str, Any]:
    """Drop the arrays of an evaluation, such as the figures of each class. Only those of the last epoch are used.

    Args:
      figures: See `ltjax.engine.evaluate.figures_of` and `over_seeds`.
      replicas: Keep the figures of each replica.
    """
    kept: dict[str, Any] = {}
    for key, value in figures.items():
        if key == "replicas" and replicas:
            kept[key] = [of_epoch(replica) for replica in value]
        elif isinstance(value, Mapping):
            kept |= {key: inner} if (inner := of_epoch(value)) else {}
        elif not isinstance(value, list) and key != "num_images":
            kept[key] = value
    return kept


def _best_on_test(evaluations: Sequence[Mapping[str, Any]], part: Callable[[Any], Any]) -> dict[str, Any]:
    best = max(evaluations, key=lambda each: part(each["test"])["accuracy"]["all"])
    return {"accuracy": part(best["test"])["accuracy"]["all"], "epoch": best["epoch"]}


def provenance(mesh: "Mesh", commit: str | None) -> dict[str, Any]:
    """Describe the origin of figures. `commit` is that of ltjax when the process started."""
    device = mesh.devices.flat[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "num_devices": int(mesh.devices.size),
        "versions": versions(),
        "git_commit": commit,
        "command": command(),
    }


def robustness_table(name: str, summary: dict[str, Any]) -> Table:
    """Make a table with a row for each test of `--mode=attack`, and for each of AutoAttack's attacks."""
    where = f"{summary['norm']} radius {summary['epsilon']:.4g}, {summary['num_images']:,} test images"
    table = Table(title=f"{name}: accuracy and calibration under attack (%), {where}")
    table.add_column("")
    for group in GROUPS:
        table.add_column(group, justify="right")
    table.add_column("ECE", justify="right")
    table.add_column("seconds", justify="right")
    for test in summary["tests"].values():
        for attack, accuracy in accuracy_after(test):
            table.add_row(f"  after {attack}", accuracy, *[""] * (len(GROUPS) + 1), style="dim")
        table.add_row(test["title"], *attack_cells(test), f"{test['seconds']:.0f}")
    return table
