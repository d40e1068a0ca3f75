import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ltjax.attacks import ball
from ltjax.attacks.fab import Fab, to_hyperplane, towards_boundary
from ltjax.attacks.slots import Task

SHAPE = (4, 5, 3)
CLASSES = 4


def task_of(images, labels, num_classes=CLASSES):
    others = [[c for c in range(num_classes) if c != label] for label in np.asarray(labels)]
    keys = jax.random.split(jax.random.key(3), len(others))
    return Task(jnp.asarray(images), jnp.asarray(labels, jnp.int32), jnp.asarray(others, jnp.int32), keys)


@functools.partial(jax.jit, static_argnums=(0, 1))
def drive(attack, predict, task, wait=0):
    """Step all images until they are settled, each from step `wait` [B] on -> state, steps of each image."""

    def settled(state):
        return state.fooled | state.done

    def body(carry):
        old, steps, clock = carry
        active = ~settled(old) & (clock >= wait)
        new = attack.step(predict, task, old)
        new = jax.tree.map(lambda n, o: jnp.where(ball.per_image(active, n), n, o), new, old)
        return new, steps + active.astype(jnp.int32), clock + 1

    start = attack.init(task), jnp.zeros(len(task.labels), jnp.int32), jnp.int32(0)
    return lax.while_loop(lambda carry: jnp.any(~settled(carry[0])), body, start)[:2]


@pytest.fixture(scope="module")
def net():
    """Return a random net of two layers, and 24 images that it classifies right, with many pixels at 0 and 1."""
    rng = np.random.default_rng(0)
    size = int(np.prod(SHAPE))
    first = jnp.asarray(rng.normal(size=(size, 32)) / size**0.5, jnp.float32)
    second = jnp.asarray(rng.normal(size=(32, CLASSES)), jnp.float32)

    def predict(x):
        hidden = jax.nn.relu(jnp.matmul(x.reshape(len(x), -1), first, precision="highest"))
        return jnp.matmul(hidden, second, precision="highest")

    images = jnp.asarray(np.clip(rng.normal(0.5, 0.5, (24, *SHAPE)), 0, 1), jnp.float32)
    return predict, task_of(images, predict(images).argmax(-1))


def cases(rng, count, size):
    """Draw images with entries at 0 and 1, weights with zeros, and distances from 0 to out of reach."""
    x = np.clip(rng.normal(0.5, 0.5, (count, size)), 0, 1)
    weights = rng.normal(size=(count, size)) * (rng.random((count, size)) < 0.7)
    weights[:3] = [np.zeros(size), np.eye(size)[1], np.ones(size)]
    share = rng.random(count) ** 2
    share[3:6] = [0, 2, 1 - 1e-6]
    sign = rng.choice([-1, 1], count)
    reach = (np.abs(weights) * np.where(weights * sign[:, None] > 0, 1 - x, x)).sum(-1)
    return (np.asarray(a, np.float32) for a in (x, weights, sign * share * reach))


@pytest.mark.parametrize("norm", ball.NORMS)
@pytest.mark.parametrize("size", [2, 60])
def test_projection_fulfils_the_conditions_of_optimality(norm, size):
    x, weights, missing = cases(np.random.default_rng(1), 200, size)
    move = jax.jit(functools.partial(to_hyperplane, norm=norm))(x, weights, missing)
    move = np.asarray(move).astype(float)
    sign = np.sign(missing)[:, None] * np.sign(weights)
    room = np.where(sign > 0, 1 - x, x)
    assert (x + move >= -1e-7).all() and (x + move <= 1 + 1e-7).all()
    assert (move * sign >= 0).all() and (move[weights == 0] == 0).all()

    gained, reach = (weights * move).sum(-1), (np.abs(weights) * room).sum(-1)
    feasible = np.abs(missing) <= reach
    assert feasible.mean() > 0.9 and not feasible.all()
    np.testing.assert_allclose(gained[feasible], missing[feasible], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.abs(move[~feasible]), np.where(sign != 0, room, 0)[~feasible], rtol=1e-6)

    # One multiplier serves all entries: those that stop early do so at the end of the box.
    share = np.abs(move) if norm == "linf" else np.abs(move) / np.where(weights == 0, 1, np.abs(weights))
    multiplier = share.max(-1, keepdims=True)
    stopped_early = (share < multiplier * (1 - 1e-5)) & (weights != 0)
    np.testing.assert_allclose(np.abs(move)[stopped_early], room[stopped_early], atol=1e-6)


@pytest.mark.parametrize("norm", ball.NORMS)
def test_projection_is_the_shortest_move(norm):
    """Search all points of the line inside the box, in two dimensions."""
    x, weights, missing = cases(np.random.default_rng(2), 60, 2)
    move = np.asarray(jax.jit(functools.partial(to_hyperplane, norm=norm))(x, weights, missing))
    for x_i, (a, b), rest, actual in zip(x, weights, missing, move, strict=True):
        if b == 0:
            continue
        first = np.linspace(0, 1, 20001) - x_i[0]
        second = (rest - a * first) / b
        ways = np.stack([first, second], -1)[(x_i[1] + second >= 0) & (x_i[1] + second <= 1)]
        if len(ways):
            order = np.inf if norm == "linf" else 2
            assert np.linalg.norm(actual, order) <= np.linalg.norm(ways, order, axis=-1).min() + 1e-6


def test_projection_does_not_depend_on_the_scale_of_the_gradient():
    rng = np.random.default_rng(4)
    images, x = (jnp.asarray(rng.random((5, *SHAPE)), jnp.float32) for _ in range(2))
    slope, value = jnp.asarray(rng.normal(size=(5, *SHAPE)), jnp.float32), jnp.full(5, -0.3)
    for norm in ball.NORMS:
        step = jax.jit(functools.partial(towards_boundary, norm=norm))
        plain, tiny = step(x, images, value, slope), step(x, images, value * 1e-30, slope * 1e-30)
        np.testing.assert_allclose(tiny, plain, atol=1e-5)


