"""What adversarial training methods share: the attack inside a step, and perhaps one on the weights."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from ltjax import attacks, losses, registry
from ltjax.types import Apply, Batch, Method, Variables

# objective(natural logits [B, C], logits [B, C], batch) -> scalar, what the attack maximises
Objective = Callable[[jax.Array, jax.Array, Batch], jax.Array]
# given(apply, variables, batch, adversarial images) -> (scalar, (variables, metrics))
Given = Callable[..., tuple[jax.Array, tuple[Variables, dict[str, jax.Array]]]]


def cross_entropy(natural: jax.Array, logits: jax.Array, batch: Batch) -> jax.Array:
    """The objective of Madry et al.; of a mixup batch, that of both labels."""
    del natural
    own = losses.mixed(
        lambda labels: losses.cross_entropy(logits, labels), batch.labels, batch.partner_labels, batch.lam
    )
    return own.sum()


def divergence(natural: jax.Array, logits: jax.Array, batch: Batch) -> jax.Array:
    """The objective of TRADES and LBGAT: away from the natural prediction, which is held fixed."""
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
    """The papers' PGD. Raises: ValueError for what `attacks.pgd` could not use."""

    def size(name: str, value: float | str) -> float:
        try:
            return attacks.radius(value, norm=norm)
        except ValueError as error:
            raise ValueError(str(error).replace("epsilon", name, 1)) from None

    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"attack num_steps = {num_steps}: a whole number from 1 up")
    if start not in attacks.STARTS:
        raise ValueError(f"unknown start {start!r} of the attack; known: {', '.join(attacks.STARTS)}")
    radius, step = size("epsilon", epsilon), size("step_size", step_size)
    moves = dict(epsilon=radius, step_size=step, num_steps=num_steps, norm=norm)
    return dict(moves=moves, begin=dict(kind=start, scale=size("start_scale", start_scale), norm=norm))


def create(
    given: Given,
    *,
    objective: Objective,
    attack: Mapping[str, Any],
    awp: float,
    per_class: Mapping[str, jax.Array] = MappingProxyType({}),
) -> Method:
    """A method that trains on images attacked in each step.

    Args:
      given: the loss of a batch and its adversarial images [B, H, W, channels].
      objective: what the attack maximises.
      attack: epsilon, step_size (both in pixel units of [0, 1], or such as "8/255"), num_steps, norm ("linf", "l2"),
        start ("gaussian", "uniform", "none") and start_scale.
      awp: size of the adversarial weight perturbation over that of the weights, 0 for none (Wu et al., NeurIPS 2020:
        0.005): the loss is taken where each kernel w has moved by `awp |w| g / |g|`, g its gradient of the loss on the
        same adversarial images. Biases, batch norms, and networks other than `net` stay.
      per_class: of the loss's criterion, {title: [C]}, see `ltjax.types.Method`.
    The attacked network `net` runs in evaluation mode there: running statistics, gradients to the images alone, its
    natural prediction computed once.
    """
    settings = registry.bind("attack", _attack_settings, attack)()
    if not 0 <= awp < 1:
        raise ValueError(f"awp = {awp}: a share of the weights' length, from 0 to below 1, such as 0.005")

    def adversarial(apply: Apply, variables: Variables, batch: Batch, rng: jax.Array) -> jax.Array:
        variables = jax.lax.stop_gradient(variables)

        def predict(images):
            return apply(variables, images, bn="eval")[0].logits

        natural = predict(batch.images)  # dead code where the objective has no use for it
        start = attacks.random_start(rng, batch.images, **settings["begin"])
        steps = partial(attacks.pgd, **settings["moves"], unroll=False)  # our convolutions are fast in a loop
        return steps(batch.images, start, lambda x: objective(natural, predict(x), batch))

    def perturbed(apply: Apply, variables: Variables, batch: Batch, images: jax.Array) -> Variables:
        """Variables whose kernels have moved uphill; as far as gradients go, by a constant."""
        fixed = jax.lax.stop_gradient(variables)

        def loss_of(net):
            return given(apply, fixed._replace(params={**fixed.params, "net": net}), batch, images)[0]

        def move(weight, gradient):
            if weight.ndim < 2:
                return jnp.zeros_like(weight)
            size, steep = (jnp.sqrt(jnp.square(x).sum()) for x in (weight, gradient))
            return awp * size * gradient / jnp.maximum(steep, 1e-12)

        moves = jax.tree.map(move, fixed.params["net"], jax.grad(loss_of)(fixed.params["net"]))
        net = jax.tree.map(jnp.add, variables.params["net"], jax.lax.stop_gradient(moves))
        return variables._replace(params={**variables.params, "net": net})

    def loss(apply: Apply, variables: Variables, batch: Batch, rng: jax.Array):
        images = adversarial(apply, variables, batch, rng)
        where = perturbed(apply, variables, batch, images) if awp else variables
        value, (after, metrics) = given(apply, where, batch, images)
        return value, (after._replace(params=variables.params), metrics)

    own = dict(per_class=lambda extra_params: dict(per_class), attacks=True)
    return Method(init=lambda rng: ({}, {}), loss=loss, **own)
