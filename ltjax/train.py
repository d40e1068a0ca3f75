"""The training loop, one for every method. Read it from `train` downwards."""

import signal
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from clu import parameter_overview
from rich.console import Console

from ltjax.config import StageConfig, parse
from ltjax.engine import describe
from ltjax.engine.experiment import (
    Experiment,
    apply_surgery,
    class_means_for,
    evaluate_set,
    longest_dispatch,
    open_feed,
    seeds,
    set_up_with_stages,
    starting_variables,
    state_shapes,
)
from ltjax.engine.stage import CompiledStage, TrainState, all_finite, kept_optimizer, steps_done
from ltjax.modes import report
from ltjax.runs import logs, results
from ltjax.runs.checkpoint import Checkpoints, StageRecord, cannot_save, complete_steps
from ltjax.runs.evaluated import with_ema
from ltjax.runs.workdir import locked, named_disk_errors, prepare_workdir
from ltjax.system import processes
from ltjax.system.files import holding, read_json, write_json
from ltjax.system.paths import local
from ltjax.system.signals import Interrupted, StopSignals
from ltjax.system.wording import one_line
from ltjax.types import UserError


def train(config: Mapping[str, Any], workdir: str | Path, data_dir: str | Path | None = None) -> dict[str, Any]:
    """Train all stages of a config, or resume a stopped run, and write the results to `workdir`.

    Args:
      config: Nested dicts, see `ltjax.config`.
      workdir: Folder of the run. It is made if it does not exist.
      data_dir: Folder of prepared data sets. The default is TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Returns:
      The content of `results.json`.

    Raises:
      UserError: For any mistake that the caller can correct.
      Interrupted: After Ctrl-C or SIGTERM, when everything is saved.
    """
    first, workdir = processes.first(), local(workdir)
    console = logs.make_console(quiet=not first)
    run = parse(config)
    processes.on_first(lambda: prepare_workdir(workdir, config))
    with locked(workdir) if first else nullcontext(), named_disk_errors(workdir):
        if processes.on_first((workdir / "results.json").exists):
            finished = read_json(workdir / "results.json")
            console.print(
                f"{workdir} holds a finished run of this config; remove it to train again, or on other images."
            )
            with holding(workdir / "results.json"):
                results.print_table(finished, console)
            return finished

        # Find all mistakes that can be found before the first step.
        commit = results.git_commit()
        experiment, compiled = set_up_with_stages(run, data_dir, workdir)
        write_start(experiment, compiled, config, workdir, console)

        # Train the stages one after the other, each from its newest checkpoint.
        states: dict[str, TrainState] = {}
        records: dict[str, StageRecord] = {}
        with StopSignals() as stop, _open_log(workdir, compiled) if first else logs.NoLog() as log:
            for name, stage in run.stages.items():
                with Checkpoints(workdir / "checkpoints" / name) as checkpoints:
                    trainer = StageTrainer(experiment, stage, compiled[name], checkpoints, log, console, stop)
                    try:
                        trainer.start(states.get(stage.start_from))
                        trainer.run()
                    except OSError as error:  # a full disk may stop the log before a checkpoint
                        if processes.lost(error):
                            raise
                        raise cannot_save(error, checkpoints.directory) from error
                states[name], records[name] = trainer.state, trainer.record

            # Write the report and the results.
            summary = results.content(experiment, run.stages, records, commit)
            write_report(experiment, states, summary, workdir, console, stop)
            if first:
                write_json(workdir / "results.json", summary)
        results.print_table(summary, console)
        console.print(f"Results, metrics and checkpoints are in {workdir}; look at {workdir}/report/index.html")
        return summary


def write_start(
    experiment: Experiment,
    compiled: Mapping[str, CompiledStage],
    config: Mapping[str, Any],
    workdir: Path,
    console: Console,
) -> None:
    """Write the run's config, split and parameters, and print what is trained. Only the first process does."""
    if processes.first():
        write_json(workdir / "config.json", config)
        if not (workdir / "split.json").exists():  # later, other images are refused
            write_json(workdir / "split.json", experiment.description)
        parameters = parameter_overview.get_parameter_overview(experiment.shapes.params, include_stats=False)
        (workdir / "parameters.txt").write_text(parameters + "\n")
        describe.show(experiment, compiled, workdir, console)
        console.print("Compiling the first steps; this is slower than running them.")


def _open_log(workdir: Path, compiled: Mapping[str, CompiledStage]) -> logs.RunLog:
    before = np.cumsum([0] + [stage.num_steps for stage in compiled.values()]).tolist()
    return logs.RunLog(workdir, dict(zip(compiled, before, strict=False)))


