"""ResNet-18 and 34: sizes, strides, and the block against NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax import models
from ltjax.models.resnet import BasicBlock
from ltjax.optim import flatten, unflatten
from ltjax.types import UserError

IMAGES = np.random.default_rng(0).uniform(size=(4, 16, 16, 3)).astype(np.float32)


def make(num_classes=10, **settings):
    return models.create("resnet", num_classes, **settings)


def tiny(**settings):
    return make(width=4, blocks=(1, 1, 1, 1), **settings)


def shapes(net):
    return jax.eval_shape(net.init, jax.random.key(0), IMAGES)


def num_parameters(net):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(net)["params"]))


def count_by_hand(blocks, width, num_classes):
    """Convolutions without bias, two numbers a channel for the batch norm after each, and a linear layer."""
    convolutions, before = [(9, 3, width)], width
    for number, channels in zip(blocks, (width, 2 * width, 4 * width, 8 * width), strict=True):
        convolutions += [(9, before, channels)] + [(9, channels, channels)] * (2 * number - 1)
        convolutions += [(1, before, channels)] if before != channels else []
        before = channels
    return sum(taps * a * b + 2 * b for taps, a, b in convolutions) + before * num_classes + num_classes


def test_resnet_18_has_11173962_parameters():
    assert num_parameters(make()) == 11_173_962


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


@pytest.mark.parametrize(
    "settings, sizes",
    [({}, [32, 32, 16, 8]), (dict(strides=(1, 2, 2, 2)), [32, 16, 8, 4]), (dict(depth=34), [32, 32, 16, 8])],
)
def test_strides_make_the_sizes_of_the_maps(settings, sizes):
    net, images = tiny(**settings), np.zeros((2, 32, 32, 3), np.float32)
    backbone = {name: tree["backbone"] for name, tree in shapes(net).items()}
    maps = jax.eval_shape(lambda variables: net.backbone.apply(variables, images, False), backbone)
    assert [x.shape for x in maps.values()] == [(2, s, s, 4 * 2**stage) for stage, s in enumerate(sizes)]
    assert list(maps) == ["stage1", "stage2", "stage3", "stage4"]


def test_strides_change_no_parameter():
    plain, strided = (flatten(shapes(tiny(strides=strides))) for strides in ((1, 1, 2, 2), (1, 2, 2, 2)))
    assert plain == strided


def test_a_stride_in_the_first_stage_gives_it_a_shortcut():
    paths = flatten(shapes(tiny(strides=(2, 1, 2, 2)))["params"])
    assert {path for path in paths if "stage1_block1/shortcut" in path} == {
        f"backbone/stage1_block1/{leaf}" for leaf in ("shortcut/kernel", "shortcut_norm/scale", "shortcut_norm/bias")
    }


def zeros(block, x, **given):
    like = flatten(jax.eval_shape(lambda rng: block.init(rng, x, False), jax.random.key(0)))
    values = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in like.items()}
    return unflatten({**values, **{path.replace("__", "/"): value for path, value in given.items()}})


@pytest.mark.parametrize("features, strides", [(6, 1), (6, 2), (4, 2)])
def test_a_shortcut_that_changes_the_shape_is_a_convolution_and_a_norm(features, strides):
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 5, 5, 4)).astype(np.float32)
    kernel = random.normal(size=(1, 1, 4, features)).astype(np.float32)
    scale, bias, mean = (random.normal(size=features).astype(np.float32) for _ in range(3))
    var = random.uniform(1, 2, features).astype(np.float32)
    block = BasicBlock(features, strides, jnp.float32, None)
    norm = dict(params__shortcut_norm__scale=scale, params__shortcut_norm__bias=bias)
    norm |= dict(batch_stats__shortcut_norm__mean=mean, batch_stats__shortcut_norm__var=var)
    found = block.apply(zeros(block, x, params__shortcut__kernel=kernel, **norm), x, False)
    expected = (x[:, ::strides, ::strides] @ kernel[0, 0] - mean) / np.sqrt(var + 1e-5) * scale + bias
    np.testing.assert_allclose(found, np.maximum(expected, 0), rtol=1e-4, atol=1e-5)


def test_a_block_of_the_same_shape_adds_its_input():
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 4)).astype(np.float32)
    block = BasicBlock(4, 1, jnp.float32, None)
    np.testing.assert_array_equal(block.apply(zeros(block, x), x, False), np.maximum(x, 0))


def test_training_mode_changes_every_statistic_and_no_parameter():
    net, random = tiny(), np.random.default_rng(1)
    like = flatten(shapes(net))
    before = {path: random.normal(0.3, 0.5, leaf.shape).astype(np.float32) for path, leaf in like.items()}
    before = unflatten({path: abs(value) + 0.1 if path.endswith("/var") else value for path, value in before.items()})
    outputs, after = jax.jit(lambda variables: net.apply(variables, IMAGES, True, mutable=True))(before)
    assert np.isfinite(outputs.logits).all()
    jax.tree.map(np.testing.assert_array_equal, after["params"], before["params"])
    for path, value in flatten(before["batch_stats"]).items():
        assert not np.any(flatten(after["batch_stats"])[path] == value), path


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(depth=50), "model depth = 50: take 18 or 34"),
        (dict(width=0), "model width = 0: the first stage needs at least one channel"),
        (dict(blocks=(2, 2, 0, 2)), "model blocks = (2, 2, 0, 2): one integer above 0 for each of the four stages"),
        (dict(strides=(1, 2, 2)), "model strides = (1, 2, 2): one integer above 0 for each of the four stages"),
        (dict(stem="7x7"), "model 'resnet' has no setting 'stem'; allowed: depth, width, strides, blocks"),
    ],
)
def test_unknown_settings_are_errors_that_name_the_known(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make(**settings)
