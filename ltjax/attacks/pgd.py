"""Projected gradient descent (Madry et al., ICLR 2018), as training and the older tables use it.

    start = attacks.random_start(rng, images)
    adversarial = attacks.pgd(images, start, objective, epsilon=8 / 255, step_size=2 / 255, num_steps=10)

Pure functions, inside `jit` and outside. On an accelerator the steps are one `lax.fori_loop`. On a CPU, where XLA's
convolutions are several times as slow in a loop, they are written out; see `pgd`'s `unroll`.
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
WRITTEN_OUT = 20  # steps; compiling takes longer with each


def random_start(
    rng: jax.Array,
    images: jax.Array,
    *,
    kind: str = "gaussian",
    scale: float | str | jax.Array = 0.001,
    norm: str = "linf",
) -> jax.Array:
    """Where an attack begins: images [B, ...] moved at random.

    kind: "gaussian", `images + scale N(0, 1)`, neither projected nor clipped (TRADES, LBGAT: 0.001); "uniform", from
      the ball of radius `scale` (Madry: epsilon), clipped to [0, 1]; "none", the images.
    norm: of the uniform ball, "linf" or "l2".
    Raises: ValueError for an unknown kind or norm, or images that are no floats.

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
    dtype = jax.dtypes.canonicalize_dtype(images.dtype)  # of float64 without x64, float32
    if kind == "gaussian":
        spread = radius(scale, norm="l2", name="scale")  # whose upper end is open
        return images + spread * jax.random.normal(rng, images.shape, dtype)
    size = radius(scale, norm=norm, name="scale", size=math.prod(images.shape[1:]))
    if norm == "linf":
        noise = jax.random.uniform(rng, images.shape, dtype, -1, 1)
        return jnp.clip(images + size * noise, 0, 1)
    way, far = jax.random.split(rng)
    towards = direction(jax.random.normal(way, images.shape, dtype), norm="l2")
    share = jax.random.uniform(far, images.shape[:1], dtype) ** (1 / math.prod(images.shape[1:]))  # over the volume
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
    """`num_steps` times: a step uphill, back into the ball around `images`, and into [0, 1].

    Args:
      images, start: [B, H, W, channels]; images in [0, 1].
      objective: images -> [B] or their sum, to be maximised. Only its gradient to the images is computed.
      epsilon: radius in pixel units of [0, 1]: 8/255 (or "8/255"), not 8. step_size: in the same units, l-inf: of each
        pixel; l2: of the whole image's step along the gradient.
      norm: "linf" (sign of the gradient) or "l2" (the gradient over its length).
      unroll: write the steps out instead of looping over them. Outside `jit` they then are calls of one compiled step;
        inside, compiling takes as many times as long. By default they are written out on a CPU, inside `jit` up to
        `WRITTEN_OUT` of them. False suits a network whose convolutions are fast in a loop, as those of `ltjax.models`.
    Returns: [B, H, W, channels], in the ball and in [0, 1], without a gradient to anything.
    Raises: ValueError for an epsilon that cannot be one, num_steps below 0, an unknown norm, or images outside [0, 1].
    Where the objective's gradient is nan or 0, that pixel stays.

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

    if _writes_out(unroll, num_steps, images, start):
        step = jax.jit(ascend)  # traced once, and compiled once where nobody compiles all of it
        for _ in range(num_steps):
            x = step(x, images)
        x = jax.lax.stop_gradient(x)
    elif not known or num_steps > 0:
        x = jax.lax.stop_gradient(jax.lax.fori_loop(0, num_steps, lambda _, x: ascend(x, images), x))
    return x if known and num_steps > 0 else project(x, images, epsilon=epsilon, norm=norm)


def _writes_out(unroll: bool | None, num_steps: Any, *inputs: Any) -> bool:
    """Whether steps are written out: as asked, by default where that is fast and does not compile for long."""
    if isinstance(num_steps, jax.core.Tracer):
        return False
    if unroll is not None:
        return unroll
    inside = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(inputs))
    return jax.default_backend() == "cpu" and (not inside or num_steps <= WRITTEN_OUT)


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
    """PGD against a model, as tables report it (PGD-20, CW-20): the adversarial images [B, H, W, channels].

    Args:
      predict: images -> logits [B, C]. images: [B, H, W, channels] in [0, 1]. labels: [B].
      objective: "ce" (by `objectives.log_odds`, whose path is that of cross-entropy), "cw" (the margin) or "kl" (from
        the clean prediction; needs a random start, where its gradient is not 0).
      start, start_scale: see `random_start`; the scale is epsilon for "uniform", 0.001 for "gaussian" by default.
      num_restarts: each with its own start. Of the last images of all, one that fools the model is kept, else the one
        with the largest objective.
      unroll: see `pgd`; of the restarts as well, whose steps count together.
    Raises: ValueError as `pgd` does, and for an unknown objective.

    Examples:
      >>> def predict(images):  # the first pixel decides
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
    unroll = _writes_out(unroll, num_steps * num_restarts, predict, images, labels, rng)

    def value(logits: jax.Array) -> jax.Array:  # [B]
        if natural is not None:
            return objectives.kl(logits, natural)
        return (objectives.log_odds if objective == "ce" else objectives.margin)(logits, labels)

    def attempt(key: jax.Array) -> Any:
        begin = random_start(key, images, kind=start, scale=start_scale, norm=norm)
        settings: dict[str, Any] = dict(epsilon=epsilon, step_size=step_size, num_steps=num_steps, norm=norm)
        return pgd(images, begin, lambda x: value(predict(x)), **settings, unroll=unroll)

    keys = jax.random.split(rng, num_restarts)
    best = attempt(keys[0])
    if num_restarts == 1:
        return best

    def rank(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = predict(x)
        reached = value(logits)
        return objectives.fooled(logits, labels), jnp.where(jnp.isnan(reached), -jnp.inf, reached)

    def again(number, kept):
        best, (fooled, highest) = kept
        tried = attempt(keys[number])
        fools, reached = rank(tried)
        better = (fools & ~fooled) | ((fools == fooled) & (reached > highest))  # [B]
        chosen = jnp.where(per_image(better, best), tried, best)
        return chosen, (fooled | fools, jnp.where(better, reached, highest))

    kept = best, rank(best)
    if not unroll:
        return jax.lax.fori_loop(1, num_restarts, again, kept)[0]
    for number in range(1, num_restarts):
        kept = again(number, kept)
    return kept[0]