def write_report(
    experiment: Experiment,
    states: Mapping[str, TrainState],
    summary: dict[str, Any],
    workdir: Path,
    console: Console,
    stop: StopSignals,
) -> None:
    """Write `report/`. If this fails, print the error and keep the results."""
    variables = {name: state.variables for name, state in states.items()}
    try:
        report.make_report(experiment, variables, summary, workdir, partial(stop_if_asked, stop))
    except (Interrupted, OSError):
        raise
    except Exception as error:
        console.print(f"No report this time ({type(error).__name__}: {one_line(error)}); --mode=report tries again.")


def stop_if_asked(stop: StopSignals) -> None:
    """Raise Interrupted if any process was asked to stop."""
    if processes.any_of(stop.requested is not None)[0]:
        raise Interrupted(stop.requested or signal.SIGTERM)


# One stage.


class Dispatch(NamedTuple):
    """Steps that were sent to the devices together, and may still be running."""

    step: int  # steps of the stage after the dispatch
    num_steps: int
    metrics: dict[str, Any]  # arrays [num_steps] or [replicas, num_steps]
    began: float | None  # start time; None if compiling is part of it
    waited: float  # seconds that the devices waited for their batches
    flags: Callable[[], tuple[bool, ...]]  # waits for the result: whether any process has to stop, and to save

    def running(self) -> bool:
        return not self.metrics["loss"].is_ready()


