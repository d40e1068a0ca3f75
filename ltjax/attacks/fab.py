"""FAB-T: looks for the nearest misclassified point, through a linear model of the decision boundary at each iterate."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ltjax.attacks import ball, objectives
from ltjax.attacks.slots import Task

OVERSHOOT = 1.05  # eta of the paper: how far past the linearised boundary a step goes
MAX_BIAS = 0.1  # alpha_max: the most that a step leans towards the original image
PULL = 0.9  # beta: what is kept of a perturbation that has fooled the model


class State(NamedTuple):
    adversarial: jax.Array  # [B, H, W, channels]; the image itself until `fooled`
    fooled: jax.Array  # [B]
    done: jax.Array  # [B]
    point: jax.Array  # [B, H, W, channels], the iterate to evaluate next
    iteration: jax.Array  # [B] int32, projections done for this target
    target: jax.Array  # [B] int32, column of `Task.targets`
    distance: jax.Array  # [B], to the nearest misclassified point so far; infinite before the first


class Fab(NamedTuple):
    """FAB-T without random restarts, as in AutoAttack's standard suite.

    Args: epsilon: radius in [0, 1] pixel units. norm: linf or l2. num_steps: projections for each target class.
      num_targets: how many of the task's targets to try, each from the original image.

    A step checks its point, pulls it back if it fools the model, and projects from there: a forward pass, and one more
    with its backward pass, as the authors' code does. A target takes num_steps + 1 steps. Here a point that still fools
    after being pulled back counts too (theirs does not look), and an image is left as soon as a point inside the ball
    fools the model, instead of going on to the smallest distance.
    Source: Croce & Hein, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack", ICML 2020;
      targeted as in "Reliable evaluation of adversarial robustness ...", ICML 2020.
    """

    epsilon: float
    norm: str = "linf"
    num_steps: int = 100
    num_targets: int = 9
    evaluations_a_step = 2

    def init(self, task: Task) -> State:
        ball.check_norm(self.norm)
        batch = task.images.shape[0]
        none, zero = jnp.zeros(batch, bool), jnp.zeros(batch, jnp.int32)
        return State(
            adversarial=task.images,
            fooled=none,
            done=none | (self._targets(task) == 0),
            point=task.images,
            iteration=zero,
            target=zero,
            distance=jnp.full(batch, jnp.inf, task.images.dtype),
        )

    def step(self, predict: Any, task: Task, state: State) -> State:
        images = task.images
        column = jnp.minimum(state.target, task.targets.shape[1] - 1)[:, None]
        target = jnp.take_along_axis(task.targets, column, axis=1)[:, 0]  # [B]
        last = state.iteration >= self.num_steps

        def check(logits, x):
            wrong, distance = objectives.fooled(logits, task.labels), ball.length(x - images, norm=self.norm)
            return wrong, jnp.where(wrong, distance, jnp.inf)

        crossed, far = check(predict(state.point), state.point)
        pull = crossed & ~last
        x = jnp.where(ball.per_image(pull, images), images + PULL * (state.point - images), state.point)
        x = jnp.clip(x, 0, 1)

        def gap(x):  # of all images in one sum: they know nothing of each other
            logits = predict(x)  # [B, C]
            theirs, own = (jax.nn.one_hot(c, logits.shape[-1], dtype=bool) for c in (target, task.labels))
            value = jnp.where(theirs, logits, 0).sum(-1) - jnp.where(own, logits, 0).sum(-1)  # [B], > 0: target has won
            return value.sum(), (logits, value)

        (_, (logits, value)), slope = jax.value_and_grad(gap, has_aux=True)(x)
        _, near = check(logits, x)
        fooled = jnp.minimum(far, near) <= self.epsilon  # bool [B]
        kept = jnp.where(ball.per_image(far <= self.epsilon, x), state.point, x)
        nearer = towards_boundary(x, images, value.astype(x.dtype), slope, norm=self.norm)
        following = state.target + last.astype(jnp.int32)
        return State(
            adversarial=jnp.where(ball.per_image(fooled, x), kept, state.adversarial),
            fooled=state.fooled | fooled,
            done=state.done | (following >= self._targets(task)),
            point=jnp.where(ball.per_image(last, x), images, nearer),
            iteration=jnp.where(last, 0, state.iteration + 1),
            target=following,
            distance=jnp.minimum(state.distance, jnp.minimum(far, near).astype(x.dtype)),
        )

    def _targets(self, task: Task) -> int:
        return min(self.num_targets, task.targets.shape[1])


def towards_boundary(x: jax.Array, images: jax.Array, value: jax.Array, slope: jax.Array, *, norm: str) -> jax.Array:
    """One projection step of FAB: x, images, slope [B, ...], value [B] -> the next iterate [B, ...], in [0, 1].

    The boundary is taken to be where `value + <slope, z - x> = 0`. Both x and the image are projected on it, and the
    step goes past it, between the two, the nearer to the image's own projection the further x has to go. Where value or
    slope is not finite, or the slope is 0, x only moves towards the image.
    """
    shape, (x, images, slope) = x.shape, (a.reshape(a.shape[0], -1) for a in (x, images, slope))  # [B, D] each
    largest = jnp.abs(slope).max(-1)  # [B]; nan if any entry is
    usable = jnp.isfinite(largest) & (largest >= jnp.finfo(largest.dtype).tiny) & jnp.isfinite(value)
    scale = jnp.where(usable, largest, 1)
    weights = jnp.where(usable[:, None], slope / scale[:, None], 0)  # [B, D], so that no square underflows
    missing = jnp.where(usable, -value / scale, 0)  # [B], what <weights, z - x> has to become
    starts = jnp.stack([x, images])  # [2, B, D]
    missing = jnp.stack([missing, missing + (weights * (x - images)).sum(-1)])  # [2, B]
    moves = to_hyperplane(starts, weights, missing, norm=norm)  # [2, B, D]
    own, original = jnp.maximum(jax.vmap(lambda d: ball.length(d, norm=norm))(moves), 1e-8)  # [B] each
    bias = jnp.minimum(own / (own + original), MAX_BIAS)[:, None]  # [B, 1]
    ends = starts + OVERSHOOT * moves
    return jnp.clip((1 - bias) * ends[0] + bias * ends[1], 0, 1).reshape(shape)


def to_hyperplane(x: jax.Array, weights: jax.Array, missing: jax.Array, *, norm: str) -> jax.Array:
    """The shortest move d with `<weights, d> = missing` and x + d in [0, 1]: x [..., D], missing [...] -> d [..., D].

    If no such d exists, every entry that has a weight goes to the end of the box that brings it nearest.

    Each entry moves by min(t * speed, room) in its helpful direction: speed is 1 for l-inf, |weight| for l2. What this
    gains is concave in t, so that Newton's method from the left never overshoots: an entry that has reached its end
    stays there, and the answer is exact once no further entry does, mostly after 3 to 6 rounds, and without sorting.
    Source: the problem of Croce & Hein, ICML 2020, section 2.2; they sort the ends.
    """
    size = jnp.abs(weights)
    speed = jnp.ones_like(size) if norm == "linf" else size
    gain = size * speed
    sign = jnp.sign(missing)[..., None] * jnp.where(gain > 0, jnp.sign(weights), 0)  # [..., D]
    room = jnp.maximum(jnp.where(sign > 0, 1 - x, x), 0)
    whole = jnp.where(gain > 0, size * room, 0)  # gained by going to the end

    def enlarge(carry):
        free, t, _ = carry
        rest = jnp.abs(missing) - jnp.where(free, 0, whole).sum(-1)
        rate = jnp.where(free, gain, 0).sum(-1)
        t = jnp.maximum(t, rest / jnp.where(rate > 0, rate, 1))  # [...]
        still = free & (t[..., None] * speed < room)
        return still, t, jnp.any(still != free)

    free = jnp.broadcast_to(gain > 0, x.shape)
    free, t, _ = lax.while_loop(lambda carry: carry[2], enlarge, (free, jnp.zeros_like(missing), jnp.array(True)))
    return sign * jnp.where(free, t[..., None] * speed, room)
