"""Projected gradient descent (Madry et al., ICLR 2018), for training and for tables of PGD-20.

    start = attacks.random_start(rng, images)
    adversarial = attacks.pgd(images, start, objective, epsilon=8 / 255, step_size=2 / 255, num_steps=10)

The functions are pure, and work inside `jit` and outside. On accelerators the steps are one `lax.fori_loop`. On CPUs,
XLA's convolutions are several times as slow in a loop, so the steps are unrolled; see `unroll` of `pgd`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ltjax.attacks import objectives
from ltjax.attacks.ball import check_floats, check_images, check_norm, direction, per_image, project, radius

STARTS = ("gaussian", "uniform", "none")
OBJECTIVES = ("ce", "kl", "cw")
MAX_UNROLLED = 20  # steps, because the time to compile grows with each


def random_start(
    rng: jax.Array,
    images: jax.Array,
    *,
    kind: str = "gaussian",
    scale: float | str | jax.Array = 0.001,
    norm: str = "linf",
) -> jax.Array:
    """Draw the start of an attack around images [B, ...].

    Args:
      rng: Random key.
      images: [B, ...], floats in [0, 1].
      kind: "gaussian": `images + scale N(0, 1)`, neither projected nor clipped (TRADES, LBGAT: 0.001). "uniform": from
        the ball of radius `scale` (Madry: epsilon), clipped to [0, 1]. "none": the images.
      scale: See `kind`; a number or text such as "8/255".
      norm: Norm of the uniform ball, "linf" or "l2".

    Raises:
      ValueError: The kind or norm is unknown, or images are not floats.

    Examples:
      >>> images = jnp.full((1, 2, 2, 1), 0.5)
      >>> start = attacks.random_start(jax.random.key(0), images, kind="uniform", scale="8/255")
      >>> bool(jnp.abs(start - images).max() <= 8 / 255), start.shape
      (True, (1, 2, 2, 1))
    """
    check_norm(norm)
    if kind not in STARTS:
        raise ValueError(f"unknown start {kind!r}; known: {', '.join(STARTS)}")
    check_floats(images)
    if kind == "none":
        return images
    dtype = jax.dtypes.canonicalize_dtype(images.dtype)  # float64 to float32 without x64
    if kind == "gaussian":
        spread = radius(scale, norm="l2", name="scale")  # l2, because it has no upper limit
        return images + spread * jax.random.normal(rng, images.shape, dtype)
    size = radius(scale, norm=norm, name="scale", size=math.prod(images.shape[1:]))
    if norm == "linf":
        noise = jax.random.uniform(rng, images.shape, dtype, -1, 1)
        return jnp.clip(images + size * noise, 0, 1)
    direction_key, length_key = jax.random.split(rng)
    towards = direction(jax.random.normal(direction_key, images.shape, dtype), norm="l2")
    share = jax.random.uniform(length_key, images.shape[:1], dtype) ** (1 / math.prod(images.shape[1:]))  # of volume
    return jnp.clip(images + size * per_image(share, images) * towards, 0, 1)


def pgd(
    images: jax.Array,
    start: jax.Array,
    objective: Callable[[jax.Array], jax.Array],
    *,
    epsilon: float | str | jax.Array,
    step_size: float | str | jax.Array,
    num_steps: int,
    norm: str = "linf",
    unroll: bool | None = None,
) -> jax.Array:
    """Take `num_steps` steps uphill, each projected into the ball around `images` and clipped to [0, 1].

    Pixels with a gradient of nan or 0 do not move.

    Args:
      images: [B, H, W, channels] in [0, 1].
      start: First iterate [B, H, W, channels], such as from `random_start`.
      objective: Function of images to maximise; returns [B] or the sum. Only its gradient to the images is computed.
      epsilon: Radius in pixel units of [0, 1]: 8/255 (or "8/255"), not 8.
      step_size: In the same units; of each pixel for l-inf, of the whole image for l2.
      num_steps: Number of steps.
      norm: "linf" (step along the gradient's sign) or "l2" (along the gradient over its length).
      unroll: Unroll the steps instead of looping. Outside `jit` they are then calls of one compiled step; inside, the
        time to compile grows with their number. Default: on CPUs, inside `jit` for at most `MAX_UNROLLED` steps. Use
        False for networks with convolutions that are fast in a loop, such as those of `ltjax.models`.

    Returns:
      [B, H, W, channels], in the ball and in [0, 1], without a gradient.

    Raises:
      ValueError: epsilon, num_steps or norm is invalid, or images are outside [0, 1].

    Examples:
      >>> images = jnp.full((1, 1, 2, 1), 0.5)
      >>> brighter = attacks.pgd(images, images, lambda x: x.sum((1, 2, 3)), epsilon=0.1, step_size=0.05, num_steps=3)
      >>> brighter.ravel()
      Array([0.6, 0.6], dtype=float32)
    """
    check_images(images)
    check_norm(norm)
    epsilon = radius(epsilon, norm=norm, size=math.prod(images.shape[1:]))
    step_size = radius(step_size, norm="l2", name="step_size")
    known = not isinstance(num_steps, jax.core.Tracer)
    if known and num_steps < 0:
        raise ValueError(f"num_steps = {num_steps}: 0 or more")
    images = jax.lax.stop_gradient(images)
    x = jax.lax.stop_gradient(start.astype(images.dtype))

    def ascend(x, images):
        gradient = jax.grad(lambda x: objective(x).sum())(x)
        gradient = jnp.where(jnp.isfinite(gradient), gradient, 0)
        return project(x + step_size * direction(gradient, norm=norm), images, epsilon=epsilon, norm=norm)

    if _unrolls(unroll, num_steps, images, start):
        step = jax.jit(ascend)  # traced once, and outside `jit` compiled once
        for _ in range(num_steps):
            x = step(x, images)
        x = jax.lax.stop_gradient(x)
    elif not known or num_steps > 0:
        x = jax.lax.stop_gradient(jax.lax.fori_loop(0, num_steps, lambda _, x: ascend(x, images), x))
    return x if known and num_steps > 0 else project(x, images, epsilon=epsilon, norm=norm)


def _unrolls(unroll: bool | None, num_steps: Any, *inputs: Any) -> bool:
    """Return whether to unroll the steps, see `pgd`."""
    if isinstance(num_steps, jax.core.Tracer):
        return False
    if unroll is not None:
        return unroll
    inside = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(inputs))
    return jax.default_backend() == "cpu" and (not inside or num_steps <= MAX_UNROLLED)


def pgd_attack(
    predict: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    labels: jax.Array,
    rng: jax.Array,
    *,
    epsilon: float | str | jax.Array,
    step_size: float | str | jax.Array,
    num_steps: int = 20,
    norm: str = "linf",
    objective: str = "ce",
    start: str = "uniform",
    start_scale: float | str | jax.Array | None = None,
    num_restarts: int = 1,
    unroll: bool | None = None,
) -> jax.Array:
    """Attack a model with PGD, as tables report it (PGD-20, CW-20): the adversarial images [B, H, W, channels].

    The many parameters are the settings of an attack in a config. Those not listed here: see `pgd`.

    Args:
      predict: Function of images that returns logits [B, C].
      images: [B, H, W, channels] in [0, 1].
      labels: [B].
      rng: Random key.
      objective: "ce" (by `objectives.log_odds`, which has the same path as cross-entropy), "cw" (the margin) or "kl"
        (from the clean prediction, where its gradient is 0, so it needs a random start).
      start: Kind of `random_start`.
      start_scale: Scale of `random_start`. Default: epsilon for "uniform", 0.001 for "gaussian".
      num_restarts: Attempts with different starts. The result is one that fools the model, or else the one with the
        largest objective.
      unroll: See `pgd`. It applies to the restarts, too; their steps count together.

    Raises:
      ValueError: As in `pgd`, or the objective is unknown.

    Examples:
      >>> def predict(images):  # from the first pixel
      ...     return 20 * jnp.stack([images[:, 0, 0, 0] - 0.5, 0.5 - images[:, 0, 0, 0]], -1)
      >>> images, labels = jnp.array([0.52, 0.9]).reshape(2, 1, 1, 1), jnp.array([0, 0])
      >>> settings = dict(epsilon=0.1, step_size=0.05, num_steps=5)
      >>> attacked = attacks.pgd_attack(predict, images, labels, jax.random.key(0), **settings)
      >>> predict(attacked).argmax(-1) == labels
      Array([False,  True], dtype=bool)
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}; known: {', '.join(OBJECTIVES)}")
    if num_restarts < 1:
        raise ValueError(f"num_restarts = {num_restarts}: at least 1")
    epsilon = radius(epsilon, norm=norm, size=math.prod(images.shape[1:]))
    labels = jnp.asarray(labels).astype(jnp.int32)
    if start_scale is None:
        start_scale = epsilon if start == "uniform" else 0.001
    natural = predict(images) if objective == "kl" else None
    unroll = _unrolls(unroll, num_steps * num_restarts, predict, images, labels, rng)

    def value(logits: jax.Array) -> jax.Array:  # [B]
        if natural is not None:
            return objectives.kl(logits, natural)
        return (objectives.log_odds if objective == "ce" else objectives.margin)(logits, labels)

    def attempt(key: jax.Array) -> Any:
        x = random_start(key, images, kind=start, scale=start_scale, norm=norm)
        settings: dict[str, Any] = dict(epsilon=epsilon, step_size=step_size, num_steps=num_steps, norm=norm)
        return pgd(images, x, lambda x: value(predict(x)), **settings, unroll=unroll)

    def rank(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = predict(x)
        values = value(logits)
        return objectives.fooled(logits, labels), jnp.where(jnp.isnan(values), -jnp.inf, values)

    return _best_of(attempt, rank, jax.random.split(rng, num_restarts), unroll)


def _best_of(
    attempt: Callable[[jax.Array], jax.Array],
    rank: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    keys: jax.Array,
    unroll: bool,
) -> jax.Array:
    """Attack once with each key, and return the best result for each image.

    Args:
      attempt: Key -> images.
      rank: Images -> whether each fools the model, and its objective.
    """
    best = attempt(keys[0])
    if len(keys) == 1:
        return best

    def restart(number, state):
        best, (fooled, highest) = state
        candidate = attempt(keys[number])
        fools, values = rank(candidate)
        better = (fools & ~fooled) | ((fools == fooled) & (values > highest))  # [B]
        best = jnp.where(per_image(better, best), candidate, best)
        return best, (fooled | fools, jnp.where(better, values, highest))

    state = best, rank(best)
    if not unroll:
        return jax.lax.fori_loop(1, len(keys), restart, state)[0]
    for number in range(1, len(keys)):
        state = restart(number, state)
    return state[0]
