"""`--mode=attack`: evaluate a checkpoint on clean and on attacked test images."""

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial
from rich.console import Console

from ltjax import attacks
from ltjax.config import AttackConfig, RunConfig, StageConfig, parse
from ltjax.engine import evaluate, feed
from ltjax.engine.experiment import Experiment, seeds, set_up
from ltjax.engine.restore import import_weights, restored_stages
from ltjax.engine.stage import make_apply, steps_done
from ltjax.report import figures, page
from ltjax.runs import logs, results
from ltjax.runs.evaluated import as_evaluated
from ltjax.runs.seeds import pool
from ltjax.runs.trained import evaluates_weights
from ltjax.runs.workdir import locked, prepare_workdir
from ltjax.system import parallel, processes, xla
from ltjax.system.files import read_json, write_json
from ltjax.system.hashing import hash32
from ltjax.system.paths import local
from ltjax.system.signals import Interrupted, StopSignals
from ltjax.types import UserError, Variables

NUMBERED = r"(pgd|cw)-[1-9]\d*"  # names of tests that end with a number of steps
OF_CURVE = "pgd-20"  # the test that is repeated at `config.attack.radii`
PICTURES = 6  # number of images in report/attack.png


class Target(NamedTuple):
    """A network, and the images to attack."""

    experiment: Experiment
    predict: Partial  # images -> logits
    images: np.ndarray  # float32 [N, H, W, channels]
    labels: np.ndarray  # int32 [N]
    settings: AttackConfig
    mesh: Mesh
    console: Console
    check_stop: Callable[[], None]  # raises Interrupted after a signal

    def figures(self, outcome: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return evaluate.figures_of(outcome, self.labels, self.experiment.groups, len(self.experiment.class_names))


class Checkpoint(NamedTuple):
    """The checkpoint to attack; with several replicas, `variables` has their axis."""

    experiment: Experiment
    stage: StageConfig
    step: int
    variables: Variables


def attack_workdir(
    config: Mapping[str, Any], workdir: str | Path, data_dir: str | Path | None = None
) -> dict[str, Any]:
    """Attack the newest checkpoint of the last stage that has one, or `config.weights` if the workdir holds no run.

    Print a table. Write the figures to `attack.json` and, if the run is finished, to `results.json` under "robustness".
    Write a few images to `report/attack.png`. After Ctrl-C, SIGTERM or kill -9 the same command continues AutoAttack.

    Returns:
      The content of `attack.json`.

    Raises:
      UserError: For any mistake that the caller can correct.
      Interrupted: After Ctrl-C or SIGTERM, when everything is saved.
    """
    workdir, console = local(workdir), logs.make_console()
    run = parse(config)
    check(run.attack)
    if processes.several():
        raise UserError("--mode=attack works in one process, with all of its devices: start it on one machine")
    prepare_workdir(workdir, config, needs_run=not evaluates_weights(run, workdir))
    with locked(workdir), StopSignals() as stop:
        began, checkpoint = time.monotonic(), _checkpoint(run, workdir, data_dir)
        experiment, stage, step, _ = checkpoint
        images, chosen = test_images(experiment, run.attack)
        labels = experiment.test_set.host_labels[chosen]
        console.print(
            f"{stage.title}, step {step}: {len(images):,} test images, {run.attack.norm} radius "
            f"{run.attack.epsilon}, {', '.join(run.attack.tests)}"
        )
        tests, curves = [], []
        for replica, target in enumerate(_targets(checkpoint, images, labels, console, stop)):
            file = workdir / "attack" / f"{stage.name}-step{step}-seed{run.seed + replica}"
            try:
                figures_of_tests, attacked = attack(target, file)
            except ValueError as error:
                raise UserError(f"cannot attack: {error}") from error
            tests.append(figures_of_tests)
            curves.append(curve(target, figures_of_tests))
            if replica == 0:
                figures.write_attack(_shown(target, attacked), experiment.class_names, workdir / "report")
        summary = _summary(checkpoint, chosen, _averaged(tests, run), _averaged(curves, run))
        summary["seconds"] = time.monotonic() - began
        write_json(workdir / "attack.json", summary)
        # Deleted last, so that an interrupted run can reuse AutoAttack's result.
        for progress in (workdir / "attack").glob(f"{stage.name}-step{step}-seed*.npz"):
            progress.unlink()
        if (workdir / "results.json").exists():
            write_json(workdir / "results.json", {**read_json(workdir / "results.json"), "robustness": summary})
            page.write(workdir)
        console.print(results.robustness_table(run.name, summary))
        console.print(f"Figures are in {workdir / 'attack.json'}, pictures in {workdir / 'report' / 'attack.png'}")
    return summary


def _checkpoint(run: RunConfig, workdir: Path, data_dir: str | Path | None) -> Checkpoint:
    imported = import_weights(run, workdir, data_dir)
    if imported is not None:
        checkpoint = Checkpoint(imported.experiment, imported.stage._replace(name="imported"), 0, imported.variables)
    else:
        experiment = set_up(run, data_dir, workdir, features_as="images")
        stage, restored = next(restored_stages(experiment, workdir, last_first=True))
        checkpoint = Checkpoint(experiment, stage, steps_done(restored.state), restored.state.variables)
    if checkpoint.stage.evaluate_net != "net":
        raise UserError(f"{checkpoint.stage.title} trains the guide alone: train on with --mode=train before attacking")
    return checkpoint


def _targets(
    checkpoint: Checkpoint, images: np.ndarray, labels: np.ndarray, console: Console, stop: StopSignals
) -> Iterator[Target]:
    """Yield the target of each replica, on all devices."""
    experiment, stage, _, variables = checkpoint
    run, mesh = experiment.config, parallel.make_mesh()
    variables = as_evaluated(variables, stage.eval_classifier)
    apply = make_apply(experiment.nets, "eval")

    def logits(variables: Variables, images: jax.Array) -> jax.Array:
        with xla.float32_products(mesh.devices.flat[0].platform):
            return apply(variables, images)[0].logits

    def check_stop() -> None:
        if stop.requested is not None:
            raise Interrupted(stop.requested)

    for replica in range(run.replicas):
        of_replica = jax.tree.map(lambda x, r=replica: x[r], variables) if run.replicas > 1 else variables
        predict = jax.device_put(Partial(logits, of_replica), parallel.replicated(mesh))
        yield Target(experiment, predict, images, labels, run.attack, mesh, console, check_stop)


def _summary(
    checkpoint: Checkpoint, chosen: np.ndarray, tests: Mapping[str, Any], curve: Mapping[float, Any]
) -> dict[str, Any]:
    experiment, stage, step, _ = checkpoint
    run = experiment.config
    points = []
    for radius, point in sorted(curve.items()):
        spread = {"std": point["std"]["accuracy"]} if "std" in point else {}
        points.append({"epsilon": radius, "accuracy": point["accuracy"], **spread})
    return {
        "stage": stage.name,
        "step": step,
        "epsilon": attacks.radius(run.attack.epsilon, norm=run.attack.norm),
        "norm": run.attack.norm,
        "num_images": len(chosen),
        "images_sha256": hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest(),
        "tests": tests,
        "curve": points,
        **({"weights": run.weights} if stage.name == "imported" else {}),
        **results.provenance(experiment.mesh, results.git_commit()),
    }


def choose(labels: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Choose `most` images (0: all), as many of each class as there can be, at random: sorted indices.

    The first images would be those of the first classes, if a data set lies in folders of classes.

    Args:
      labels: [N].
      seed: It determines the choice, on every machine.
    """
    if not 0 < most < len(labels):
        return np.arange(len(labels))
    random = hash32(np.uint32(seed % 2**32), np.arange(len(labels), dtype=np.uint32))
    by_class = np.lexsort((random, labels))
    starts = np.searchsorted(labels[by_class], np.arange(labels.max() + 1))
    rank = np.empty(len(labels), np.int64)  # of an image in its class
    rank[by_class] = np.arange(len(labels)) - starts[labels[by_class]]
    return np.sort(np.lexsort((random, rank))[:most])


def test_images(experiment: Experiment, settings: AttackConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return the test images to attack, float32 in [0, 1], and their indices; see `choose`."""
    test_set = experiment.test_set
    chosen = choose(test_set.host_labels, settings.num_images, settings.seed)
    if len(chosen) < test_set.size:
        images = np.stack([feed.picture(experiment.config, experiment.data, int(i)) for i in chosen])
    else:
        parts = [np.asarray(images).reshape(-1, *experiment.image_shape) for images, _ in test_set.parts()]
        images = np.concatenate(parts)[: test_set.size]
    return images.astype(np.float32) / 255, chosen


def check(settings: AttackConfig) -> None:
    """Check `config.attack`. UserError if a value is wrong."""
    try:
        attacks.radius(settings.epsilon, norm=settings.norm)
        attacks.radius(settings.step_size, norm="l2")
    except ValueError as error:
        raise UserError(f"config.attack: {error}") from error
    for times in settings.radii:
        if not isinstance(times, (int, float)) or not times > 0:
            raise UserError(f"config.attack.radii = {settings.radii}: multiples of epsilon above 0, such as (0.5, 2.0)")
    known = (*attacks.ATTACKS, "autoattack")
    for test in settings.tests:
        if test not in known and not re.fullmatch(NUMBERED, test):
            raise UserError(f"config.attack.tests names {test!r}; known: pgd-N, cw-N (N steps), {', '.join(known)}")
    for key in ("num_images", "seed"):
        if getattr(settings, key) < 0:
            raise UserError(f"config.attack.{key} = {getattr(settings, key)}: from 0 up")
    if settings.batch_size < 1:
        raise UserError(f"config.attack.batch_size = {settings.batch_size}: at least 1")


def _averaged(of_replicas: list[dict], run: RunConfig) -> dict:
    """Average the figures {test or radius: figures} over replicas."""
    if run.replicas == 1:
        return of_replicas[0]
    averages = {}
    for key, first in of_replicas[0].items():
        same_test = [tests[key] for tests in of_replicas]
        averages[key] = {"title": first["title"], "seconds": sum(test["seconds"] for test in same_test)}
        if "robust_after" in first:
            after = [test["robust_after"] for test in same_test]
            averages[key]["robust_after"] = pool(after, lambda shares: float(np.mean(shares)))
        averages[key] |= evaluate.over_seeds(same_test, seeds(run).tolist())
    return averages


def _shown(target: Target, adversarial: np.ndarray) -> list[figures.AttackedImage]:
    """Choose images to show: first those that the attack turned from right to wrong."""
    before, after = outcome(target, target.images), outcome(target, adversarial)
    right_before, right_after = (part["predictions"] == target.labels for part in (before, after))
    order = np.argsort(np.where(right_before & ~right_after, 0, np.where(right_before, 1, 2)), kind="stable")
    return [
        figures.AttackedImage(
            target.images[i],
            adversarial[i],
            int(target.labels[i]),
            *((int(part["predictions"][i]), float(part["confidences"][i])) for part in (before, after)),
        )
        for i in order[:PICTURES]
    ]


_static = ("num_steps", "norm", "objective")
_pgd = xla.jit(partial(attacks.pgd_attack, unroll=False), static_argnames=_static)  # compiled once for all radii
_outcome = xla.jit(lambda predict, images, labels: evaluate.outcome(predict(images), labels))


def attack(target: Target, file: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Attack one network with all tests of a config.

    Args:
      file: Path of AutoAttack's progress files, without their ending.

    Returns:
      {"clean" and each test: `evaluate.figures_of`, title and seconds}, and the adversarial images of the last test,
      [N, H, W, channels].
    """
    figures_of_tests, images = {}, target.images
    for test in ("clean", *target.settings.tests):
        title = {"clean": "Clean", "autoattack": "AutoAttack"}.get(test, test.upper())
        began, robust, more = time.monotonic(), None, {}
        if re.fullmatch(NUMBERED, test):
            images = pgd_images(target, test)
        elif test != "clean":
            names = attacks.STANDARD if test == "autoattack" else (test,)
            result = suite(target, names, file.with_name(f"{file.stem}-{test}.npz"))
            images, robust = result.adversarial, result.robust
            more = {"robust_after": {name: float(after.mean()) for name, after in result.robust_after.items()}}
        scores = target.figures(outcome(target, images, robust))
        seconds = time.monotonic() - began
        figures_of_tests[test] = {"title": title, **scores, **more, "seconds": seconds}
        accuracy, ece = results.percent(scores["accuracy"]["all"]), results.percent(scores["ece"])
        target.console.print(f"{title}: accuracy {accuracy}%, ECE {ece}%, {logs.clock(seconds)}")
    return figures_of_tests, images


def curve(target: Target, figures_of_tests: Mapping[str, Any]) -> dict[float, Any]:
    """Attack with `OF_CURVE` at `config.attack.radii`, l-inf up to 1: {radius: figures}; {} if not asked for.

    Args:
      figures_of_tests: From `attack`.
    """
    settings = target.settings
    if not settings.radii or OF_CURVE not in figures_of_tests:
        return {}
    radius, step = attacks.radius(settings.epsilon, norm=settings.norm), attacks.radius(settings.step_size, norm="l2")
    points = {0.0: figures_of_tests["clean"], radius: figures_of_tests[OF_CURVE]}
    for times in settings.radii:
        if settings.norm == "linf" and times * radius > 1:
            continue
        scaled = target._replace(settings=settings._replace(epsilon=times * radius, step_size=times * step))
        began, images = time.monotonic(), pgd_images(scaled, OF_CURVE)
        scores, title = target.figures(outcome(scaled, images)), f"{OF_CURVE.upper()}, radius {times * radius:.4g}"
        points[times * radius] = {"title": title, **scores, "seconds": time.monotonic() - began}
        target.console.print(f"{title}: accuracy {results.percent(scores['accuracy']['all'])}%")
    return points


def outcome(target: Target, images: np.ndarray, robust: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Compute predictions, confidences and losses on images [N, ...].

    Args:
      robust: bool [N], the attack's result if it returns one. It replaces what the predictions say, which may differ
        for an image on the decision boundary.
    """
    parts: list[dict[str, np.ndarray]] = []
    for size, batch in batches(target, images):
        parts.append({name: np.asarray(value)[:size] for name, value in _outcome(target.predict, *batch).items()})
    joined: dict[str, np.ndarray] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if robust is not None:
        wrong = np.where(joined["predictions"] == target.labels, -1, joined["predictions"])
        joined["predictions"] = np.where(robust, target.labels, wrong)
    return joined


def batches(target: Target, images: np.ndarray) -> Iterator[tuple[int, tuple[jax.Array, jax.Array]]]:
    """Yield the size of each batch, and its images and labels on the devices. The last batch is padded with repeats."""
    devices = target.mesh.size
    size = -(-min(target.settings.batch_size, len(images)) // devices) * devices
    for start in range(0, len(images), size):
        target.check_stop()
        rows = np.resize(np.arange(start, min(start + size, len(images))), size)
        batch = images[rows], target.labels[rows]
        yield min(size, len(images) - start), jax.device_put(batch, parallel.split_batch(target.mesh))


def pgd_images(target: Target, test: str) -> np.ndarray:
    """Attack the images with "pgd-N" (cross-entropy) or "cw-N" (margin loss): N steps from a uniform start."""
    settings, (kind, steps) = target.settings, test.split("-")
    radius = attacks.radius(settings.epsilon, norm=settings.norm)
    moves: dict[str, Any] = dict(epsilon=radius, step_size=attacks.radius(settings.step_size, norm="l2"))
    moves |= dict(num_steps=int(steps), norm=settings.norm, objective={"pgd": "ce", "cw": "cw"}[kind])
    parts: list[np.ndarray] = []
    with logs.AttackProgress(target.console) as bar:
        for number, (size, (images, labels)) in enumerate(batches(target, target.images)):
            rng = jax.random.fold_in(jax.random.key(settings.seed), number)
            parts.append(np.asarray(_pgd(target.predict, images, labels, rng, **moves, start_scale=radius))[:size])
            bar.show(test, number * target.settings.batch_size + size, len(target.images))
    return np.concatenate(parts)


def suite(target: Target, names: tuple[str, ...], file: Path) -> attacks.AutoAttackResult:
    """Run AutoAttack, or some of its attacks. Progress and result are stored in `file`, from which it continues."""
    settings = target.settings
    with logs.AttackProgress(target.console) as bar:

        def show(progress: attacks.Progress) -> None:
            bar.show(progress.attack, progress.settled, progress.total, progress.robust / progress.num_images)
            target.check_stop()

        return attacks.autoattack(
            target.predict,
            target.images,
            target.labels,
            jax.random.key(settings.seed),
            epsilon=settings.epsilon,
            norm=settings.norm,
            attacks=names,
            batch_size=settings.batch_size,
            progress_file=file,
            progress=show,
        )
