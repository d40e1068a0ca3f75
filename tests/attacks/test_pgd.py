import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ltjax import attacks
from ltjax.attacks import ball, objectives, slots
from ltjax.attacks.pgd import MAX_UNROLLED

CLASSES = 4
KEY = jax.random.key(0, impl="unsafe_rbg")  # of all kinds the fastest to compile
WEIGHTS = np.random.default_rng(0).normal(size=(16, CLASSES)).astype(np.float32)
IMAGES = np.random.default_rng(1).random((8, 4, 4, 1), dtype=np.float32)


def linear(images):
    return jnp.matmul(images.reshape(len(images), -1), WEIGHTS, precision="highest")


LABELS = np.asarray(linear(IMAGES).argmax(-1))


def cross_entropy(images):
    return -jnp.take_along_axis(jax.nn.log_softmax(linear(images)), LABELS[:, None], 1)[:, 0]


def by_hand(start, *, epsilon, step_size, num_steps, norm):
    """Return the attack on cross-entropy of the linear model, in float64."""
    x, images = start.astype(float), IMAGES.astype(float)
    for _ in range(num_steps):
        logits = x.reshape(len(x), -1) @ WEIGHTS
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        slope = ((p - np.eye(CLASSES)[LABELS]) @ WEIGHTS.T).reshape(x.shape)
        if norm == "linf":
            x = np.clip(x + step_size * np.sign(slope), images - epsilon, images + epsilon)
        else:
            x = x + step_size * slope / np.sqrt((slope**2).sum((1, 2, 3), keepdims=True))
            far = np.sqrt(((x - images) ** 2).sum((1, 2, 3), keepdims=True))
            x = images + (x - images) * np.minimum(1, epsilon / far)
        x = np.clip(x, 0, 1)
    return x


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.1), ("l2", 0.7)])
def test_steps_are_those_of_a_loop_by_hand(norm, epsilon):
    start = np.asarray(attacks.random_start(KEY, IMAGES, kind="uniform", scale=epsilon, norm=norm))
    how = dict(epsilon=epsilon, step_size=epsilon / 3, num_steps=7, norm=norm)
    ours = attacks.pgd(IMAGES, start, cross_entropy, **how)
    np.testing.assert_allclose(ours, by_hand(start, **how), atol=1e-5)
    inside, ours = ball.length(ours - IMAGES, norm=norm), np.asarray(ours)
    assert np.all(inside <= epsilon + 1e-6) and (ours >= 0).all() and (ours <= 1).all()


def test_unrolled_and_looped_steps_agree():
    attack = functools.partial(
        attacks.pgd, IMAGES, IMAGES, cross_entropy, epsilon="8/255", step_size="2/255", num_steps=3
    )
    np.testing.assert_allclose(attack(unroll=False), attack(unroll=True), atol=1e-6)


@pytest.mark.parametrize(
    "num_steps, unroll, looped",
    [(MAX_UNROLLED, None, False), (MAX_UNROLLED + 1, None, True), (3, False, True), (30, True, False)],
)
def test_steps_are_unrolled_on_a_cpu_unless_they_are_many(num_steps, unroll, looped):
    how = dict(epsilon=0.1, step_size=0.01, num_steps=num_steps, unroll=unroll)
    inside = jax.make_jaxpr(lambda images: attacks.pgd(images, images, cross_entropy, **how))(IMAGES)
    assert any(name in str(inside) for name in ("while[", "scan[")) == looped


def test_outside_jit_one_step_is_compiled_and_called():
    """Tracing calls the objective once."""
    calls = []

    def objective(x):
        calls.append(x)
        return cross_entropy(x)

    how = dict(epsilon=0.1, step_size=0.01, num_steps=50)
    ours = attacks.pgd(IMAGES, IMAGES, objective, **how)
    assert len(calls) == 1
    np.testing.assert_allclose(ours, attacks.pgd(IMAGES, IMAGES, cross_entropy, **how, unroll=False), atol=1e-6)


def test_restarts_are_unrolled_with_their_steps():
    def attack(images, num_steps=2, **how):
        settings = dict(epsilon=0.1, step_size=0.03, num_steps=num_steps, num_restarts=3)
        return attacks.pgd_attack(linear, images, LABELS, KEY, **settings, **how)

    program = jax.make_jaxpr(functools.partial(attack, num_steps=6))(IMAGES)
    assert "while[" not in str(program).replace("random_bits", "")
    looped = jax.jit(functools.partial(attack, unroll=False))
    np.testing.assert_allclose(jax.jit(attack)(IMAGES), looped(IMAGES), atol=1e-6)


