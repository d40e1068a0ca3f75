"""AutoAttack's standard suite (Croce & Hein, ICML 2020): four attacks in order, each on the images that still stand."""

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from ltjax.attacks import slots
from ltjax.attacks.apgd import Apgd
from ltjax.attacks.ball import check_images, radius
from ltjax.attacks.checks import look_for_trouble
from ltjax.attacks.fab import Fab
from ltjax.attacks.progress import Found, Progress, ProgressFile, show_progress
from ltjax.attacks.square import Square
from ltjax.system import xla

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square")


class AutoAttackResult(NamedTuple):
    """Of N images, on the host."""

    adversarial: np.ndarray  # [N, H, W, channels] in the ball; an image that stood, or was wrong anyway, as it was
    robust: np.ndarray  # bool [N], right on the clean image and after every attack
    robust_after: dict[str, np.ndarray]  # {attack: bool [N]}, after it and those before it


def autoattack(
    predict: Callable[[jax.Array], jax.Array],
    images: Any,
    labels: Any,
    rng: jax.Array,
    *,
    epsilon: float | str,
    norm: str = "linf",
    attacks: Sequence[str] = STANDARD,
    batch_size: int = 512,
    num_steps: int = 100,
    num_targets: int = 9,
    num_queries: int = 5000,
    progress_file: str | os.PathLike | None = None,
    save_seconds: float = 30.0,
    progress: Callable[[Progress], None] | None = show_progress,
    devices: list[jax.Device] | None = None,
) -> AutoAttackResult:
    """Attack N images with each attack in turn, each only those that the ones before it left standing.

    Args:
      predict: images [B, H, W, channels] -> logits [B, C], in evaluation mode: an image's logits must not depend on the
        others. `jax.tree_util.Partial(apply, variables)` makes the weights arguments of what is compiled, so that
        another checkpoint compiles nothing anew (all that it holds becomes an array: bind flags such as train=False in
        `apply`); a closure works as well.
      images: [N, H, W, channels] floats in [0, 1]. labels: [N] integers below C.
      rng: a key. Image i's random numbers follow from it and i alone.
      epsilon: radius in pixel units of [0, 1], 8/255 or "8/255", not 8. norm: "linf" or "l2".
      attacks: of `ATTACKS`; the standard suite by default.
      batch_size: images under evaluation at a time, over all devices; on CPUs, over all cores, at most 64 to each.
      num_steps, num_targets, num_queries: budget of APGD and FAB, of the targeted ones, and of Square; the defaults are
        the standard.
      progress_file: written every `save_seconds`, when stopped, and at the end of each attack. If it exists, the suite
        goes on from there, and ends with the same answer.
      progress: called with a `Progress`; None for silence. devices: all of this process by default; of CPUs the first
        is enough, whose threads reach every core.
    Raises: ValueError for what cannot be attacked: images outside [0, 1], labels or logits of a wrong shape, an epsilon
      above 1 in l-inf, an unknown attack, a progress file of other images, another model or other settings.
    Warns: RuntimeWarning where the outcome would not mean what it says, see `ltjax.attacks.checks`.

    Where we differ from the authors' code: an attack stops working on an image once it is fooled, and cross-entropy is
    climbed by its log-odds, which do not saturate.

    On CPUs every core works on images of its own, by threads of this process, and no network needs convolutions that
    are fast in a loop.

    Examples:
      >>> def predict(images):  # the first pixel decides
      ...     return 20 * jnp.stack([images[:, 0, 0, 0] - 0.5, 0.5 - images[:, 0, 0, 0]], -1)
      >>> images, labels = np.float32([0.52, 0.9]).reshape(2, 1, 1, 1), np.array([0, 0])
      >>> settings = dict(epsilon=0.1, attacks=("apgd-ce",), batch_size=8, num_steps=5, progress=None)
      >>> attacks.autoattack(predict, images, labels, jax.random.key(0), **settings).robust
      array([False,  True])
    """
    images, labels = np.asarray(images), np.asarray(labels)
    size = radius(epsilon, norm=norm, size=math.prod(images.shape[1:]))
    if isinstance(attacks, str):
        raise ValueError(f"attacks = {attacks!r}: a tuple of names, such as ({attacks!r},)")
    budget = dict(num_steps=num_steps, num_targets=num_targets, num_queries=num_queries)
    if min(batch_size, *budget.values()) < 1:
        raise ValueError(f"batch_size = {batch_size}, {budget}: at least 1 each")
    machines = {name: _machine(name, size, norm, **budget) for name in attacks}
    images = images.astype(jax.dtypes.canonicalize_dtype(images.dtype), copy=False)  # float64 has no place without x64
    _check(images, labels)
    if "square" in machines and images.ndim != 4:
        raise ValueError(f"images {images.shape}: square needs [N, H, W, channels]; leave it out of attacks")
    kind = getattr(rng, "dtype", np.dtype(object))
    if not (jax.dtypes.issubdtype(kind, jax.dtypes.prng_key) or (kind == np.uint32 and rng.ndim == 1)):
        raise ValueError(f"rng = {rng!r}: a random key, such as jax.random.key(0)")
    mesh = slots.make_mesh(devices)
    predict = predict if isinstance(predict, Partial) else Partial(predict)
    drawn = jax.random.bits(rng, (2,), "uint32")
    own_rng = jax.random.wrap_key_data(drawn, impl="threefry2x32")  # keys of an "rbg" draw otherwise in other company
    predict, own_rng = jax.device_put((predict, own_rng), NamedSharding(mesh, PartitionSpec()))
    clean = _clean_logits(predict, images, labels, batch_size, mesh)  # [N, C]
    for trouble in look_for_trouble(predict, images, labels, clean):
        warnings.warn(trouble, RuntimeWarning, stacklevel=2)
    correct = (clean.argmax(1) == labels) & ~np.isnan(clean).any(1)
    ranked = np.argsort(-np.nan_to_num(clean), axis=1, kind="stable")
    targets = ranked[ranked != labels[:, None]].reshape(len(images), -1)[:, :num_targets]  # [N, T]

    found = Found(images.copy(), correct, np.ones(len(images), bool), "", {})
    file = None
    if progress_file is not None:
        settings = repr((size, norm, tuple(attacks), budget, jax.random.key_data(rng).tolist()))
        file = ProgressFile(Path(progress_file), settings, images, labels, clean)
        found = file.load(found)
    try:
        for name, machine in machines.items():
            if name in found.robust_after:
                continue
            if found.attack != name:
                found = found._replace(attack=name, settled=~found.robust)
            todo = np.flatnonzero(found.robust & ~found.settled)
            own = jax.random.fold_in(own_rng, ATTACKS.index(name))
            layout: dict[str, Any] = dict(batch_size=min(batch_size, len(images)), mesh=mesh)
            work = slots.run(machine, predict, images, labels, targets, todo, own, **layout) if len(todo) else ()
            saved_at = time.monotonic()
            for now in _follow(name, work, found, len(todo)):
                if progress:
                    progress(now)
                if file and time.monotonic() - saved_at >= save_seconds:
                    file.save(found, images)
                    saved_at = time.monotonic()
            found.robust_after[name] = found.robust.copy()
            if file:
                file.save(found, images)
    except BaseException:  # Ctrl-C, or whatever `progress` raises
        if file:
            file.save(found, images)
        raise
    return AutoAttackResult(found.adversarial, found.robust, found.robust_after)


