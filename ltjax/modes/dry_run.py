"""`--dry_run`: describe a run in detail, with the memory that it needs."""

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
from ltjax.engine import describe, feed
from ltjax.engine.experiment import (
    Experiment,
    build_stage,
    fresh_shapes,
    make_method,
    seeds,
    set_up_with_stages,
    source_shapes,
    steps_per_epoch,
)
from ltjax.engine.stage import CompiledStage
from ltjax.runs import logs
from ltjax.runs.evaluated import EMA
from ltjax.runs.workdir import check_workdir
from ltjax.system import parallel, processes
from ltjax.system.paths import local

BARS = "▁▂▃▄▅▆▇█"


def dry_run(config: Mapping[str, Any], workdir: str | Path, data_dir: str | Path | None = None) -> None:
    """Print what `train` will do, and how much memory it needs. Write nothing. UserError as in `train`."""
    workdir, console = local(workdir), logs.make_console(quiet=not processes.first())
    run = parse(config)
    processes.on_first(lambda: check_workdir(workdir, config))
    console.print(f"Dry run of {run.name}: making data, networks and stages ready.")
    experiment, compiled = set_up_with_stages(run, data_dir, workdir, features_as="shapes")
    describe.show(experiment, compiled, workdir, console)
    show_details(experiment, compiled, console)


def show_details(experiment: Experiment, compiled: Mapping[str, CompiledStage], console: Console) -> None:
    """Print how each stage trains its parameters, and the memory that the run will need."""
    for name, stage in experiment.config.stages.items():
        console.print(f"\nstage {name}: {_recipe(stage)}", highlight=False)
        if stage.epochs:
            console.print(groups_table(stage, stage_params(experiment, compiled[name])))
            console.print(
                f"  the stage's learning rate, groups in proportion: {schedule(stage.lr * compiled[name].factors)}",
                highlight=False,
            )
    console.print()
    memory = expected_memory(experiment)
    console.print(memory_table(memory))
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
        batches = num_bytes(source_shapes(experiment, _longest_dispatch(experiment)))
        return 3 * batches // experiment.mesh.shape[parallel.BATCH_AXIS]
    sets = jax.tree.leaves((experiment.train_data, experiment.test_set, experiment.holdout_set))
    return sum(x.addressable_shards[0].data.nbytes for x in sets if isinstance(x, jax.Array))


def _longest_dispatch(experiment: Experiment) -> int:
    """Return the most steps in a dispatch of any stage, whose batches are streamed."""
    run, counts = experiment.config, experiment.split.class_counts
    lengths = [
        feed.dispatch_length(
            steps_per_epoch(stage, counts, run.batch_size),
            run.dispatch_steps,
            run.replicas,
            streamed=True,
            attacks=make_method(experiment, stage).attacks,
        )
        for stage in run.stages.values()
        if stage.epochs
    ]
    return max(lengths, default=0)


def memory_table(memory: Memory) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column("memory of each device, MB")
    for title in ("images", "variables", "optimizer", "step (estimate)"):
        table.add_column(title, justify="right")
    table.add_row("all stages", megabytes(memory.images))
    for name in memory.variables:
        parts = (memory.variables[name], memory.optimizer[name], memory.step[name])
        table.add_row(f"stage {name}", "", *(megabytes(part) for part in parts))
    return table


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f}" if size < 1e8 else f"{size / 1e6:,.0f}"


def num_bytes(tree: Any) -> int:
    """Count the bytes of a pytree of arrays or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


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
        outputs = {var: num_bytes(var.aval) for var in equation.outvars if var in last_use}
        most = max(most, now + max(inner, sum(outputs.values())))
        alive |= outputs
        for var in {var for var in equation.invars if not isinstance(var, core.Literal)} & alive.keys():
            if last_use[var] == number:
                del alive[var]
        now = sum(alive.values())
    return most


def _inner(equation: Any) -> list[core.Jaxpr]:
    """List the computations inside an equation, such as the body of a loop."""
    values = jax.tree.leaves(list(equation.params.values()))
    values = [value.jaxpr if isinstance(value, core.ClosedJaxpr) else value for value in values]
    return [value for value in values if isinstance(value, core.Jaxpr)]
