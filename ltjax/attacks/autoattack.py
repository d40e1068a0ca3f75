"""AutoAttack's standard suite (Croce & Hein, ICML 2020): four attacks in order, each on the images still robust."""

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
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
from ltjax.attacks.progress import Progress, ProgressFile, Suite, show_progress
from ltjax.attacks.square import Square
from ltjax.system import xla

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square")


class AutoAttackResult(NamedTuple):
    """Result for N images, on the host.

    Attributes:
      adversarial: [N, H, W, channels], in the ball. Images are unchanged if no attack fooled the model, or if it was
        wrong on the clean image.
      robust: bool [N], right on the clean image and after every attack.
      robust_after: {attack: bool [N]}, robust after this attack and those before it.
    """

    adversarial: np.ndarray
    robust: np.ndarray
    robust_after: dict[str, np.ndarray]


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
    """Run the attacks in order on N images, each only on those that are still robust.

    Unlike the authors' code, an attack stops working on an image once it fools the model, and APGD climbs the log-odds
    instead of cross-entropy, because they do not saturate. On CPUs, each core works on different images in its own
    thread, and no convolution runs in a compiled loop. Of the many parameters, only `epsilon` is required.

    Args:
      predict: Function of images [B, H, W, channels] that returns logits [B, C], in evaluation mode: an image's logits
        must not depend on the others. `jax.tree_util.Partial(apply, variables)` makes the weights arguments of the
        compiled program, so another checkpoint is not compiled again. All that it holds becomes an array: bind flags
        such as train=False in `apply`. A closure works as well.
      images: [N, H, W, channels] floats in [0, 1].
      labels: [N] integers below C.
      rng: Random key. An image's random numbers depend only on it and the image's index.
      epsilon: Radius in pixel units of [0, 1]: 8/255 or "8/255", not 8.
      norm: "linf" or "l2".
      attacks: Names in `ATTACKS`.
      batch_size: Images evaluated at a time, over all devices. On CPUs it is over all cores, at most 64 each.
      num_steps: Steps of APGD and FAB. The defaults of all budgets are the standard ones.
      num_targets: Target classes of the targeted attacks.
      num_queries: Queries of Square.
      progress_file: File written every `save_seconds`, on interruption, and after each attack. If it exists, the suite
        resumes from it, with the same result.
      save_seconds: See `progress_file`.
      progress: Function called with a `Progress`; None for silence.
      devices: Default: all of this process. Of CPU devices the first is enough; its threads use every core.

    Raises:
      ValueError: An argument is invalid, such as images outside [0, 1], logits of a wrong shape or an epsilon above 1
        for l-inf; or the progress file is of other images, another model or other settings.

    Warns:
      RuntimeWarning: Robust accuracy may be misleading for this model, see `ltjax.attacks.checks`.

    Examples:
      >>> def predict(images):  # from the first pixel
      ...     return 20 * jnp.stack([images[:, 0, 0, 0] - 0.5, 0.5 - images[:, 0, 0, 0]], -1)
      >>> images, labels = np.float32([0.52, 0.9]).reshape(2, 1, 1, 1), np.array([0, 0])
      >>> settings = dict(epsilon=0.1, attacks=("apgd-ce",), batch_size=8, num_steps=5, progress=None)
      >>> attacks.autoattack(predict, images, labels, jax.random.key(0), **settings).robust
      array([False,  True])
    """
    images, labels = np.asarray(images), np.asarray(labels)
    size = radius(epsilon, norm=norm, size=math.prod(images.shape[1:]))
    budget = dict(num_steps=num_steps, num_targets=num_targets, num_queries=num_queries)
    steppers = _steppers(attacks, size, norm, batch_size, budget)
    images = images.astype(jax.dtypes.canonicalize_dtype(images.dtype), copy=False)  # float64 to float32 without x64
    _check(images, labels, attacks, rng)

    mesh = slots.make_mesh(devices)
    predict, suite_rng = _replicate(predict, rng, mesh)
    clean = _clean_logits(predict, images, labels, batch_size, mesh)  # [N, C]
    for trouble in look_for_trouble(predict, images, labels, clean):
        warnings.warn(trouble, RuntimeWarning, stacklevel=2)
    targets = _target_classes(clean, labels)[:, :num_targets]  # [N, T]

    correct = (clean.argmax(1) == labels) & ~np.isnan(clean).any(1)
    suite = Suite(images.copy(), correct)
    file = None
    if progress_file is not None:
        settings = repr((size, norm, tuple(attacks), budget, jax.random.key_data(rng).tolist()))
        file = ProgressFile(Path(progress_file), settings, images, labels, clean)
        file.load(suite)
    save = partial(file.save, suite, images) if file else lambda: None

    layout: dict[str, Any] = dict(batch_size=min(batch_size, len(images)), mesh=mesh)
    try:
        for name, stepper in steppers.items():
            if name in suite.robust_after:
                continue
            chosen, key = suite.begin(name), jax.random.fold_in(suite_rng, ATTACKS.index(name))
            reports = slots.run(stepper, predict, images, labels, targets, chosen, key, **layout)
            _report(_record(suite, reports, len(chosen)), progress, save, save_seconds)
            suite.robust_after[name] = suite.robust.copy()
            save()
    except BaseException:  # Ctrl-C, or an exception from `progress`
        save()
        raise
    return AutoAttackResult(suite.adversarial, suite.robust, suite.robust_after)


