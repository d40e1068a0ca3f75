"""Operations of a training step, by XLA's count and by hand. Nothing runs."""

import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks import adversarial_step, cifar_step, flops
from ltjax import config, models
from ltjax.engine import experiment as experiments


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Return `stages(depth)`: {stage: arguments of `flops.by_xla`} of MiSLAS on CIFAR-100's shape."""
    data_dir = tmp_path_factory.mktemp("images")
    cifar_step.write_random_images(data_dir, per_class=2, num_test=100)

    def make(depth):
        run = config.parse(cifar_step.one_epoch_config(depth=depth, max_count=2))
        experiment = experiments.set_up(run, data_dir)
        return {name: (experiment, stage) for name, stage in run.stages.items()}

    return make


def by_hand(depth, **settings):
    return flops.by_hand(depth, width=16, num_classes=100, **settings)


@pytest.mark.parametrize("depth", [8, 20])
def test_counted_operations_are_those_of_the_convolutions(stages, depth):
    both = stages(depth)
    training, frozen = flops.by_xla(*both["features"]), flops.by_xla(*both["classifier"])
    assert training == pytest.approx(by_hand(depth), rel=0.05)
    assert frozen == pytest.approx(by_hand(depth, backbone_trains=False), rel=0.05)
    assert frozen < 0.4 * training


def test_the_count_by_hand_of_resnet_32():
    # 3x3 pairs of an output row and a tap that meet a row: 94, 47 (stride 2), 46, 23 (stride 2), 22
    sides = {(3, 16): [94], (16, 16): 10 * [94], (16, 32): [47], (32, 32): 9 * [46], (32, 64): [23], (64, 64): 9 * [22]}
    forward = sum(2 * side**2 * came * out for (came, out), rows in sides.items() for side in rows)
    assert by_hand(32, backbone_trains=False) == forward + 2 * 2 * 64 * 100
    assert by_hand(32) == 3 * (forward + 2 * 64 * 100) - 2 * 94**2 * 3 * 16  # no gradient for the images


@pytest.mark.parametrize("num_steps", [1, 2])
def test_one_step_is_compiled_without_the_loop(stages, num_steps):
    text = flops.step_program(*stages(8)["classifier"], num_steps=num_steps).as_text()
    loops_with_weights = [line for line in text.splitlines() if re.search(r"f32\[3,3,3,16\].* while\(", line)]
    assert len(loops_with_weights) == num_steps - 1


NETWORKS = [
    {"name": "wide_resnet", "depth": 10, "width": 1},
    {"name": "wide_resnet", "depth": 10, "width": 2},
    {"name": "preact_resnet", "depth": 18, "width": 4},
    {"name": "resnet", "depth": 18, "width": 4},
    {"name": "resnet_cifar", "depth": 8, "width": 16},
]


def variables_of(net):
    return jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))


@pytest.mark.parametrize("settings", [dict(depth=50), dict(depth=18, stem="large")])
def test_other_networks_are_not_counted_by_hand(settings):
    with pytest.raises(ValueError, match="only basic blocks and the small stem"):
        flops.network(dict(name="resnet", width=64, **settings), 100)


@pytest.mark.parametrize("model", NETWORKS, ids=lambda model: "{name}-{depth}-{width}".format(**model))
def test_the_counted_convolutions_are_those_of_the_network(model):
    params = jax.tree.leaves(variables_of(models.create(**model, num_classes=100))["params"])
    kernels = sorted(x.shape for x in params if x.ndim == 4)
    assert sorted((c.kernel, c.kernel, c.channels_in, c.out) for c in flops.convolutions(**model)) == kernels


@pytest.mark.parametrize("size, kernel, strides", [(5, 3, 1), (6, 3, 2), (5, 3, 2), (6, 1, 2), (5, 1, 1)])
def test_products_of_a_convolution_one_by_one(size, kernel, strides):
    pad = (kernel - 1) // 2
    inside = [pad <= at < pad + size for at in range(size + 2 * pad)]  # of the padded image
    windows = [inside[at : at + kernel] for at in range(0, size + 2 * pad - kernel + 1, strides)]
    pairs = [(a, b) for rows in windows for columns in windows for a in rows for b in columns]
    layer = flops.Convolution(2, 3, size, kernel, strides)
    assert layer.operations == 2 * 2 * 3 * sum(a and b for a, b in pairs)


def test_a_pass_of_a_wide_resnet_forward_and_to_the_image():
    model, batch_size = NETWORKS[0], 4
    net = models.create(**model, num_classes=100, platform="gpu")
    images = jax.ShapeDtypeStruct((batch_size, 32, 32, 3), jnp.float32)

    def predict(variables, images):
        return net.apply(variables, images, False).logits

    def ascent(variables, images):
        return jax.grad(lambda x: predict(variables, x).sum())(images)

    by_hand = flops.network(model, 100)
    for function, expected in ((predict, by_hand.forward), (ascent, by_hand.ascent)):
        program = flops.compile_to_count(jax.jit(function).lower(variables_of(net), images))
        assert flops.operations(program) / batch_size == pytest.approx(expected, rel=0.08)


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Return `counted(program)`: operations for an image of a program of `adversarial_step`, by XLA and the minimum."""
    data_dir = tmp_path_factory.mktemp("images")
    cifar_step.write_random_images(data_dir, per_class=2, num_test=100)
    shape = dict(model="wrn10_1", guide="wrn10_1", batch_size=8, attack_steps=2)

    def count(name):
        program = adversarial_step.PROGRAMS[name]
        return adversarial_step.operations(program, data_dir, shape), adversarial_step.least(program, shape)

    return count


def test_a_step_of_lbgat_is_close_to_the_minimum(counted):
    actual, least = counted("lbgat-0")
    assert actual == pytest.approx(least, rel=0.08)
    again, _ = counted("lbgat-0-recomputed")
    forward = flops.network(NETWORKS[0], 100).forward
    assert again - actual == pytest.approx(forward, rel=0.08)  # the second of two steps


def test_each_further_attack_step_has_as_many_operations_as_the_second():
    assert flops.with_attack(lambda steps: 5 + 3 * steps, 10) == 35
    assert flops.with_attack(lambda steps: 5 + 3 * steps, 1) == 8