class StageTrainer:
    """Trains one stage: dispatches steps, reads their metrics, evaluates and saves.

    Attributes:
      state: The state of the stage.
      step: Number of steps dispatched so far.
      record: What a checkpoint stores with the state.
    """

    def __init__(
        self,
        experiment: Experiment,
        stage: StageConfig,
        compiled: CompiledStage,
        checkpoints: Checkpoints,
        log: logs.RunLog | logs.NoLog,
        console: Console,
        stop: StopSignals,
    ):
        self.experiment, self.stage, self.compiled, self.checkpoints = experiment, stage, compiled, checkpoints
        self.log, self.console, self.stop, self.check_stop = log, console, stop, partial(stop_if_asked, stop)
        self.run_config = experiment.config
        self.most_steps = longest_dispatch(experiment, compiled)
        self.record: StageRecord = {"seconds": 0.0, "train_seconds": 0.0, "train_steps": 0, "evaluations": []}
        self.lengths: set[int] = set()  # lengths of dispatches that this process has compiled
        self.known_means: dict[tuple[str, ...], Any] = {}  # {layers: class means} of the current state
        self.loss: float | None = None  # mean of the last dispatch that was read
        self.read_at = 0.0  # time when it was read
        self.stopping = self.save_is_due = False

    def start(self, before: TrainState | None) -> None:
        """Restore the newest checkpoint, or start from scratch or from the stage `before`."""
        self.began = time.monotonic()
        restored = self.checkpoints.restore(state_shapes(self.experiment, self.compiled))
        if restored is None:
            self.state = self.initial_state(before)
        else:
            self.state, self.record = restored
        self.step = steps_done(self.state)
        self.began -= self.record["seconds"]
        self.saved_at = time.monotonic()
        self.unsaved = restored is None and bool(self.stage.surgery)
        if self.step < self.compiled.num_steps or self.evaluation_due():
            if restored is not None:
                self.console.print(f"Resuming {self.stage.title} after step {self.step} of {self.compiled.num_steps}.")
            self.log.rewind(self.stage.name, -1 if restored is None else self.step, last_evaluated(self.record))

    def initial_state(self, before: TrainState | None) -> TrainState:
        """Make the state of step 0 from scratch or from the stage `before`, with the stage's surgery."""
        experiment, stage = self.experiment, self.stage
        if before is None:
            variables = starting_variables(experiment, stage)
        else:  # with keep_optimizer net and average go on; else the stage starts from the average and begins a new one
            variables = before.variables if stage.keep_optimizer else with_ema(before.variables)
        if stage.surgery:
            variables, self.record["surgery"] = apply_surgery(experiment, stage, variables, self.check_stop)
        state: TrainState = self.compiled.init(seeds(self.run_config), variables)
        return kept_optimizer(state, before) if stage.keep_optimizer and before is not None else state

    def run(self) -> None:
        """Train to the end of the stage. After a signal, save and raise Interrupted."""
        end, together = self.compiled.num_steps, self.run_config.batch_size * self.run_config.replicas
        with (
            logs.StageProgress(self.console, self.stage.title, end, self.step, together, self.stage.epochs) as self.bar,
            open_feed(self.experiment, self.stage, end) as self.feed,
        ):
            try:
                # A dispatch is sent while the one before it runs. Nothing is evaluated or saved until all are read.
                running: Dispatch | None = None
                while True:
                    at_rest = self.stopping or self.save_is_due or self.step == end or self.evaluation_due()
                    next_up = None
                    if not at_rest and (running is None or self.may_run_ahead()):
                        next_up = self.dispatch(running)
                    if running is not None:
                        self.read(running)
                    running = next_up
                    if running is not None:
                        continue
                    if self.stopping:
                        raise Interrupted(self.stop.requested or signal.SIGTERM)
                    if self.evaluation_due():
                        self.evaluate()
                    if self.save_is_due or self.step == end:
                        self.save()
                    if self.step == end:
                        break
            except Interrupted:
                self.save()
                self.checkpoints.wait()
                raise
        self.checkpoints.wait()
        self.check_stop()

    def length(self, step: int) -> int:
        """Return the number of steps of the dispatch that begins at a step. It ends with the epoch at the latest."""
        per_epoch = self.compiled.steps_per_epoch
        return min(self.most_steps, per_epoch - step % per_epoch, self.compiled.num_steps - step)

    def refreshes(self) -> bool:
        return self.compiled.refresh is not None and self.step % self.compiled.steps_per_epoch == 0

    def may_run_ahead(self) -> bool:
        """Return whether the next steps may be dispatched before the metrics of the last ones are read.

        Not if they have to be compiled: that time must not count as time of the last steps.
        """
        return runs_ahead() and not self.refreshes() and self.length(self.step) in self.lengths

    def dispatch(self, before: Dispatch | None) -> Dispatch:
        """Dispatch the next steps. The devices may still run those of `before`."""
        num_steps, began, waited = self.length(self.step), time.monotonic(), self.feed.waited
        if self.refreshes():
            layers = self.compiled.layers
            self.state = self.compiled.refresh(self.state, None if layers is None else self.class_means(layers))
        busy = lambda: before is not None and before.running()  # noqa: E731
        source = self.feed.take(self.step, num_steps, self.length(self.step + num_steps), busy)
        self.state, metrics = self.compiled.run(self.state, source, num_steps)
        self.step, self.unsaved = self.step + num_steps, True
        self.known_means.clear()
        compiles = num_steps not in self.lengths
        self.lengths.add(num_steps)
        began, waited = None if compiles else began, self.feed.waited - waited
        return Dispatch(self.step, num_steps, metrics, began, waited, processes.ask(self.stop_or_save))

    def stop_or_save(self) -> tuple[bool, bool]:
        """Return whether this process has to stop, and to save."""
        due = time.monotonic() - self.saved_at > self.run_config.checkpoint_seconds
        return self.stop.requested is not None, due

    def read(self, dispatch: Dispatch) -> None:
        """Wait for a dispatch, check and log its metrics, and learn whether to stop or to save."""
        metrics = {key: np.atleast_2d(value) for key, value in dispatch.metrics.items()}  # [replicas, steps]; waits
        epoch = -(-dispatch.step // self.compiled.steps_per_epoch)
        self.check_finite(metrics["loss"], epoch, dispatch)
        now = time.monotonic()
        if dispatch.began is not None:
            self.record["train_seconds"] += now - max(dispatch.began, self.read_at)
            self.record["train_steps"] += dispatch.num_steps
            self.record["wait_seconds"] = self.record.get("wait_seconds", 0.0) + dispatch.waited
        self.read_at = now
        self.bar.show(dispatch.step, epoch, float(metrics["loss"][:, -1].mean()), *self.pace(dispatch.step))
        values = {key: float(value.mean()) for key, value in metrics.items()}
        self.loss = values["loss"]
        if self.run_config.replicas > 1:
            values["loss_of_replicas"] = metrics["loss"].mean(1).tolist()
        values["lr"] = self.stage.lr * float(self.compiled.factors[epoch - 1])
        self.log.write(self.stage.name, epoch, dispatch.step, "train", values)
        self.stopping, self.save_is_due = dispatch.flags()

    def check_finite(self, loss: np.ndarray, epoch: int, dispatch: Dispatch) -> None:
        """Raise UserError if a loss [replicas, steps] is inf or nan."""
        if np.isfinite(loss).all():
            return
        first, replica = (int(i[0]) for i in np.nonzero(~np.isfinite(loss.T)))
        seed = f" of seed {self.run_config.seed + replica}" if self.run_config.replicas > 1 else ""
        step = dispatch.step - dispatch.num_steps + first + 1
        raise self.non_finite(epoch, step, f"loss{seed} became {loss[replica, first]}")

    def non_finite(self, epoch: int, step: int, what: str) -> UserError:
        self.checkpoints.wait()
        steps = complete_steps(self.checkpoints.directory)
        good = f"step {steps[-1]}" if steps else "none of this stage"
        return UserError(
            f"{what} in stage {self.stage.name!r}, epoch {epoch}, step {step}; last good checkpoint in "
            f"{self.checkpoints.directory}: {good}; lower config.{self.stage.name}.lr (now {self.stage.lr:g}) or look "
            "at the loss's settings"
        )

    def pace(self, step: int) -> tuple[float | None, float | None]:
        """Return the mean seconds a step, and the seconds left after `step`; None if no step was timed yet."""
        if not self.record["train_steps"]:
            return None, None
        step_seconds = self.record["train_seconds"] / self.record["train_steps"]
        return step_seconds, step_seconds * (self.compiled.num_steps - step)

    def class_means(self, layers: tuple[str, ...] = ()) -> Any:
        """Compute the class means of the current state, once."""
        if layers not in self.known_means:
            self.known_means[layers] = self.experiment.class_means(self.state.variables, layers, self.check_stop)
        return self.known_means[layers]

    def evaluation_due(self) -> bool:
        """Return whether the current state has to be evaluated, and was not."""
        epoch, steps_into_epoch = divmod(self.step, self.compiled.steps_per_epoch)
        ended = steps_into_epoch == 0 and (epoch > 0 or self.stage.epochs == 0)
        due = ended and evaluation_follows(epoch, self.stage.epochs, self.run_config.eval_every)
        return due and self.step != last_evaluated(self.record)

    def evaluate(self) -> None:
        """Evaluate the current state. Add the figures to the record and the log, and print them."""
        experiment, stage, epoch = self.experiment, self.stage, self.step // self.compiled.steps_per_epoch
        shares_means = stage.nearest_mean and not stage.ema  # with `refresh`, whose means are not of the average
        variables = self.state.variables
        means = self.class_means() if shares_means else class_means_for(experiment, stage, variables, self.check_stop)
        evaluation: dict[str, Any] = {"epoch": epoch, "step": self.step}
        for split, images in (("holdout", experiment.holdout_set), ("test", experiment.test_set)):
            if images is not None:
                evaluation[split] = evaluate_set(experiment, stage, variables, images, means, self.check_stop)
        for split in ("holdout", "test"):  # only now, so that a signal cannot separate the two
            if split in evaluation:
                self.log.write(stage.name, epoch, self.step, split, results.of_epoch(evaluation[split]))
        self.record["evaluations"] = [*map(results.of_epoch, self.record["evaluations"]), evaluation]
        self.unsaved = True
        self.bar.say(self.epoch_line(epoch, evaluation["test"]))

    def epoch_line(self, epoch: int, test: Mapping[str, Any]) -> str:
        accuracy, spread = test["accuracy"], test.get("std", {}).get("accuracy", {})
        shown = {
            group: results.percent(accuracy[group], spread.get(group)) for group in results.GROUPS if group in accuracy
        }
        parts = [f"epoch {epoch}/{self.stage.epochs}"] if epoch else []
        parts += [] if self.loss is None else [f"loss {self.loss:.3f}"]
        parts += ["test " + "  ".join(f"{group} {value}%" for group, value in shown.items()), f"ECE {test['ece']:.1%}"]
        if "nearest_mean" in test:
            parts.append(f"nearest mean {test['nearest_mean']['accuracy']['all']:.1%}")
        step_seconds, seconds_left = self.pace(self.step)
        if step_seconds:
            rate = f"{self.run_config.batch_size * self.run_config.replicas / step_seconds:,.0f} images/s"
            waiting = self.record.get("wait_seconds", 0.0) / self.record["train_seconds"]
            parts.append(rate + (f" ({waiting:.0%} of it waiting for data)" if waiting > 0.05 else ""))
        parts += [f"ETA {logs.clock(seconds_left)}"] if epoch else []
        return "  ".join((self.stage.title, *parts))

    def save(self) -> None:
        """Save the current state, unless it is saved already. Raise UserError if a parameter is inf or nan."""
        if self.unsaved:
            if self.stage.epochs and not all_finite(self.state):
                epoch = -(-self.step // self.compiled.steps_per_epoch)
                raise self.non_finite(epoch, self.step, "a parameter is no longer finite")
            self.record["seconds"] = time.monotonic() - self.began
            self.checkpoints.save(self.step, self.state, self.record)
        self.unsaved, self.saved_at, self.save_is_due = False, time.monotonic(), False


def evaluation_follows(epoch: int, epochs: int, every: int) -> bool:
    """Return whether an evaluation follows an epoch, counted from 1. every: `config.eval_every`."""
    if every == 0:
        every = 5 if epoch <= epochs - 20 else 1
    return epoch % every == 0 or epoch == epochs


def runs_ahead() -> bool:
    """Return whether to dispatch steps before the last metrics are read, so that devices never wait.

    Not on CPUs: they would gain nothing, and the collectives of two programs at once may wait for each other.
    """
    return jax.default_backend() != "cpu"


def last_evaluated(record: StageRecord) -> int:
    """Return the step of a stage's last evaluation; -1 if there is none."""
    return record["evaluations"][-1]["step"] if record["evaluations"] else -1
