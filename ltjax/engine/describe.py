"""Describe an experiment in a few lines, before training and in a dry run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ltjax import optim
from ltjax.engine.experiment import Experiment, fresh_shapes
from ltjax.engine.stage import CompiledStage
from ltjax.methods.criteria import weights_by_name
from ltjax.runs.weights import Weights, is_weights, load_weights, surplus
from ltjax.system import parallel, xla


def show(experiment: Experiment, compiled: Mapping[str, CompiledStage], workdir: Path, console: Console) -> None:
    """Print data, groups of classes, devices and stages, a line each."""
    _show_data(experiment, console)
    _show_devices(experiment, workdir, console)
    run = experiment.config
    sizes = {path: leaf.size for path, leaf in optim.flatten(experiment.shapes.params).items()}
    total = sum(sizes.values())
    for name, stage in run.stages.items():
        trained = sum(sizes.get(path, 0) for path in compiled[name].trained)
        frozen = sorted(set(sizes) - set(compiled[name].trained))
        rest = f" (all but {frozen[0]})" if len(frozen) == 1 else ""
        steps = f"{stage.epochs} epochs of {compiled[name].steps_per_epoch} steps"
        length = f"{steps}, {trained:,} of {total:,} parameters train{rest}" if stage.epochs else "no training"
        what = ", ".join(filter(None, (stage.surgery.get("name"), length)))
        origin = f"weights {run.weights}" if run.weights and stage.start_from == "scratch" else stage.start_from
        console.print(f"stage {name} ({stage.title}): {what}, from {origin}")
    if is_weights(run.weights):
        _show_weights(experiment, load_weights(run.weights), console)


def _show_data(experiment: Experiment, console: Console) -> None:
    config, counts = experiment.config.data, experiment.split.class_counts
    also_trained_on = experiment.description["also_trained_on"].items()
    copies = {name: f", {n} of them training images, too" if n else "" for name, n in also_trained_on}
    held_out = f", {len(experiment.split.holdout)} held out{copies['holdout']}" if config.holdout else ""
    console.print(
        f"{config.name}: {counts.sum():,} training images of {len(counts)} classes, {counts.max()} down to "
        f"{counts.min()} a class (imbalance factor {counts.max() / counts.min():.4g}){held_out}; "
        f"{experiment.test_set.size:,} test images{copies['test']}"
    )
    for group, member in experiment.groups.items():
        if member.any():
            console.print(f"  {group}: {_classes(np.flatnonzero(member), counts, experiment.class_names)}")

    if experiment.config.class_weights:
        console.print(f"  class weights: {_class_weights(experiment)}", highlight=False)


def _class_weights(experiment: Experiment, shown: int = 8) -> str:
    """Describe the factors on the losses: of named classes, or the largest and smallest of automatic ones."""
    asked, names = experiment.config.class_weights, experiment.class_names
    if isinstance(asked, Mapping):
        listed = ", ".join(f"{name} {weight:g}" for name, weight in list(asked.items())[:shown])
        return listed + (", ..." if len(asked) > shown else "") + "; 1 for other classes"
    weights = np.array(weights_by_name(asked, names, experiment.split.class_counts))
    low, high = int(weights.argmin()), int(weights.argmax())
    return f"{asked}, from {weights[low]:.3g} ({names[low]}) to {weights[high]:.3g} ({names[high]})"


def _show_weights(experiment: Experiment, weights: Weights, console: Console) -> None:
    """Print what training starts from, and where the config's images differ from those of the weights."""
    run, side = experiment.config, experiment.image_shape[0]
    licence = f", licence {weights.licence}" if weights.licence else ""
    parts = f", {', '.join(run.weights_parts)} alone" if run.weights_parts else ""
    console.print(f"weights {run.weights}{parts}{licence}: images of {side} pixels" + _normalisation(run.model))
    given = {key: run.model.get(key) for key in ("mean", "std") if key in weights.settings}
    if given != (theirs := {key: weights.settings[key] for key in given}):
        console.print(f"note: these weights are for images with{_normalisation(theirs)}: set config.model.mean and std")
    if ignored := surplus(fresh_shapes(experiment), weights):
        console.print(f"{', '.join(ignored)} of these weights are ignored; a new block replaces them")


def _normalisation(settings: Mapping[str, Any]) -> str:
    values = {key: tuple(round(x, 4) for x in settings[key]) for key in ("mean", "std") if key in settings}
    return "".join(f", {key} {value}" for key, value in values.items())


def _show_devices(experiment: Experiment, workdir: Path, console: Console) -> None:
    run, devices = experiment.config, experiment.mesh.devices.flat
    arithmetic = xla.arithmetic(experiment.nets["net"].dtype)
    console.print(f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}): {arithmetic}")
    console.print(f"workdir {workdir}")
    if run.replicas > 1:
        groups = experiment.mesh.shape[parallel.REPLICA_AXIS]
        console.print(
            f"{run.replicas} replicas, seeds {run.seed} to {run.seed + run.replicas - 1}, on {groups} group(s) of "
            f"{len(devices) // groups} device(s)"
        )


def _classes(members: np.ndarray, counts: np.ndarray, names: tuple[str, ...], shown: int = 8) -> str:
    """Describe a group: its numbers of classes and images, names and counts of its largest classes."""
    largest = members[np.argsort(-counts[members], kind="stable")][:shown]
    listed = ", ".join(f"{names[c]} {counts[c]}" for c in largest) + (", ..." if len(members) > shown else "")
    return f"{len(members):,} classes, {counts[members].sum():,} images: {listed}"
