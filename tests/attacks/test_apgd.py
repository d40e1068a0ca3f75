"""APGD against a transcription of the paper's algorithm 1, image by image in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ltjax.attacks import ball, objectives
from ltjax.attacks.apgd import Apgd, checkpoints
from ltjax.attacks.slots import Task

SHAPE = (4, 4, 2)
CLASSES = 5
STEPS = 40
CHECKPOINTS = {8: 8, 15: 7, 21: 6, 26: 5, 30: 4, 33: 3, 35: 2, 37: 2, 39: 2}  # of 40 steps: {step: gap}


def net(x):
    """Return a smooth net of two layers with fixed random weights, in the precision of x."""
    rng = np.random.default_rng(0)
    first = jnp.asarray(rng.normal(size=(32, 24)) / 4, x.dtype)
    second = jnp.asarray(rng.normal(size=(24, CLASSES)), x.dtype)
    return jnp.sin(x.reshape(len(x), -1) @ first) @ second


def task_of(dtype, count=6):
    rng = np.random.default_rng(1)
    images = jnp.asarray(np.clip(rng.normal(0.5, 0.4, (count, *SHAPE)), 0, 1), dtype)
    labels = net(images).argmax(-1).astype(jnp.int32)
    others = [[c for c in range(CLASSES) if c != label] for label in np.asarray(labels)]
    return Task(images, labels, jnp.asarray(others, jnp.int32), jax.random.split(jax.random.key(3), count))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def history(attack, predict, steps, task):
    """Return the state after each of `steps` evaluations, also of fooled images."""

    def step(state, _):
        state = attack.step(predict, task, state)
        return state, state

    return lax.scan(step, attack.init(task), length=steps)[1]


def algorithm_1(start, image, value_and_slope, epsilon, norm):
    """Return one image's points, losses, step sizes and best losses after evaluations 0, 1, ..., STEPS."""

    def into_ball(x):
        if norm == "linf":
            return np.clip(np.clip(x, image - epsilon, image + epsilon), 0, 1)
        far = np.sqrt(((x - image) ** 2).sum())
        return np.clip(image + (x - image) * min(1, epsilon / far), 0, 1)

    size, x, before = 2 * epsilon, start, start
    loss, slope = value_and_slope(x)
    losses, best = [loss], (loss, x, slope)
    last_best, halved_before = loss, True
    points, sizes, bests = [x], [size], [loss]
    for k in range(1, STEPS + 1):
        ascent = np.sign(slope) if norm == "linf" else slope / np.sqrt((slope**2).sum())
        z = into_ball(x + size * ascent)
        share = 1 if k == 1 else 0.75
        x, before = into_ball(x + share * (z - x) + (1 - share) * (x - before)), x
        loss, slope = value_and_slope(x)
        losses.append(loss)
        if loss > best[0]:
            best = loss, x, slope
        if k in CHECKPOINTS:
            window = CHECKPOINTS[k]
            uphill = sum(losses[i] > losses[i - 1] for i in range(k - window + 1, k + 1))
            halve = uphill <= 0.75 * window or (not halved_before and best[0] == last_best)
            last_best, halved_before = best[0], halve
            if halve:
                size, x, slope = size / 2, best[1], best[2]
        points.append(x)
        sizes.append(size)
        bests.append(best[0])
    return points, losses, sizes, bests


