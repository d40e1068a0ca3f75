"""The training loop: one for every method. Read it top to bottom."""

import signal
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from ltjax import config as config_module
from ltjax.config import Run
from ltjax.data import splits
from ltjax.engine import stage
from ltjax.engine.feed import DISPATCH_STEPS
from ltjax.engine.problem import (
    Problem,
    batches,
    evaluate_split,
    initial_variables,
    operate,
    prepare,
    seeds,
)
from ltjax.engine.stage import State
from ltjax.modes import dry_run, report
from ltjax.runs import logs, results
from ltjax.runs.checkpoint import Checkpoints, cannot_save, complete_steps, like, read_json, write_json
from ltjax.runs.workdir import check_same_images, locked, named_disk_errors, open_workdir
from ltjax.system import processes
from ltjax.system.paths import local
from ltjax.system.signals import Interrupted, StopSignals
from ltjax.types import UserError, one_line


def chunk_length(
    steps_per_epoch: int, asked: int, replicas: int = 1, *, streamed: bool = False, attacks: bool = False
) -> int:
    """Steps to a dispatch: at most 100 on accelerators and 16 on a CPU, of several replicas together; a fifth of that
    where each step attacks its images; 4 of streamed batches, which take memory. When a signal asks to stop, two
    dispatches may be under way (see `runs_ahead`), and are finished.

    A divisor of the epoch where there is a good one, so that one compiled function serves all dispatches; else the
    epoch in nearly equal parts, whose last is shorter.
    """
    usual = 16 if jax.default_backend() == "cpu" else 100
    usual = max(1, usual // (replicas * (5 if attacks else 1)))
    most = min(asked or (min(usual, DISPATCH_STEPS) if streamed else usual), steps_per_epoch)
    divisor = max(n for n in range(1, most + 1) if steps_per_epoch % n == 0)
    parts = -(-steps_per_epoch // most)
    return divisor if 2 * divisor >= most else -(-steps_per_epoch // parts)


def evaluates(epoch: int, epochs: int, every: int) -> bool:
    """Whether an evaluation follows this epoch, from 1 on. every: `config.eval_every`."""
    if every == 0:
        every = 5 if epoch <= epochs - 20 else 1
    return epoch % every == 0 or epoch == epochs


def runs_ahead() -> bool:
    """Whether devices get their next steps before what they did last is read, and so never wait for that. A CPU would
    gain nothing, and there collectives of two programs under way may wait for each other."""
    return jax.default_backend() != "cpu"


class Dispatch(NamedTuple):
    """Steps that the devices have been given, and may not have done yet."""

    step: int  # after the last of them
    num_steps: int
    values: dict[str, Any]  # metrics of each step, arrays [num_steps] or [replicas, num_steps]
    began: float | None  # None: a part of their time is the compiler's
    waited: float  # seconds that the devices had to wait for their batches
    asked: Callable[[], tuple[bool, ...]]  # waits -> whether some process wants to stop, or to save

    def running(self) -> bool:
        return not self.values["loss"].is_ready()


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
            dry_run.write_parameters(problem, workdir / "parameters.txt")
            dry_run.show(run, stages, built, problem, workdir, console)
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
            write_report(run, stages, problem, finals, summary, workdir, console, stop)
            if first:
                write_json(workdir / "results.json", summary)
        results.print_table(summary, console)
        console.print(f"Results, metrics and checkpoints are in {workdir}; look at {workdir}/report/index.html")
        return summary


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
    step, per_epoch = stage.steps_done(state), built.steps_per_epoch
    chunk = chunk_length(per_epoch, run.dispatch_steps, run.replicas, streamed=problem.streamed, attacks=built.attacks)
    compiled: set[int] = set()  # lengths of dispatch that this process has run
    means: dict[tuple[str, ...], Any] = {}  # {layers: class means} of the state as it is
    started, saved_at, read_at = began - record["seconds"], time.monotonic(), 0.0
    unsaved = kept is None and bool(settings.surgery)
    stopping = due = False
    loss = None  # of the steps that were read last

    def flags() -> tuple[bool, bool]:
        return stop.requested is not None, time.monotonic() - saved_at > run.checkpoint_seconds

    def go_on() -> None:
        if processes.any_of(stop.requested is not None)[0]:
            raise Interrupted(stop.requested or signal.SIGTERM)

    def class_means(layers: tuple[str, ...] = ()) -> Any:
        if layers not in means:
            means[layers] = problem.class_means(state.variables, layers, go_on)
        return means[layers]

    def length(step: int) -> int:
        """Of the dispatch that begins at a step."""
        return min(chunk, per_epoch - step % per_epoch, built.num_steps - step)

    def refreshes() -> bool:
        return built.refresh is not None and step % per_epoch == 0

    def give(before: Dispatch | None) -> Dispatch:
        """Hand the next steps to the devices, which may still be at those of `before`."""
        nonlocal state, step, unsaved
        num_steps, began, waited = length(step), time.monotonic(), feed.waited
        if refreshes():
            state = built.refresh(state, class_means(built.layers))
        source = feed.take(step, num_steps, length(step + num_steps), lambda: before is not None and before.running())
        state, values = built.run(state, source, num_steps)
        step, unsaved = step + num_steps, True
        means.clear()
        counts = num_steps in compiled  # the first one's time is the compiler's
        compiled.add(num_steps)
        return Dispatch(step, num_steps, values, began if counts else None, feed.waited - waited, processes.ask(flags))

    def read(done: Dispatch) -> None:
        """Wait for the devices, check and log what they have done, and hear whether to stop or to save."""
        nonlocal read_at, loss, stopping, due
        values = {key: np.atleast_2d(value) for key, value in done.values.items()}  # [replicas, steps]; waits
        epoch = -(-done.step // per_epoch)
        if not np.isfinite(values["loss"]).all():
            bad, replica = (int(i[0]) for i in np.nonzero(~np.isfinite(values["loss"].T)))  # the first step's
            whose = f" of seed {run.seed + replica}" if run.replicas > 1 else ""
            what = f"loss{whose} became {values['loss'][replica, bad]}"
            raise non_finite(name, epoch, done.step - done.num_steps + bad + 1, what, settings, checkpoints)
        now = time.monotonic()
        if done.began is not None:
            record["train_seconds"] += now - max(done.began, read_at)
            record["train_steps"] += done.num_steps
            record["wait_seconds"] = record.get("wait_seconds", 0.0) + done.waited
        read_at = now
        bar.show(done.step, epoch, float(values["loss"][:, -1].mean()), *pace(record, built.num_steps - done.step))
        averages = {key: float(value.mean()) for key, value in values.items()}
        each = {"loss_of_replicas": values["loss"].mean(1).tolist()} if run.replicas > 1 else {}
        learning_rate = settings.lr * float(built.factors[epoch - 1])
        log.write(name, epoch, done.step, "train", {**averages, **each, "lr": learning_rate})
        loss = averages["loss"]
        stopping, due = done.asked()

    def owes_evaluation() -> bool:
        """Whether the state as it is has to be evaluated, and has not been."""
        epoch, beyond = divmod(step, per_epoch)
        ended = beyond == 0 and (epoch > 0 or settings.epochs == 0)
        return ended and evaluates(epoch, settings.epochs, run.eval_every) and step != last_evaluated(record)

    def evaluate() -> None:
        nonlocal unsaved
        epoch, nearest = step // per_epoch, class_means() if settings.nearest_mean else None
        evaluate_stage(run, name, settings, problem, state, epoch, record, log, nearest, go_on)
        unsaved = True
        step_seconds, left = pace(record, built.num_steps - step)
        speed = run.batch_size * run.replicas / step_seconds if step_seconds else None
        wait = record.get("wait_seconds", 0.0) / record["train_seconds"] if record["train_seconds"] else 0.0
        bar.say(epoch_line(settings, epoch, loss, record["evaluations"][-1]["test"], speed, left, wait))

    def save() -> None:
        nonlocal unsaved, saved_at, due
        if unsaved:
            if settings.epochs and not stage.all_finite(state):
                what = "a parameter is no longer finite"
                raise non_finite(name, -(-step // per_epoch), step, what, settings, checkpoints)
            record["seconds"] = time.monotonic() - started
            checkpoints.save(step, state, record)
        unsaved, saved_at, due = False, time.monotonic(), False

    if step < built.num_steps or owes_evaluation():
        if kept is not None:
            console.print(f"Resuming {settings.title} after step {step} of {built.num_steps}.")
        log.rewind(name, -1 if kept is None else step, last_evaluated(record))
    together = run.batch_size * run.replicas
    with (
        logs.StageProgress(console, settings.title, built.num_steps, step, together, settings.epochs) as bar,
        batches(run, name, settings, problem, built.num_steps) as feed,
    ):
        try:
            under_way: Dispatch | None = None
            while True:
                wanted = stopping or due or step == built.num_steps or owes_evaluation()  # the state as it is
                # what is under way is read first, for a new length, too: compiling is no time of its steps
                alone = not runs_ahead() or refreshes() or length(step) not in compiled
                given = None if wanted or (alone and under_way is not None) else give(under_way)
                if under_way is not None:
                    read(under_way)
                under_way = given
                if under_way is not None:
                    continue
                if stopping:
                    raise Interrupted(stop.requested or signal.SIGTERM)
                if owes_evaluation():
                    evaluate()
                if due or step == built.num_steps:
                    save()
                if step == built.num_steps:
                    break
        except Interrupted:
            save()
            checkpoints.wait()
            raise
    checkpoints.wait()
    go_on()
    return state, record


def pace(record: Mapping[str, Any], steps: int) -> tuple[float | None, float | None]:
    """Seconds a step so far, and for so many more; None while there are none to go by."""
    each = record["train_seconds"] / record["train_steps"] if record["train_steps"] else None
    return each, None if each is None else each * steps


def last_evaluated(record: Mapping[str, Any]) -> int:
    """The step of a stage's last evaluation; -1: there is none."""
    return record["evaluations"][-1]["step"] if record["evaluations"] else -1


def evaluate_stage(run, name, settings, problem, state, epoch, record, log, means, go_on) -> None:
    """Add the figures of this moment to the stage's record and the log. means, go_on: see `evaluate_split`."""
    step = stage.steps_done(state)
    evaluation: dict[str, Any] = {"epoch": epoch, "step": step}
    for split, held in (("holdout", problem.holdout_set), ("test", problem.test_set)):
        if held is not None:
            evaluation[split] = evaluate_split(run, settings, problem, state.variables, held, means, go_on)
    for split in ("holdout", "test"):  # all of it or, where that is stopped, none
        if split in evaluation:
            log.write(name, epoch, step, split, _brief(evaluation[split]))
    earlier = [{key: _brief(part) for key, part in each.items()} for each in record["evaluations"]]
    record["evaluations"] = [*earlier, evaluation]


def write_report(run, stages, problem, finals, summary, workdir, console, stop) -> None:
    """Leave `report/`; a report that cannot be made takes no results with it."""

    def go_on() -> None:
        if processes.any_of(stop.requested is not None)[0]:
            raise Interrupted(stop.requested or signal.SIGTERM)

    variables = {name: state.variables for name, state in finals.items()}
    try:
        report.write_report(run, stages, problem, variables, summary, workdir, go_on)
    except (Interrupted, OSError):
        raise
    except Exception as error:
        console.print(f"No report this time ({type(error).__name__}: {one_line(error)}); --mode=report tries again.")


def non_finite(name, epoch, step, what, settings, checkpoints: Checkpoints) -> UserError:
    checkpoints.wait()
    kept = complete_steps(checkpoints.directory)
    good = f"step {kept[-1]}" if kept else "none of this stage"
    return UserError(
        f"{what} in stage {name!r}, epoch {epoch}, step {step}; last good checkpoint in {checkpoints.directory}: "
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
    progress = f"epoch {epoch}/{settings.epochs}  " if epoch else ""
    progress += "" if loss is None else f"loss {loss:.3f}  "
    nearest = f"  nearest mean {test['nearest_mean']['accuracy']['all']:.1%}" if "nearest_mean" in test else ""
    speed = f"  {images_per_second:,.0f} images/s" if images_per_second else ""
    speed += f" ({wait:.0%} of it waiting for data)" if wait > 0.05 else ""
    left = f"  ETA {logs.clock(seconds_left)}" if epoch else ""
    return f"{settings.title}  {progress}test {groups}  ECE {test['ece']:.1%}{nearest}{speed}{left}"
