"""The training loop: one for every method. Read it top to bottom."""

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from flax import linen as nn
from jax.sharding import Mesh
from rich.console import Console

from ltjax import config as config_module
from ltjax import data, evaluate, logs, methods, metrics, models, optim, registry, results, stage
from ltjax.checkpoint import MEND_DISK, Checkpoints, cannot_save, complete_steps, read_json, write_json
from ltjax.config import Run
from ltjax.data import augment, samplers, splits
from ltjax.data.source import Images
from ltjax.hashing import hash32
from ltjax.report import figures
from ltjax.signals import Interrupted, StopSignals
from ltjax.stage import State
from ltjax.types import UserError, Variables

DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
)


class Problem(NamedTuple):
    """What stays the same through all stages of a run."""

    images: Images
    split: splits.Split
    groups: dict[str, np.ndarray]  # {"many": bool [C], ...}
    nets: dict[str, nn.Module]
    mesh: Mesh
    train_data: stage.Resident
    test_set: evaluate.EvaluationSet
    holdout_set: evaluate.EvaluationSet | None
    evaluate: Callable[[Variables, evaluate.EvaluationSet], dict[str, np.ndarray]]

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.images.train_images.shape[1:]


def use_cpu_cores(batch_size: int) -> None:
    """On a machine without an accelerator, make its cores JAX devices; before JAX starts, and only if nobody chose.

    Two devices that share a batch run a step 1.4 times as fast as one device that has both cores. Each gets at least
    16 images of a batch, and their number divides it.
    """
    if os.environ.get("JAX_NUM_CPU_DEVICES") or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = max(1, min(cores, batch_size // 16))
    try:
        jax.config.update("jax_num_cpu_devices", max(n for n in range(1, most + 1) if batch_size % n == 0))
    except RuntimeError:
        pass  # JAX runs already, with the devices that its caller wanted


def setup(run: Run, data_dir: str | Path | None) -> Problem:
    """Load the data, choose the long-tailed part, build the network, put the images on the devices."""
    images = data.load(run.data.name, data_dir)
    num_classes = len(images.class_names)
    split = splits.long_tailed_split(
        images.train_labels,
        num_classes,
        imbalance=run.data.imbalance,
        profile=run.data.profile,
        max_count=run.data.max_count or None,
        holdout=run.data.holdout,
        seed=run.data.seed,
    )
    if run.data.groups == "ranges":
        groups = metrics.range_groups(num_classes, run.data.ranges)
    else:
        groups = metrics.count_groups(split.class_counts, few_below=run.data.few_below, many_above=run.data.many_above)
    mesh = stage.make_mesh()
    if run.batch_size % mesh.devices.size:
        raise UserError(
            f"config.batch_size = {run.batch_size} cannot be shared by {mesh.devices.size} devices: "
            f"take a multiple of {mesh.devices.size}"
        )
    model = dict(run.model)
    nets: dict[str, nn.Module] = {"net": models.create(model.pop("name", ""), num_classes, **model)}
    everywhere = stage.replicated(mesh)
    train_data = stage.Resident(
        jax.device_put(images.train_images[split.train], everywhere),
        jax.device_put(images.train_labels[split.train].astype(np.int32), everywhere),
    )
    holdout_set = None
    if run.data.holdout:
        kept = images.train_images[split.holdout], images.train_labels[split.holdout]
        holdout_set = evaluate.place(*kept, run.eval_batch_size, mesh)
    return Problem(
        images=images,
        split=split,
        groups=groups,
        nets=nets,
        mesh=mesh,
        train_data=train_data,
        test_set=evaluate.place(images.test_images, images.test_labels, run.eval_batch_size, mesh),
        holdout_set=holdout_set,
        evaluate=evaluate.evaluator(nets, mesh),
    )


def build_stage(run: Run, name: str, settings: config_module.Stage, problem: Problem) -> stage.Stage:
    """The compiled functions of one stage of a config."""
    class_counts = problem.split.class_counts
    hyper = dict(settings.method)
    method = methods.create(hyper.pop("name", ""), class_counts, **hyper)
    initial = jax.eval_shape(lambda: stage.init_variables(problem.nets, problem.image_shape, jax.random.key(0), method))
    draw = stage.resident_draw(
        samplers.create(**settings.sampler),
        registry.bind(f"config.{name}.augment", augment.augment, settings.augment),
        seed=int(hash32(np.uint32(run.seed), np.uint32(run.stages.index(name)))),
        batch_size=run.batch_size,
        class_counts=class_counts,
        mesh=problem.mesh,
    )
    size = int(class_counts.sum())
    steps = size // run.batch_size if settings.drop_last else -(-size // run.batch_size)
    jax.eval_shape(
        draw, problem.train_data, jnp.zeros((), jnp.int32), stage_rng(run, name)
    )  # its errors now, not later
    return stage.build(
        problem.nets,
        method,
        draw,
        initial.params,
        groups=settings.groups,
        bn=settings.batch_norm,
        lr=settings.lr,
        factors=registry.bind(f"config.{name}.schedule", optim.schedule_table, settings.schedule)(settings.epochs),
        steps_per_epoch=steps,
        **settings.optimizer,
        rng=stage_rng(run, name),
        mesh=problem.mesh,
        image_shape=problem.image_shape,
    )


def stage_rng(run: Run, name: str) -> jax.Array:
    return jax.random.fold_in(jax.random.key(run.seed), run.stages.index(name))


def fresh_variables(run: Run, name: str, problem: Problem) -> Variables:
    """Newly initialised networks, on every device."""
    rng = jax.random.fold_in(stage_rng(run, name), 1)
    make = jax.jit(
        lambda rng: stage.init_variables(problem.nets, problem.image_shape, rng),
        out_shardings=stage.replicated(problem.mesh),
    )
    return make(rng)


def like(state: State) -> State:
    """Shapes and shardings of a state, for restoring one."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def chunk_length(steps_per_epoch: int, asked: int) -> int:
    """Steps to a dispatch: a whole epoch on accelerators; on CPU at most 16, so that there is something to watch.

    A divisor of the epoch where there is a good one, so that one compiled function serves all chunks; else the epoch in
    nearly equal parts, whose last is shorter.
    """
    most = min(asked or (16 if jax.default_backend() == "cpu" else steps_per_epoch), steps_per_epoch)
    divisor = max(n for n in range(1, most + 1) if steps_per_epoch % n == 0)
    parts = -(-steps_per_epoch // most)
    return divisor if 2 * divisor >= most else -(-steps_per_epoch // parts)


def train(config: Mapping[str, Any], workdir: str | Path, data_dir: str | Path | None = None) -> dict[str, Any]:
    """Train all stages of a config, or go on where a killed run stopped, and leave the results in `workdir`.

    Args:
      config: nested dicts, see `ltjax.config`. workdir: made if need be. data_dir: prepared data sets, instead of
        TFDS_DATA_DIR.
    Returns: what `results.json` holds.
    Raises: UserError for anything the caller can mend; Interrupted after Ctrl-C or SIGTERM, once all is saved.
    """
    workdir, console = Path(workdir), logs.make_console()
    run, stages = config_module.parse(config)
    open_workdir(workdir, config)
    with locked(workdir), named_disk_errors(workdir):
        if (workdir / "results.json").exists():
            finished = read_json(workdir / "results.json")
            console.print(f"{workdir} holds a finished run of this config; remove it to train anew.")
            results.print_table(finished, console)
            return finished

        commit = results.git_commit()
        problem = setup(run, data_dir)
        built = {name: build_stage(run, name, settings, problem) for name, settings in stages.items()}  # all errors now
        write_json(workdir / "config.json", config)
        write_json(workdir / "split.json", splits.describe(problem.split, seed=run.data.seed, groups=problem.groups))
        show_plan(run, stages, built, problem, workdir, console)

        steps_before = dict(zip(stages, np.cumsum([0] + [b.num_steps for b in built.values()]).tolist(), strict=False))
        finals: dict[str, Variables] = {}
        records: dict[str, dict[str, Any]] = {}
        with StopSignals() as stop, logs.RunLog(workdir, steps_before) as log:
            for name, settings in stages.items():
                with Checkpoints(workdir / "checkpoints" / name) as checkpoints:
                    try:
                        finals[name], records[name] = run_stage(
                            run, name, settings, built[name], problem, finals, checkpoints, log, console, stop
                        )
                    except OSError as error:  # a full disk can stop the log before it stops a checkpoint
                        raise cannot_save(error, checkpoints.directory) from error
            summary = results.summarise(run, stages, records, problem, commit)
            figures.write_summary(summary, workdir / "report")
            write_json(workdir / "results.json", summary)
        results.print_table(summary, console)
        console.print(f"Results, metrics, checkpoints and report/summary.png are in {workdir}")
        return summary


@contextlib.contextmanager
def named_disk_errors(workdir: Path) -> Iterator[None]:
    """A full disk, or a file that cannot be written, as one line instead of a traceback."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise UserError(f"cannot write to {workdir}: {error}; {MEND_DISK}") from error


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keep a second process from training in the same folder; the lock goes with the process, however it ends."""
    with named_disk_errors(workdir), open(workdir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another process is training in {workdir}: wait for it, or use another --workdir"
            ) from error
        yield


def run_stage(
    run: Run,
    name: str,
    settings: config_module.Stage,
    built: stage.Stage,
    problem: Problem,
    finals: Mapping[str, Variables],
    checkpoints: Checkpoints,
    log: logs.RunLog,
    console: Console,
    stop: StopSignals,
) -> tuple[Variables, dict[str, Any]]:
    """Train one stage from its last checkpoint, or from its start -> final variables and the stage's record."""
    fresh = settings.start_from == "scratch"
    start = fresh_variables(run, name, problem) if fresh else finals[settings.start_from]
    state: State = built.init(jax.random.fold_in(stage_rng(run, name), 2), start)
    record: dict[str, Any] = {"seconds": 0.0, "train_seconds": 0.0, "train_steps": 0, "evaluations": []}

    restored = checkpoints.restore(like(state))
    if restored is not None:
        state, record = restored
    step = int(state.step)
    if step < built.num_steps:
        if restored is not None:
            console.print(f"Resuming {settings.title} after step {step} of {built.num_steps}.")
        log.rewind(name, step)

    per_epoch = built.steps_per_epoch
    chunk = chunk_length(per_epoch, run.dispatch_steps)
    started, saved_at = time.monotonic() - record["seconds"], time.monotonic()
    compiled: set[int] = set()  # lengths of dispatch that this process has run
    with logs.StageProgress(console, settings.title, built.num_steps, step, run.batch_size, settings.epochs) as bar:
        while step < built.num_steps:
            num_steps = min(chunk, per_epoch - step % per_epoch)
            epoch = step // per_epoch  # counted from 0
            chunk_started = time.monotonic()
            if built.refresh is not None and step % per_epoch == 0:
                state = built.refresh(state, problem.train_data)
            state, values = built.run(state, problem.train_data, num_steps)
            values = {key: np.asarray(value) for key, value in values.items()}  # waits for the device
            if not np.isfinite(values["loss"]).all():
                bad = int(np.flatnonzero(~np.isfinite(values["loss"]))[0])
                what = f"loss became {values['loss'][bad]}"
                raise non_finite(name, epoch, step + bad + 1, what, settings, checkpoints)
            if num_steps in compiled:  # the first one's time is the compiler's
                record["train_seconds"] += time.monotonic() - chunk_started
                record["train_steps"] += num_steps
            compiled.add(num_steps)
            step += num_steps
            step_seconds = record["train_seconds"] / record["train_steps"] if record["train_steps"] else None
            left = None if step_seconds is None else step_seconds * (built.num_steps - step)
            bar.show(step, epoch + 1, float(values["loss"][-1]), step_seconds, left)
            learning_rate = settings.lr * float(built.factors[epoch])
            means = {key: float(value.mean()) for key, value in values.items()}
            log.write(name, epoch + 1, step, "train", {**means, "lr": learning_rate})

            due = time.monotonic() - saved_at > run.checkpoint_seconds
            saving = step % per_epoch == 0 or stop.requested is not None or due
            if saving and not stage.all_finite(state):
                raise non_finite(name, epoch, step, "a parameter is no longer finite", settings, checkpoints)
            score = None
            if step % per_epoch == 0 and ((epoch + 1) % run.eval_every == 0 or step == built.num_steps):
                evaluation: dict[str, Any] = {"epoch": epoch + 1, "step": step}
                for split, held in (("holdout", problem.holdout_set), ("test", problem.test_set)):
                    if held is not None:
                        evaluation[split] = evaluate_split(problem, state.variables, held)
                        short = {k: v for k, v in evaluation[split].items() if k in ("accuracy", "ece", "loss")}
                        log.write(name, epoch + 1, step, split, short)
                score = evaluation["holdout" if problem.holdout_set else "test"]["accuracy"]["all"]
                record["evaluations"] = [_brief(e) for e in record["evaluations"]] + [evaluation]
                speed = run.batch_size / step_seconds if step_seconds else None
                bar.console.print(epoch_line(settings, epoch + 1, means["loss"], evaluation["test"], speed, left))
            record["seconds"] = time.monotonic() - started
            if saving:
                checkpoints.save(step, state, record, score)
                saved_at = time.monotonic()
            if saving and stop.requested is not None:
                checkpoints.wait()
                raise Interrupted(stop.requested)
    checkpoints.wait()
    return state.variables, record


def non_finite(name, epoch, step, what, settings, checkpoints: Checkpoints) -> UserError:
    checkpoints.wait()
    kept = complete_steps(checkpoints.directory)
    good = f"step {kept[-1]}" if kept else "none of this stage"
    return UserError(
        f"{what} in stage {name!r}, epoch {epoch + 1}, step {step}; last good checkpoint in {checkpoints.directory}: "
        f"{good}; lower config.{name}.lr (now {settings.lr:g}) or look at the loss's settings"
    )


def evaluate_split(problem: Problem, variables: Variables, held: evaluate.EvaluationSet) -> dict[str, Any]:
    labels = np.asarray(held.labels).reshape(-1)[: held.size]
    outcome = problem.evaluate(variables, held)
    return evaluate.summarise(outcome, labels, problem.groups, len(problem.images.class_names))


def _brief(evaluation: dict[str, Any]) -> dict[str, Any]:
    """An earlier epoch's evaluation without the per-class numbers, which only the last needs."""
    kept = ("accuracy", "ece", "loss")
    return {
        key: {k: v for k, v in value.items() if k in kept} if isinstance(value, dict) else value
        for key, value in evaluation.items()
    }


def epoch_line(settings, epoch, loss, test, images_per_second, seconds_left) -> str:
    accuracy = test["accuracy"]
    groups = "  ".join(f"{group} {accuracy[group]:.1%}" for group in results.GROUPS if group in accuracy)
    speed = f"{images_per_second:,.0f} images/s  " if images_per_second else ""
    return (
        f"{settings.title}  epoch {epoch}/{settings.epochs}  loss {loss:.3f}  test {groups}  "
        f"ECE {test['ece']:.1%}  {speed}ETA {logs.clock(seconds_left)}"
    )


def open_workdir(workdir: Path, config: Mapping[str, Any]) -> None:
    """Make the folder, or check that it holds a run of the same config. Raises: UserError naming what differs."""
    config = json.loads(json.dumps(config))
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            changed = config_module.differences(read_json(path), config)
            if changed:
                more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
                raise UserError(
                    f"{workdir} holds a run of another config ({'; '.join(changed[:5])}{more}): "
                    "use another --workdir, or the old settings to resume"
                )
        elif (workdir / "results.json").exists():
            raise UserError(f"{workdir} holds results without a config.json: use another --workdir")
        probe = workdir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot use workdir {workdir}: {error}; give another --workdir") from error


def show_plan(run, stages, built, problem, workdir, console) -> None:
    """Print what is about to happen; every parameter, by path, goes to `parameters.txt`."""
    counts, devices = problem.split.class_counts, problem.mesh.devices.flat
    held = f", {len(problem.split.holdout)} held out" if run.data.holdout else ""
    console.print(
        f"{run.data.name}: {counts.sum():,} training images of {len(counts)} classes, {counts.max()} down to "
        f"{counts.min()} a class{held}; {problem.test_set.size:,} test images"
    )
    console.print(f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), workdir {workdir}")
    initial = jax.eval_shape(lambda: stage.init_variables(problem.nets, problem.image_shape, jax.random.key(0)))
    (workdir / "parameters.txt").write_text(
        parameter_overview.get_parameter_overview(initial.params, include_stats=False) + "\n"
    )
    sizes = {path: leaf.size for path, leaf in optim.flatten(initial.params).items()}
    for name, settings in stages.items():
        trained = sum(sizes.get(path, 0) for path in built[name].trained)
        console.print(
            f"stage {name} ({settings.title}): {settings.epochs} epochs of {built[name].steps_per_epoch} steps, "
            f"{trained:,} of {sum(sizes.values()):,} parameters train, from {settings.start_from}"
        )


def evaluate_workdir(
    config: Mapping[str, Any], workdir: str | Path, data_dir: str | Path | None = None
) -> dict[str, Any]:
    """Evaluate the newest checkpoint of every stage that has one; print the table and write `eval.json`."""
    workdir, console = Path(workdir), logs.make_console()
    run, stages = config_module.parse(config)
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir} holds no run: train first, with --mode=train and the same --workdir")
    open_workdir(workdir, config)
    problem = setup(run, data_dir)
    records = {}
    for name, settings in stages.items():
        built = build_stage(run, name, settings, problem)
        state = built.init(jax.random.key(0), fresh_variables(run, name, problem))
        with Checkpoints(workdir / "checkpoints" / name) as checkpoints:
            restored = checkpoints.restore(like(state), move_damaged=False)
        if restored is not None:
            state, record = restored
            step = int(state.step)
            evaluation: dict[str, Any] = {"epoch": -(-step // built.steps_per_epoch), "step": step}
            evaluation["test"] = evaluate_split(problem, state.variables, problem.test_set)
            records[name] = {**record, "evaluations": [evaluation]}
    if not records:
        raise UserError(f"{workdir} holds no checkpoint yet: train first, with --mode=train")
    summary = results.summarise(run, {name: stages[name] for name in records}, records, problem, results.git_commit())
    with named_disk_errors(workdir):
        write_json(workdir / "eval.json", summary)
    console.print(results.table(summary))
    return summary
