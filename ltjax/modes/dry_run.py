"""What a run is about to do, in words: in short before training, and at length for `--dry_run`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from clu import parameter_overview
from jax.extend import core
from rich.console import Console
from rich.table import Table

from ltjax import config as config_module
from ltjax import optim
from ltjax.config import Run
from ltjax.config import Stage as Settings
from ltjax.engine import feed, stage
from ltjax.engine.problem import Problem, build_stage, fresh_shapes, prepare, seeds, source_shapes
from ltjax.interop.weights import load_weights, surplus
from ltjax.runs import logs
from ltjax.runs.workdir import check_workdir
from ltjax.system import parallel, processes, xla
from ltjax.system.paths import local

BARS = "▁▂▃▄▅▆▇█"


def dry_run(config: Mapping[str, Any], workdir: str | Path, data_dir: str | Path | None = None) -> None:
    """Print what `train` is going to do, and in how much memory; train and write nothing. Raises: UserError, as `train`
    before its first step."""
    workdir, console = local(workdir), logs.make_console(quiet=not processes.first())
    run, stages = config_module.parse(config)
    processes.on_first(lambda: check_workdir(workdir, config))
    console.print(f"Dry run of {run.name}: making data, networks and stages ready.")
    problem, built = prepare(run, stages, data_dir)
    show(run, stages, built, problem, workdir, console)
    show_details(run, stages, built, problem, console)


def show(
    run: Run,
    stages: Mapping[str, Settings],
    built: Mapping[str, stage.Stage],
    problem: Problem,
    workdir: Path,
    console: Console,
) -> None:
    """Data, groups of classes, devices and stages, a line each."""
    counts, devices = problem.split.class_counts, problem.mesh.devices.flat
    held = f", {len(problem.split.holdout)} held out" if run.data.holdout else ""
    console.print(
        f"{run.data.name}: {counts.sum():,} training images of {len(counts)} classes, {counts.max()} down to "
        f"{counts.min()} a class (imbalance factor {counts.max() / counts.min():.4g}){held}; "
        f"{problem.test_set.size:,} test images"
    )
    for group, member in problem.groups.items():
        if member.any():
            console.print(f"  {group}: {_classes(np.flatnonzero(member), counts, problem.class_names)}")
    arithmetic = xla.arithmetic(problem.nets["net"].dtype)
    console.print(f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}): {arithmetic}")
    console.print(f"workdir {workdir}")
    if run.replicas > 1:
        groups = problem.mesh.shape[parallel.REPLICA_AXIS]
        console.print(
            f"{run.replicas} replicas, seeds {run.seed} to {run.seed + run.replicas - 1}, on {groups} group(s) of "
            f"{len(devices) // groups} device(s)"
        )
    sizes = {path: leaf.size for path, leaf in optim.flatten(problem.shapes.params).items()}
    total = sum(sizes.values())
    for name, settings in stages.items():
        trained = sum(sizes.get(path, 0) for path in built[name].trained)
        frozen = sorted(set(sizes) - set(built[name].trained))
        rest = f" (all but {frozen[0]})" if len(frozen) == 1 else ""
        steps = f"{settings.epochs} epochs of {built[name].steps_per_epoch} steps"
        length = f"{steps}, {trained:,} of {total:,} parameters train{rest}" if settings.epochs else "no training"
        what = ", ".join(filter(None, (settings.surgery.get("name"), length)))
        console.print(f"stage {name} ({settings.title}): {what}, from {settings.start_from}")
    if run.weights and (left := surplus(fresh_shapes(run, problem), load_weights(run.weights))):
        console.print(f"config.weights {run.weights}: {', '.join(left)} passed over, for a new block in its place")


def _classes(members: np.ndarray, counts: np.ndarray, names: tuple[str, ...], shown: int = 8) -> str:
    """How many classes a group has, the images in it, and the names and counts of the largest ones."""
    largest = members[np.argsort(-counts[members], kind="stable")][:shown]
    listed = ", ".join(f"{names[c]} {counts[c]}" for c in largest) + (", ..." if len(members) > shown else "")
    return f"{len(members):,} classes, {counts[members].sum():,} images: {listed}"


def write_parameters(problem: Problem, path: Path) -> None:
    """Every parameter: its path, shape and size."""
    path.write_text(parameter_overview.get_parameter_overview(problem.shapes.params, include_stats=False) + "\n")


def show_details(
    run: Run, stages: Mapping[str, Settings], built: Mapping[str, stage.Stage], problem: Problem, console: Console
) -> None:
    """What each stage trains, and how; then the memory that the run will take."""
    for name, settings in stages.items():
        console.print(f"\nstage {name}: {_recipe(settings)}", highlight=False)
        if settings.epochs:
            console.print(groups_table(settings, stage_params(run, built[name], problem)))
            console.print(
                f"  the stage's learning rate, groups in proportion: {schedule(settings.lr * built[name].factors)}",
                highlight=False,
            )
    console.print()
    memory = expected_memory(run, stages, problem)
    console.print(memory_table(memory, stages))
    limit = (problem.mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit")
    peak, where = memory.peak()
    beside = f" of {megabytes(limit)} MB" if limit else ""
    console.print(
        f"Together {megabytes(peak)} MB{beside} on each device, in stage {where}. Steps are estimates from shapes, "
        "0.8 to 1.6 times what XLA planned for those that were compiled.",
        highlight=False,
    )


def _recipe(settings: Settings) -> str:
    method = dict(settings.method)
    name = method.pop("name", "")
    given = ", ".join(f"{key}={value}" for key, value in method.items() if not isinstance(value, Mapping))
    sampler = ", ".join(str(v) if key == "name" else f"{key} {v}" for key, v in settings.sampler.items())
    surgery = f"{settings.surgery['name']}, then " if settings.surgery else ""
    augment = ", ".join(key if value is True else f"{key} {value}" for key, value in settings.augment.items() if value)
    if not settings.epochs:
        return f"{settings.surgery['name']}, no training"
    how = f"sampler {sampler}; batch norm {settings.batch_norm}; augmentation: {augment or 'none'}"
    return f"{surgery}{name}{f' ({given})' if given else ''}; {how}"


def stage_params(run: Run, built: stage.Stage, problem: Problem) -> dict[str, int]:
    """{path: number of values} of all parameters that a stage has, its method's own among them; of one replica."""
    variables = jax.eval_shape(built.init, seeds(run), fresh_shapes(run, problem)).variables
    return {path: leaf.size // run.replicas for path, leaf in optim.flatten(variables.params).items()}


def groups_table(settings: Settings, sizes: Mapping[str, int]) -> Table:
    """A row for each parameter group that has parameters."""
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column("  group")
    for title in ("parameters", "", "learning rate", "weight decay"):
        table.add_column(title, justify="right")
    assigned = optim.assign_groups(list(sizes), settings.groups)
    for name, group in settings.groups.items():
        size = sum(sizes[path] for path, of in assigned.items() if of == name)
        decay = group.get("weight_decay")
        decay = settings.optimizer["weight_decay"] if decay is None else decay
        rate = group["rate"] * settings.lr
        if size and rate:
            table.add_row(f"  {name}", f"{size:,}", "trained", f"{rate:g}", f"{decay:g}")
        elif size:
            table.add_row(f"  {name}", f"{size:,}", "frozen", "", "")
    return table


def schedule(rates: np.ndarray) -> str:
    """Learning rates by epoch [epochs], where they begin, peak and end, and their course as a line of bars."""
    marks = {0: "epoch 1", int(rates.argmax()): f"epoch {rates.argmax() + 1}", len(rates) - 1: f"epoch {len(rates)}"}
    named = ", ".join(f"{rates[epoch]:.4g} in {name}" for epoch, name in sorted(marks.items()))
    shown = rates[np.linspace(0, len(rates) - 1, min(len(rates), 40)).round().astype(int)]
    bars = "".join(BARS[round(float(rate / rates.max()) * (len(BARS) - 1))] for rate in shown)
    return f"{named}  {bars}"


class Memory(NamedTuple):
    """Bytes on each device."""

    images: int  # that stay there, or are on their way
    variables: dict[str, int]  # {stage: parameters, statistics and arrays of its method}, kept to the run's end
    optimizer: dict[str, int]  # {stage: its optimizer's state}, kept as well
    step: dict[str, int]  # {stage: what a training step takes beside them}, an estimate

    def peak(self) -> tuple[int, str]:
        """The most at a time, and the stage."""
        most, kept = (0, ""), self.images
        for name in self.variables:
            kept += self.variables[name] + self.optimizer[name]
            most = max(most, (kept + self.step[name], name))
        return most


def expected_memory(run: Run, stages: Mapping[str, Settings], problem: Problem) -> Memory:
    """What a run takes of each device: images and states counted, training steps estimated (`peak_bytes`)."""
    groups, sharing = (problem.mesh.shape[axis] for axis in (parallel.REPLICA_AXIS, parallel.BATCH_AXIS))
    # what one device does: its share of the replicas, and of each batch
    own = run._replace(replicas=run.replicas // groups, batch_size=run.batch_size // sharing)
    alone = problem._replace(mesh=parallel.make_mesh([problem.mesh.devices.flat[0]]))
    variables, optimizer, step = {}, {}, {}
    for name, settings in stages.items():
        single = build_stage(own, name, settings, alone)
        state = jax.eval_shape(single.init, seeds(own), fresh_shapes(own, alone))
        variables[name], optimizer[name] = num_bytes(state.variables), num_bytes(state.opt_state)
        source = source_shapes(own, alone)
        traced = jax.make_jaxpr(single.run, static_argnums=2)(state, source, 1) if settings.epochs else None
        step[name] = peak_bytes(traced.jaxpr) if traced else 0
    return Memory(_image_bytes(run, problem), variables, optimizer, step)


def _image_bytes(run: Run, problem: Problem) -> int:
    if problem.streamed:  # the batches of two dispatches that are under way, and those of the next
        return (
            3 * num_bytes(source_shapes(run, problem, feed.DISPATCH_STEPS)) // problem.mesh.shape[parallel.BATCH_AXIS]
        )
    held = jax.tree.leaves((problem.train_data, problem.test_set, problem.holdout_set))
    return sum(x.addressable_shards[0].data.nbytes for x in held if isinstance(x, jax.Array))


def memory_table(memory: Memory, stages: Mapping[str, Settings]) -> Table:
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
    """Of arrays, or of their shapes."""
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _bytes(array: Any) -> int:
    return int(np.prod(array.shape)) * array.dtype.itemsize


def peak_bytes(jaxpr: core.Jaxpr) -> int:
    """The most that arrays made by a computation take at a time, if each lives from where it is made to its last use.

    Its arguments do not count. XLA takes less where it fuses operations, and more where a convolution wants room to
    work in: for nine steps compiled on CPU (ResNets of 8 to 32 layers and ResNet-18; cross-entropy, MiSLAS, DRO-LT,
    LBGAT; accumulated, frozen) this was 0.8 to 1.6 times `memory_analysis().temp_size_in_bytes`.
    """
    last_use = {}
    for number, equation in enumerate(jaxpr.eqns):
        last_use |= {var: number for var in equation.invars if not isinstance(var, core.Literal)}
    last_use |= {var: len(jaxpr.eqns) for var in jaxpr.outvars if not isinstance(var, core.Literal)}
    alive: dict[Any, int] = {}
    most = now = 0
    for number, equation in enumerate(jaxpr.eqns):
        inner = max((peak_bytes(each) for each in _inner(equation)), default=0)
        made = {var: _bytes(var.aval) for var in equation.outvars if var in last_use}
        most = max(most, now + max(inner, sum(made.values())))
        alive |= made
        for var in {var for var in equation.invars if not isinstance(var, core.Literal)} & alive.keys():
            if last_use[var] == number:
                del alive[var]
        now = sum(alive.values())
    return most


def _inner(equation: Any) -> list[core.Jaxpr]:
    """The computations within one, such as a loop's."""
    values = [
        each for value in equation.params.values() for each in (value if isinstance(value, (tuple, list)) else (value,))
    ]
    opened = [value.jaxpr if isinstance(value, core.ClosedJaxpr) else value for value in values]
    return [value for value in opened if isinstance(value, core.Jaxpr)]
