import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ltjax.attacks import ball
from ltjax.attacks.slots import Task
from ltjax.attacks.square import HALVINGS, Square, State, eta, grid_of_windows, pyramids, window_sides

CLASSES = 4


def task_of(images, labels):
    keys = jax.random.split(jax.random.key(3), len(labels))
    return Task(jnp.asarray(images), jnp.asarray(labels, jnp.int32), jnp.zeros((len(labels), 1), jnp.int32), keys)


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


@functools.cache
def net_of(shape, num_classes=CLASSES, count=16):
    """Return a random net of two layers, and images that it classifies right, some pixels at 0 and 1."""
    rng = np.random.default_rng(0)
    size = int(np.prod(shape))
    first = jnp.asarray(rng.normal(size=(size, 32)) / size**0.5, jnp.float32)
    second = jnp.asarray(rng.normal(size=(32, num_classes)), jnp.float32)

    def predict(x):
        hidden = jax.nn.relu(jnp.matmul(x.reshape(len(x), -1), first, precision="highest"))
        return jnp.matmul(hidden, second, precision="highest")

    images = jnp.asarray(np.clip(rng.normal(0.5, 0.3, (count, *shape)), 0, 1), jnp.float32)
    return predict, task_of(images, predict(images).argmax(-1))


def test_window_sides_of_32_x_32_images():
    """Compare with shares 0.8, 0.4, ... of 1024 pixels, computed by hand."""
    assert window_sides(32, 32, p_init=0.8, norm="linf") == (29, 20, 14, 10, 7, 5, 4, 3, 2, 1)
    assert window_sides(32, 32, p_init=0.8, norm="l2") == (29, 21, 15, 11, 7, 5, 5, 3, 3, 3)
    assert len(HALVINGS) == 9


@pytest.mark.parametrize("height, width", [(1, 1), (1, 9), (2, 3), (4, 4), (4, 40), (11, 8)])
def test_windows_fit_into_the_image(height, width):
    for p_init in (0.05, 1.0):
        sides = window_sides(height, width, p_init=p_init, norm="linf")
        odd = window_sides(height, width, p_init=p_init, norm="l2")
        assert all(1 <= side <= min(height, width) for side in sides + odd) and all(side % 2 for side in odd)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 12, 29])
def test_eta_is_the_windows_of_the_paper(side):
    """eta_{r,s} = sum_{k=0}^{M} 1 / (n + 1 - k)^2, M = n - max(|r - floor(h1/2) - 1|, |s - floor(h2/2) - 1|)."""
    n = side // 2
    halves = []
    for rows, sign in ((n, 1), (side - n, -1)):
        half = np.zeros((rows, side))
        for r in range(1, rows + 1):
            for s in range(1, side + 1):
                most = n - max(abs(r - rows // 2 - 1), abs(s - side // 2 - 1))
                half[r - 1, s - 1] = sum(1 / (n + 1 - k) ** 2 for k in range(most + 1))
        halves.append(sign * half / max(np.linalg.norm(half), 1e-9))
    wanted = np.concatenate(halves)
    wanted /= np.linalg.norm(wanted)
    pixels, tables = np.arange(side, dtype=np.int32), np.array(pyramids(side, 20), np.float32)
    actual = jax.jit(eta)(pixels[:, None], pixels[None, :], side, tables)
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("height, width, filled", [(32, 32, 900), (4, 6, 24), (13, 11, 120)])
def test_the_l2_start_fills_the_image_with_windows(height, width, filled):
    start = np.asarray(
        jax.jit(grid_of_windows, static_argnums=(1, 2))(jax.random.key(0), (height, width, 2), "float32")
    )
    assert ((start != 0).sum((0, 1)) == filled).all()
    if height == 32:  # a frame of one pixel, and 25 windows of length 1
        assert (start[1:31, 1:31] != 0).all()
        blocks = start[1:31, 1:31].reshape(5, 6, 5, 6, 2)
        np.testing.assert_allclose(np.square(blocks).sum((1, 3)), 1, rtol=1e-5)
        turned = np.abs(blocks[:, :, :, :, 0] - blocks[:1, :, :1, :, 0]).max((1, 3)) > 1e-3
        assert turned.any() and not turned.all()


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.05), ("l2", 0.4)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 2)])
def test_every_step_stays_inside_ball_and_box_and_never_raises_the_margin(norm, epsilon, shape):
    predict, task = net_of(shape)
    attack = Square(epsilon, norm, num_queries=30)

    @jax.jit
    def history(task):  # states after 0, 1, ... 30 steps
        start = attack.init(task)
        _, states = lax.scan(lambda state, _: (attack.step(predict, task, state),) * 2, start, length=30)
        return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), start, states)

    states = jax.tree.map(np.asarray, history(task))
    images, labels = np.asarray(task.images), np.asarray(task.labels)
    lengths = jax.jit(functools.partial(ball.length, norm=norm))
    predicted = jax.jit(lambda x: predict(x).argmax(-1))
    for i in range(31):
        old, state = (jax.tree.map(lambda a, i=i: a[i], states) for i in (max(i - 1, 0), i))
        assert (np.asarray(lengths(state.adversarial - images)) <= epsilon * (1 + 1e-5)).all()
        assert (state.adversarial >= 0).all() and (state.adversarial <= 1).all()
        assert (state.margin <= old.margin)[~state.fooled].all()
        if i:
            wrong = np.asarray(predicted(state.adversarial)) != labels
            assert (wrong == state.fooled).all() and (state.fooled == (state.margin < 0))[state.margin != 0].all()
    assert state.done.all() and (state.query == 30).all()
    assert np.isfinite(state.adversarial).all() and np.isfinite(state.margin).all()


