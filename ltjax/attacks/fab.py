"""FAB-T: searches for the nearest misclassified point by linearising the decision boundary at each iterate."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ltjax.attacks import ball, objectives
from ltjax.attacks.slots import Task

OVERSHOOT = 1.05  # the paper's eta: factor on a step to the linearised boundary
MAX_BIAS = 0.1  # alpha_max: largest weight of the original image's projection
PULL = 0.9  # beta: factor on a perturbation that fools the model


class State(NamedTuple):
    """State for B images.

    Attributes:
      adversarial: [B, H, W, channels], the image itself until `fooled`.
      fooled: bool [B].
      done: bool [B].
      point: [B, H, W, channels], the iterate to evaluate next.
      iteration: int32 [B], projections so far for this target.
      target: int32 [B], column of `Task.targets`.
      distance: [B], to the nearest misclassified point so far, or infinite.
    """

    adversarial: jax.Array
    fooled: jax.Array
    done: jax.Array
    point: jax.Array
    iteration: jax.Array
    target: jax.Array
    distance: jax.Array


class Fab(NamedTuple):
    """FAB-T without random restarts, as in AutoAttack's standard suite.

    A step evaluates its point, pulls it back if it fools the model, evaluates again with the gradient, and projects, as
    in the authors' code. A target takes num_steps + 1 steps. Unlike their code, a point that still fools the model
    after being pulled back counts, too, and an image is done as soon as a point inside the ball fools the model.

    Source: Croce & Hein, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack", ICML 2020;
    targeted as in "Reliable evaluation of adversarial robustness ...", ICML 2020.

    Attributes:
      epsilon: Radius in [0, 1] pixel units.
      norm: "linf" or "l2".
      num_steps: Projections for each target class.
      num_targets: Number of the task's targets to try, each from the original image.
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

        def gap(x):  # the sum over images, which do not depend on each other
            logits = predict(x)  # [B, C]
            is_target, is_label = (jax.nn.one_hot(c, logits.shape[-1], dtype=bool) for c in (target, task.labels))
            value = jnp.where(is_target, logits, 0).sum(-1) - jnp.where(is_label, logits, 0).sum(-1)  # [B]
            return value.sum(), (logits, value)

        (_, (logits, value)), slope = jax.value_and_grad(gap, has_aux=True)(x)
        _, near = check(logits, x)
        fooled = jnp.minimum(far, near) <= self.epsilon  # bool [B]
        inside = jnp.where(ball.per_image(far <= self.epsilon, x), state.point, x)
        nearer = towards_boundary(x, images, value.astype(x.dtype), slope, norm=self.norm)
        next_target = state.target + last.astype(jnp.int32)
        return State(
            adversarial=jnp.where(ball.per_image(fooled, x), inside, state.adversarial),
            fooled=state.fooled | fooled,
            done=state.done | (next_target >= self._targets(task)),
            point=jnp.where(ball.per_image(last, x), images, nearer),
            iteration=jnp.where(last, 0, state.iteration + 1),
            target=next_target,
            distance=jnp.minimum(state.distance, jnp.minimum(far, near).astype(x.dtype)),
        )

    def _targets(self, task: Task) -> int:
        return min(self.num_targets, task.targets.shape[1])


def towards_boundary(x: jax.Array, images: jax.Array, value: jax.Array, slope: jax.Array, *, norm: str) -> jax.Array:
    """Take a projection step of FAB: x, images, slope [B, ...], value [B] -> the next iterate [B, ...], in [0, 1].

    x and the image are both projected to the linearised boundary, `value + <slope, z - x> = 0`, and overshoot it. The
    step averages the two; the weight of the image's grows with the distance of x. If value or slope is not finite, or
    the slope is 0, x only moves towards the image.
    """
    shape, (x, images, slope) = x.shape, (a.reshape(a.shape[0], -1) for a in (x, images, slope))  # [B, D] each
    largest = jnp.abs(slope).max(-1)  # [B]; nan if any entry is nan
    usable = jnp.isfinite(largest) & (largest >= jnp.finfo(largest.dtype).tiny) & jnp.isfinite(value)
    scale = jnp.where(usable, largest, 1)
    weights = jnp.where(usable[:, None], slope / scale[:, None], 0)  # [B, D]; scaled so that squares do not underflow
    missing = jnp.where(usable, -value / scale, 0)  # [B], value of <weights, z - x> on the boundary
    starts = jnp.stack([x, images])  # [2, B, D]
    missing = jnp.stack([missing, missing + (weights * (x - images)).sum(-1)])  # [2, B]
    moves = to_hyperplane(starts, weights, missing, norm=norm)  # [2, B, D]
    of_x, of_image = jnp.maximum(jax.vmap(lambda d: ball.length(d, norm=norm))(moves), 1e-8)  # [B] each
    bias = jnp.minimum(of_x / (of_x + of_image), MAX_BIAS)[:, None]  # [B, 1]
    ends = starts + OVERSHOOT * moves
    return jnp.clip((1 - bias) * ends[0] + bias * ends[1], 0, 1).reshape(shape)


def to_hyperplane(x: jax.Array, weights: jax.Array, missing: jax.Array, *, norm: str) -> jax.Array:
    """Find the shortest d with `<weights, d> = missing` and x + d in [0, 1]: x [..., D], missing [...] -> d [..., D].

    If no such d exists, every entry with a weight goes to the end of the box that comes closest.

    Each entry moves by min(t * speed, room) in its helpful direction; the speed is 1 for l-inf, |weight| for l2. The
    gain is concave in t, so Newton's method from the left never overshoots. An entry at its end stays there, and the
    result is exact once no further entry reaches its end, mostly after 3 to 6 iterations.

    Source: the problem of Croce & Hein, ICML 2020, section 2.2, which they solve by sorting.
    """
    size = jnp.abs(weights)
    speed = jnp.ones_like(size) if norm == "linf" else size
    gain = size * speed
    sign = jnp.sign(missing)[..., None] * jnp.where(gain > 0, jnp.sign(weights), 0)  # [..., D]
    room = jnp.maximum(jnp.where(sign > 0, 1 - x, x), 0)
    whole = jnp.where(gain > 0, size * room, 0)  # gain at the end of the box

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
