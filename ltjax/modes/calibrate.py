"""`--calibrate`: a temperature fitted on the hold-out, and what it does to the calibration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from ltjax import metrics
from ltjax.calibration import fit_temperature, has_minimum
from ltjax.config import RunConfig, parse
from ltjax.engine import evaluate
from ltjax.engine.experiment import set_up
from ltjax.predictor import TEMPERATURE, Model, imported_key, load_as_configured
from ltjax.runs import logs, results
from ltjax.runs.checkpoint import write_json
from ltjax.runs.trained import newest
from ltjax.runs.workdir import check_same_config, named_disk_errors
from ltjax.system import processes
from ltjax.system.paths import local
from ltjax.types import UserError

SPLITS = {"holdout": "hold-out", "test": "test images"}


def check(config: Mapping[str, Any]) -> RunConfig:
    """What can be said before anything is trained or read. Raises: UserError without a hold-out, and of several
    processes."""
    run = parse(config)
    if processes.several():
        raise UserError("--calibrate works in one process, with all of its devices: start it on one machine")
    if not run.data.holdout:
        raise UserError(
            "config.data.holdout = 0: a temperature is fitted on images that training did not see; train with the "
            "config's argument holdout=5 (--config=FILE:holdout=5: images of each class, fewer than the rarest class "
            "has) and another --workdir"
        )
    return run


def calibrate_workdir(
    config: Mapping[str, Any],
    workdir: str | Path,
    data_dir: str | Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Fit the temperature of the newest checkpoint of the last stage that has one, or of `config.weights` where the
    workdir holds no run, on the images that were held out; print what it does there and to the test images, and keep
    it in `temperature.json`, for `--mode=predict` and `ltjax.load`. Each replica has its own.

    Returns: what `temperature.json` holds.
    Raises: UserError without a hold-out, and where no temperature is the best.
    """
    workdir, console, run = local(workdir), console or logs.make_console(), check(config)
    check_same_config(workdir, config)
    alone = not (workdir / "config.json").exists() and bool(run.weights)
    about = imported_key(run.weights) if alone else _key(workdir)
    experiment = set_up(run, data_dir)
    sets = {"holdout": experiment.holdout_set, "test": experiment.test_set}
    replicas: list[dict[str, Any]] = []
    for replica in range(1 if alone else run.replicas):
        model = load_as_configured(config, workdir, temperature=1.0, replica=replica)
        found = {name: (_logits(model, held), held.host_labels) for name, held in sets.items() if held is not None}
        logits, labels = found["holdout"]
        if not has_minimum(logits, labels):
            right = (logits.argmax(-1) == labels).mean()
            raise UserError(
                f"no temperature is the best for {len(labels)} held-out images of which {right:.0%} are right: "
                + ("hold out more (config.data.holdout)" if right > 0.5 else "train longer")
            )
        temperature = float(fit_temperature(logits, labels))
        each = {name: _before_and_after(*pair, temperature) for name, pair in found.items()}
        replicas.append({"seed": run.seed + replica, "temperature": temperature, **each})
    summary = {
        **about,
        "num_holdout": len(experiment.split.holdout),
        "num_test": experiment.test_set.size,
        "replicas": replicas,
        "class_names": list(experiment.class_names),
        **results.provenance(experiment.mesh, results.git_commit()),
    }
    with named_disk_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / TEMPERATURE, summary)
    show(summary, console)
    if alone:
        console.print("Whether these weights were trained on the images held out here, nobody can tell: if so, they")
        console.print("are surer there than on new images, and the temperature is too low.")
        in_python = f"ltjax.load({run.weights!r}, temperature={replicas[0]['temperature']:.6g})"
        users = f"--mode=predict with this --workdir divides logits by it from now on; in Python, {in_python}."
    else:
        users = "--mode=predict and ltjax.load divide logits by it from now on."
    before, after = (np.mean([one["test"][when]["nll"] for one in replicas]) for when in ("before", "after"))
    if after >= before:
        few = f"{len(experiment.split.holdout)} held-out images are few"
        console.print(f"On the test images it is no better: {few}, or the network was calibrated already.")
    console.print(f"Kept in {workdir / TEMPERATURE}; {users} Delete the file to undo it.", markup=False)
    return summary


def _key(workdir: Path) -> dict[str, Any]:
    trained = newest(workdir)
    return {"stage": trained.stage.name, "step": trained.step}


def _logits(model: Model, held: evaluate.EvaluationSet | evaluate.StoredSet) -> np.ndarray:
    parts = [model.logits(batch) for images, _ in held.parts() for batch in np.asarray(images)]
    return np.concatenate(parts)[: held.size]


def _before_and_after(logits: np.ndarray, labels: np.ndarray, temperature: float) -> dict[str, Any]:
    """{"accuracy", "before": {"ece", "nll"}, "after": ...}; logits: [N, C]."""
    found: dict[str, Any] = {"accuracy": float((logits.argmax(-1) == labels).mean())}
    for name, scale in (("before", 1.0), ("after", temperature)):
        outcome = evaluate.outcome(jnp.asarray(logits) / np.float32(scale), jnp.asarray(labels))
        ece = metrics.calibration(outcome["confidences"], outcome["predictions"] == labels).ece
        found[name] = {"ece": float(ece), "nll": float(outcome["losses"].mean())}
    return found


def show(summary: Mapping[str, Any], console: Console) -> None:
    """The table of what `temperature.json` holds."""
    replicas = summary["replicas"]

    def over(values: list[float], digits: int) -> str:
        spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{np.mean(values):.{digits}f}{spread}"

    temperature = over([one["temperature"] for one in replicas], 3)
    table = Table(title=f"Stage {summary['stage']}, step {summary['step']}: temperature {temperature}")
    for column in ("", "images", "ECE before (%)", "after", "NLL before", "after"):
        table.add_column(column, justify="right" if column else "left")
    for name, title in SPLITS.items():
        cells = [
            over([scale * one[name][when][figure] for one in replicas], digits)
            for figure, scale, digits in (("ece", 100, 1), ("nll", 1, 3))
            for when in ("before", "after")
        ]
        table.add_row(title, f"{summary[f'num_{name}']:,}", *cells)
    console.print(table)
