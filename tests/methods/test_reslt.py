"""ResLT as a method: the classes of its branches, mixup, and mistakes in its settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax import losses, methods, models
from ltjax.engine import stage
from ltjax.types import Batch, Outputs, UserError, Variables

COUNTS = np.array([5, 80, 20, 1, 40])  # by rank: classes 1, 4, 2, 0, 3
random = np.random.default_rng(0)
LOGITS = random.normal(0, 2, (3, 10, 5)).astype(np.float32)  # [R, B, C]
LABELS, PARTNERS = (random.integers(0, 5, 10) for _ in range(2))


def loss_of(method, num_branches, *, labels=LABELS, **mixup):
    def apply(variables, images):
        branches = jnp.asarray(LOGITS[:num_branches])
        return Outputs(branches.sum(0), jnp.zeros((10, 2)), branches), variables

    batch = Batch(jnp.zeros((10, 2, 2, 3)), jnp.asarray(labels, jnp.int32), **mixup)
    return method.loss(apply, Variables({}, {}, {}), batch, jax.random.key(0))[0]


def cross_entropy(logits, labels):
    logits = np.float64(logits)
    return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, labels[:, None], -1)[:, 0]


def expected_loss(responsible, beta):
    """responsible: the classes of each branch."""
    pairs = [np.isin(LABELS, classes) for classes in responsible]
    branch = sum(cross_entropy(LOGITS[r], LABELS)[member].sum() for r, member in enumerate(pairs)) / np.sum(pairs)
    fused = cross_entropy(LOGITS[: len(responsible)].sum(0), LABELS).mean()
    return beta * branch + (1 - beta) * fused


BRANCHES = [
    (dict(medium_start=1, tail_start=3), [[0, 1, 2, 3, 4], [0, 2, 3, 4], [0, 3]]),
    (dict(medium_start=2), [[0, 1, 2, 3, 4], [0, 2, 3]]),
    (dict(medium_start=2, tail_start=None), [[0, 1, 2, 3, 4], [0, 2, 3]]),
]


@pytest.mark.parametrize("beta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("starts, responsible", BRANCHES, ids=["three", "two", "two, none given"])
def test_branches_cover_all_then_medium_and_tail_then_tail(starts, responsible, beta):
    method = methods.create("reslt", COUNTS, beta=beta, **starts)
    ours = loss_of(method, len(responsible))
    np.testing.assert_allclose(ours, expected_loss(responsible, beta), rtol=1e-5)


def test_mixup_combines_the_losses_of_both_labels():
    method = methods.create("reslt", COUNTS, beta=0.7, medium_start=1, tail_start=3)
    mixed = loss_of(method, 3, partner_labels=jnp.asarray(PARTNERS, jnp.int32), lam=jnp.float32(0.3))
    expected = 0.3 * loss_of(method, 3) + 0.7 * loss_of(method, 3, labels=PARTNERS)
    np.testing.assert_allclose(mixed, expected, rtol=1e-5)


MISTAKES = [
    (dict(beta=1.2, medium_start=1), "method 'reslt': beta = 1.2: from 0 to 1"),
    (dict(beta=-0.1, medium_start=1), "method 'reslt': beta = -0.1: from 0 to 1"),
    *(
        (
            dict(beta=0.9, medium_start=medium, tail_start=tail),
            f"method 'reslt': medium_start = {medium}, tail_start = {tail}: "
            "whole ranks from 1 to 5, the number of classes, or shares of them below 1, in this order",
        )
        for medium, tail in ((3, 2), (0, 2), (2, 6), (6, None), (2.5, 3), (1, 3.5))
    ),
    (dict(beta=0.9), "method 'reslt' needs the setting 'medium_start'; allowed: medium_start, tail_start, beta"),
]


@pytest.mark.parametrize("settings, message", MISTAKES, ids=lambda value: str(value)[:60])
def test_a_mistake_is_one_line_with_the_allowed_values(settings, message):
    with pytest.raises(UserError) as raised:
        methods.create("reslt", COUNTS, **settings)
    assert str(raised.value) == message


@pytest.mark.parametrize("have, starts, wanted", [(0, dict(tail_start=3), "2 or 3"), (3, {}, "2, or a tail_start")])
def test_a_network_with_other_branches_is_refused(have, starts, wanted):
    net = models.create("resnet_cifar", 5, depth=8, width=4, branches=have)
    method = methods.create("reslt", COUNTS, beta=0.9, medium_start=1, **starts)

    def loss():
        variables = stage.random_variables({"net": net}, (8, 8, 3), jax.random.key(0))
        batch = Batch(jnp.zeros((2, 8, 8, 3)), jnp.zeros(2, jnp.int32))
        return method.loss(stage.make_apply({"net": net}, "train"), variables, batch, jax.random.key(0))

    with pytest.raises(UserError) as raised:
        jax.eval_shape(loss)
    assert str(raised.value) == f"method 'reslt' needs model.branches = {wanted}; it is {have}"


def test_two_branches_ignore_tail_start(variables_of):
    """`tail_start` of a config for three branches may stay."""
    net = models.create("resnet_cifar", 5, depth=8, width=4, branches=2)
    images, labels = np.random.default_rng(1).random((4, 8, 8, 3), np.float32), np.array([0, 1, 3, 4])
    apply = stage.make_apply({"net": net}, "eval")

    @jax.jit
    def actual_and_expected(variables, batch):
        actual = []
        for settings in ({}, {"tail_start": 3}):
            method = methods.create("reslt", COUNTS, beta=0.9, medium_start=1, **settings)
            actual.append(method.loss(apply, variables, batch, None)[0])
        outputs, _ = apply(variables, batch.images)
        masks = losses.branch_masks(COUNTS, medium_start=1, tail_start=5)[:2]
        return actual, losses.residual_fusion(outputs.branches, batch.labels, masks=masks, beta=0.9)

    actual, expected = actual_and_expected(variables_of(net), Batch(images, labels))
    np.testing.assert_allclose(actual, [expected] * 2, rtol=1e-6)
