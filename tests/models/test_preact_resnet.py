"""Pre-activation ResNets: sizes, the block against NumPy, and the layers after the last block."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax import models
from ltjax.models.preact_resnet import PreActBlock
from ltjax.optim import flatten, unflatten
from ltjax.types import UserError

IMAGES = np.random.default_rng(0).uniform(size=(4, 16, 16, 3)).astype(np.float32)


def make(num_classes=10, **settings):
    return models.create("preact_resnet", num_classes, **settings)


def tiny():
    return make(width=4, blocks=(1, 1, 1, 1))


def shapes(net):
    return jax.eval_shape(net.init, jax.random.key(0), IMAGES)


def num_parameters(net):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(net)["params"]))


def count_by_hand(blocks, width, num_classes):
    """Count convolutions without bias, two numbers a channel for each norm, and a linear layer."""
    count, before = 9 * 3 * width, width
    for number, channels in zip(blocks, (width, 2 * width, 4 * width, 8 * width), strict=True):
        for _ in range(number):
            count += 2 * before + 9 * before * channels + 2 * channels + 9 * channels**2
            count += before * channels if before != channels else 0
            before = channels
    return count + 2 * before + before * num_classes + num_classes


def test_preact_resnet_18_has_11172170_parameters():
    net = make()
    assert num_parameters(net) == 11_172_170 == 11_171_146 + 2 * 512
    assert shapes(net)["params"]["backbone"]["norm"]["scale"].shape == (512,)


@pytest.mark.parametrize(
    "settings, blocks",
    [
        (dict(depth=18), (2, 2, 2, 2)),
        (dict(depth=34), (3, 4, 6, 3)),
        (dict(depth=34, width=8), (3, 4, 6, 3)),
        (dict(blocks=(1, 2, 1, 3)), (1, 2, 1, 3)),
    ],
)
def test_parameters_are_those_counted_by_hand(settings, blocks):
    assert num_parameters(make(100, **settings)) == count_by_hand(blocks, settings.get("width", 64), 100)


@pytest.mark.parametrize("size", [32, 64])
def test_later_stages_halve_the_map(size):
    net, images = tiny(), np.zeros((2, size, size, 3), np.float32)
    backbone = {name: tree["backbone"] for name, tree in shapes(net).items()}
    maps = jax.eval_shape(lambda variables: net.backbone.apply(variables, images, False), backbone)
    expected = [(2, size // 2**stage, size // 2**stage, 4 * 2**stage) for stage in range(4)]
    assert [x.shape for x in maps.values()] == expected
    assert list(maps) == ["stage1", "stage2", "stage3", "stage4"]


def block_variables(block, x, **given):
    """Return zeros, statistics for the first norm, and `given` by path."""
    like = flatten(jax.eval_shape(lambda rng: block.init(rng, x, False), jax.random.key(0)))
    values = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in like.items()}
    first = {"params/norm1/scale": 2.0, "params/norm1/bias": 0.5, "batch_stats/norm1/mean": 0.1}
    first |= {"batch_stats/norm1/var": 4.0}
    values |= {path: np.full_like(values[path], value) for path, value in first.items()}
    return unflatten({**values, **{path.replace("__", "/"): value for path, value in given.items()}})


def active(x):
    return np.maximum((x - 0.1) / np.sqrt(4 + 1e-5) * 2 + 0.5, 0)


@pytest.mark.parametrize("features, strides", [(6, 1), (6, 2), (4, 2)])
def test_a_shortcut_that_changes_the_shape_convolves_the_activated_input(features, strides):
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 5, 5, 4)).astype(np.float32)
    kernel = random.normal(size=(1, 1, 4, features)).astype(np.float32)
    block = PreActBlock(features, strides, jnp.float32, None)
    actual = block.apply(block_variables(block, x, params__shortcut__kernel=kernel), x, False)
    np.testing.assert_allclose(actual, active(x)[:, ::strides, ::strides] @ kernel[0, 0], rtol=1e-4, atol=1e-5)


def test_a_shortcut_of_the_same_shape_is_the_input_and_not_its_activation():
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 4)).astype(np.float32)
    block = PreActBlock(4, 1, jnp.float32, None)
    np.testing.assert_array_equal(block.apply(block_variables(block, x), x, False), x)


def test_the_convolutions_see_the_activated_input():
    """Use kernels that copy the middle pixel, and an identity as the second norm, except for its epsilon."""
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 4)).astype(np.float32)
    block = PreActBlock(4, 1, jnp.float32, None)
    middle = np.zeros((3, 3, 4, 4), np.float32)
    middle[1, 1] = np.eye(4)
    given = dict(params__conv1__kernel=middle, params__conv2__kernel=middle)
    given |= dict(params__norm2__scale=np.ones(4, np.float32), batch_stats__norm2__var=np.ones(4, np.float32))
    actual = block.apply(block_variables(block, x, **given), x, False)
    np.testing.assert_allclose(actual, x + active(x), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def trained():
    """Return variables, and the maps and new variables of one pass in training mode."""
    net, random = tiny(), np.random.default_rng(1)
    like = flatten(shapes(net))
    before = {path: random.normal(0.3, 0.5, leaf.shape).astype(np.float32) for path, leaf in like.items()}
    before = unflatten({path: abs(value) + 0.1 if path.endswith("/var") else value for path, value in before.items()})
    step = jax.jit(lambda variables: net.apply(variables, IMAGES, True, mutable=True, capture_intermediates=True))
    outputs, after = step(before)
    return before, outputs, after


def test_the_classifier_sees_the_map_after_the_last_norm_and_relu(trained):
    before, outputs, after = trained
    (norm,) = after["intermediates"]["backbone"]["norm"]["__call__"]
    features = np.maximum(norm, 0).mean((1, 2))
    head = before["params"]["classifier"]
    np.testing.assert_allclose(outputs.features, features, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outputs.logits, features @ head["kernel"] + head["bias"], rtol=1e-4, atol=1e-4)


def test_training_mode_changes_every_statistic_and_no_parameter(trained):
    before, _, after = trained
    jax.tree.map(np.testing.assert_array_equal, after["params"], before["params"])
    for path, value in flatten(before["batch_stats"]).items():
        assert not np.any(flatten(after["batch_stats"])[path] == value), path


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(depth=50), "model depth = 50: take 18 or 34"),
        (dict(width=0), "model width = 0: the first stage needs at least one channel"),
        (dict(blocks=(2, 2, 2)), "model blocks = (2, 2, 2): one integer above 0 for each of the four stages"),
        (dict(strides=(1, 1, 2, 2)), "model 'preact_resnet' has no setting 'strides'; allowed: depth, width, blocks"),
    ],
)
def test_unknown_settings_are_errors_that_name_the_known(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make(**settings)