def _follow(name: str, work: Iterable[slots.Settled], found: Found, total: int) -> Iterable[Progress]:
    """Write down what an attack settles."""
    began, settled = time.monotonic(), 0
    yield Progress(name, 0, total, int(found.robust.sum()), len(found.robust), 0, 0, 0.0)
    for report in work:
        fooled = report.index[report.fooled]
        found.adversarial[fooled] = report.adversarial[report.fooled]  # in this order: Ctrl-C may come in between
        found.robust[fooled] = False
        found.settled[report.index] = True
        settled += len(report.index)
        standing, seconds = int(found.robust.sum()), time.monotonic() - began
        yield Progress(name, settled, total, standing, len(found.robust), report.evaluations, report.slots, seconds)


def _machine(name: str, epsilon: float, norm: str, *, num_steps: int, num_targets: int, num_queries: int) -> Any:
    ball: dict[str, Any] = dict(epsilon=epsilon, norm=norm)
    match name:
        case "apgd-ce" | "apgd-dlr":
            return Apgd(**ball, loss=name.removeprefix("apgd-"), num_steps=num_steps)
        case "apgd-t":
            return Apgd(**ball, loss="dlr-targeted", num_steps=num_steps, num_targets=num_targets)
        case "fab-t":
            return Fab(**ball, num_steps=num_steps, num_targets=num_targets)
        case "square":
            return Square(**ball, num_queries=num_queries)
    raise ValueError(f"unknown attack {name!r}; known: {', '.join(ATTACKS)}")


def _check(images: np.ndarray, labels: np.ndarray) -> None:
    if images.ndim < 2 or labels.shape != images.shape[:1] or not len(images):
        raise ValueError(f"images {images.shape} and labels {labels.shape}: [N, H, W, channels] and [N], N at least 1")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise ValueError(f"labels are {labels.dtype}, the smallest {labels.min()}: integers from 0 to C - 1")
    check_images(images)


@xla.jit
def _evaluate(predict: Partial, images: jax.Array) -> jax.Array:
    return predict(images)


def _clean_logits(predict: Partial, images: np.ndarray, labels: np.ndarray, batch_size: int, mesh: Mesh) -> np.ndarray:
    """[N, C], in full batches: the last one is filled up with the first image."""
    size = slots.batch_sizes(min(batch_size, len(images)), mesh)[0]
    shape = getattr(
        jax.eval_shape(predict, jax.ShapeDtypeStruct((size, *images.shape[1:]), images.dtype)), "shape", None
    )
    if shape is None or len(shape) != 2 or shape[0] != size or shape[1] < 2:
        returned = "no array" if shape is None else list(shape)
        raise ValueError(f"predict returns {returned} for {size} images: logits [{size}, C] wanted, C at least 2")
    if labels.max() >= shape[1]:
        raise ValueError(f"labels run up to {labels.max()}, but predict returns logits of {shape[1]} classes")
    found = []
    for start in range(0, len(images), size):
        index = np.arange(start, start + size)
        batch = slots.split(images[np.where(index < len(images), index, 0)], mesh)
        logits = np.asarray(_evaluate(predict, batch))
        found.append(logits.astype(np.promote_types(logits.dtype, np.float32)))
    return np.concatenate(found)[: len(images)]
