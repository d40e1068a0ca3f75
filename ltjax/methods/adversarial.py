"""Common part of adversarial training methods: the attack in a step, and optionally one on the weights."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ltjax import attacks, losses, registry
from ltjax.types import Apply, Batch, Method, Settings, Variables

PAPERS_ATTACK: Settings = MappingProxyType({})  # the defaults of `_attack_settings`
# objective(natural logits [B, C], logits [B, C], batch) -> scalar, which the attack maximises
Objective = Callable[[jax.Array, jax.Array, Batch], jax.Array]
# loss_of(apply, variables, batch, adversarial images) -> (scalar, (variables, metrics))
LossOf = Callable[[Apply, Variables, Batch, jax.Array], tuple[jax.Array, tuple[Variables, dict[str, jax.Array]]]]


def cross_entropy(natural: jax.Array, logits: jax.Array, batch: Batch) -> jax.Array:
    """Compute the objective of Madry et al. A mixup batch counts both labels."""
    del natural
    per_image = partial(losses.cross_entropy, logits)
    return losses.mixed(per_image, batch.labels, batch.partner_labels, batch.lam).sum()


def divergence(natural: jax.Array, logits: jax.Array, batch: Batch) -> jax.Array:
    """Compute the objective of TRADES and LBGAT: the KL divergence from the natural prediction, which is constant."""
    del batch
    return losses.kl_divergence(natural, logits).sum()


def _attack_settings(
    *,
    epsilon: float | str = 0.031,
    step_size: float | str = 0.007,
    num_steps: int = 10,
    norm: str = "linf",
    start: str = "gaussian",
    start_scale: float | str = 0.001,
) -> dict[str, Any]:
    """Check the settings of PGD, whose defaults are the papers', and split them into those of moves and start."""

    def size(name: str, value: float | str) -> float:
        try:
            return attacks.radius(value, norm=norm)
        except ValueError as error:
            raise ValueError(str(error).replace("epsilon", name, 1)) from None

    if num_steps < 1:
        raise ValueError(f"attack num_steps = {num_steps}: a whole number from 1 up")
    if start not in attacks.STARTS:
        raise ValueError(f"unknown start {start!r} of the attack; known: {', '.join(attacks.STARTS)}")
    radius, step = size("epsilon", epsilon), size("step_size", step_size)
    moves = dict(epsilon=radius, step_size=step, num_steps=num_steps, norm=norm)
    return dict(moves=moves, start=dict(kind=start, scale=size("start_scale", start_scale), norm=norm))


def create(
    loss_of: LossOf,
    *,
    objective: Objective,
    attack: Settings,
    awp: float,
    per_class: Mapping[str, jax.Array] = MappingProxyType({}),
    prior: np.ndarray | None = None,
) -> Method:
    """Create a method that attacks the images of each step and trains on them.

    The attack runs the network `net` in evaluation mode, with gradients only to the images.

    Args:
      loss_of: Loss of a batch and its adversarial images [B, H, W, channels].
      objective: Function that the attack maximises.
      attack: epsilon, step_size (both in pixel units of [0, 1], or text such as "8/255"), num_steps, norm ("linf",
        "l2"), start ("gaussian", "uniform", "none") and start_scale.
      awp: Length of the adversarial weight perturbation, relative to the weights (Wu et al., NeurIPS 2020: 0.005); 0
        for none. The loss is evaluated with each kernel w moved by `awp |w| g / |g|`, where g is the loss's gradient on
        the same adversarial images. Biases, batch norms and networks other than `net` are not perturbed.
      per_class: Of the loss's criterion, {title: [C]}, see `ltjax.types.Method`.
      prior: Of the loss's criterion, [C].
    """
    settings = registry.bind("attack", _attack_settings, attack)()
    if not 0 <= awp < 1:
        raise ValueError(f"awp = {awp}: a share of the weights' length, from 0 to below 1, such as 0.005")

    def adversarial(apply: Apply, variables: Variables, batch: Batch, rng: jax.Array) -> jax.Array:
        variables = jax.lax.stop_gradient(variables)

        def predict(images):
            return apply(variables, images, bn="eval")[0].logits

        natural = predict(batch.images)  # dead code if the objective does not use it
        start = attacks.random_start(rng, batch.images, **settings["start"])
        pgd = partial(attacks.pgd, **settings["moves"], unroll=False)  # our convolutions are fast in a loop
        return pgd(batch.images, start, lambda x: objective(natural, predict(x), batch))

    def perturbed(apply: Apply, variables: Variables, batch: Batch, images: jax.Array) -> Variables:
        """Move the kernels uphill. The moves are constants for gradients."""
        fixed = jax.lax.stop_gradient(variables)

        def loss_at(net):
            return loss_of(apply, fixed._replace(params={**fixed.params, "net": net}), batch, images)[0]

        def move(weight, gradient):
            if weight.ndim < 2:
                return jnp.zeros_like(weight)
            length, steepness = (jnp.sqrt(jnp.square(x).sum()) for x in (weight, gradient))
            return awp * length * gradient / jnp.maximum(steepness, 1e-12)

        moves = jax.tree.map(move, fixed.params["net"], jax.grad(loss_at)(fixed.params["net"]))
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
        per_class=lambda extra_params: dict(per_class),
        attacks=True,
        prior=prior,
    )
