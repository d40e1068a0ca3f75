"""The training loop: one for every method. Read it top to bottom."""

import signal
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from ltjax import config as config_module
from ltjax import logs, plan, processes, results, stage
from ltjax.checkpoint import Checkpoints, cannot_save, complete_steps, like, read_json, write_json
from ltjax.config import Run
from ltjax.data import splits
from ltjax.feed import DISPATCH_STEPS
from ltjax.interop.weights import into, load_weights
from ltjax.paths import local
from ltjax.problem import (
    Imported,
    Problem,
    batches,
    build_stage,
    class_means_for,
    evaluate_restored,
    evaluate_split,
    fresh_shapes,
    imported,
    initial_variables,
    operate,
    restored,
    seeds,
    setup,
)
from ltjax.report import make
from ltjax.signals import Interrupted, StopSignals
from ltjax.stage import State
from ltjax.types import UserError, one_line
from ltjax.workdir import check_same_images, check_workdir, locked, named_disk_errors, open_workdir


def chunk_length(steps_per_epoch: int, asked: int, replicas: int = 1, *, streamed: bool = False) -> int:
    """Steps to a dispatch: a whole epoch on accelerators; on CPU at most 16, so that there is something to watch.
    Of several replicas, 16 together; of streamed batches, which take memory, 4.

    A divisor of the epoch where there is a good one, so that one compiled function serves all chunks; else the epoch in
    nearly equal parts, whose last is shorter.
    """
    on_cpu = jax.default_backend() == "cpu"
    usual = DISPATCH_STEPS if streamed else max(1, 16 // replicas) if on_cpu else steps_per_epoch
    most = min(asked or usual, steps_per_epoch)
    divisor = max(n for n in range(1, most + 1) if steps_per_epoch % n == 0)
    parts = -(-steps_per_epoch // most)
    return divisor if 2 * divisor >= most else -(-steps_per_epoch // parts)


def evaluates(epoch: int, epochs: int, every: int) -> bool:
    """Whether an evaluation follows this epoch, from 1 on. every: `config.eval_every`."""
    if every == 0:
        every = 5 if jax.default_backend() == "cpu" and epoch <= epochs - 20 else 1
    return epoch % every == 0 or epoch == epochs


def train(config: Mapping[str, Any], workdir: str | Path, data_dir: str | Path | None = None) -> dict[str, Any]:
    """Train all stages of a config, or go on where a killed run stopped, and leave the results in `workdir`.

    Args:
      config: nested dicts, see `ltjax.config`. workdir: made if need be. data_dir: prepared data sets, instead of
        TFDS_DATA_DIR, else ~/tensorflow_datasets.
    Returns: what `results.json` holds.
    Raises: UserError for anything the caller can mend; Interrupted after Ctrl-C or SIGTERM, once all is saved.
    """
    workdir, console, first = local(workdir), logs.make_console(quiet=not processes.first()), processes.first()
    run, stages = config_module.parse(config)
    processes.on_first(lambda: open_workdir(workdir, config))
    with locked(workdir) if first else nullcontext(), named_disk_errors(workdir):
        if processes.on_first((workdir / "results.json").exists):
            finished = read_json(workdir / "results.json")
            console.print(
                f"{workdir} holds a finished run of this config; remove it to train anew, or on other images."
            )
            results.print_table(finished, console)
            return finished

        commit = results.git_commit()
        problem, built = prepare(run, stages, data_dir)
        known = dict(groups=problem.groups, class_names=problem.class_names)
        described = splits.describe(problem.split, seed=run.data.seed, **known)
        processes.on_first(lambda: check_same_images(workdir, described))
        if first:
            write_json(workdir / "config.json", config)
            write_json(workdir / "split.json", described)
            plan.write_parameters(problem, workdir / "parameters.txt")
            plan.show(run, stages, built, problem, workdir, console)
            console.print("The first steps are being compiled, which takes longer than they do.")

        steps_before = dict(zip(stages, np.cumsum([0] + [b.num_steps for b in built.values()]).tolist(), strict=False))
        finals: dict[str, State] = {}
        records: dict[str, dict[str, Any]] = {}
        with StopSignals() as stop, logs.RunLog(workdir, steps_before) if first else logs.NoLog() as log:
            for name, settings in stages.items():
                with Checkpoints(workdir / "checkpoints" / name) as checkpoints:
                    try:
                        finals[name], records[name] = run_stage(
                            run, name, settings, built[name], problem, finals, checkpoints, log, console, stop
                        )
                    except OSError as error:  # a full disk can stop the log before it stops a checkpoint
                        if processes.lost(error):
                            raise
                        raise cannot_save(error, checkpoints.directory) from error
            summary = results.summarise(run, stages, records, problem, commit)
            report(run, stages, problem, finals, summary, workdir, console, stop)
            if first:
                write_json(workdir / "results.json", summary)
        results.print_table(summary, console)
        console.print(f"Results, metrics and checkpoints are in {workdir}; look at {workdir}/report/index.html")
        return summary


def dry_run(config: Mapping[str, Any], workdir: str | Path, data_dir: str | Path | None = None) -> None:
    """Print what `train` is going to do, and in how much memory; train and write nothing. Raises: UserError, as `train`
    before its first step."""
    workdir, console = local(workdir), logs.make_console(quiet=not processes.first())
    run, stages = config_module.parse(config)
    processes.on_first(lambda: check_workdir(workdir, config))
    console.print(f"Dry run of {run.name}: making data, networks and stages ready.")
    problem, built = prepare(run, stages, data_dir)
    plan.show(run, stages, built, problem, workdir, console)
    plan.show_details(run, stages, built, problem, console)


def prepare(
    run: Run, stages: Mapping[str, config_module.Stage], data_dir: str | Path | None
) -> tuple[Problem, dict[str, stage.Stage]]:
    """All that can go wrong before the first step goes wrong here."""
    problem = setup(run, data_dir)
    built = {name: build_stage(run, name, settings, problem) for name, settings in stages.items()}
    for name, settings in stages.items():
        if settings.keep_optimizer and built[name].assigned != built[settings.start_from].assigned:
            raise UserError(
                f"config.{name}.keep_optimizer: stage {settings.start_from!r} does not train the same parameters "
                "in the same groups"
            )
    if run.weights:
        into(fresh_shapes(run, problem), load_weights(run.weights), run.weights_parts)
    return problem, built


def run_stage(
    run: Run,
    name: str,
    settings: config_module.Stage,
    built: stage.Stage,
    problem: Problem,
    finals: Mapping[str, State],
    checkpoints: Checkpoints,
    log: logs.RunLog | logs.NoLog,
    console: Console,
    stop: StopSignals,
) -> tuple[State, dict[str, Any]]:
    """Train one stage from its last checkpoint, or from its start -> final state and the stage's record."""
    began, fresh = time.monotonic(), settings.start_from == "scratch"
    before = None if fresh else finals[settings.start_from]
    start = initial_variables(run, name, problem) if before is None else before.variables
    state: State = built.init(seeds(run), start)
    record: dict[str, Any] = {"seconds": 0.0, "train_seconds": 0.0, "train_steps": 0, "evaluations": []}

    kept = checkpoints.restore(like(state))
    if kept is not None:
        state, record = kept
    elif settings.surgery:
        changed, record["surgery"] = operate(run, name, settings, problem, start)
        state = built.init(seeds(run), changed)
    if kept is None and settings.keep_optimizer and before is not None:
        state = stage.kept_optimizer(state, before)
    step = stage.steps_done(state)
    if step < built.num_steps or not record["evaluations"]:
        if kept is not None:
            console.print(f"Resuming {settings.title} after step {step} of {built.num_steps}.")
        log.rewind(name, -1 if kept is None else step)

    per_epoch, together = built.steps_per_epoch, run.batch_size * run.replicas
    chunk = chunk_length(per_epoch, run.dispatch_steps, run.replicas, streamed=problem.streamed)
    waited = record.get("wait_seconds", 0.0)
    started, saved_at = began - record["seconds"], time.monotonic()
    compiled: set[int] = set()  # lengths of dispatch that this process has run
    with (
        logs.StageProgress(console, settings.title, built.num_steps, step, together, settings.epochs) as bar,
        batches(run, name, settings, problem, built.num_steps) as feed,
    ):
        while step < built.num_steps:
            num_steps = min(chunk, per_epoch - step % per_epoch)
            epoch = step // per_epoch  # counted from 0
            chunk_started = time.monotonic()
            if built.refresh is not None and step % per_epoch == 0:
                state = built.refresh(state, problem.class_means(state.variables, built.layers))
            then = min(chunk, per_epoch - (step + num_steps) % per_epoch, built.num_steps - step - num_steps)
            waited_before = feed.waited
            state, values = built.run(state, feed.take(step, num_steps, then), num_steps)
            values = {key: np.atleast_2d(value) for key, value in values.items()}  # [replicas, steps]; waits
            if not np.isfinite(values["loss"]).all():
                bad, replica = (int(i[0]) for i in np.nonzero(~np.isfinite(values["loss"].T)))  # the first step's
                whose = f" of seed {run.seed + replica}" if run.replicas > 1 else ""
                what = f"loss{whose} became {values['loss'][replica, bad]}"
                raise non_finite(name, epoch, step + bad + 1, what, settings, checkpoints)
            if num_steps in compiled:  # the first one's time is the compiler's
                record["train_seconds"] += time.monotonic() - chunk_started
                record["train_steps"] += num_steps
                waited += feed.waited - waited_before
                record["wait_seconds"] = waited
            compiled.add(num_steps)
            step += num_steps
            step_seconds = record["train_seconds"] / record["train_steps"] if record["train_steps"] else None
            left = None if step_seconds is None else step_seconds * (built.num_steps - step)
            bar.show(step, epoch + 1, float(values["loss"][:, -1].mean()), step_seconds, left)
            means = {key: float(value.mean()) for key, value in values.items()}
            each = {"loss_of_replicas": values["loss"].mean(1).tolist()} if run.replicas > 1 else {}
            learning_rate = settings.lr * float(built.factors[epoch])
            log.write(name, epoch + 1, step, "train", {**means, **each, "lr": learning_rate})

            due = time.monotonic() - saved_at > run.checkpoint_seconds
            stopping, due = processes.any_of(stop.requested is not None, due)
            saving = step % per_epoch == 0 or stopping or due
            if saving and not stage.all_finite(state):
                raise non_finite(name, epoch, step, "a parameter is no longer finite", settings, checkpoints)
            score = None
            if step % per_epoch == 0 and evaluates(epoch + 1, settings.epochs, run.eval_every):
                score = evaluate_stage(run, name, settings, problem, state, epoch + 1, record, log)
                speed = together / step_seconds if step_seconds else None
                test = record["evaluations"][-1]["test"]
                wait = waited / record["train_seconds"] if record["train_seconds"] else 0.0
                bar.say(epoch_line(settings, epoch + 1, means["loss"], test, speed, left, wait))
            record["seconds"] = time.monotonic() - started
            if saving:
                checkpoints.save(step, state, record, score)
                saved_at = time.monotonic()
            if saving and stopping:
                checkpoints.wait()
                raise Interrupted(stop.requested or signal.SIGTERM)
        if not record["evaluations"]:  # a stage of surgery alone
            score = evaluate_stage(run, name, settings, problem, state, 0, record, log)
            bar.say(epoch_line(settings, 0, None, record["evaluations"][-1]["test"], None, None))
            record["seconds"] = time.monotonic() - started
            checkpoints.save(0, state, record, score)
    checkpoints.wait()
    if not settings.epochs and processes.any_of(stop.requested is not None)[0]:
        raise Interrupted(stop.requested or signal.SIGTERM)
    return state, record


def evaluate_stage(run, name, settings, problem, state, epoch, record, log) -> float:
    """Add the figures of this moment to the stage's record and the log -> the accuracy that checkpoints compete by."""
    step = stage.steps_done(state)
    evaluation: dict[str, Any] = {"epoch": epoch, "step": step}
    means = class_means_for(settings, problem, state.variables)
    for split, held in (("holdout", problem.holdout_set), ("test", problem.test_set)):
        if held is not None:
            evaluation[split] = evaluate_split(run, settings, problem, state.variables, held, means)
            log.write(name, epoch, step, split, _brief(evaluation[split]))
    earlier = [{key: _brief(part) for key, part in each.items()} for each in record["evaluations"]]
    record["evaluations"] = [*earlier, evaluation]
    return evaluation["holdout" if problem.holdout_set else "test"]["accuracy"]["all"]


def report(run, stages, problem, finals, summary, workdir, console, stop) -> None:
    """Leave `report/`; a report that cannot be made takes no results with it."""

    def go_on() -> None:
        if processes.any_of(stop.requested is not None)[0]:
            raise Interrupted(stop.requested or signal.SIGTERM)

    variables = {name: state.variables for name, state in finals.items()}
    try:
        make.write_report(run, stages, problem, variables, summary, workdir, go_on)
    except (Interrupted, OSError):
        raise
    except Exception as error:
        console.print(f"No report this time ({type(error).__name__}: {one_line(error)}); --mode=report tries again.")


def non_finite(name, epoch, step, what, settings, checkpoints: Checkpoints) -> UserError:
    checkpoints.wait()
    kept = complete_steps(checkpoints.directory)
    good = f"step {kept[-1]}" if kept else "none of this stage"
    return UserError(
        f"{what} in stage {name!r}, epoch {epoch + 1}, step {step}; last good checkpoint in {checkpoints.directory}: "
        f"{good}; lower config.{name}.lr (now {settings.lr:g}) or look at the loss's settings"
    )


def _brief(part: Any) -> Any:
    """An evaluation without the per-class numbers, which only the last one needs."""
    if isinstance(part, list):
        return [_brief(each) for each in part]
    if not isinstance(part, dict):
        return part
    kept = ("seed", "accuracy", "ece", "loss", "nearest_mean", "std", "replicas")
    return {key: _brief(value) if key == "replicas" else value for key, value in part.items() if key in kept}


def epoch_line(settings, epoch, loss, test, images_per_second, seconds_left, wait=0.0) -> str:
    accuracy, spread = test["accuracy"], test.get("std", {}).get("accuracy", {})
    shown = {
        group: results.percent(accuracy[group], spread.get(group)) for group in results.GROUPS if group in accuracy
    }
    groups = "  ".join(f"{group} {value}%" for group, value in shown.items())
    progress = f"epoch {epoch}/{settings.epochs}  loss {loss:.3f}  " if epoch else ""
    nearest = f"  nearest mean {test['nearest_mean']['accuracy']['all']:.1%}" if "nearest_mean" in test else ""
    speed = f"  {images_per_second:,.0f} images/s" if images_per_second else ""
    speed += f" ({wait:.0%} of it waiting for data)" if wait > 0.05 else ""
    left = f"  ETA {logs.clock(seconds_left)}" if epoch else ""
    return f"{settings.title}  {progress}test {groups}  ECE {test['ece']:.1%}{nearest}{speed}{left}"


def evaluate_workdir(
    config: Mapping[str, Any], workdir: str | Path, data_dir: str | Path | None = None
) -> dict[str, Any]:
    """Evaluate the newest checkpoint of every stage that has one, or `config.weights` where the workdir holds no run;
    print the table and write `eval.json`."""
    workdir, console = local(workdir), logs.make_console(quiet=not processes.first())
    run, stages = config_module.parse(config)
    found = imported(run, stages, workdir, data_dir)
    if found is None and not (workdir / "config.json").exists():
        raise UserError(f"{workdir} holds no run: train first, with --mode=train and the same --workdir")
    processes.on_first(lambda: open_workdir(workdir, config))
    if found is not None:
        summary = results.summarise(
            found.run,
            {"imported": found.settings},
            {"imported": judge_imported(found)},
            found.problem,
            results.git_commit(),
        )
        return write_evaluation({**summary, "weights": run.weights}, workdir, console)
    problem = setup(run, data_dir)
    records = {}
    for name, settings in stages.items():
        found = restored(run, name, settings, problem, workdir)
        if found is not None:
            built, state, record = found
            records[name] = {**record, "evaluations": [evaluate_restored(run, settings, problem, built, state)]}
    if not records:
        raise UserError(f"{workdir} holds no checkpoint yet: train first, with --mode=train")
    summary = results.summarise(run, {name: stages[name] for name in records}, records, problem, results.git_commit())
    return write_evaluation(summary, workdir, console)


def judge_imported(found: Imported) -> dict[str, Any]:
    """The record, as of a stage without training, of weights alone."""
    began, (run, problem, settings, variables) = time.monotonic(), found
    means = class_means_for(settings, problem, variables)
    test = evaluate_split(run, settings, problem, variables, problem.test_set, means)
    record = {"train_seconds": 0.0, "train_steps": 0, "evaluations": [{"epoch": 0, "step": 0, "test": test}]}
    return {**record, "seconds": time.monotonic() - began}


def write_evaluation(summary: dict[str, Any], workdir: Path, console: Console) -> dict[str, Any]:
    with named_disk_errors(workdir):
        if processes.first():
            write_json(workdir / "eval.json", summary)
    console.print(results.table(summary))
    return summary
