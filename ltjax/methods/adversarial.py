"""Common part of adversarial training methods: the attack in a step, and optionally one on the weights."""

from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ltjax import attacks, losses
from ltjax.attacks.ball import per_image
from ltjax.methods.criteria import Criterion
from ltjax.system import registry
from ltjax.types import Apply, Batch, Method, Settings, Variables

PAPERS_ATTACK: Settings = MappingProxyType({})  # the defaults of `_attack_settings`
# objective(natural logits [B, C], logits [B, C], batch, variables) -> scalar, which the attack maximises
Objective = Callable[[jax.Array, jax.Array, Batch, Variables], jax.Array]
# loss_of(apply, variables, batch, adversarial images) -> (scalar, (variables, metrics))
LossOf = Callable[[Apply, Variables, Batch, jax.Array], tuple[jax.Array, tuple[Variables, dict[str, jax.Array]]]]


def cross_entropy(natural: jax.Array, logits: jax.Array, batch: Batch, variables: Variables) -> jax.Array:
    """Compute the objective of Madry et al. A mixup batch counts both labels."""
    per_image = partial(losses.cross_entropy, logits)
    return losses.mixed(per_image, batch.labels, batch.partner_labels, batch.lam).sum()


def divergence(natural: jax.Array, logits: jax.Array, batch: Batch, variables: Variables) -> jax.Array:
    """Compute the objective of TRADES and LBGAT: the KL divergence from the natural prediction, which is constant."""
    return losses.kl_divergence(natural, logits).sum()


def _progress(batch: Batch) -> jax.Array:
    assert batch.progress is not None  # the engine sets it, because `Method.progress` is true
    return batch.progress


def _attack_settings(
    *,
    epsilon: float | str = 0.031,
    step_size: float | str = 0.007,
    num_steps: int = 10,
    norm: str = "linf",
    start: str = "gaussian",
    start_scale: float | str = 0.001,
    radius_share: float = 0.0,
    ramp: float = 0.0,
) -> dict[str, Any]:
    """Check the settings of PGD, whose defaults are the papers', and split them into those of moves, start, radius."""

    def size(name: str, value: float | str) -> float:
        try:
            return attacks.radius(value, norm=norm)
        except ValueError as error:
            raise ValueError(str(error).replace("epsilon", name, 1)) from None

    if num_steps < 1:
        raise ValueError(f"attack num_steps = {num_steps}: a whole number from 1 up")
    if start not in attacks.STARTS:
        raise ValueError(f"unknown start {start!r} of the attack; known: {', '.join(attacks.STARTS)}")
    if not 0 <= radius_share <= 1 or not 0 <= ramp <= 1:
        raise ValueError(f"attack radius_share = {radius_share}, ramp = {ramp}: shares from 0 to 1")
    radius, step = size("epsilon", epsilon), size("step_size", step_size)
    moves = dict(epsilon=radius, step_size=step, num_steps=num_steps, norm=norm)
    start_settings = dict(kind=start, scale=size("start_scale", start_scale), norm=norm)
    return dict(moves=moves, start=start_settings, share=radius_share, ramp=ramp)


def _move(share: Any, weight: jax.Array, gradient: jax.Array) -> jax.Array:
    """Return the move of a kernel along its gradient, a `share` of its length; other parameters do not move."""
    if weight.ndim < 2:
        return jnp.zeros_like(weight)
    length, steepness = (jnp.sqrt(jnp.square(x).sum()) for x in (weight, gradient))
    return share * length * gradient / jnp.maximum(steepness, 1e-12)


def _moves(batch: Batch, moves: dict[str, Any], factors: jax.Array | None, ramp: float) -> dict[str, Any]:
    """Give each image its radius and step, [B, 1, 1, 1], if they are not the same for all. factors: [C], or None."""
    if factors is None and not ramp:
        return moves
    factor = jnp.ones(len(batch.images), batch.images.dtype)
    if factors is not None:
        of_labels = lambda labels: jax.nn.one_hot(labels, len(factors), dtype=factors.dtype) @ factors  # noqa: E731
        factor = losses.mixed(of_labels, batch.labels, batch.partner_labels, batch.lam).astype(factor.dtype)
    if ramp:
        factor = factor * jnp.minimum(_progress(batch) / ramp, 1).astype(factor.dtype)
    return {**moves, **{key: moves[key] * per_image(factor, batch.images) for key in ("epsilon", "step_size")}}


