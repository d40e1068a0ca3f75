"""Describe a run: briefly before training, in detail for `--dry_run`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core
from rich.console import Console
from rich.table import Table

from ltjax import optim
from ltjax.config import StageConfig, parse
from ltjax.engine import feed
from ltjax.engine.experiment import Experiment, build_stage, class_weights, fresh_shapes, prepare, seeds, source_shapes
from ltjax.engine.stage import CompiledStage
from ltjax.runs import logs
from ltjax.runs.weights import Weights, is_weights, load_weights, surplus
from ltjax.runs.workdir import check_workdir
from ltjax.surgery import EMA
from ltjax.system import parallel, processes, xla
from ltjax.system.paths import local

BARS = "▁▂▃▄▅▆▇█"


def dry_run(config: Mapping[str, Any], workdir: str | Path, data_dir: str | Path | None = None) -> None:
    """Print the stages that `train` will run, and their memory. Train and write nothing.

    Raises:
      UserError: The same errors that `train` raises before its first step.
    """
    workdir, console = local(workdir), logs.make_console(quiet=not processes.first())
    run = parse(config)
    processes.on_first(lambda: check_workdir(workdir, config))
    console.print(f"Dry run of {run.name}: making data, networks and stages ready.")
    experiment, compiled = prepare(run, data_dir, workdir, features_as="shapes")
    show(experiment, compiled, workdir, console)
    show_details(experiment, compiled, console)


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
    copies = {name: f", {n} of them training images, too" if n else "" for name, n in _copies(experiment).items()}
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
    weights = np.array(class_weights(experiment))
    low, high = int(weights.argmin()), int(weights.argmax())
    return f"{asked}, from {weights[low]:.3g} ({names[low]}) to {weights[high]:.3g} ({names[high]})"


def _show_weights(experiment: Experiment, weights: Weights, console: Console) -> None:
    """Print what training starts from, and where the config's images differ from those of the weights."""
    run, licence = experiment.config, f", licence {weights.licence}" if weights.licence else ""
    parts = f", {', '.join(run.weights_parts)} alone" if run.weights_parts else ""
    console.print(
        f"weights {run.weights}{parts}{licence}: images of {run.data.size} pixels" + _normalisation(run.model)
    )
    given = {key: run.model.get(key) for key in ("mean", "std") if key in weights.settings}
    if given != (theirs := {key: weights.settings[key] for key in given}):
        console.print(f"note: these weights are for images with{_normalisation(theirs)}: set config.model.mean and std")
    if ignored := surplus(fresh_shapes(experiment), weights):
        console.print(f"{', '.join(ignored)} of these weights are ignored; a new block replaces them")


def _normalisation(settings: Mapping[str, Any]) -> str:
    values = {key: tuple(round(x, 4) for x in settings[key]) for key in ("mean", "std") if key in settings}
    return "".join(f", {key} {value}" for key, value in values.items())


def _copies(experiment: Experiment) -> Mapping[str, int]:
    return experiment.description["also_trained_on"]


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


