"""Learning rates by epoch, and parameter groups by regular expression."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from ltjax.system import registry
from ltjax.types import UserError

SCHEDULES = ("constant", "step", "cosine")


def schedule_table(
    epochs: int,
    *,
    kind: str,
    warmup: float = 0.0,
    warmup_start: float = 0.0,
    decay_at: tuple[float, ...] = (),
    decay: float = 0.1,
) -> np.ndarray:
    """Compute the factor on the learning rate of each epoch, [epochs]. It changes once an epoch, as in the papers.

    Positions are shares of the run, so a shorter run keeps the shape.

    Args:
      epochs: Length of the run.
      kind: "constant"; "step", times `decay` after each share in `decay_at`; or "cosine", `(1 + cos(pi e / epochs))/2`,
        which begins in the last epoch of the warm-up.
      warmup: Share of the epochs, rounded to W epochs, over which the factor rises linearly. It reaches 1 in the last.
      warmup_start: Factor of the first epoch. 0 means 1/W, for a rise of `(e + 1) / W`.
      decay_at: Shares of the run at which "step" decays.
      decay: Factor of each decay.

    Raises:
      UserError: The kind is unknown, a share or `warmup_start` is outside [0, 1], or epochs is negative.

    Examples:
      >>> optim.schedule_table(5, kind="step", warmup=0.4, decay_at=(0.8,))
      array([0.5, 1. , 1. , 1. , 0.1])
    """
    registry.choose("schedule", SCHEDULES, kind)
    if not all(0 <= share <= 1 for share in (warmup, *decay_at)):
        raise UserError(
            f"schedule warmup = {warmup}, decay_at = {decay_at}: shares of the run, from 0 to 1, not epochs"
        )
    if not 0 <= warmup_start <= 1:
        raise UserError(f"schedule warmup_start = {warmup_start}: a factor on the learning rate, from 0 to 1")
    if epochs < 0:
        raise UserError(f"epochs = {epochs}: a stage cannot have less than none")
    epoch = np.arange(epochs)
    factor = np.ones(epochs)
    if kind == "step":
        for share in decay_at:
            factor[epoch >= round(share * epochs)] *= decay
    warmup_epochs = round(warmup * epochs)
    last = max(warmup_epochs - 1, 0)  # epoch of the warm-up
    if kind == "cosine":
        factor = 0.5 * (1 + np.cos(math.pi * np.maximum(epoch - last, 0) / max(epochs - last, 1)))
    if warmup_epochs:
        start = warmup_start or 1 / warmup_epochs
        factor = np.minimum(1.0, start + (1 - start) * epoch / max(last, 1)) * factor
    return factor


def flatten(params: Any) -> dict[str, jax.Array]:
    """Flatten nested dicts to {"net/backbone/conv/kernel": array, ...}."""
    return dict(traverse_util.flatten_dict(params, sep="/"))


def unflatten(flat: Mapping[str, jax.Array]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def assign_groups(paths: list[str], groups: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Assign each parameter to its group: {path: group name}.

    Args:
      paths: Of the parameters.
      groups: {name: {"match": regular expression for the whole path, "optional": whether it may match none, ...}}.

    Raises:
      UserError: A parameter matches no group or several, or a group matches no parameter.
    """
    roots = sorted({"/".join(path.split("/")[:2]) for path in paths})
    assigned = {}
    for path in paths:
        names = [name for name, group in groups.items() if re.fullmatch(group["match"], path)]
        if len(names) != 1:
            what = f"parameter groups {names} all match" if names else f"no parameter group of {sorted(groups)} matches"
            raise UserError(f"{what} {path!r}: every parameter must match exactly one; paths begin with {roots}")
        assigned[path] = names[0]
    needed = {name for name, group in groups.items() if not group.get("optional")}
    empty = sorted(needed - set(assigned.values()))
    if empty:
        raise UserError(f"parameter groups {empty} match no parameter; paths begin with {roots}")
    return assigned


