"""What a run has come to: its newest checkpoint, or its archive, and the weights in it. Needs no data set."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from ltjax import surgery
from ltjax.config import RunConfig, StageConfig, parse
from ltjax.interop.weights import ARRAYS, Weights, load_weights
from ltjax.runs.checkpoint import complete_steps, read_json
from ltjax.runs.workdir import no_checkpoint
from ltjax.types import UserError, Variables, one_line


class Trained(NamedTuple):
    """The last stage of a run that has a checkpoint, and the step of the newest one."""

    run: RunConfig
    stage: StageConfig
    step: int


def newest(workdir: Path) -> Trained:
    """Find what the run in a workdir, or in an archive, has come to.

    Raises:
      UserError: There is no run, or none that has trained.
    """
    if not (workdir / "config.json").is_file():
        raise UserError(f"{workdir} is neither a run's workdir (no config.json) nor a folder of weights")
    run = parse(read_json(workdir / "config.json"))
    if is_archive(workdir):
        archive = read_archive(workdir)
        return Trained(run, run.stages[archive.stage], archive.step)
    steps = {name: complete_steps(workdir / "checkpoints" / name) for name in run.stages}
    trained = [name for name in run.stages if steps[name]]
    if not trained:
        raise no_checkpoint(workdir)
    return Trained(run, run.stages[trained[-1]], steps[trained[-1]][-1])


def variables_of(workdir: Path, trained: Trained) -> Variables:
    """The variables of what `newest` has found in a workdir or an archive, as they were trained, on one device."""
    if is_archive(workdir):
        return read_archive(workdir).weights.variables
    return _restore(workdir / "checkpoints" / trained.stage.name / str(trained.step))


def _restore(checkpoint: Path) -> Variables:
    """The networks' variables in a checkpoint, on one device."""
    path = checkpoint.absolute() / "state"
    on = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    chatty = logging.getLogger("absl")  # Orbax misses a file that is of no use here
    level = chatty.level
    chatty.setLevel(logging.ERROR)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            there: Any = checkpointer.metadata(path).item_metadata
            there = getattr(there, "tree", there)
            like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on), there)
            variables = checkpointer.restore(path, like)["variables"]
    except Exception as error:  # Orbax and TensorStore pass damage on as many types
        raise UserError(f"cannot read the checkpoint {path} ({one_line(error)})") from error
    finally:
        chatty.setLevel(level)
    return Variables(variables["params"], variables.get("stats") or {}, {})


def weights_of(workdir: Path, trained: Trained, *, net: str = "net", replica: int = 0) -> Weights:
    """The weights of what `newest` has found in a workdir, as the stage's evaluation has them."""
    run = trained.run
    settings = dict(run.guide if net == "guide" else run.model)
    if net not in ("net", "guide") or not settings:
        raise UserError(f"--net={net}: the run has {'net and guide' if run.guide else 'net alone'}")
    if not 0 <= replica < run.replicas:
        raise UserError(f"--replica={replica}: the run has {run.replicas}, counted from 0")
    own = variables_of(workdir, trained)
    own = jax.tree.map(lambda x: x[replica], own) if run.replicas > 1 else own
    if net not in own.params:
        raise UserError(f"--net={net}: {workdir} is the archive of a run, which has net alone")
    own = surgery.as_evaluated(own, trained.stage.eval_classifier) if net == "net" else own
    variables = Variables({"net": own.params[net]}, {"net": own.stats.get(net, {})}, {})
    num_classes = own.params[net]["classifier"]["kernel"].shape[-1]
    return Weights(jax.tree.map(np.asarray, variables), settings, num_classes)


class Archived(NamedTuple):
    """What an archive has of a run."""

    stage: str  # the last one
    step: int
    weights: Weights
    record: dict[str, Any]  # as beside a checkpoint


def is_archive(folder: Path) -> bool:
    """Whether a folder was written by `archive`, and is no workdir."""
    return (
        all((folder / name).is_file() for name in ("config.json", "results.json", ARRAYS))
        and not (folder / "checkpoints").exists()
    )


def read_archive(folder: Path) -> Archived:
    """Raises: UserError where results.json is not that of an archive."""
    results = read_json(folder / "results.json")
    try:
        stage = results["final_stage"]
        summary = results["stages"][stage]
        evaluations = [{**each, "test": dict(each)} for each in summary["evaluations"]]
        evaluations[-1]["test"] = summary
        step: int = summary["evaluations"][-1]["step"]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/results.json is not what ltjax writes there (no {error}): make it anew") from error
    record = {"seconds": summary["seconds"], "train_seconds": 0.0, "train_steps": 0, "evaluations": evaluations}
    return Archived(stage, step, load_weights(folder), record)
