"""Operations of a training step, by XLA's count, against the count by hand. Compiles, and runs nothing."""

import re

import pytest

from benchmarks import cifar_step, flops
from ltjax import config, train


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """`stages(depth)`: {stage: arguments of `flops.by_xla`} of MiSLAS on CIFAR-100's shape."""
    data_dir = tmp_path_factory.mktemp("images")
    cifar_step.write_random_images(data_dir, per_class=2, num_test=100)

    def make(depth):
        run, settings = config.parse(cifar_step.one_epoch_config(depth=depth, max_count=2))
        problem = train.setup(run, data_dir)
        return {name: (run, name, settings[name], problem) for name in settings}

    return make


def by_hand(depth, **settings):
    return flops.by_hand(depth, width=16, num_classes=100, **settings)


@pytest.mark.parametrize("depth", [8, 20])
def test_operations_are_those_of_the_convolutions_and_a_frozen_backbone_has_no_backward_pass(stages, depth):
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
    text = flops.compiled(*stages(8)["classifier"], num_steps=num_steps).as_text()
    loops_with_weights = [line for line in text.splitlines() if re.search(r"f32\[3,3,3,16\].* while\(", line)]
    assert len(loops_with_weights) == num_steps - 1
