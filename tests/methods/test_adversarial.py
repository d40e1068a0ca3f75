"""Adversarial training on a toy network, against its formulas written out in plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax import methods
from ltjax.types import Batch, Outputs, UserError, Variables

COUNTS = np.array([50, 10, 2])
random = np.random.default_rng(0)
IMAGES = jnp.asarray(random.uniform(size=(6, 2, 2, 3)), jnp.float32)
LABELS, PARTNERS = jnp.asarray([0, 1, 2, 0, 0, 1]), jnp.asarray([1, 1, 0, 2, 0, 2])
BATCH = Batch(IMAGES, LABELS)
ATTACK = dict(epsilon=0.1, step_size=0.04, num_steps=4)
RNG = jax.random.key(3)


def some_weights():
    shapes = {"first": (12, 5), "second": (5, 3), "bias": (3,)}
    return {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


PARAMS = {"net": some_weights(), "guide": some_weights()}
STATS = {net: {"mean": jnp.asarray(random.normal(size=5), jnp.float32)} for net in PARAMS}
VARIABLES = Variables(PARAMS, STATS, {})


def network(weights, images, mean=None):
    """Return logits, and the hidden layer's mean, which is subtracted like a batch norm; `mean` replaces it."""
    hidden = images.reshape(len(images), -1) @ weights["first"]
    mean = hidden.mean(0) if mean is None else mean
    return jnp.tanh(hidden - mean) @ weights["second"] + weights["bias"], mean


def remembered(old, new):
    return {"mean": 0.75 * old["mean"] + 0.25 * new}


class Toy:
    """`apply` of the toy network in a stage whose batch norm trains. It records its calls."""

    def __init__(self):
        self.calls = []  # (net, bn, images, weights)

    def __call__(self, variables, images, net="net", bn=None):
        weights, stats = variables.params[net], variables.stats[net]
        self.calls.append((net, bn, images, weights))
        if bn == "eval":
            return Outputs(network(weights, images, stats["mean"])[0], images), variables
        logits, mean = network(weights, images)
        return Outputs(logits, images), variables._replace(stats={**variables.stats, net: remembered(stats, mean)})


def create(name, **settings):
    return methods.create(name, COUNTS, **{"attack": ATTACK, **settings})


def run(method, params=PARAMS, batch=BATCH):
    """Return the toy with its calls, the loss, the variables after it and the metrics."""
    toy = Toy()
    loss, (after, metrics) = method.loss(toy, VARIABLES._replace(params=params), batch, RNG)
    return toy, loss, after, metrics


def value_and_gradient_of(method):
    """Return the loss, its gradient, the parameters after it and the number of calls."""

    def loss_of(params):
        toy, loss, after, _ = run(method, params)
        return loss, (after.params, len(toy.calls))

    (loss, (after, num_calls)), gradient = jax.value_and_grad(loss_of, has_aux=True)(PARAMS)
    return loss, gradient, after, num_calls


def ce(logits, labels=LABELS):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]


def kl(p, q):
    p, q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
    return (jnp.exp(p) * (p - q)).sum(-1)


def climb_cross_entropy(natural, logits):
    return ce(logits)


def climb_divergence(natural, logits):
    return kl(natural, logits)


@functools.cache
def attacked(objective):
    """Run PGD from the papers' start, on the network in evaluation mode."""

    def predict(images):
        return network(PARAMS["net"], images, STATS["net"]["mean"])[0]

    natural = predict(IMAGES)
    x = IMAGES + 0.001 * jax.random.normal(RNG, IMAGES.shape)
    for _ in range(ATTACK["num_steps"]):
        gradient = jax.grad(lambda x: objective(natural, predict(x)).sum())(x)
        x = jnp.clip(x + ATTACK["step_size"] * jnp.sign(gradient), IMAGES - 0.1, IMAGES + 0.1).clip(0, 1)
    return x


# The losses, given adversarial images x.


def net(params, images):
    return network(params["net"], images)[0]


def guide(params):
    return network(params["guide"], IMAGES)[0]


def smoothed(logits):
    """Compute concave label-aware smoothing over all classes: 0.3 for 50 images, 0.1 for 2."""
    amount = jnp.asarray(0.1 + 0.2 * np.sin((COUNTS - 2) * np.pi / 96), jnp.float32)[LABELS][:, None]
    is_label = jax.nn.one_hot(LABELS, 3)
    target = is_label * (1 - amount) + amount / 3
    return -(target * jax.nn.log_softmax(logits)).sum(-1)


