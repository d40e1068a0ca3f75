"""APGD: projected gradient ascent with momentum and an adaptive step size (Croce & Hein, ICML 2020)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ltjax.attacks import objectives
from ltjax.attacks.ball import direction, length, per_image, project
from ltjax.attacks.slots import Task

LOSSES = ("ce", "dlr", "dlr-targeted")
UPHILL_SHARE = 0.75  # of the steps since the last checkpoint; the step size is halved below it
MOMENTUM = 0.75


class State(NamedTuple):
    """State for B images. A point is [B, H, W, channels]. A checkpoint is a step at which the step size may be halved.

    Attributes:
      adversarial: Point of the highest loss, or one that fools the model.
      fooled: bool [B].
      done: bool [B].
      step: int32 [B], evaluations so far, over all targets.
      x: Point evaluated last.
      before: Point before x.
      gradient: At x.
      loss: [B], at x.
      best: Point of the highest loss of this run.
      best_gradient: At `best`.
      best_loss: [B].
      step_size: [B].
      uphill: int32 [B], steps since the last checkpoint that raised the loss.
      last_best: [B], best_loss at the last checkpoint.
      halved: bool [B], whether the step size was halved at the last checkpoint.
    """

    adversarial: jax.Array
    fooled: jax.Array
    done: jax.Array
    step: jax.Array
    x: jax.Array
    before: jax.Array
    gradient: jax.Array
    loss: jax.Array
    best: jax.Array
    best_gradient: jax.Array
    best_loss: jax.Array
    step_size: jax.Array
    uphill: jax.Array
    last_best: jax.Array
    halved: jax.Array


def checkpoints(num_steps: int) -> tuple[list[bool], list[int]]:
    """Return for each of `num_steps` steps whether it is a checkpoint, and the steps between checkpoints there.

    The first checkpoint comes after 22 % of the steps. The gaps then shrink by 3 % of the steps each, down to 6 %.
    """
    gap, least, shrink = (max(int(share * num_steps), 1) for share in (0.22, 0.06, 0.03))
    is_checkpoint, gaps, since = [], [], 0
    for _ in range(num_steps):
        since += 1
        gaps.append(gap)
        is_checkpoint.append(since == gap)
        if since == gap:
            gap, since = max(gap - shrink, least), 0
    return is_checkpoint, gaps


class Apgd(NamedTuple):
    """One run of a start and `num_steps` steps, or with "dlr-targeted" one for each of `num_targets` classes.

    An image is done as soon as a point fools the model.

    Attributes:
      epsilon: Radius in [0, 1] pixel units.
      norm: "linf" or "l2".
      loss: One of `LOSSES`. "ce" uses `objectives.log_odds`.
      num_steps: Steps of a run.
      num_targets: Runs with "dlr-targeted".
    """

    epsilon: float
    norm: str = "linf"
    loss: str = "ce"
    num_steps: int = 100
    num_targets: int = 9
    evaluations_a_step = 1

    def init(self, task: Task) -> State:
        images, numbers = task.images, jnp.zeros(task.labels.shape, task.images.dtype)  # [B]
        none = jnp.zeros(task.labels.shape, bool)
        count = jnp.zeros(task.labels.shape, jnp.int32)
        points = dict(x=images, before=images, best=images)
        zeros = jnp.zeros_like(images)
        return State(
            adversarial=images,
            fooled=none,
            done=none,
            step=count,
            **points,
            gradient=zeros,
            loss=numbers,
            best_gradient=zeros,
            best_loss=numbers,
            step_size=numbers,
            uphill=count,
            last_best=numbers,
            halved=none,
        )

    def _start(self, task: Task, run: jax.Array) -> jax.Array:
        """Draw a point on the surface of the ball for each image and run."""
        keys = jax.vmap(jax.random.fold_in)(task.keys, run)
        images = task.images

        def draw(key):
            if self.norm == "linf":
                return jax.random.uniform(key, images.shape[1:], images.dtype, -1, 1)
            return jax.random.normal(key, images.shape[1:], images.dtype)

        noise = jax.vmap(draw)(keys)
        noise = noise / jnp.maximum(per_image(length(noise, norm=self.norm), noise), 1e-12)
        return project(images + self.epsilon * noise, images, epsilon=self.epsilon, norm=self.norm)

    def step(self, predict: Any, task: Task, state: State) -> State:
        """Move (or start a run) and evaluate. At a checkpoint, perhaps halve the step size and go back to the best."""
        images, per_run = task.images, self.num_steps + 1
        run, number = state.step // per_run, state.step % per_run  # number 0: the start of a run
        begins = number == 0
        start = jax.lax.cond(begins.any(), lambda: self._start(task, run), lambda: images)
        moved = jnp.where(per_image(begins, images), start, self._move(images, state, number))

        target = jnp.take_along_axis(task.targets, jnp.minimum(run, task.targets.shape[1] - 1)[:, None], 1)[:, 0]

        def total(x):
            logits = predict(x)
            logits = logits if logits.dtype == jnp.float64 else logits.astype(jnp.float32)
            if self.loss == "dlr-targeted":
                values = objectives.dlr_targeted(logits, task.labels, target)
            else:
                values = (objectives.log_odds if self.loss == "ce" else objectives.dlr)(logits, task.labels)
            return values.sum(), (values, logits)

        gradient, (loss, logits) = jax.grad(total, has_aux=True)(moved)
        gradient = jnp.where(jnp.isfinite(gradient), gradient, 0)
        loss = jnp.where(jnp.isnan(loss), -jnp.inf, loss).astype(images.dtype)
        fools = objectives.fooled(logits, task.labels)

        better = begins | (loss > state.best_loss)
        choose = per_image(better, images)
        best = jnp.where(choose, moved, state.best)
        best_gradient = jnp.where(choose, gradient, state.best_gradient)
        best_loss = jnp.where(better, loss, state.best_loss)
        uphill = jnp.where(begins, 0, state.uphill + (loss > state.loss).astype(jnp.int32))
        last_best = jnp.where(begins, loss, state.last_best)
        halved = begins | state.halved  # so that the first checkpoint ignores whether the best loss has risen
        step_size = jnp.where(begins, 2 * self.epsilon, state.step_size).astype(images.dtype)

        is_checkpoint, gaps = checkpoints(self.num_steps)
        check = jnp.asarray([False, *is_checkpoint])[number]
        oscillates = uphill <= jnp.asarray([0, *(int(UPHILL_SHARE * gap) for gap in gaps)], jnp.int32)[number]
        stuck = ~halved & (last_best >= best_loss)
        halve = check & (oscillates | stuck)
        back = per_image(halve, images)
        step = state.step + 1
        runs = min(self.num_targets, task.targets.shape[1]) if self.loss == "dlr-targeted" else 1
        return State(
            adversarial=jnp.where(per_image(fools, images), moved, best),
            fooled=fools,
            done=step >= runs * per_run,
            step=step,
            x=jnp.where(back, best, moved),
            before=jnp.where(per_image(begins, images), moved, state.x),
            gradient=jnp.where(back, best_gradient, gradient),
            loss=loss,
            best=best,
            best_gradient=best_gradient,
            best_loss=best_loss,
            step_size=jnp.where(halve, step_size / 2, step_size),
            uphill=jnp.where(check, 0, uphill),
            last_best=jnp.where(check, best_loss, last_best),
            halved=jnp.where(check, halve, halved),
        )

    def _move(self, images: jax.Array, state: State, number: jax.Array) -> jax.Array:
        """Add 3/4 of a projected step along the gradient and 1/4 of the previous move."""
        ball = dict(epsilon=self.epsilon, norm=self.norm)
        along = per_image(state.step_size, images) * direction(state.gradient, norm=self.norm)
        stepped = project(state.x + along, images, **ball)
        share = per_image(jnp.where(number == 1, 1.0, MOMENTUM).astype(images.dtype), images)
        carried = state.x + share * (stepped - state.x) + (1 - share) * (state.x - state.before)
        return project(carried, images, **ball)