def test_an_linf_proposal_changes_one_square_of_the_schedules_size():
    """Start far from the ball's faces, so that every change can be seen: + or - 2 epsilon, cut off at epsilon."""
    images = jnp.full((256, 32, 32, 2), 0.5)
    queries = jnp.tile(jnp.array([11, 12, 52, 8002], jnp.int32), 64)
    state = State(images, None, None, None, queries)
    change = np.asarray(jax.jit(Square(0.1).proposal)(task_of(images, np.zeros(256)), state) - images)
    for k, side in enumerate((29, 20, 14, 1)):
        places, signs = set(), set()
        for change_of_one in change[k::4]:
            rows, columns = (np.flatnonzero((change_of_one != 0).any(axes)) for axes in ((1, 2), (0, 2)))
            assert len(rows) == len(columns) == rows[-1] - rows[0] + 1 == columns[-1] - columns[0] + 1 == side
            inside = change_of_one[rows[0] : rows[0] + side, columns[0] : columns[0] + side]
            np.testing.assert_allclose(np.abs(inside), 0.1, rtol=1e-5)
            assert (inside == inside[0, 0]).all()
            places.add(int(rows[0]))
            signs.add(tuple(np.sign(inside[0, 0])))
        assert len(signs) == 4 and min(places) >= 0 and max(places) <= 32 - side
        assert side < 29 or places == {0, 1, 2}  # never up to the last row, as in the authors' code