def pairing(p, x):
    return ((net(p, x) - guide(p)) ** 2).mean()


LOG_COUNTS = jnp.asarray(np.log(COUNTS), jnp.float32)
LOG_SHARES = jnp.asarray(np.log(COUNTS / COUNTS.sum()), jnp.float32)
BALANCED, SMOOTHING = {"name": "balanced_softmax"}, {"name": "label_aware_smoothing", "head": 0.3, "tail": 0.1}
CE, KL = climb_cross_entropy, climb_divergence
FORMULAS = [
    ("pgd_at", {}, CE, lambda p, x: ce(net(p, x)).mean()),
    ("pgd_at", {"loss": BALANCED}, CE, lambda p, x: ce(net(p, x) + LOG_COUNTS).mean()),
    ("trades", {}, KL, lambda p, x: ce(net(p, IMAGES)).mean() + 6 * kl(net(p, IMAGES), net(p, x)).mean()),
    ("trades", {"beta": 0.0}, KL, lambda p, x: ce(net(p, IMAGES)).mean()),
    (
        "trades",
        {"beta": 2.0, "loss": SMOOTHING},
        KL,
        lambda p, x: smoothed(net(p, IMAGES)).mean() + 2 * kl(net(p, IMAGES), net(p, x)).mean(),
    ),
    (
        "alp",
        {"pairing_weight": 0.3},
        CE,
        lambda p, x: (ce(net(p, IMAGES)) + ce(net(p, x)) + 0.3 * ((net(p, x) - net(p, IMAGES)) ** 2).sum(-1)).mean(),
    ),
    ("lbgat", {}, KL, lambda p, x: pairing(p, x) + ce(guide(p)).mean()),
    (
        "lbgat",
        {"beta": 6.0},
        KL,
        lambda p, x: pairing(p, x) + ce(guide(p)).mean() + 6 * kl(net(p, IMAGES), net(p, x)).mean(),
    ),
    ("lbgat", {"guide_loss": BALANCED}, KL, lambda p, x: pairing(p, x) + ce(guide(p) + LOG_COUNTS).mean()),
    (
        "lbgat",
        {"guide_loss": {"name": "logit_adjusted", "tau": 0.5}},
        KL,
        lambda p, x: pairing(p, x) + ce(guide(p) + 0.5 * LOG_SHARES).mean(),
    ),
]
every_formula = pytest.mark.parametrize(
    "name, settings, objective, formula", FORMULAS, ids=[f"{name}-{settings}" for name, settings, *_ in FORMULAS]
)


def assert_close(actual, expected, rtol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), actual, expected)


@every_formula
def test_loss_and_gradient_are_the_papers_with_the_images_of_its_attack_as_constants(
    name, settings, objective, formula
):
    """Check that no gradient flows through the attack, and that LBGAT's pairing also has a gradient to the guide."""
    loss, gradient, *_ = value_and_gradient_of(create(name, **settings))
    expected, expected_gradient = jax.value_and_grad(formula)(PARAMS, attacked(objective))
    assert_close(loss, expected)
    assert_close(gradient, expected_gradient, rtol=1e-3)


def test_the_pairing_pulls_at_the_guide():
    alone = jax.grad(lambda p: ce(guide(p)).mean())(PARAMS)["guide"]["second"]
    assert np.abs(value_and_gradient_of(create("lbgat"))[1]["guide"]["second"] - alone).max() > 0.01


@pytest.mark.parametrize("beta", [0.0, 6.0])
def test_bgats_guide_is_in_evaluation_mode_and_does_not_change(beta):
    method, x = create("bgat", beta=beta), attacked(climb_divergence)
    target = network(PARAMS["guide"], IMAGES, STATS["guide"]["mean"])[0]
    toy, loss, after, _ = run(method)
    clean, robust = net(PARAMS, IMAGES), net(PARAMS, x)
    assert_close(loss, ((robust - target) ** 2).mean() + beta * kl(clean, robust).mean())
    assert {bn for net, bn, *_ in toy.calls if net == "guide"} == {"eval"}
    assert_close(after.stats["guide"], STATS["guide"], rtol=0)


