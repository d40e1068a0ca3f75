"""Find a run's newest checkpoint, or its archive, and read the weights. This needs no data set."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from ltjax.config import RunConfig, StageConfig, parse
from ltjax.runs.archive import is_archive, read_archive
from ltjax.runs.checkpoint import complete_steps
from ltjax.runs.evaluated import as_evaluated
from ltjax.runs.weights import Weights
from ltjax.runs.workdir import no_checkpoint
from ltjax.system.files import holding, load_json, read_json
from ltjax.system.hashing import fingerprint
from ltjax.system.wording import one_line
from ltjax.types import UserError, Variables

TEMPERATURE = "temperature.json"  # written by `ltjax.modes.calibrate`
NAMED_IN = ("split.json", "results.json", "eval.json", TEMPERATURE)  # files that may hold the names of classes


class Trained(NamedTuple):
    """The last stage of a run that has a checkpoint, and the step of the newest one."""

    run: RunConfig
    stage: StageConfig
    step: int


def newest(workdir: Path) -> Trained:
    """Find the newest checkpoint of the run in a workdir or an archive. UserError if there is none yet.

    A damaged one is an error here; training and --mode=eval fall back to an older one.
    """
    if not (workdir / "config.json").is_file():
        raise UserError(f"{workdir} is neither a run's workdir (no config.json) nor a folder of weights")
    run = parse(read_json(workdir / "config.json"))
    if is_archive(workdir):
        archive = read_archive(workdir)
        if archive.stage not in run.stages:
            raise UserError(f"{workdir}/results.json has a stage that config.json lacks: write the archive again")
        return Trained(run, run.stages[archive.stage], archive.step)
    steps = {name: complete_steps(workdir / "checkpoints" / name) for name in run.stages}
    trained = [name for name in run.stages if steps[name]]
    if not trained:
        raise no_checkpoint(workdir)
    return Trained(run, run.stages[trained[-1]], steps[trained[-1]][-1])


def evaluates_weights(run: RunConfig, workdir: Path) -> bool:
    """Return whether to evaluate `config.weights`: the workdir holds no run, and the weights are a whole network."""
    return bool(run.weights) and not run.weights_parts and not (workdir / "config.json").exists()


def as_computed(weights: Weights, run: RunConfig) -> dict[str, Any]:
    """Return the settings of imported weights' network, with the precision and platform of a run."""
    return {**weights.settings, **{key: run.model[key] for key in ("dtype", "platform", "remat") if key in run.model}}


def variables_of(workdir: Path, trained: Trained) -> Variables:
    """Read the trained variables that `newest` found, onto one device."""
    if is_archive(workdir):
        return read_archive(workdir).weights.variables
    return _restore(workdir / "checkpoints" / trained.stage.name / str(trained.step))


def _restore(checkpoint: Path) -> Variables:
    """Read the networks' variables from a checkpoint, onto one device. UserError if any bit has changed."""
    path = checkpoint.absolute() / "state"
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    logger = logging.getLogger("absl")  # Orbax warns of a missing file that is not needed here
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            metadata: Any = checkpointer.metadata(path).item_metadata
            metadata = getattr(metadata, "tree", metadata)
            target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), metadata)
            state = checkpointer.restore(path, target)
        variables = state["variables"]
        saved = load_json(path.with_name("record") / "metadata")["fingerprint"]
        parts = [variables.get(name) for name in Variables._fields]
        # Orbax returns dicts. A fingerprint numbers the arrays in the order of `TrainState`.
        actual = int(fingerprint((state["step"], state["seed"], parts, state["opt_state"])))
        if actual != saved:
            raise ValueError(f"fingerprint {actual:08x}, saved as {saved:08x}")
    except Exception as error:  # damage has many exception types
        raise UserError(f"cannot read the checkpoint {path} ({one_line(error)})") from error
    finally:
        logger.setLevel(level)
    return Variables(variables["params"], variables.get("stats") or {}, {})


def weights_of(workdir: Path, trained: Trained, *, net: str = "net", replica: int = 0) -> Weights:
    """Read the weights that `newest` found, changed as the stage's evaluation changes them (`eval_classifier`).

    Args:
      net: "net" or "guide".
      replica: Which of the run's replicas, from 0.

    Raises:
      UserError: The run has no such network or replica, or the checkpoint is damaged.
    """
    run = trained.run
    settings = dict(run.guide if net == "guide" else run.model)
    if net not in ("net", "guide") or not settings:
        raise UserError(f"--net={net}: the run has {'net and guide' if run.guide else 'net alone'}")
    if not 0 <= replica < run.replicas:
        raise UserError(f"--replica={replica}: the run has {run.replicas}, counted from 0")
    variables = variables_of(workdir, trained)
    if run.replicas > 1:
        variables = jax.tree.map(lambda x: x[replica], variables)
    if net not in variables.params:
        raise UserError(f"--net={net}: {workdir} is the archive of a run, which has net alone")
    if net == "net":
        variables = as_evaluated(variables, trained.stage.eval_classifier)
    params, stats = variables.params[net], variables.stats.get(net, {})
    variables = jax.tree.map(np.asarray, Variables({"net": params}, {"net": stats}, {}))
    return Weights(variables, settings, params["classifier"]["kernel"].shape[-1])


def class_names(workdir: Path, num_classes: int) -> tuple[str, ...]:
    """Read the names of classes from a workdir; () if it has none."""
    for file in NAMED_IN:
        if (workdir / file).is_file():
            names = read_json(workdir / file).get("class_names", [])
            with holding(workdir / file):
                if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                    raise TypeError("class_names are no list of names")
            if len(names) == num_classes:
                return tuple(names)
    return ()