def ema(
    average: Any, value: Any, step: jax.Array, *, decay: float = 0.999, warmup: bool = True, power: float = 2 / 3
) -> Any:
    """Update an exponential moving average of weights: `average + (1 - d) (value - average)`.

    The first step copies the value. With `warmup`, d in step s is `min(decay, 1 - s^-power)`, s from 1, so that early
    weights are soon forgotten; else d is `decay`. timm's ModelEmaV3 does the same.

    Args:
      average: Pytree of arrays.
      value: The same after a step.
      step: Number of the step, from 0.
      decay: In [0, 1).
      warmup: Whether d rises.
      power: Of the rise.

    Examples:
      >>> optim.ema(jnp.array(0.0), jnp.array(1.0), jnp.array(5), decay=0.75, warmup=False)
      Array(0.25, dtype=float32)
    """
    step = step.astype(jnp.float32)
    d = jnp.minimum(decay, 1 - (1 + step) ** -power) if warmup else jnp.float32(decay)
    weight = jnp.where(step == 0, 1.0, 1 - d)
    return jax.tree.map(lambda a, v: a + weight.astype(a.dtype) * (v - a), average, value)


def check_ema(*, decay: float = 0.999, warmup: bool = True, power: float = 2 / 3) -> None:
    """Raise UserError if a setting of `ema` is out of range."""
    if not 0 <= decay < 1 or not power > 0:
        raise UserError(f"ema decay = {decay}, power = {power}: decay from 0 to below 1, power above 0")


def climbed(
    params: dict[str, jax.Array], gradients: dict[str, jax.Array], *, rho: float, adaptive: bool = False
) -> dict[str, jax.Array]:
    """Climb from parameters by their gradient, to the weights at which SAM takes the gradient of its step.

    `theta + rho g / |g|`; adaptive: `theta + rho theta^2 g / ||theta| g|`. The lengths are those of all parameters
    together. Source: Foret et al., ICLR 2021; Kwon et al., ICML 2021.

    Args:
      params: {path: array} of all trained parameters.
      gradients: The same.
      rho: Length of the step.
      adaptive: Scale the step by the parameters.

    Examples:
      >>> optim.climbed({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([0.0, 5.0])}, rho=0.5)
      {'w': Array([1. , 2.5], dtype=float32)}
    """
    scaled = {path: jnp.abs(params[path]) * g if adaptive else g for path, g in gradients.items()}
    length = jnp.sqrt(sum(jnp.square(g).sum() for g in scaled.values()))
    factor = rho / (length + 1e-12)
    return {
        path: value + factor.astype(value.dtype) * scaled[path] * (jnp.abs(value) if adaptive else 1)
        for path, value in params.items()
    }


def check_sam(*, rho: float, adaptive: bool = False) -> None:
    """Raise UserError if a setting of `climbed` is out of range."""
    if not rho > 0:
        raise UserError(f"sam rho = {rho}: above 0")


def optimizer(
    assigned: Mapping[str, str],
    groups: Mapping[str, Mapping[str, Any]],
    *,
    lr: float,
    factors: np.ndarray,
    steps_per_epoch: int,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
) -> optax.GradientTransformation:
    """Build PyTorch's SGD for a flat {path: array} of trained parameters.

    Weight decay is added to the gradient, then comes momentum, then the learning rate `lr * factors[epoch] * rate of
    the group`.

    Args:
      assigned: {path: group} of the trained parameters.
      groups: {name: {"rate": factor on lr, "weight_decay": optional, replaces the common one}}.
      lr: Base learning rate.
      factors: [epochs], see `schedule_table`.
      steps_per_epoch: Steps after which the next factor applies.
      momentum: Of SGD.
      nesterov: Whether momentum is Nesterov's.
      weight_decay: Common weight decay.
    """
    table = jnp.asarray(factors, jnp.float32)

    def sgd(group):
        rate, decay = group["rate"] * lr, group.get("weight_decay")
        decay = weight_decay if decay is None else decay
        schedule = lambda count: rate * table[jnp.minimum(count // steps_per_epoch, len(factors) - 1)]  # noqa: E731
        return optax.chain(optax.add_decayed_weights(decay), optax.sgd(schedule, momentum=momentum, nesterov=nesterov))

    # Not `optax.flatten`: XLA then compiles ResNet-32's step to 507 kernels on an H100 instead of 464, because each
    # convolution needs its part of the vector as an array.
    used = sorted(set(assigned.values()))
    return optax.partition({name: sgd(groups[name]) for name in used}, dict(assigned))