def test_zero_steps_project_the_start_into_the_ball():
    ours = attacks.pgd(IMAGES, IMAGES + 0.5, cross_entropy, epsilon=0.1, step_size=0.1, num_steps=0)
    np.testing.assert_allclose(ours, np.minimum(IMAGES + np.float32(0.1), 1), atol=1e-6)


@pytest.mark.parametrize("num_steps", [0, 3])
def test_the_number_of_steps_may_be_traced(num_steps):
    def attack(num_steps):
        how = dict(epsilon=0.1, step_size=0.05, num_steps=num_steps)
        return attacks.pgd(IMAGES, jnp.asarray(IMAGES + 0.5), cross_entropy, **how)

    np.testing.assert_allclose(jax.jit(attack)(num_steps), attack(num_steps), atol=1e-6)


def test_a_negative_number_of_steps_is_refused():
    with pytest.raises(ValueError, match="num_steps = -1: 0 or more"):
        attacks.pgd(IMAGES, IMAGES, cross_entropy, epsilon=0.1, step_size=0.1, num_steps=-1)


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_a_start_from_float64_images_is_float32_without_x64(kind):
    start = attacks.random_start(KEY, IMAGES.astype(np.float64), kind=kind, scale=0.1)
    assert start.dtype == jnp.float32


def test_integer_images_are_refused():
    with pytest.raises(ValueError, match="images are uint8: give floats"):
        attacks.random_start(KEY, IMAGES.astype(np.uint8))


@pytest.mark.parametrize("norm", ball.NORMS)
def test_a_ball_of_radius_0_is_the_image(norm):
    ours = attacks.pgd_attack(linear, IMAGES, LABELS, KEY, epsilon=0, step_size=0.1, num_steps=2, norm=norm)
    np.testing.assert_array_equal(ours, IMAGES)


def test_pixels_without_a_finite_gradient_stay():
    weights = np.zeros((4, 4, 1), np.float32)
    weights[0], weights[1] = np.nan, 1

    def objective(x):
        return (x * weights).sum((1, 2, 3))

    ours = np.asarray(attacks.pgd(IMAGES, IMAGES, objective, epsilon=0.1, step_size=0.1, num_steps=1))
    np.testing.assert_array_equal(ours[:, [0, 2, 3]], IMAGES[:, [0, 2, 3]])
    np.testing.assert_allclose(ours[:, 1], np.minimum(IMAGES[:, 1] + 0.1, 1), atol=1e-6)


def test_radius_may_be_traced():
    def attack(epsilon):
        how = dict(epsilon=epsilon, step_size=epsilon / 4, num_steps=3, start="uniform")
        return attacks.pgd_attack(linear, IMAGES, LABELS, KEY, **how)

    np.testing.assert_allclose(jax.jit(attack)(0.1), attack(0.1), atol=1e-6)


def test_eight_devices_give_the_images_of_one():
    sharding = NamedSharding(slots.make_mesh(), PartitionSpec(slots.BATCH_AXIS))
    attack = jax.jit(
        functools.partial(attacks.pgd_attack, linear, rng=KEY, epsilon=0.1, step_size=0.03, num_steps=2, num_restarts=2)
    )
    spread = attack(jax.device_put(IMAGES, sharding), jax.device_put(LABELS, sharding))
    assert len(spread.sharding.device_set) == 8
    np.testing.assert_allclose(spread, attack(IMAGES, LABELS), atol=1e-6)


def test_start_none_is_the_images():
    assert attacks.random_start(KEY, IMAGES, kind="none") is IMAGES


def test_start_gaussian_is_neither_projected_nor_clipped():
    images = np.zeros((4, 16, 16, 1), np.float32)
    noise = np.asarray(attacks.random_start(KEY, images, scale="1/1000")) * 1000
    assert abs(noise.std() - 1) < 0.1 and abs(noise.mean()) < 0.1 and (noise < 0).any()


def test_start_uniform_fills_the_linf_ball():
    images = np.full((4, 16, 16, 1), 0.5, np.float32)
    noise = np.asarray(attacks.random_start(KEY, images, kind="uniform", scale=0.1)) - 0.5
    assert 0.098 < np.abs(noise).max() <= 0.1 + 1e-6
    assert abs(noise.std() - 0.2 / math.sqrt(12)) < 0.003


def test_start_uniform_fills_the_l2_ball_by_volume():
    """Half of the volume of a ball in 2 dimensions lies within 0.5 ** (1 / 2) of its radius."""
    images = np.full((2000, 2, 1, 1), 0.5, np.float32)
    start = jax.jit(functools.partial(attacks.random_start, kind="uniform", scale=0.1, norm="l2"))
    far = np.linalg.norm(np.asarray(start(KEY, images)) - 0.5, axis=(1, 2))[:, 0]
    assert far.max() <= 0.1 + 1e-6
    assert abs((far < 0.1 * 0.5**0.5).mean() - 0.5) < 0.05


