"""`--calibrate`: fit a temperature on the hold-out, and show how calibration changes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from ltjax import metrics
from ltjax.calibration import fit_temperature, has_minimum
from ltjax.config import RunConfig, parse
from ltjax.engine import evaluate
from ltjax.engine.experiment import Experiment, set_up
from ltjax.engine.restore import note_images_of_weights
from ltjax.predictor import TEMPERATURE, Model, imported_key, load_as_configured
from ltjax.runs import logs, results
from ltjax.runs.seeds import mean_and_std
from ltjax.runs.trained import evaluates_weights, newest
from ltjax.runs.workdir import check_same_config, named_disk_errors
from ltjax.system import processes, xla
from ltjax.system.files import write_json
from ltjax.system.paths import local
from ltjax.types import UserError

SPLITS = {"holdout": "hold-out", "test": "test images"}


def check(config: Mapping[str, Any]) -> RunConfig:
    """Parse a config, and check what can be checked before training. UserError without a hold-out."""
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
    """Fit a temperature on the hold-out, print its effect, and write `temperature.json`.

    The network is the newest checkpoint of the last stage that has one, or `config.weights` if the workdir holds no
    run. Each replica has a temperature of its own. `--mode=predict` and `ltjax.load` read the file.

    Returns:
      The content of `temperature.json`.

    Raises:
      UserError: There is no hold-out, or its loss has no minimum over temperatures.
    """
    workdir, console, run = local(workdir), console or logs.make_console(), check(config)
    check_same_config(workdir, config)
    imported = evaluates_weights(run, workdir)
    if imported:
        checkpoint = imported_key(run.weights)
    else:
        trained = newest(workdir)
        checkpoint = {"stage": trained.stage.name, "step": trained.step}

    experiment = set_up(run, data_dir, workdir, features_as="images")
    if imported:
        note_images_of_weights(experiment)
    replicas = []
    for replica in range(1 if imported else run.replicas):
        model = load_as_configured(config, workdir, temperature=1.0, replica=replica)
        replicas.append({"seed": run.seed + replica, **_calibrate(model, experiment)})

    summary = {
        **checkpoint,
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
    _show_use(summary, workdir, run.weights if imported else "", console)
    return summary


def _calibrate(model: Model, experiment: Experiment) -> dict[str, Any]:
    """Fit the temperature of one network: {"temperature", "holdout" and "test": see `_before_and_after`}."""
    assert experiment.holdout_set is not None
    sets = {"holdout": experiment.holdout_set, "test": experiment.test_set}
    most = max(images.size for images in sets.values())
    batch_size = evaluate.shared_batch(experiment.config.eval_batch_size, most, experiment.mesh)
    outputs = {name: (_logits(model, images, batch_size), images.host_labels) for name, images in sets.items()}
    logits, labels = outputs["holdout"]
    if not has_minimum(logits, labels):
        right = (logits.argmax(-1) == labels).mean()
        raise UserError(
            f"no temperature is the best for {len(labels)} held-out images of which {right:.0%} are right: "
            + ("hold out more (config.data.holdout)" if right > 0.5 else "train longer")
        )
    temperature = float(fit_temperature(logits, labels))
    return {
        "temperature": temperature,
        **{name: _before_and_after(*output, temperature) for name, output in outputs.items()},
    }


def _logits(model: Model, images: evaluate.EvaluationSet | evaluate.StoredSet, batch_size: int) -> np.ndarray:
    """Compute the logits [N, C] of a set of images, all sets in batches of one size: the network is compiled once."""
    parts = []
    for batch in (batch for batches, _ in images.parts() for batch in np.asarray(batches)):
        missing = [(0, batch_size - len(batch))] + [(0, 0)] * (batch.ndim - 1)
        parts.append(model.logits(np.pad(batch, missing))[: len(batch)])
    return np.concatenate(parts)[: images.size]


@xla.jit
def _ece_and_nll(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    outcome = evaluate.outcome(logits, labels)
    ece = metrics.calibration(outcome["confidences"], outcome["predictions"] == labels).ece
    return {"ece": ece, "nll": outcome["losses"].mean()}


def _before_and_after(logits: np.ndarray, labels: np.ndarray, temperature: float) -> dict[str, Any]:
    """Compute {"accuracy", "before" and "after": {"ece", "nll"}} from logits [N, C]."""
    figures: dict[str, Any] = {"accuracy": float((logits.argmax(-1) == labels).mean())}
    for when, scale in (("before", 1.0), ("after", temperature)):
        figures[when] = jax.tree.map(float, _ece_and_nll(logits / np.float32(scale), labels))
    return figures


def show(summary: Mapping[str, Any], console: Console) -> None:
    """Print the content of `temperature.json` as a table."""
    replicas = summary["replicas"]

    def mean(values: list[float], digits: int) -> str:
        figure = mean_and_std(values)
        spread = "" if figure.std is None else f" ± {figure.std:.{digits}f}"
        return f"{figure.mean:.{digits}f}{spread}"

    temperature = mean([replica["temperature"] for replica in replicas], 3)
    table = Table(title=f"Stage {summary['stage']}, step {summary['step']}: temperature {temperature}")
    for column in ("", "images", "ECE before (%)", "after", "NLL before", "after"):
        table.add_column(column, justify="right" if column else "left")
    for name, title in SPLITS.items():
        cells = [
            mean([scale * replica[name][when][figure] for replica in replicas], digits)
            for figure, scale, digits in (("ece", 100, 1), ("nll", 1, 3))
            for when in ("before", "after")
        ]
        table.add_row(title, f"{summary[f'num_{name}']:,}", *cells)
    console.print(table)


def _show_use(summary: Mapping[str, Any], workdir: Path, weights: str, console: Console) -> None:
    """Print whether the temperature helps, and what uses it. weights: the imported weights, "" if a run was trained."""
    replicas = summary["replicas"]
    use = "--mode=predict and ltjax.load divide logits by it from now on."
    if weights:
        console.print("If these weights were trained on the held-out images, the temperature is too low.")
        in_python = f"ltjax.load({weights!r}, temperature={replicas[0]['temperature']:.6g})"
        use = f"--mode=predict with this --workdir divides logits by it from now on; in Python, {in_python}."
    before, after = (np.mean([replica["test"][when]["nll"] for replica in replicas]) for when in ("before", "after"))
    if after >= before:
        few = f"{summary['num_holdout']} held-out images are few"
        console.print(f"On the test images it is no better: {few}, or the network was calibrated already.")
    console.print(f"Written to {workdir / TEMPERATURE}; {use} Delete the file to undo it.", markup=False)
