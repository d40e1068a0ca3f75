"""`--mode=attack`: a trained checkpoint on clean and on attacked test images."""

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

from ltjax import attacks, surgery
from ltjax import config as config_module
from ltjax.config import Run
from ltjax.engine import evaluate, stage
from ltjax.engine.problem import Problem, imported, restored, seeds, setup
from ltjax.report import figures, page
from ltjax.runs import logs, results
from ltjax.runs.checkpoint import read_json, write_json
from ltjax.runs.workdir import locked, named_disk_errors, open_workdir
from ltjax.system import parallel, processes, xla
from ltjax.system.paths import local
from ltjax.system.signals import Interrupted, StopSignals
from ltjax.types import UserError, Variables

NUMBERED = r"(pgd|cw)-[1-9]\d*"  # tests with their number of steps
OF_CURVE = "pgd-20"  # the test that is repeated at `config.attack.radii`
PICTURES = 6  # images shown


class Target(NamedTuple):
    """What is attacked, and where."""

    predict: Partial  # images -> logits
    images: np.ndarray  # float32 [N, H, W, channels]
    labels: np.ndarray  # int32 [N]
    settings: config_module.Attack
    mesh: Mesh
    console: Console
    go_on: Callable[[], None]  # raises Interrupted once a signal has asked for it


def attack_workdir(
    config: Mapping[str, Any], workdir: str | Path, data_dir: str | Path | None = None
) -> dict[str, Any]:
    """Attack the newest checkpoint of the last stage that has one, as `config.attack` says, and print a table; where
    the workdir holds no run, `config.weights`.

    The figures go to `attack.json`, of a finished run also into `results.json` under "robustness"; a few images to
    `report/attack.png`. Stopped by Ctrl-C, SIGTERM or kill -9, the same command goes on where AutoAttack was.
    Returns: what `attack.json` holds.
    Raises: UserError for anything the caller can mend; Interrupted after Ctrl-C or SIGTERM, once all is saved.
    """
    workdir, console = local(workdir), logs.make_console()
    run, stages = config_module.parse(config)
    check(run.attack)
    if processes.several():
        raise UserError("--mode=attack works in one process, with all of its devices: start it on one machine")
    alone = imported(run, stages, workdir, data_dir)
    if alone is None and not (workdir / "config.json").exists():
        raise UserError(f"{workdir} holds no run: train first, with --mode=train and the same --workdir")
    open_workdir(workdir, config)
    with locked(workdir), named_disk_errors(workdir), StopSignals() as stop:
        if alone is not None:
            run, problem, settings, variables = alone
            name, step = "imported", 0
        else:
            problem = setup(run, data_dir)
            name, step, variables = newest(run, stages, problem, workdir)
            settings = stages[name]
        if settings.evaluate_net != "net":
            raise UserError(f"{settings.title} trains the guide alone: train on with --mode=train before attacking")
        variables = surgery.as_evaluated(variables, settings.eval_classifier)
        most = run.attack.num_images or None
        images, labels = test_images(problem, most)
        console.print(
            f"{settings.title}, step {step}: {len(images):,} test images, {run.attack.norm} radius "
            f"{run.attack.epsilon}, {', '.join(run.attack.tests)}"
        )
        began, each, curves, mesh = time.monotonic(), [], [], parallel.make_mesh()

        apply = stage.make_apply(problem.nets, "eval")

        def logits(variables: Variables, images: jax.Array) -> jax.Array:
            with xla.float32_products(mesh.devices.flat[0].platform):
                return apply(variables, images)[0].logits

        def go_on() -> None:
            if stop.requested is not None:
                raise Interrupted(stop.requested)

        for replica in range(run.replicas):
            own = jax.tree.map(lambda x, r=replica: x[r], variables) if run.replicas > 1 else variables
            predict = jax.device_put(Partial(logits, own), parallel.replicated(mesh))
            target = Target(predict, images, labels, run.attack, mesh, console, go_on)
            file = workdir / "attack" / f"{name}-step{step}-seed{run.seed + replica}"
            try:
                found, made = judge(target, problem.groups, len(problem.class_names), file)
            except ValueError as error:
                raise UserError(f"cannot attack: {error}") from error
            each.append(found)
            curves.append(curve(target, found, problem.groups, len(problem.class_names)))
            if replica == 0:
                figures.write_attack(_shown(target, made), problem.class_names, workdir / "report")
        tests, points = each[0], curves[0]
        if run.replicas > 1:
            tests = {test: over_seeds([one[test] for one in each], run) for test in tests}
            points = {at: over_seeds([one[at] for one in curves], run) for at in points}
        summary = {
            "stage": name,
            "step": step,
            "epsilon": attacks.radius(run.attack.epsilon, norm=run.attack.norm),
            "norm": run.attack.norm,
            "num_images": len(images),
            "tests": tests,
            "curve": [{"epsilon": at, **_accuracy(figures)} for at, figures in sorted(points.items())],
            "seconds": time.monotonic() - began,
            **({"weights": run.weights} if alone is not None else {}),
            **results.provenance(problem, results.git_commit()),
        }
        write_json(workdir / "attack.json", summary)
        for kept in (workdir / "attack").glob(f"{name}-step{step}-seed*.npz"):
            kept.unlink()  # not before: who is stopped on the way, in a later test or replica, has AutoAttack's answer
        if (workdir / "results.json").exists():
            write_json(workdir / "results.json", {**read_json(workdir / "results.json"), "robustness": summary})
            page.write(workdir)
        console.print(results.robustness_table(run.name, summary))
        console.print(f"Figures are in {workdir / 'attack.json'}, pictures in {workdir / 'report' / 'attack.png'}")
    return summary