def test_an_l2_proposal_keeps_the_length_and_touches_two_windows():
    rng = np.random.default_rng(7)
    images = jnp.full((32, 16, 16, 3), 0.5)
    delta = rng.normal(size=images.shape)
    delta *= 0.5 / np.sqrt(np.square(delta).sum((1, 2, 3), keepdims=True))
    state = State(images + delta.astype(np.float32), None, None, None, jnp.full(32, 300, jnp.int32))
    before = np.asarray(state.adversarial - images)
    after = np.asarray(jax.jit(Square(0.5, "l2").proposal)(task_of(images, np.zeros(32)), state) - images)
    side = window_sides(16, 16, p_init=0.8, norm="l2")[3]
    np.testing.assert_allclose(np.sqrt(np.square(after).sum((1, 2, 3))), 0.5, rtol=1e-5)
    changed = np.abs(after - before).max(-1) > 1e-4  # more than scaling to the full length changes
    emptied = (np.abs(after) < 1e-6).all(-1)
    assert (changed.sum((1, 2)) <= 2 * side**2).all() and (changed.sum((1, 2)) > side**2 * 0.9).all()
    apart = changed.sum((1, 2)) == 2 * side**2
    assert apart.any() and (emptied.sum((1, 2)) == side**2)[apart].all()
    # mass stays in its channel, as nothing was unused
    np.testing.assert_allclose(np.square(after).sum((1, 2)), np.square(before).sum((1, 2)), rtol=1e-4)


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.1), ("l2", 0.5)])
def test_fooled_images_are_misclassified(norm, epsilon):
    predict, task = net_of((5, 4, 2))
    state, steps = drive(Square(epsilon, norm, num_queries=60), predict, task, jnp.zeros(16, jnp.int32))
    fooled = np.asarray(state.fooled)
    assert 0.2 < fooled.mean() < 1
    assert (np.asarray(predict(state.adversarial).argmax(-1) != task.labels) == fooled).all()
    assert (steps == state.query).all() and (steps[~fooled] == 60).all()


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.1), ("l2", 0.5)])
def test_an_image_does_not_depend_on_its_batch_or_its_first_step(norm, epsilon):
    predict, task = net_of((5, 4, 2))
    attack = Square(epsilon, norm, num_queries=60)
    zero = jnp.zeros(len(task.labels), jnp.int32)
    whole = drive(attack, predict, task, zero)
    order = np.random.default_rng(6).permutation(len(task.labels))
    turned = drive(attack, predict, jax.tree.map(lambda a: a[order], task), zero + 7 * (jnp.arange(len(order)) % 3))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[order], b), whole, turned)


@pytest.mark.parametrize("norm", ball.NORMS)
def test_radius_0_leaves_an_image_alone(norm):
    predict, task = net_of((4, 4, 1), num_classes=2, count=1)
    state, steps = drive(Square(0.0, norm, num_queries=20), predict, task)
    assert not state.fooled.any() and (steps == 20).all()
    np.testing.assert_array_equal(state.adversarial, task.images)


def test_logits_of_nan_or_infinity_end_the_search_in_time():
    _, task = net_of((4, 4, 1), count=3)
    task = task_of(task.images, np.zeros(3))

    def predict(x):  # nan for the first image, which fools, infinity for the others
        bad = jnp.where(jnp.arange(len(x)) == 0, jnp.nan, jnp.inf)
        return jnp.stack([bad, jnp.zeros(len(x))], -1)

    state, steps = drive(Square(0.1, num_queries=5), predict, task)
    np.testing.assert_array_equal(steps, [1, 5, 5])
    np.testing.assert_array_equal(state.fooled, [True, False, False])
    assert jnp.isfinite(state.adversarial).all()


def test_a_step_has_one_evaluation_and_a_small_state():
    predict, task = net_of((4, 4, 3))
    calls = []

    def counted(x):
        calls.append(x.shape)
        return predict(x)

    attack = Square(0.1)
    state = jax.eval_shape(attack.init, task)
    after = jax.eval_shape(lambda task, state: attack.step(counted, task, state), task, state)
    assert calls == [task.images.shape] and after == state
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 2 * task.images.size


def test_float64_images_stay_float64():
    predict, task = net_of((4, 4, 3))
    with jax.enable_x64(True):
        task = task._replace(images=task.images.astype(jnp.float64))

        def narrow(x):
            return predict(x.astype(jnp.float32))

        for norm in ball.NORMS:
            attack = Square(0.1, norm)
            state = jax.eval_shape(attack.init, task)
            assert state.adversarial.dtype == jnp.float64
            assert jax.eval_shape(lambda *a, attack=attack: attack.step(narrow, *a), task, state) == state


def test_unknown_norms_are_refused():
    with pytest.raises(ValueError, match="unknown norm 'l1'"):
        Square(0.1, "l1").init(net_of((4, 4, 1))[1])
