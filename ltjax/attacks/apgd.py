"""APGD: projected gradient ascent with momentum that halves its own step (Croce & Hein, ICML 2020)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ltjax.attacks import objectives
from ltjax.attacks.ball import direction, length, per_image, project
from ltjax.attacks.slots import Task

LOSSES = ("ce", "dlr", "dlr-targeted")
PATIENCE = 0.75  # share of steps since the last look that must have gone uphill
MOMENTUM = 0.75


class State(NamedTuple):
    """Of B images; `x`, `gradient` and `loss` belong to the point evaluated last."""

    adversarial: jax.Array  # [B, H, W, channels], of the highest loss, or the one that fools the model
    fooled: jax.Array  # bool [B]
    done: jax.Array  # bool [B]
    step: jax.Array  # int32 [B], evaluations so far, over all targets
    x: jax.Array
    before: jax.Array  # the point before x
    gradient: jax.Array
    loss: jax.Array  # [B]
    best: jax.Array  # the point of the highest loss of this run
    best_gradient: jax.Array
    best_loss: jax.Array  # [B]
    step_size: jax.Array  # [B]
    uphill: jax.Array  # int32 [B], steps since the last look that raised the loss
    last_best: jax.Array  # [B], best_loss at the last look
    halved: jax.Array  # bool [B], the step size was halved at the last look


def looks(num_steps: int) -> tuple[list[bool], list[int]]:
    """After which of `num_steps` steps the step size may be halved, and how many steps the look covers.

    The first look comes after 22 % of the steps, the gaps shrink by 3 % to 6 %.
    """
    gap, least, shrink = (max(int(share * num_steps), 1) for share in (0.22, 0.06, 0.03))
    at, covers, since = [], [], 0
    for _ in range(num_steps):
        since += 1
        covers.append(gap)
        at.append(since == gap)
        if since == gap:
            gap, since = max(gap - shrink, least), 0
    return at, covers


class Apgd(NamedTuple):
    """One run of `num_steps` steps (and its start), or with "dlr-targeted" one for each of `num_targets` classes.

    epsilon: radius in [0, 1] pixel units. loss: one of `LOSSES`; "ce" by its log-odds, see `objectives.log_odds`.
    An image is done as soon as a point fools the model.
    """

    epsilon: float
    norm: str = "linf"
    loss: str = "ce"
    num_steps: int = 100
    num_targets: int = 9
    evaluations_a_step = 1

    def init(self, task: Task) -> State:
        images, flat = task.images, jnp.zeros(task.labels.shape, task.images.dtype)  # [B]
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
            loss=flat,
            best_gradient=zeros,
            best_loss=flat,
            step_size=flat,
            uphill=count,
            last_best=flat,
            halved=none,
        )

    def _start(self, task: Task, run: jax.Array) -> jax.Array:
        """A random point on the surface of the ball, of each image and run."""
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
        """Move (or start a run), evaluate, and where a look is due, perhaps halve the step and return to the best."""
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
        halved = begins | state.halved  # at the first look, a best that has not moved is no reason yet
        step_size = jnp.where(begins, 2 * self.epsilon, state.step_size).astype(images.dtype)

        at, covers = looks(self.num_steps)
        look = jnp.asarray([False, *at])[number]
        oscillates = uphill <= jnp.asarray([0, *(int(PATIENCE * steps) for steps in covers)], jnp.int32)[number]
        stuck = ~halved & (last_best >= best_loss)
        halve = look & (oscillates | stuck)
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
            uphill=jnp.where(look, 0, uphill),
            last_best=jnp.where(look, best_loss, last_best),
            halved=jnp.where(look, halve, halved),
        )

    def _move(self, images: jax.Array, state: State, number: jax.Array) -> jax.Array:
        """A projected step along the gradient, three quarters of it, and a quarter of the move before."""
        ball = dict(epsilon=self.epsilon, norm=self.norm)
        along = per_image(state.step_size, images) * direction(state.gradient, norm=self.norm)
        stepped = project(state.x + along, images, **ball)
        share = per_image(jnp.where(number == 1, 1.0, MOMENTUM).astype(images.dtype), images)
        carried = state.x + share * (stepped - state.x) + (1 - share) * (state.x - state.before)
        return project(carried, images, **ball)
