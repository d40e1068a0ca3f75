"""Schedules against the authors' formulas, parameter groups, and SGD against PyTorch's, written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax import optim
from ltjax.types import UserError

CIFAR_STEPS = dict(kind="step", warmup=5 / 200, decay_at=(0.8, 0.9), decay=0.1)
PATHS = ["net/backbone/conv/kernel", "net/backbone/norm/scale", "net/classifier/kernel", "net/logit_scale"]


def authors_cifar_rate(lr, epoch):
    """MiSLAS's `adjust_learning_rate`, epochs counted from 0."""
    epoch = epoch + 1
    if epoch <= 5:
        return lr * epoch / 5
    if epoch > 180:
        return lr * 0.01
    if epoch > 160:
        return lr * 0.1
    return lr


def test_cifar_schedule_is_the_authors():
    ours = 0.1 * optim.schedule_table(200, **CIFAR_STEPS)
    np.testing.assert_allclose(ours, [authors_cifar_rate(0.1, epoch) for epoch in range(200)], rtol=1e-12)


def test_cosine_schedule_is_the_authors():
    ours = 0.1 * optim.schedule_table(10, kind="cosine")
    np.testing.assert_allclose(ours, [0.1 * 0.5 * (1 + np.cos(np.pi * e / 10)) for e in range(10)], rtol=1e-12)


@pytest.mark.parametrize("epochs", [20, 100, 400])
def test_another_number_of_epochs_keeps_the_shape(epochs):
    factors = optim.schedule_table(epochs, **CIFAR_STEPS)
    changes = [e for e in range(1, epochs) if factors[e] < factors[e - 1]]
    assert changes == [round(0.8 * epochs), round(0.9 * epochs)]
    np.testing.assert_allclose(factors[[-1, changes[0] - 1]], [0.01, 1.0])
    assert factors[0] == pytest.approx(1 / max(round(epochs / 40), 1))


def test_constant_schedule_never_changes():
    np.testing.assert_array_equal(optim.schedule_table(4, kind="constant"), np.ones(4))


def test_a_cosine_begins_in_the_last_epoch_of_the_warmup():
    """ResLT on ImageNet-LT: 5 epochs, then cos(pi (e - 4) / 176) of 180."""
    actual = optim.schedule_table(180, kind="cosine", warmup=5 / 180)
    after = (1 + np.cos(np.pi * np.arange(176) / 176)) / 2
    np.testing.assert_allclose(actual, [0.2, 0.4, 0.6, 0.8, *after])


@pytest.mark.parametrize("kind", optim.SCHEDULES)
def test_one_epoch_is_enough_for_every_schedule(kind):
    assert optim.schedule_table(1, kind=kind, warmup=0.025, decay_at=(0.8, 0.9)).tolist() == [1.0]


def test_unknown_schedule_names_the_known_ones():
    with pytest.raises(UserError, match="unknown schedule 'exponential'; known: constant, step, cosine"):
        optim.schedule_table(10, kind="exponential")


@pytest.mark.parametrize("kind", optim.SCHEDULES)
def test_no_epochs_have_no_factors(kind):
    """For a stage with only surgery."""
    assert optim.schedule_table(0, kind=kind, warmup=0.025, warmup_start=0.5, decay_at=(0.8, 0.9)).shape == (0,)


def test_less_than_no_epochs_are_an_error():
    with pytest.raises(UserError, match="epochs = -1: a stage cannot have less than none"):
        optim.schedule_table(-1, kind="constant")


def torch_linear_lr(epoch, start_factor, total_iters):
    """`torch.optim.lr_scheduler.LinearLR`'s closed form, with its end factor of 1."""
    return start_factor + (1 - start_factor) * min(epoch, total_iters) / total_iters


def test_a_start_of_the_warmup_is_pytorchs_linear_lr():
    factors = optim.schedule_table(200, **CIFAR_STEPS, warmup_start=1 / 3)
    expected = [torch_linear_lr(epoch, 1 / 3, 4) for epoch in range(160)]
    np.testing.assert_allclose(factors[:160], expected, rtol=1e-12)