@pytest.mark.parametrize("kind", attacks.STARTS)
def test_a_start_depends_only_on_its_key(kind):
    keys = [jax.random.key(number, impl="unsafe_rbg") for number in (0, 0, 1)]
    first, same, other = (attacks.random_start(key, IMAGES, kind=kind, scale=0.1) for key in keys)
    np.testing.assert_array_equal(first, same)
    assert (kind == "none") == bool((first == other).all())


@pytest.mark.parametrize("name", ["ce", "kl", "cw"])
def test_every_objective_rises(name):
    def value(images):
        if name == "kl":
            return objectives.kl(linear(images), linear(IMAGES))
        return {"ce": cross_entropy, "cw": lambda x: objectives.margin(linear(x), LABELS)}[name](images)

    ours = attacks.pgd_attack(linear, IMAGES, LABELS, KEY, epsilon=0.3, step_size=0.1, num_steps=10, objective=name)
    assert (value(ours) > value(IMAGES) + 0.1).all()


def test_restarts_keep_a_fooling_image_or_else_the_highest_loss():
    """With no steps, an attempt is its start, so the attempts can be compared."""
    how = dict(epsilon=0.2, step_size=0.1, num_steps=0)
    ours = attacks.pgd_attack(linear, IMAGES, LABELS, KEY, **how, num_restarts=6)

    @jax.jit
    def attempts():
        keys = jax.random.split(KEY, 6)
        tried = jnp.stack([attacks.random_start(key, IMAGES, kind="uniform", scale=0.2) for key in keys])
        logits = jax.vmap(linear)(tried)  # [6, B, C]
        return tried, logits.argmax(-1) != LABELS, jax.vmap(objectives.log_odds, (0, None))(logits, LABELS)

    tried, fooled, reached = map(np.asarray, attempts())
    wanted = np.where(fooled.any(0), np.where(fooled, reached, -np.inf).argmax(0), reached.argmax(0))
    np.testing.assert_allclose(ours, tried[wanted, np.arange(len(IMAGES))], atol=1e-6)


def test_a_batch_of_one():
    ours = attacks.pgd_attack(linear, IMAGES[:1], LABELS[:1], KEY, epsilon=0.1, step_size=0.1, num_steps=2)
    assert ours.shape == (1, 4, 4, 1)


def test_integer_labels_of_any_width():
    attack = functools.partial(attacks.pgd_attack, linear, IMAGES, rng=KEY, epsilon=0.1, step_size=0.1, num_restarts=2)
    np.testing.assert_array_equal(attack(labels=LABELS.astype(np.uint8)), attack(labels=LABELS))


LOGITS = np.array([[2.0, -1, 0.5, 1], [0, 3, 0.2, -2], [1, 1, 1, 0]], np.float32)
OWN = np.array([0, 0, 2], np.int32)
log_odds, margin, dlr, dlr_targeted = map(
    jax.jit, (objectives.log_odds, objectives.margin, objectives.dlr, objectives.dlr_targeted)
)


def test_log_odds_are_those_of_the_softmax():
    p = np.asarray(jax.nn.softmax(LOGITS))[np.arange(3), OWN]
    np.testing.assert_allclose(log_odds(LOGITS, OWN), np.log((1 - p) / p), rtol=1e-5)


def test_softplus_of_log_odds_is_cross_entropy():
    wanted = -np.asarray(jax.nn.log_softmax(LOGITS))[np.arange(3), OWN]
    np.testing.assert_allclose(jax.nn.softplus(log_odds(LOGITS, OWN)), wanted, rtol=1e-5)


def test_margin_by_hand():
    np.testing.assert_allclose(margin(LOGITS, OWN), [-1, 3, 0], atol=1e-6)


def test_dlr_by_hand():
    """Logits in order: 2, 1, 0.5; 3, 0.2, 0; the third has its three largest equal, so that the margin 0 remains 0."""
    np.testing.assert_allclose(dlr(LOGITS, OWN), [-1 / 1.5, 3 / 3, 0], atol=1e-6)


def test_targeted_dlr_by_hand():
    """Target 1: (-1 - 2) / (2 - (0.5 - 1) / 2); (3 - 0) / (3 - (0 - 2) / 2); (1 - 1) / (1 - (1 + 0) / 2)."""
    ours = dlr_targeted(LOGITS, OWN, np.full(3, 1, np.int32))
    np.testing.assert_allclose(ours, [-3 / 2.25, 3 / 4, 0], atol=1e-6)