@pytest.mark.parametrize("norm, epsilon, loss", [("linf", 0.1, "dlr"), ("l2", 0.6, "ce")])
def test_every_step_is_that_of_the_paper(norm, epsilon, loss):
    """Compute in float64, so that rounding does not flip signs of gradients."""
    with jax.enable_x64():
        task = task_of(jnp.float64)
        ours = history(Apgd(epsilon, norm, loss, STEPS), net, STEPS + 1, task)
        loss = {"ce": objectives.log_odds, "dlr": objectives.dlr}[loss]

        @jax.jit
        def value_and_slope(x, label):
            return jax.value_and_grad(lambda x: loss(net(x[None]), label[None])[0])(x)

        halvings = set()
        for i, image in enumerate(np.asarray(task.images)):

            def evaluate(x, label=task.labels[i]):
                value, slope = value_and_slope(jnp.asarray(x), label)
                return float(value), np.asarray(slope)

            points, losses, sizes, bests = algorithm_1(np.asarray(ours.x[0, i]), image, evaluate, epsilon, norm)
            np.testing.assert_allclose(ours.step_size[:, i], sizes, rtol=1e-12)
            np.testing.assert_allclose(ours.loss[:, i], losses, rtol=1e-7, atol=1e-8)
            np.testing.assert_allclose(ours.best_loss[:, i], bests, rtol=1e-7, atol=1e-8)
            np.testing.assert_allclose(ours.x[:, i], points, rtol=0, atol=1e-8)
            halvings.add(sizes[-1])
    assert len(halvings) > 1  # some images halve their step more often than others


def test_checkpoints_of_100_steps():
    """Gaps 22, 19, 16, 13, 10, 7, and then 6: the paper's p = 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99."""
    is_checkpoint, gaps = checkpoints(100)
    steps = [step for step, check in enumerate(is_checkpoint, 1) if check]
    assert steps == [22, 41, 57, 70, 80, 87, 93, 99]
    assert [gaps[step - 1] for step in steps] == [22, 19, 16, 13, 10, 7, 6, 6]


def test_checkpoints_of_40_steps():
    is_checkpoint, gaps = checkpoints(40)
    assert {step: gaps[step - 1] for step, check in enumerate(is_checkpoint, 1) if check} == CHECKPOINTS


def test_checkpoints_of_one_step():
    assert checkpoints(1) == ([True], [1])


def test_each_target_has_its_own_start():
    task, attack = task_of(jnp.float32), Apgd(0.05, "linf", "dlr-targeted", num_steps=3, num_targets=2)
    states = history(attack, net, 8, task)
    for run in (0, 1):
        for step in range(4 * run, 4 * run + 3):  # the loss of a point that no look has sent back
            x = states.x[step]
            wanted = objectives.dlr_targeted(net(x), task.labels, task.targets[:, run])
            stays = np.asarray(states.step_size[step] == (states.step_size[step - 1] if step % 4 else 0.1))
            np.testing.assert_allclose(states.loss[step][stays], wanted[stays], rtol=1e-4, atol=1e-5)
            assert stays.any()
    assert not np.allclose(states.x[0], states.x[4])
    np.testing.assert_allclose(states.step_size[4], 0.1, rtol=1e-6)
    np.testing.assert_array_equal(states.done.all(1), [False] * 7 + [True])


@pytest.mark.parametrize("norm", ball.NORMS)
def test_the_start_is_on_the_surface_of_the_ball(norm):
    task = task_of(jnp.float32)
    task = task._replace(images=jnp.full_like(task.images, 0.5))
    start = history(Apgd(0.1, norm, num_steps=10), net, 11, task).x[0]
    np.testing.assert_allclose(ball.length(start - task.images, norm=norm), 0.1, rtol=1e-5)


def test_the_result_fools_the_model_or_has_the_highest_loss():
    task = task_of(jnp.float32)
    states = history(Apgd(0.1, "linf", num_steps=10), net, 11, task)
    np.testing.assert_array_equal(states.best_loss[-1], states.loss.max(0))
    fooled = np.asarray(states.fooled)  # [11, 6]
    assert fooled.any() and not fooled.all()
    predictions = net(states.adversarial.reshape(-1, *SHAPE)).argmax(-1).reshape(fooled.shape)
    assert (np.asarray(predictions) != np.asarray(task.labels))[fooled].all()
    np.testing.assert_array_equal(np.asarray(states.adversarial)[~fooled], np.asarray(states.best)[~fooled])
