"""Losses by name: their mean over a batch, with class weights and mixup, and mistakes in their settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax import losses, methods
from ltjax.methods import criteria
from ltjax.types import Batch, Outputs, UserError, Variables

COUNTS = np.array([100, 40, 10, 5])
NEEDED = {"label_aware_smoothing": {"head": 0.4, "tail": 0.1}}  # settings without a default
WEIGHTS = [{"kind": "count"}, {"kind": "effective_number", "beta": 0.99}]
each_criterion = pytest.mark.parametrize("name", criteria.CRITERIA)

random = np.random.default_rng(0)
LOGITS = jnp.asarray(random.normal(0, 2, (12, 4)), jnp.float32)
LABELS, PARTNERS = (jnp.asarray(random.integers(0, 4, 12), jnp.int32) for _ in range(2))


def batch(labels=LABELS, **mixup):
    return Batch(jnp.zeros((12, 2, 2, 3)), labels, **mixup)


def create(name, **settings):
    return criteria.create(COUNTS, {"name": name, **NEEDED.get(name, {}), **settings})


@each_criterion
def test_every_loss_and_its_gradient_are_finite(name):
    value, gradient = jax.value_and_grad(create(name))(LOGITS, batch())
    assert value > 0 and np.isfinite(value)
    assert np.isfinite(gradient).all() and np.any(gradient)


KERNELS = {
    "cross_entropy": ({}, losses.cross_entropy),
    "focal": ({"gamma": 1.5}, lambda z, y: losses.focal(z, y, gamma=1.5)),
    "balanced_softmax": ({}, lambda z, y: losses.balanced_softmax(z, y, class_counts=COUNTS)),
    "logit_adjusted": ({"tau": 0.7}, lambda z, y: losses.logit_adjusted(z, y, class_counts=COUNTS, tau=0.7)),
    "ldam": (
        {"max_margin": 0.3, "scale": 20.0},
        lambda z, y: losses.ldam(z, y, class_counts=COUNTS, max_margin=0.3, scale=20.0),
    ),
    "label_aware_smoothing": (
        {"head": 0.3, "tail": 0.1, "shape": "exp", "power": 2.0},
        lambda z, y: losses.label_aware_smoothing(
            z, y, smoothing=losses.smoothing_by_count(COUNTS, head=0.3, tail=0.1, shape="exp", power=2.0)
        ),
    ),
}


@each_criterion
def test_a_name_and_its_settings_give_the_mean_of_that_kernel(name):
    settings, kernel = KERNELS[name]
    ours = create(name, **settings)(LOGITS, batch())
    np.testing.assert_allclose(ours, kernel(LOGITS, LABELS).mean(), rtol=1e-6)


def expected_weights(kind, beta=None):
    if kind == "count":
        return COUNTS / COUNTS.max()
    weights = (1 - beta) / (1 - beta**COUNTS)
    return weights / weights.mean()


@pytest.mark.parametrize("weighting", WEIGHTS, ids=lambda w: w["kind"])
@each_criterion
def test_class_weights_are_pytorchs_weighted_mean(name, weighting):
    """`reduction="mean"` with `weight`: sum of w l over sum of w, over the batch."""
    one_each = [float(create(name)(LOGITS[i : i + 1], batch(LABELS[i : i + 1]))) for i in range(len(LABELS))]
    weights = expected_weights(**weighting)[np.asarray(LABELS)]
    ours = create(name, class_weights=weighting)(LOGITS, batch())
    np.testing.assert_allclose(ours, (weights * one_each).sum() / weights.sum(), rtol=1e-5)


@pytest.mark.parametrize("weighting", [None, *WEIGHTS], ids=lambda w: w["kind"] if w else "unweighted")
@each_criterion
def test_mixup_combines_the_losses_of_both_labels(name, weighting):
    criterion = create(name, class_weights=weighting)
    labels, partners = criterion(LOGITS, batch()), criterion(LOGITS, batch(PARTNERS))
    mixed = criterion(LOGITS, batch(partner_labels=PARTNERS, lam=jnp.float32(0.3)))
    np.testing.assert_allclose(mixed, 0.3 * labels + 0.7 * partners, rtol=1e-5)


@pytest.mark.parametrize("name, settings", [("erm", {}), ("mislas", {"head": 0.4, "tail": 0.1})])
def test_methods_of_one_loss_take_it_from_the_logits(name, settings):
    criterion = create({"erm": "cross_entropy", "mislas": "label_aware_smoothing"}[name])

    def apply(variables, images, net="net"):
        return Outputs(LOGITS, jnp.zeros((12, 3))), variables

    method = methods.create(name, COUNTS, **settings)
    loss, _ = method.loss(apply, Variables({}, {}, {}), batch(), jax.random.key(0))
    np.testing.assert_allclose(loss, criterion(LOGITS, batch()), rtol=1e-6)


MISTAKES = [
    (
        {"name": "hinge"},
        "unknown loss 'hinge'; known: cross_entropy, focal, balanced_softmax, logit_adjusted, ldam, "
        "label_aware_smoothing",
    ),
    ({"name": "focal", "tau": 1.0}, "loss 'focal' has no setting 'tau'; allowed: gamma"),
    (
        {"name": "label_aware_smoothing", "head": 0.4},
        "loss 'label_aware_smoothing' needs the setting 'tail'; allowed: head, tail, shape, power",
    ),
    (
        {"name": "label_aware_smoothing", "head": 1.4, "tail": 0.1},
        "method 'erm': smoothing head = 1.4: a share of the label, from 0 to 1",
    ),
    ({"class_weights": {"kind": "inverse"}}, "unknown class weights 'inverse'; known: effective_number, count"),
    ({"class_weights": {"beta": 0.9}}, "class_weights = {'beta': 0.9}: needs a kind, effective_number or count"),
    ({"class_weights": "count"}, "class_weights = 'count': needs a kind, effective_number or count"),
    ({"class_weights": {"kind": "count", "power": 2}}, "class_weights has no setting 'power'; allowed: kind, beta"),
    (
        {"class_weights": {"kind": "effective_number", "beta": 1.0}},
        "method 'erm': effective number beta = 1.0: from 0 up to, not including, 1",
    ),
    ("focal", "method 'erm': loss = 'focal': needs settings, such as {'name': 'focal'}"),
]


@pytest.mark.parametrize("loss, message", MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_one_line_with_the_allowed_values(loss, message):
    with pytest.raises(UserError) as raised:
        methods.create("erm", COUNTS, loss=loss)
    assert str(raised.value) == message


def test_an_unknown_method_names_the_known_ones():
    with pytest.raises(UserError, match="unknown method 'sgd'; known: erm, mislas, drolt, reslt"):
        methods.create("sgd", COUNTS)