def _report(
    updates: Iterator[Progress], progress: Callable[[Progress], None] | None, save: Callable[[], None], seconds: float
) -> None:
    """Pass each update on, and save after an interval in seconds."""
    saved_at = time.monotonic()
    for now in updates:
        if progress:
            progress(now)
        if time.monotonic() - saved_at >= seconds:
            save()
            saved_at = time.monotonic()


def _record(suite: Suite, reports: Iterator[slots.Settled], total: int) -> Iterator[Progress]:
    """Write an attack's reports into the suite, and yield its progress."""
    began, settled = time.monotonic(), 0
    yield Progress(suite.attack, 0, total, int(suite.robust.sum()), len(suite.robust), 0, 0, 0.0)
    for report in reports:
        fooled = report.index[report.fooled]
        suite.adversarial[fooled] = report.adversarial[report.fooled]  # first, because Ctrl-C may come in between
        suite.robust[fooled] = False
        suite.settled[report.index] = True
        settled += len(report.index)
        robust, seconds = int(suite.robust.sum()), time.monotonic() - began
        yield Progress(
            suite.attack, settled, total, robust, len(suite.robust), report.evaluations, report.slots, seconds
        )


def _steppers(
    attacks: Sequence[str], epsilon: float, norm: str, batch_size: int, budget: dict[str, int]
) -> dict[str, slots.Attack]:
    """Build the attacks by name. Raises: ValueError for an unknown name or a budget below 1."""
    if isinstance(attacks, str):
        raise ValueError(f"attacks = {attacks!r}: a tuple of names, such as ({attacks!r},)")
    if min(batch_size, *budget.values()) < 1:
        raise ValueError(f"batch_size = {batch_size}, {budget}: at least 1 each")
    unknown = [name for name in attacks if name not in ATTACKS]
    if unknown:
        raise ValueError(f"unknown attack {unknown[0]!r}; known: {', '.join(ATTACKS)}")
    steps, targets, queries = budget["num_steps"], budget["num_targets"], budget["num_queries"]
    ball: dict[str, Any] = dict(epsilon=epsilon, norm=norm)
    known: dict[str, slots.Attack] = {
        "apgd-ce": Apgd(**ball, loss="ce", num_steps=steps),
        "apgd-dlr": Apgd(**ball, loss="dlr", num_steps=steps),
        "apgd-t": Apgd(**ball, loss="dlr-targeted", num_steps=steps, num_targets=targets),
        "fab-t": Fab(**ball, num_steps=steps, num_targets=targets),
        "square": Square(**ball, num_queries=queries),
    }
    return {name: known[name] for name in attacks}


def _check(images: np.ndarray, labels: np.ndarray, attacks: Sequence[str], rng: Any) -> None:
    if images.ndim < 2 or labels.shape != images.shape[:1] or not len(images):
        raise ValueError(f"images {images.shape} and labels {labels.shape}: [N, H, W, channels] and [N], N at least 1")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise ValueError(f"labels are {labels.dtype}, the smallest {labels.min()}: integers from 0 to C - 1")
    check_images(images)
    if "square" in attacks and images.ndim != 4:
        raise ValueError(f"images {images.shape}: square needs [N, H, W, channels]; leave it out of attacks")
    dtype = getattr(rng, "dtype", np.dtype(object))
    if not (jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) or (dtype == np.uint32 and rng.ndim == 1)):
        raise ValueError(f"rng = {rng!r}: a random key, such as jax.random.key(0)")


def _replicate(predict: Callable, rng: jax.Array, mesh: Mesh) -> tuple[Partial, jax.Array]:
    """Put the model and a threefry key on every device. The draws of "rbg" keys would depend on the other images."""
    key = jax.random.wrap_key_data(jax.random.bits(rng, (2,), "uint32"), impl="threefry2x32")
    predict = predict if isinstance(predict, Partial) else Partial(predict)
    return jax.device_put((predict, key), NamedSharding(mesh, PartitionSpec()))


def _target_classes(clean: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rank the classes other than the label by clean logit, highest first: [N, C] -> [N, C - 1]."""
    ranked = np.argsort(-np.nan_to_num(clean), axis=1, kind="stable")
    return ranked[ranked != labels[:, None]].reshape(len(labels), -1)


@xla.jit
def _evaluate(predict: Partial, images: jax.Array) -> jax.Array:
    return predict(images)


def _clean_logits(predict: Partial, images: np.ndarray, labels: np.ndarray, batch_size: int, mesh: Mesh) -> np.ndarray:
    """Compute logits [N, C] in full batches; the first image pads the last one."""
    size = slots.batch_sizes(min(batch_size, len(images)), mesh)[0]
    batch = jax.ShapeDtypeStruct((size, *images.shape[1:]), images.dtype)
    shape = getattr(jax.eval_shape(predict, batch), "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != size or shape[1] < 2:
        returned = "no array" if shape is None else list(shape)
        raise ValueError(f"predict returns {returned} for {size} images: logits [{size}, C] wanted, C at least 2")
    if labels.max() >= shape[1]:
        raise ValueError(f"labels run up to {labels.max()}, but predict returns logits of {shape[1]} classes")
    batches = []
    for start in range(0, len(images), size):
        index = np.arange(start, start + size)
        padded = slots.split(images[np.where(index < len(images), index, 0)], mesh)
        logits = np.asarray(_evaluate(predict, padded))
        batches.append(logits.astype(np.promote_types(logits.dtype, np.float32)))
    return np.concatenate(batches)[: len(images)]