def test_images(problem: Problem, most: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The first test images, float32 in [0, 1], and their labels."""
    parts, size = [], min(most or problem.test_set.size, problem.test_set.size)
    for images, _ in problem.test_set.parts():
        parts.append(np.asarray(images).reshape(-1, *problem.image_shape))
        if sum(len(part) for part in parts) >= size:
            break
    return np.concatenate(parts)[:size].astype(np.float32) / 255, problem.test_set.host_labels[:size]


def newest(
    run: Run, stages: Mapping[str, config_module.Stage], problem: Problem, workdir: Path
) -> tuple[str, int, Variables]:
    """The last stage that has a checkpoint, the step of the newest one, and what it holds."""
    found = None
    for name in stages:
        if (there := restored(run, name, stages[name], problem, workdir)) is not None:
            found = name, stage.steps_done(there[1]), there[1].variables
    if found is None:
        raise UserError(f"{workdir} holds no checkpoint yet: train first, with --mode=train")
    return found


def check(settings: config_module.Attack) -> None:
    """Raises: UserError for what in `config.attack` no attack could use."""
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


def over_seeds(each: list[dict[str, Any]], run: Run) -> dict[str, Any]:
    """One test of several replicas: means, and what only the first one has words for."""
    kept = {"title": each[0]["title"], "seconds": sum(one["seconds"] for one in each)}
    if "robust_after" in each[0]:
        names = each[0]["robust_after"]
        kept["robust_after"] = {name: float(np.mean([one["robust_after"][name] for one in each])) for name in names}
    return {**kept, **evaluate.over_seeds(each, seeds(run).tolist())}


def _shown(target: Target, made: np.ndarray) -> list[figures.Attacked]:
    """Some images before and after, those first that were right and are not any more."""
    before, after = outcome(target, target.images), outcome(target, made)
    was, stays = before["predictions"] == target.labels, after["predictions"] == target.labels
    order = np.argsort(np.where(was & ~stays, 0, np.where(was, 1, 2)), kind="stable")[:PICTURES]
    return [
        figures.Attacked(
            target.images[i],
            made[i],
            int(target.labels[i]),
            *((int(found["predictions"][i]), float(found["confidences"][i])) for found in (before, after)),
        )
        for i in order
    ]


_static = ("num_steps", "norm", "objective")
_pgd = xla.jit(partial(attacks.pgd_attack, unroll=False), static_argnames=_static)  # compiled once for all radii
_outcome = xla.jit(lambda predict, images, labels: evaluate.outcome(predict(images), labels))


def judge(target: Target, groups: Mapping[str, np.ndarray], num_classes: int, file: Path) -> tuple[dict, np.ndarray]:
    """One network under all tests of a config.

    file: where AutoAttack keeps its progress.
    Returns: {"clean" and each test: the figures of `evaluate.summarise`, with title and seconds}, and the images that
      the last test made [N, H, W, channels].
    """
    found, images = {}, target.images
    for test in ("clean", *target.settings.tests):
        began, robust, more, title = time.monotonic(), None, {}, test.upper()
        if test == "clean":
            title = "Clean"
        elif re.fullmatch(NUMBERED, test):
            images = pgd_images(target, test)
        else:
            title = "AutoAttack" if test == "autoattack" else title
            names = attacks.STANDARD if test == "autoattack" else (test,)
            result = suite(target, names, file.with_name(f"{file.stem}-{test}.npz"))
            images, robust = result.adversarial, result.robust
            more = {"robust_after": {name: float(stood.mean()) for name, stood in result.robust_after.items()}}
        figures_of = evaluate.summarise(outcome(target, images, robust), target.labels, groups, num_classes)
        found[test] = {"title": title, **figures_of, **more, "seconds": time.monotonic() - began}
        accuracy, ece = results.percent(found[test]["accuracy"]["all"]), results.percent(found[test]["ece"])
        target.console.print(f"{title}: accuracy {accuracy}%, ECE {ece}%, {logs.clock(found[test]['seconds'])}")
    return found, images


def curve(target: Target, found: Mapping[str, Any], groups: Mapping[str, np.ndarray], num_classes: int) -> dict:
    """{radius: figures of `OF_CURVE`}, from 0 to 1 (l-inf) at most; {} where that is no test of the config, or
    `config.attack.radii` names none. found: from `judge`."""
    settings = target.settings
    if not settings.radii or OF_CURVE not in found:
        return {}
    radius, step = attacks.radius(settings.epsilon, norm=settings.norm), attacks.radius(settings.step_size, norm="l2")
    points = {0.0: found["clean"], radius: found[OF_CURVE]}
    for times in settings.radii:
        if settings.norm == "linf" and times * radius > 1:
            continue
        at = target._replace(settings=settings._replace(epsilon=times * radius, step_size=times * step))
        began, images = time.monotonic(), pgd_images(at, OF_CURVE)
        figures_of = evaluate.summarise(outcome(at, images), target.labels, groups, num_classes)
        title = f"{OF_CURVE.upper()}, radius {times * radius:.4g}"
        points[times * radius] = {"title": title, **figures_of, "seconds": time.monotonic() - began}
        target.console.print(f"{title}: accuracy {results.percent(figures_of['accuracy']['all'])}%")
    return points


def _accuracy(figures: Mapping[str, Any]) -> dict[str, Any]:
    spread = {"std": figures["std"]["accuracy"]} if "std" in figures else {}
    return {"accuracy": figures["accuracy"], **spread}


def outcome(target: Target, images: np.ndarray, robust: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Predictions, confidences and losses on images [N, ...].

    robust: bool [N] where an attack knows it: an image on the very boundary counts as the attack saw it.
    """
    parts: list[dict[str, np.ndarray]] = []
    for size, batch in batches(target, images):
        parts.append({name: np.asarray(value)[:size] for name, value in _outcome(target.predict, *batch).items()})
    found: dict[str, np.ndarray] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if robust is not None:
        wrong = np.where(found["predictions"] == target.labels, -1, found["predictions"])
        found["predictions"] = np.where(robust, target.labels, wrong)
    return found


def batches(target: Target, images: np.ndarray) -> Iterator[tuple[int, tuple[jax.Array, jax.Array]]]:
    """How many images of a batch count, and images and labels on the devices; the last batch repeats some."""
    devices = target.mesh.size
    size = -(-min(target.settings.batch_size, len(images)) // devices) * devices
    for start in range(0, len(images), size):
        target.go_on()
        rows = np.resize(np.arange(start, min(start + size, len(images))), size)
        batch = images[rows], target.labels[rows]
        yield min(size, len(images) - start), jax.device_put(batch, parallel.split_batch(target.mesh))


def pgd_images(target: Target, test: str) -> np.ndarray:
    """What "pgd-N" (cross-entropy) or "cw-N" (margin) makes of the images: N steps from a uniform start."""
    settings, (kind, steps) = target.settings, test.split("-")
    radius = attacks.radius(settings.epsilon, norm=settings.norm)
    moves: dict[str, Any] = dict(epsilon=radius, step_size=attacks.radius(settings.step_size, norm="l2"))
    moves |= dict(num_steps=int(steps), norm=settings.norm, objective={"pgd": "ce", "cw": "cw"}[kind])
    made: list[np.ndarray] = []
    with logs.AttackProgress(target.console) as bar:
        for number, (size, (images, labels)) in enumerate(batches(target, target.images)):
            rng = jax.random.fold_in(jax.random.key(settings.seed), number)
            made.append(np.asarray(_pgd(target.predict, images, labels, rng, **moves, start_scale=radius))[:size])
            bar.show(test, number * target.settings.batch_size + size, len(target.images))
    return np.concatenate(made)


def suite(target: Target, names: tuple[str, ...], file: Path) -> attacks.AutoAttackResult:
    """AutoAttack, or one of its attacks, kept in `file`: asked again, it answers from there."""
    settings = target.settings
    with logs.AttackProgress(target.console) as bar:

        def show(now: attacks.Progress) -> None:
            bar.show(now.attack, now.settled, now.total, now.robust / now.num_images)
            target.go_on()

        rng = jax.random.key(settings.seed)
        result = attacks.autoattack(
            target.predict,
            target.images,
            target.labels,
            rng,
            epsilon=settings.epsilon,
            norm=settings.norm,
            attacks=names,
            batch_size=settings.batch_size,
            progress_file=file,
            progress=show,
        )
    return result