def test_one_epoch_of_warmup_has_its_start_alone():
    factors = optim.schedule_table(100, kind="step", warmup=0.01, warmup_start=0.2)
    np.testing.assert_allclose(factors, [0.2, *[1.0] * 99])


def test_a_start_of_the_warmup_changes_nothing_after_it():
    with_start = optim.schedule_table(200, **CIFAR_STEPS, warmup_start=1 / 3)
    np.testing.assert_array_equal(with_start[5:], optim.schedule_table(200, **CIFAR_STEPS)[5:])


def test_a_warmup_that_starts_at_1_is_none():
    steps = dict(kind="step", decay_at=(0.5,))
    np.testing.assert_array_equal(
        optim.schedule_table(10, **steps, warmup=0.4, warmup_start=1.0), optim.schedule_table(10, **steps)
    )


@pytest.mark.parametrize("start", [-0.1, 1.5])
def test_a_start_of_the_warmup_is_a_factor(start):
    with pytest.raises(UserError, match=f"schedule warmup_start = {start}: a factor on the learning rate, from 0 to 1"):
        optim.schedule_table(10, kind="step", warmup=0.2, warmup_start=start)


@pytest.mark.parametrize("shares", [dict(warmup=5), dict(decay_at=(160, 180)), dict(warmup=-0.1)])
def test_epochs_in_place_of_shares_are_an_error(shares):
    with pytest.raises(UserError, match="shares of the run, from 0 to 1, not epochs"):
        optim.schedule_table(200, kind="step", **shares)


def test_every_parameter_gets_its_group():
    groups = {"body": {"match": "net/backbone/.*"}, "head": {"match": "net/(classifier/.*|logit_scale)"}}
    assert optim.assign_groups(PATHS, groups) == dict(zip(PATHS, ["body", "body", "head", "head"], strict=True))


def test_a_pattern_is_for_the_whole_path():
    with pytest.raises(UserError, match="no parameter group"):
        optim.assign_groups(PATHS, {"all": {"match": "net/"}})


def test_a_parameter_without_a_group_is_named_with_the_groups_and_roots():
    message = (
        "no parameter group of ['body'] matches 'net/classifier/kernel': every parameter must match exactly one; "
        "paths begin with ['net/backbone', 'net/classifier', 'net/logit_scale']"
    )
    with pytest.raises(UserError) as raised:
        optim.assign_groups(PATHS, {"body": {"match": "net/backbone/.*"}})
    assert str(raised.value) == message


def test_a_parameter_with_two_groups_is_named_with_both():
    groups = {"all": {"match": ".*"}, "scales": {"match": ".*scale"}}
    with pytest.raises(UserError, match=r"groups \['all', 'scales'\] all match 'net/backbone/norm/scale': "):
        optim.assign_groups(PATHS, groups)


def test_a_group_without_a_parameter_is_named():
    groups = {"all": {"match": ".*"}, "head": {"match": "net/fc/.*"}}
    with pytest.raises(UserError, match=r"parameter groups \['head'\] match no parameter; paths begin with \['net"):
        optim.assign_groups(PATHS, groups)


def test_an_optional_group_may_match_nothing():
    groups = {"all": {"match": "net/.*"}, "margins": {"match": "method/margins", "optional": True}}
    assert set(optim.assign_groups(PATHS, groups).values()) == {"all"}


def test_an_optional_group_has_its_matches():
    groups = {"all": {"match": "net/.*"}, "margins": {"match": "method/margins", "optional": True}}
    assert optim.assign_groups([*PATHS, "method/margins"], groups)["method/margins"] == "margins"