def test_targeted_dlr_of_three_classes_and_of_two():
    labels, targets = np.array([0], np.int32), np.array([1], np.int32)
    three, two = np.array([[2.0, 1, -1]], np.float32), np.array([[2.0, 1]], np.float32)
    np.testing.assert_allclose(dlr_targeted(three, labels, targets), [-1 / 3], atol=1e-6)
    np.testing.assert_allclose(dlr_targeted(two, labels, targets), [-1], atol=1e-6)
    np.testing.assert_allclose(dlr(two, labels), [-1], atol=1e-6)


@pytest.mark.parametrize("name", ["log_odds", "margin", "dlr", "dlr_targeted"])
@pytest.mark.parametrize("num_classes", [2, 3, 4])
def test_saturating_logits_have_finite_gradients(name, num_classes):
    """Cross-entropy and its gradient are 0 in float32 for these logits."""
    logits = np.array([[1e4, -1e4, 0, 5e3], [1e4, 9e3, 2, 1]], np.float32)[:, :num_classes]
    zeros, ones = np.zeros(2, np.int32), np.ones(2, np.int32)
    arguments = (zeros, ones) if name == "dlr_targeted" else (zeros,)

    @jax.jit
    def value_and_slope(logits):
        value, pull = jax.vjp(lambda z: getattr(objectives, name)(z, *arguments), logits)
        return value, pull(jnp.ones_like(value))[0]

    value, slope = value_and_slope(logits)
    assert np.isfinite(value).all() and np.isfinite(slope).all()
    assert name.startswith("dlr") or (np.abs(slope).max(1) > 0.5).all()


def test_logits_with_a_nan_do_not_predict_the_label():
    logits = jnp.asarray([[jnp.nan, 0], [1, 0], [0, 1]], jnp.float32)
    np.testing.assert_array_equal(objectives.fooled(logits, jnp.zeros(3, jnp.int32)), [True, False, True])


@pytest.mark.parametrize(
    "text, number", [("8/255", 8 / 255), ("0.5", 0.5), (" 1 / 255", 1 / 255), ("2.5/255", 2.5 / 255), (0, 0), (1, 1)]
)
def test_radii_as_numbers_and_fractions(text, number):
    assert attacks.radius(text) == pytest.approx(number)


@pytest.mark.parametrize("wrong", [8, "8", np.float32(8), jnp.float32(8)])
def test_a_radius_in_255ths_is_refused_with_a_hint(wrong):
    with pytest.raises(ValueError, match=r"epsilon = 8.*did you mean 8/255"):
        attacks.pgd(IMAGES, IMAGES, cross_entropy, epsilon=wrong, step_size=0.1, num_steps=1)
    with pytest.raises(ValueError, match=r"epsilon = 8.*did you mean 8/255"):
        attacks.pgd_attack(linear, IMAGES, LABELS, KEY, epsilon=wrong, step_size=0.1)


def test_an_l2_radius_may_exceed_1():
    assert attacks.radius(3, norm="l2") == 3


@pytest.mark.parametrize("wrong", [-0.1, math.nan, math.inf, "a lot", "1/0", "8/", "1/2/3", None])
def test_an_invalid_radius_is_refused(wrong):
    with pytest.raises(ValueError, match="epsilon"):
        attacks.radius(wrong)


@pytest.mark.parametrize(
    "images, message",
    [
        (IMAGES * 255, "images run from .* to 25.*divide by 255"),
        (IMAGES - 0.5, "images run from -0.* undo the normalisation"),
        (IMAGES.astype(np.uint8), "images are uint8.*255"),
        (np.where(IMAGES > 0.5, np.nan, IMAGES), "images run from nan"),
    ],
)
def test_images_outside_the_box_are_named_by_their_range(images, message):
    with pytest.raises(ValueError, match=message):
        attacks.pgd(images, images, cross_entropy, epsilon=0.1, step_size=0.1, num_steps=1)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(norm="l1"), "unknown norm 'l1'; known: linf, l2"),
        (dict(objective="mse"), "unknown objective 'mse'"),
        (dict(start="zero"), "unknown start 'zero'"),
        (dict(num_restarts=0), "num_restarts = 0"),
        (dict(step_size=-1), "step_size = -1"),
        (dict(start="gaussian", start_scale="much"), "scale = 'much'"),
    ],
)
def test_errors_name_what_is_wrong(changes, message):
    how = dict(epsilon=0.1, step_size=0.1, num_steps=1)
    with pytest.raises(ValueError, match=message):
        attacks.pgd_attack(linear, IMAGES, LABELS, KEY, **{**how, **changes})