def show_details(experiment: Experiment, compiled: Mapping[str, CompiledStage], console: Console) -> None:
    """Print how each stage trains its parameters, and the memory that the run will need."""
    stages = experiment.config.stages
    for name, stage in stages.items():
        console.print(f"\nstage {name}: {_recipe(stage)}", highlight=False)
        if stage.epochs:
            console.print(groups_table(stage, stage_params(experiment, compiled[name])))
            console.print(
                f"  the stage's learning rate, groups in proportion: {schedule(stage.lr * compiled[name].factors)}",
                highlight=False,
            )
    console.print()
    memory = expected_memory(experiment)
    console.print(memory_table(memory, stages))
    limit = (experiment.mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit")
    peak, where = memory.peak()
    of_all = f" of {megabytes(limit)} MB" if limit else ""
    console.print(
        f"Together {megabytes(peak)} MB{of_all} on each device, in stage {where}. Steps are estimates from shapes, "
        "0.8 to 1.6 times what XLA planned for those that were compiled.",
        highlight=False,
    )


def _recipe(stage: StageConfig) -> str:
    method = dict(stage.method)
    name = method.pop("name", "")
    settings = ", ".join(f"{key}={value}" for key, value in method.items() if not isinstance(value, Mapping))
    sampler = ", ".join(str(v) if key == "name" else f"{key} {v}" for key, v in stage.sampler.items())
    surgery = f"{stage.surgery['name']}, then " if stage.surgery else ""
    augment, *views = (
        ", ".join(key if value is True else f"{key} {value}" for key, value in settings.items() if value)
        for settings in (stage.augment, *(stage.views[name] for name in sorted(stage.views)))
    )
    if not stage.epochs:
        return f"{stage.surgery['name']}, no training"
    rest = f"sampler {sampler}; batch norm {stage.batch_norm}; augmentation: {augment or 'none'}"
    rest += "".join(f"; view: {view or 'none'}" for view in views)
    parts = {"ema": stage.ema, "sam": stage.sam}
    extra = "".join(f"; {name} {key} {value}" for name, part in parts.items() for key, value in part.items())
    return f"{surgery}{name}{f' ({settings})' if settings else ''}; {rest}{extra}"


def stage_params(experiment: Experiment, compiled: CompiledStage) -> dict[str, int]:
    """Return {path: number of values} of all parameters of a stage and its method, of one replica.

    The moving average of the weights is no parameter.
    """
    run = experiment.config
    variables = jax.eval_shape(compiled.init, seeds(run), fresh_shapes(experiment)).variables
    params = {name: value for name, value in variables.params.items() if name != EMA}
    return {path: leaf.size // run.replicas for path, leaf in optim.flatten(params).items()}


def groups_table(stage: StageConfig, sizes: Mapping[str, int]) -> Table:
    """Make a table with a row for each parameter group that has parameters."""
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column("  group")
    for title in ("parameters", "", "learning rate", "weight decay"):
        table.add_column(title, justify="right")
    assigned = optim.assign_groups(list(sizes), stage.groups)
    for name, group in stage.groups.items():
        size = sum(sizes[path] for path, of in assigned.items() if of == name)
        decay = group.get("weight_decay")
        decay = stage.optimizer["weight_decay"] if decay is None else decay
        rate = group["rate"] * stage.lr
        if size and rate:
            table.add_row(f"  {name}", f"{size:,}", "trained", f"{rate:g}", f"{decay:g}")
        elif size:
            table.add_row(f"  {name}", f"{size:,}", "frozen", "", "")
    return table


def schedule(rates: np.ndarray) -> str:
    """Describe learning rates [epochs]: the first, the largest and the last one, and all as a line of bars."""
    marks = {0: "epoch 1", int(rates.argmax()): f"epoch {rates.argmax() + 1}", len(rates) - 1: f"epoch {len(rates)}"}
    named = ", ".join(f"{rates[epoch]:.4g} in {name}" for epoch, name in sorted(marks.items()))
    shown = rates[np.linspace(0, len(rates) - 1, min(len(rates), 40)).round().astype(int)]
    bars = "".join(BARS[round(float(rate / rates.max()) * (len(BARS) - 1))] for rate in shown)
    return f"{named}  {bars}"


class Memory(NamedTuple):
    """Bytes on each device."""

    images: int  # resident images, or the streamed batches on their way
    variables: dict[str, int]  # {stage: parameters, statistics and arrays of its method}, kept to the end of the run
    optimizer: dict[str, int]  # {stage: state of its optimizer}, kept to the end of the run
    step: dict[str, int]  # {stage: estimate of what a training step needs in addition}

    def peak(self) -> tuple[int, str]:
        """Return the largest total, and its stage."""
        peak, kept = (0, ""), self.images
        for name in self.variables:
            kept += self.variables[name] + self.optimizer[name]
            peak = max(peak, (kept + self.step[name], name))
        return peak


def expected_memory(experiment: Experiment) -> Memory:
    """Compute the memory of each device: count images and states, estimate training steps (`peak_bytes`)."""
    mesh, run = experiment.mesh, experiment.config
    groups, sharing = (mesh.shape[axis] for axis in (parallel.REPLICA_AXIS, parallel.BATCH_AXIS))
    # One device with its share of the replicas, and of each batch.
    share = run._replace(replicas=run.replicas // groups, batch_size=run.batch_size // sharing)
    on_one_device = experiment._replace(config=share, mesh=parallel.make_mesh([mesh.devices.flat[0]]))
    variables, optimizer, step = {}, {}, {}
    for name, stage in run.stages.items():
        compiled = build_stage(on_one_device, stage)
        state = jax.eval_shape(compiled.init, seeds(share), fresh_shapes(on_one_device))
        variables[name], optimizer[name] = num_bytes(state.variables), num_bytes(state.opt_state)
        step[name] = 0
        if stage.epochs:
            jaxpr = jax.make_jaxpr(compiled.run, static_argnums=2)(state, source_shapes(on_one_device), 1)
            step[name] = peak_bytes(jaxpr.jaxpr)
    return Memory(_image_bytes(experiment), variables, optimizer, step)


def _image_bytes(experiment: Experiment) -> int:
    if experiment.streamed:  # batches of two running dispatches and of the next one
        batches = num_bytes(source_shapes(experiment, feed.DISPATCH_STEPS))
        return 3 * batches // experiment.mesh.shape[parallel.BATCH_AXIS]
    sets = jax.tree.leaves((experiment.train_data, experiment.test_set, experiment.holdout_set))
    return sum(x.addressable_shards[0].data.nbytes for x in sets if isinstance(x, jax.Array))


def memory_table(memory: Memory, stages: Mapping[str, StageConfig]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column("memory of each device, MB")
    for title in ("images", "variables", "optimizer", "step (estimate)"):
        table.add_column(title, justify="right")
    table.add_row("all stages", megabytes(memory.images))
    for name in stages:
        parts = (memory.variables[name], memory.optimizer[name], memory.step[name])
        table.add_row(f"stage {name}", "", *(megabytes(part) for part in parts))
    return table


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f}" if size < 1e8 else f"{size / 1e6:,.0f}"


def num_bytes(tree: Any) -> int:
    """Count the bytes of a pytree of arrays or of their shapes."""
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _bytes(array: Any) -> int:
    return int(np.prod(array.shape)) * array.dtype.itemsize


def peak_bytes(jaxpr: core.Jaxpr) -> int:
    """Estimate the peak memory of a computation in bytes: every array lives from its creation to its last use.

    Arguments do not count. XLA needs less if it fuses operations, and more if a convolution needs scratch memory. For
    nine steps compiled on a CPU (ResNets of 8 to 32 layers and ResNet-18; cross-entropy, MiSLAS, DRO-LT, LBGAT;
    accumulated, frozen) the estimate was 0.8 to 1.6 times `memory_analysis().temp_size_in_bytes`.
    """
    last_use = {}
    for number, equation in enumerate(jaxpr.eqns):
        last_use |= {var: number for var in equation.invars if not isinstance(var, core.Literal)}
    last_use |= {var: len(jaxpr.eqns) for var in jaxpr.outvars if not isinstance(var, core.Literal)}
    alive: dict[Any, int] = {}
    most = now = 0
    for number, equation in enumerate(jaxpr.eqns):
        inner = max((peak_bytes(inner) for inner in _inner(equation)), default=0)
        outputs = {var: _bytes(var.aval) for var in equation.outvars if var in last_use}
        most = max(most, now + max(inner, sum(outputs.values())))
        alive |= outputs
        for var in {var for var in equation.invars if not isinstance(var, core.Literal)} & alive.keys():
            if last_use[var] == number:
                del alive[var]
        now = sum(alive.values())
    return most


def _inner(equation: Any) -> list[core.Jaxpr]:
    """List the computations inside an equation, such as the body of a loop."""
    values = [
        item for value in equation.params.values() for item in (value if isinstance(value, (tuple, list)) else (value,))
    ]
    values = [value.jaxpr if isinstance(value, core.ClosedJaxpr) else value for value in values]
    return [value for value in values if isinstance(value, core.Jaxpr)]