def test_a_group_that_is_not_optional_has_to_match():
    groups = {"all": {"match": "net/.*"}, "margins": {"match": "method/margins", "optional": False}}
    with pytest.raises(UserError, match=r"parameter groups \['margins'\] match no parameter"):
        optim.assign_groups(PATHS, groups)


def test_an_optional_group_may_not_share_a_parameter():
    groups = {"all": {"match": ".*"}, "scale": {"match": "net/logit_scale", "optional": True}}
    with pytest.raises(UserError, match=r"groups \['all', 'scale'\] all match 'net/logit_scale'"):
        optim.assign_groups(PATHS, groups)


def test_flatten_and_unflatten_are_inverse():
    params = {"net": {"classifier": {"kernel": np.ones(2)}, "logit_scale": np.zeros(3)}}
    flat = optim.flatten(params)
    assert list(flat) == ["net/classifier/kernel", "net/logit_scale"]
    jax.tree.map(np.testing.assert_array_equal, optim.unflatten(flat), params)


class TorchSGD:
    """`torch.optim.SGD` with one momentum buffer a parameter, float64."""

    def __init__(self, momentum, nesterov, weight_decay):
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay
        self.buffers = {}

    def step(self, params, gradients, rates, decays):
        moved = {}
        for name, value in params.items():
            gradient = gradients[name] + decays.get(name, self.weight_decay) * value
            if name in self.buffers:
                self.buffers[name] = self.momentum * self.buffers[name] + gradient
            else:
                self.buffers[name] = gradient
            direction = gradient + self.momentum * self.buffers[name] if self.nesterov else self.buffers[name]
            moved[name] = value - rates[name] * direction
        return moved


@pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "nesterov"])
@pytest.mark.parametrize("weight_decay, own_decay", [(0.0, {}), (0.01, {}), (0.01, {"weight_decay": 0.2})])
def test_sgd_is_pytorchs(nesterov, weight_decay, own_decay):
    random = np.random.default_rng(0)
    params = {"net/a": random.normal(size=(3, 2)), "net/b": random.normal(size=4), "net/c": random.normal(size=())}
    assigned = {"net/a": "slow", "net/b": "fast", "net/c": "slow"}
    groups = {"slow": {"rate": 0.2, **own_decay}, "fast": {"rate": 1.0}}
    factors = np.array([0.5, 1.0, 0.1])
    optimizer = optim.optimizer(
        assigned,
        groups,
        lr=0.3,
        factors=factors,
        steps_per_epoch=2,
        momentum=0.9,
        nesterov=nesterov,
        weight_decay=weight_decay,
    )
    torch = TorchSGD(0.9, nesterov, weight_decay)
    ours = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    state = optimizer.init(ours)
    update = jax.jit(optimizer.update)
    decays = {name: own_decay["weight_decay"] for name in ("net/a", "net/c") if own_decay}
    for step in range(6):
        gradients = {name: random.normal(size=value.shape) for name, value in params.items()}
        rates = {name: 0.3 * groups[assigned[name]]["rate"] * factors[step // 2] for name in params}
        params = torch.step(params, gradients, rates, decays)
        updates, state = update({k: jnp.asarray(g, jnp.float32) for k, g in gradients.items()}, state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)
        for name in params:
            np.testing.assert_allclose(ours[name], params[name], rtol=1e-5, atol=1e-6, err_msg=f"{name}, step {step}")


def test_steps_past_the_last_epoch_keep_its_rate():
    settings = dict(lr=1.0, steps_per_epoch=1, momentum=0.0, nesterov=False, weight_decay=0.0)
    optimizer = optim.optimizer({"net/a": "all"}, {"all": {"rate": 1.0}}, factors=np.array([1.0, 0.5]), **settings)
    params = {"net/a": jnp.zeros(())}
    state, moved = optimizer.init(params), []
    for _ in range(4):
        updates, state = optimizer.update({"net/a": jnp.ones(())}, state, params)
        moved.append(float(updates["net/a"]))
    assert moved == [-1.0, -0.5, -0.5, -0.5]
