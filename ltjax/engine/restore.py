"""Read a run's checkpoints or imported weights into an experiment, and evaluate them."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from ltjax.config import RunConfig, StageConfig
from ltjax.engine.experiment import (
    Experiment,
    build_stage,
    class_means_for,
    evaluate_set,
    fresh_variables,
    seeds,
    set_up,
    state_shapes,
)
from ltjax.engine.stage import CompiledStage, TrainState, steps_done
from ltjax.runs.archive import is_archive, read_archive
from ltjax.runs.checkpoint import Checkpoints, StageRecord
from ltjax.runs.evaluated import EMA
from ltjax.runs.trained import as_computed, evaluates_weights
from ltjax.runs.weights import check_classifier, folder_of, load_weights, taken, with_weights
from ltjax.runs.workdir import check_same_images, no_checkpoint
from ltjax.types import UserError, Variables


class Restored(NamedTuple):
    """A stage with its newest checkpoint."""

    compiled: CompiledStage
    state: TrainState
    record: StageRecord


def restore(experiment: Experiment, stage: StageConfig, workdir: Path) -> Restored | None:
    """Read the newest undamaged checkpoint of a stage; None if it has none. An archive holds the last stage only."""
    compiled, run = build_stage(experiment, stage), experiment.config
    if is_archive(workdir):
        archive = read_archive(workdir)
        if stage.name != archive.stage:
            return None
        state = compiled.init(seeds(run), fresh_variables(experiment, stage, taken(archive.weights)))
        net = EMA if stage.ema else "net"  # which one is evaluated
        variables = with_weights(state.variables, archive.weights, net=net)
        extra = archive.weights.variables.params.get("method")
        variables = variables._replace(params={**variables.params, **({"method": extra} if extra else {})})
        state = state._replace(step=jnp.full_like(state.step, archive.step), variables=variables)
        return Restored(compiled, state, archive.record)
    with Checkpoints(workdir / "checkpoints" / stage.name) as checkpoints:
        restored = checkpoints.restore(state_shapes(experiment, compiled), move_damaged=False)
    return None if restored is None else Restored(compiled, *restored)


def restored_stages(
    experiment: Experiment, workdir: Path, *, last_first: bool = False
) -> Iterator[tuple[StageConfig, Restored]]:
    """Yield the stages that have a checkpoint, each with its newest undamaged one. UserError if there is none."""
    stages, has_checkpoint = list(experiment.config.stages.values()), False
    for stage in reversed(stages) if last_first else stages:
        if (restored := restore(experiment, stage, workdir)) is not None:
            has_checkpoint = True
            yield stage, restored
    if not has_checkpoint:
        raise no_checkpoint(workdir)


class Imported(NamedTuple):
    """`config.weights`, to be evaluated in a workdir that holds no run."""

    experiment: Experiment  # with the network that the weights belong to
    stage: StageConfig  # the last one, which says how to evaluate
    variables: Variables


def import_weights(run: RunConfig, workdir: Path, data_dir: str | Path | None) -> Imported | None:
    """Set up the evaluation of `config.weights`; None if the workdir holds a run, or the config names no weights."""
    if not evaluates_weights(run, workdir):
        return None
    weights = load_weights(run.weights, run.weights_sha256)
    check_classifier(weights, run.weights)
    experiment = set_up(run._replace(model=as_computed(weights, run)), data_dir)
    note_images_of_weights(experiment)
    last = list(run.stages.values())[-1]
    stage = last._replace(title="Imported weights", epochs=0, surgery={}, evaluate_net="net")
    return Imported(experiment, stage, with_weights(fresh_variables(experiment, last, taken(weights)), weights))


def note_images_of_weights(experiment: Experiment) -> None:
    """Print a note if `config.weights` is an archive of a run that began with other images."""
    archive = folder_of(experiment.config.weights)
    if is_archive(archive):
        try:
            check_same_images(archive, experiment.description)
        except UserError as error:
            print(f"note: some test images may have been trained on: {error}", file=sys.stderr)


def evaluate_restored(experiment: Experiment, stage: StageConfig, restored: Restored) -> dict[str, Any]:
    """Evaluate a checkpoint on the test images: {"epoch": counted from 1, "step", "test": figures}."""
    step, variables = steps_done(restored.state), restored.state.variables
    means = class_means_for(experiment, stage, variables)
    test = evaluate_set(experiment, stage, variables, experiment.test_set, means)
    return {"epoch": -(-step // restored.compiled.steps_per_epoch), "step": step, "test": test}