@pytest.mark.parametrize("norm", ball.NORMS)
@pytest.mark.parametrize("num_classes", [2, 4])
def test_distance_to_linear_boundaries_is_found_to_1_percent(norm, num_classes):
    rng = np.random.default_rng(5)
    images = jnp.asarray(rng.uniform(0.4, 0.6, (8, *SHAPE)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(images[0].size, num_classes)), jnp.float32)
    bias = -(0.5 * weights.sum(0))

    def predict(x):
        return jnp.matmul(x.reshape(len(x), -1), weights, precision="highest") + bias

    logits = np.asarray(predict(images))
    task = task_of(images, logits.argmax(-1), num_classes)
    state, _ = drive(Fab(0.0, norm, num_steps=30), predict, task)

    exact = []
    for z, label in zip(logits, logits.argmax(-1), strict=True):
        others = [c for c in range(num_classes) if c != label]
        slopes = np.asarray(weights)[:, others] - np.asarray(weights)[:, [label]]
        exact.append(((z[label] - z[others]) / np.linalg.norm(slopes, 1 if norm == "linf" else 2, axis=0)).min())
    ratio = np.asarray(state.distance) / np.asarray(exact)
    assert (ratio > 1 - 1e-4).all() and (ratio < 1.01).all(), ratio
    assert not state.fooled.any() and state.done.all()  # the radius is 0
    np.testing.assert_array_equal(state.adversarial, images)


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.06), ("l2", 0.3)])
def test_fooled_images_are_misclassified_inside_ball_and_box(net, norm, epsilon):
    predict, task = net
    state, _ = drive(Fab(epsilon, norm, num_steps=20), predict, task, jnp.zeros(24, jnp.int32))
    fooled = np.asarray(state.fooled)
    assert 0.2 < fooled.mean() < 0.9
    assert (np.asarray(predict(state.adversarial).argmax(-1) != task.labels) == fooled).all()
    assert (ball.length(state.adversarial - task.images, norm=norm) <= epsilon).all()
    assert (state.adversarial >= 0).all() and (state.adversarial <= 1).all()
    assert (state.adversarial == task.images)[~fooled].all()


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.06), ("l2", 0.3)])
def test_an_image_does_not_depend_on_its_batch_or_its_first_step(net, norm, epsilon):
    predict, task = net
    attack = Fab(epsilon, norm, num_steps=20)
    zero = jnp.zeros(len(task.labels), jnp.int32)
    whole, steps = drive(attack, predict, task, zero)
    order = np.random.default_rng(6).permutation(len(task.labels))
    turned = drive(attack, predict, jax.tree.map(lambda a: a[order], task), zero + jnp.arange(len(order)) % 3)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[order], b), (whole, steps), turned)
    alone, _ = drive(attack, predict, jax.tree.map(lambda a: a[5:6], task))
    np.testing.assert_allclose(alone.distance, whole.distance[5:6], rtol=1e-3)
    assert alone.fooled == whole.fooled[5:6]


def test_a_misclassified_image_is_settled_by_the_first_evaluation(net):
    predict, task = net
    task = task_of(task.images, (task.labels + 1) % CLASSES)
    state, steps = drive(Fab(0.0), predict, task)
    assert state.fooled.all() and (steps == 1).all() and (state.distance == 0).all()


def test_without_a_useful_gradient_every_target_takes_exactly_its_steps(net):
    """Attack constant models: a gradient of nan, a logit of -inf, and only nan, which counts as fooled."""
    _, task = net
    task = task_of(task.images[:4], np.zeros(4))

    def predict(x):
        x = x.reshape(4, -1)
        kink = jnp.sqrt(jnp.square(x[1] - x[1]).sum())  # 0, whose gradient is nan
        return jnp.eye(4)[jnp.zeros(4, jnp.int32)].at[1].add(kink).at[2, 2].set(-jnp.inf).at[3].set(jnp.nan)

    state, steps = drive(Fab(0.1, "l2", num_steps=5, num_targets=2), predict, task)
    np.testing.assert_array_equal(steps, [2 * (5 + 1)] * 3 + [1])
    np.testing.assert_array_equal(state.fooled, [False] * 3 + [True])
    assert state.done[:3].all()
    assert jnp.isfinite(state.point).all()


def test_a_step_has_the_declared_evaluations_and_a_small_state(net):
    predict, task = net
    calls = []

    def counted(x):
        calls.append(x.shape)
        return predict(x)

    attack = Fab(0.1, num_steps=1000)
    state = jax.eval_shape(attack.init, task)
    after = jax.eval_shape(lambda task, state: attack.step(counted, task, state), task, state)
    assert calls == Fab.evaluations_a_step * [task.images.shape] and after == state
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 3 * task.images.size


def test_float64_images_stay_float64(net):
    predict, task = net
    with jax.enable_x64(True):
        task = task._replace(images=task.images.astype(jnp.float64))

        def narrow(x):
            return predict(x.astype(jnp.float32))

        for norm in ball.NORMS:
            attack = Fab(0.1, norm)
            state = jax.eval_shape(attack.init, task)
            assert state.adversarial.dtype == jnp.float64
            assert jax.eval_shape(lambda *a, attack=attack: attack.step(narrow, *a), task, state) == state


def test_unknown_norms_are_refused(net):
    with pytest.raises(ValueError, match="unknown norm 'l1'"):
        Fab(0.1, "l1").init(net[1])