def test_mixup_attacks_and_trains_on_both_labels():
    mixed = Batch(IMAGES, LABELS, PARTNERS, jnp.float32(0.3))

    def both(logits):
        return 0.3 * ce(logits) + 0.7 * ce(logits, PARTNERS)

    x = attacked(lambda natural, logits: both(logits))
    assert_close(run(create("pgd_at"), batch=mixed)[1], both(net(PARAMS, x)).mean())


def test_mixup_reaches_the_guides_loss():
    mixed = Batch(IMAGES, LABELS, PARTNERS, jnp.float32(0.3))
    expected = 0.3 * ce(guide(PARAMS)) + 0.7 * ce(guide(PARAMS), PARTNERS)
    assert_close(run(create("lbgat"), batch=mixed)[3]["guide_loss"], expected.mean())


# The attack inside a step.

METHODS = ("pgd_at", "trades", "alp", "bgat", "lbgat")
every_method = pytest.mark.parametrize("name", METHODS)


def attacked_pass(toy):
    """Return the images of the pass on adversarial ones."""
    (actual,) = [images for net, bn, images, _ in toy.calls if net == "net" and bn is None and images is not IMAGES]
    return actual


@every_method
@pytest.mark.parametrize("start", ["gaussian", "uniform", "none"])
def test_attacked_images_stay_in_the_ball_and_the_box(name, start):
    attack = dict(epsilon="51/255", step_size=0.15, num_steps=3, start=start, start_scale=0.1)
    actual = attacked_pass(run(create(name, attack=attack))[0])
    assert np.abs(actual - IMAGES).max() == pytest.approx(0.2, abs=1e-6)
    assert actual.min() >= 0 and actual.max() <= 1


def test_an_l2_ball_is_kept():
    attack = dict(epsilon=0.3, step_size=0.2, num_steps=3, norm="l2")
    actual = attacked_pass(run(create("pgd_at", attack=attack))[0])
    lengths = np.sqrt(np.square(actual - IMAGES).sum((1, 2, 3)))
    assert 0.2 < lengths.max() < 0.3 + 1e-6


@every_method
def test_the_attack_uses_evaluation_mode_and_one_clean_prediction(name):
    toy, *_ = run(create(name))
    inside = [images for net, bn, images, _ in toy.calls if net == "net" and bn == "eval"]
    assert len([images for images in inside if images is IMAGES]) == 1
    assert len(inside) == 2  # and the steps of the attack, traced once


PASSES = {
    "pgd_at": ["net attacked"],
    "trades": ["net clean", "net attacked", "net clean"],
    "alp": ["net clean", "net attacked"],
    "bgat": ["net attacked", "net clean"],
    "lbgat": ["net attacked", "net clean", "guide clean"],
}


@every_method
def test_batch_norm_sees_the_passes_in_the_authors_order(name):
    toy, _, after, _ = run(create(name))
    trained = [(net, images) for net, bn, images, _ in toy.calls if bn is None]
    assert [f"{net} {'clean' if images is IMAGES else 'attacked'}" for net, images in trained] == PASSES[name]
    expected = dict(STATS)
    for net, images in trained:
        expected[net] = remembered(expected[net], network(PARAMS[net], images)[1])
    assert_close(after.stats, expected)


@every_method
def test_the_logged_parts_make_up_the_loss(name):
    weights = dict(robust_loss=6.0, pairing_loss=0.5 if name == "alp" else 1.0)
    settings = {} if name in ("pgd_at", "alp") else {"beta": 6.0}
    _, loss, _, parts = run(create(name, **settings))
    if parts:
        np.testing.assert_allclose(sum(weights.get(key, 1.0) * value for key, value in parts.items()), loss, rtol=1e-5)


# Adversarial weight perturbation.


def moved(formula, x, awp=0.05):
    """Move each kernel of the net along the gradient, by a share of its length."""
    gradient = jax.grad(formula)(PARAMS, x)["net"]
    kernels = {
        name: w + awp * jnp.linalg.norm(w) * gradient[name] / jnp.linalg.norm(gradient[name])
        for name, w in PARAMS["net"].items()
        if w.ndim > 1
    }
    return {**PARAMS, "net": {**PARAMS["net"], **kernels}}