def create(
    loss_of: LossOf,
    objective: Objective,
    criterion: Criterion | None = None,
    class_counts: np.ndarray | None = None,
    *,
    attack: Settings,
    awp: float,
    awp_start: float = 0.0,
) -> Method:
    """Create a method that attacks the images of each step and trains on them.

    The attack runs the network `net` in evaluation mode, with gradients only to the images.

    Args:
      loss_of: Loss of a batch and its adversarial images [B, H, W, channels].
      objective: Function that the attack maximises.
      criterion: Of the loss, for the method's `per_class` and `prior`.
      class_counts: [C] training images, for radius_share.
      attack: epsilon, step_size (both in pixel units of [0, 1], or text such as "8/255"), num_steps, norm ("linf",
        "l2"), start ("gaussian", "uniform", "none") and start_scale; radius_share, the part of the radius that is
        larger for rarer classes (RobustLT, see `attacks.radius_by_count`); ramp, the share of the stage over which
        the radius rises from 0. Steps change in proportion to the radius; the start does not.
      awp: Length of the adversarial weight perturbation, relative to the weights (Wu et al., NeurIPS 2020: 0.005); 0
        for none. The loss is evaluated with each kernel w moved by `awp |w| g / |g|`, where g is the loss's gradient on
        the same adversarial images. Biases, batch norms and networks other than `net` are not perturbed.
      awp_start: Share of the stage after which the weights are perturbed.
    """
    settings = registry.bind("attack", _attack_settings, attack)()
    if not 0 <= awp < 1:
        raise ValueError(f"awp = {awp}: a share of the weights' length, from 0 to below 1, such as 0.005")
    if not 0 <= awp_start <= 1:
        raise ValueError(f"awp_start = {awp_start}: a share of the stage, from 0 to 1")
    share, ramp = settings["share"], settings["ramp"]
    factors = None  # [C], on the radius
    if share:
        if class_counts is None:
            raise ValueError(f"attack radius_share = {share} needs the class counts")
        factors = attacks.radius_by_count(class_counts, epsilon=1.0, share=share)

    def adversarial(apply: Apply, variables: Variables, batch: Batch, rng: jax.Array) -> jax.Array:
        variables = jax.lax.stop_gradient(variables)

        def predict(images):
            return apply(variables, images, bn="eval")[0].logits

        natural = predict(batch.images)  # dead code if the objective does not use it
        start = attacks.random_start(rng, batch.images, **settings["start"])
        moves = _moves(batch, settings["moves"], factors, ramp)
        pgd = partial(attacks.pgd, **moves, unroll=False)  # our convolutions are fast in a loop
        return pgd(batch.images, start, lambda x: objective(natural, predict(x), batch, variables))

    def perturbed(apply: Apply, variables: Variables, batch: Batch, images: jax.Array) -> Variables:
        """Move the kernels uphill. The moves are constants for gradients."""
        fixed = jax.lax.stop_gradient(variables)

        def loss_at(net):
            return loss_of(apply, fixed._replace(params={**fixed.params, "net": net}), batch, images)[0]

        share_now = jnp.where(_progress(batch) >= awp_start, awp, 0.0) if awp_start else awp
        moves = jax.tree.map(partial(_move, share_now), fixed.params["net"], jax.grad(loss_at)(fixed.params["net"]))
        net = jax.tree.map(jnp.add, variables.params["net"], jax.lax.stop_gradient(moves))
        return variables._replace(params={**variables.params, "net": net})

    def loss(apply: Apply, variables: Variables, batch: Batch, rng: jax.Array):
        images = adversarial(apply, variables, batch, rng)
        moved = perturbed(apply, variables, batch, images) if awp else variables
        value, (after, metrics) = loss_of(apply, moved, batch, images)
        return value, (after._replace(params=variables.params), metrics)

    return Method(
        init=lambda rng: ({}, {}),
        loss=loss,
        per_class=lambda extra_params: criterion.per_class if criterion else {},
        progress=bool(ramp or (awp and awp_start)),
        attacks=True,
        prior=criterion and criterion.prior,
    )