@every_formula
def test_awp_takes_the_loss_and_its_gradient_at_moved_kernels(name, settings, objective, formula):
    method, x = create(name, awp=0.05, **settings), attacked(objective)
    moved_params = moved(formula, x)
    loss, gradient, after, _ = value_and_gradient_of(method)
    expected, expected_gradient = jax.value_and_grad(formula)(moved_params, x)
    assert_close(loss, expected, rtol=1e-4)
    assert_close(gradient, expected_gradient, rtol=2e-3)
    assert_close(after, PARAMS, rtol=0)


def test_awp_moves_only_kernels_by_a_share_of_their_norm():
    toy, _, after, _ = run(create("lbgat", beta=6.0, awp=0.05))
    last = {net: weights for net, _, _, weights in toy.calls}
    steps = {net: jax.tree.map(jnp.subtract, last[net], PARAMS[net]) for net in PARAMS}
    for kernel in ("first", "second"):
        share = jnp.linalg.norm(steps["net"][kernel]) / jnp.linalg.norm(PARAMS["net"][kernel])
        np.testing.assert_allclose(share, 0.05, rtol=1e-4)
    assert not steps["net"]["bias"].any()
    assert not any(step.any() for step in steps["guide"].values())
    assert_close(after.stats["guide"], remembered(STATS["guide"], network(PARAMS["guide"], IMAGES)[1]))


@every_method
def test_awp_of_0_changes_nothing(name):
    with_0, without = value_and_gradient_of(create(name, awp=0.0)), value_and_gradient_of(create(name))
    assert_close(with_0[1], without[1], rtol=0)
    assert with_0[3] == without[3]


# Mistakes.

MISTAKES = [
    (dict(attack={"epsilon": 8}), "epsilon = 8: l-inf radii are in [0, 1], as pixels are; did you mean 8/255?"),
    (dict(attack={"epsilon": "some"}), "epsilon = 'some': a number such as 0.031"),
    (dict(attack={"step_size": 2}), "step_size = 2: l-inf radii are in [0, 1], as pixels are; did you mean 2/255?"),
    (dict(attack={"step_size": -0.1}), "step_size = -0.1: "),
    (dict(attack={"start_scale": -0.1}), "start_scale = -0.1: "),
    (dict(attack={"num_steps": 0}), "attack num_steps = 0: a whole number from 1 up"),
    (dict(attack={"start": "corner"}), "unknown start 'corner' of the attack; known: gaussian, uniform, none"),
    (dict(attack={"norm": "l1"}), "unknown norm 'l1'; known: linf, l2"),
    (dict(awp=2), "awp = 2: a share of the weights' length, from 0 to below 1, such as 0.005"),
    (dict(awp=-0.1), "awp = -0.1: "),
]


def test_a_setting_of_the_attack_of_another_type_is_named():
    with pytest.raises(UserError, match=r"attack: num_steps = 2\.5: int expected"):
        create("trades", attack={"num_steps": 2.5})


@every_method
@pytest.mark.parametrize("settings, message", MISTAKES, ids=lambda value: str(value)[:40])
def test_a_wrong_setting_of_the_attack_is_named_with_its_method(name, settings, message):
    with pytest.raises(UserError) as raised:
        create(name, **settings)
    assert str(raised.value).startswith(f"method {name!r}: {message}")


@every_method
def test_an_unknown_setting_of_the_attack_is_named_with_the_known_ones(name):
    with pytest.raises(UserError, match="attack has no setting 'steps'; allowed: epsilon, step_size, num_steps, norm"):
        create(name, attack={"steps": 10})


@pytest.mark.parametrize(
    "name, setting", [("trades", "beta"), ("bgat", "beta"), ("lbgat", "beta"), ("alp", "pairing_weight")]
)
@pytest.mark.parametrize("value", [-1.0, -0.1])
def test_a_weight_below_0_is_named(name, setting, value):
    with pytest.raises(UserError) as raised:
        create(name, **{setting: value})
    assert str(raised.value) == f"method {name!r}: {setting} = {value}: from 0 up"


def test_bgat_has_no_loss_of_labels():
    with pytest.raises(UserError, match="method 'bgat' has no setting 'loss'; allowed: beta, attack, awp"):
        create("bgat", loss=BALANCED)
