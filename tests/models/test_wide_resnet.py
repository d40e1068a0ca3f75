"""Wide ResNets: sizes, and logits against those of LBGAT's authors (the numbers' source: tests/golden/README.md)."""

import re

import jax
import numpy as np
import pytest

from ltjax import models
from ltjax.interop.torch import import_state_dict
from ltjax.optim import flatten
from ltjax.types import UserError

IMAGES = np.zeros((2, 32, 32, 3), np.float32)


def make(num_classes=10, **settings):
    return models.create("wide_resnet", num_classes, **{"depth": 10, "width": 1, **settings})


def shapes(net):
    return jax.eval_shape(net.init, jax.random.key(0), IMAGES)


def num_parameters(net):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(net)["params"]))


def test_initial_weights_are_hes_for_the_channels_that_go_out():
    params = jax.jit(make(width=4).init)(jax.random.key(0, impl="unsafe_rbg"), IMAGES)["params"]
    kernels = [k for k in flatten(params).values() if k.ndim == 4]
    assert len(kernels) == 1 + 3 * 2 + 3
    for kernel in kernels:
        standard = np.std(kernel) * np.sqrt(kernel[:, :, 0].size / 2)
        assert abs(standard - 1) < 4.5 / np.sqrt(2 * kernel.size)


def count_by_hand(depth, width, num_classes):
    """Count convolutions without bias, two numbers a channel for each norm, and a linear layer."""
    count, before = 9 * 3 * 16, 16
    for channels in (16 * width, 32 * width, 64 * width):
        for _ in range((depth - 4) // 6):
            count += 2 * before + 9 * before * channels + 2 * channels + 9 * channels**2
            count += before * channels if before != channels else 0
            before = channels
    return count + 2 * before + before * num_classes + num_classes


@pytest.mark.parametrize(
    "depth, width, num_classes, published",
    [(34, 10, 10, 46_160_474), (28, 10, 10, 36_479_194), (34, 20, 10, None), (16, 3, 200, None), (10, 1, 100, None)],
)
def test_parameters_are_the_published_without_the_dead_stage(depth, width, num_classes, published):
    actual = num_parameters(make(num_classes, depth=depth, width=width))
    assert actual == count_by_hand(depth, width, num_classes)
    assert published is None or actual == published


@pytest.mark.parametrize("size", [32, 64])
def test_later_stages_halve_the_map(size):
    net, images = make(width=2), np.zeros((2, size, size, 3), np.float32)
    backbone = {name: tree["backbone"] for name, tree in shapes(net).items()}
    maps = jax.eval_shape(lambda variables: net.backbone.apply(variables, images, False), backbone)
    assert {name: x.shape for name, x in maps.items()} == {
        "stage1": (2, size, size, 32),
        "stage2": (2, size // 2, size // 2, 64),
        "stage3": (2, size // 4, size // 4, 128),
    }
    assert jax.eval_shape(net.apply, shapes(net), images).features.shape == (2, 128)


@pytest.mark.parametrize("width, stages", [(1, {2, 3}), (2, {1, 2, 3})])
def test_only_shortcuts_that_change_the_channels_have_a_convolution(width, stages):
    paths = flatten(shapes(make(depth=16, width=width))["params"])
    actual = {path for path in paths if "shortcut" in path}
    assert actual == {f"backbone/stage{stage}_block1/shortcut/kernel" for stage in stages}


@pytest.fixture(scope="module")
def authors(golden):
    """Return the numbers of the authors' step, and the weights of its first network."""
    numbers = golden("lbgat_step")
    return numbers, {k.removeprefix("init/"): v for k, v in numbers.items() if k.startswith("init/model.")}


@pytest.mark.parametrize("dtype, rtol, atol", [("float32", 1e-4, 1e-5), ("float64", 0, 1e-12)])
def test_logits_are_the_authors(authors, dtype, rtol, atol):
    numbers, state_dict = authors
    with jax.enable_x64(dtype == "float64"):
        net = make(100, dtype=dtype)
        variables = import_state_dict(state_dict, net)
        variables = {"params": variables.params["net"], "batch_stats": variables.stats["net"]}
        outputs = jax.jit(net.apply)(variables, numbers["images"].astype(dtype) / np.asarray(255, dtype))
        assert {x.dtype for x in jax.tree.leaves(outputs)} == {np.dtype(dtype)}
        np.testing.assert_allclose(outputs.logits, numbers["eval_logits"], rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(depth=32), "model depth = 32 is no wide ResNet: take 6 n + 4, such as 10, 16, 28 or 34"),
        (dict(depth=4), "model depth = 4 is no wide ResNet"),
        (dict(width=0), "model width = 0: channels are 16, 32 and 64 times it, so it is at least 1"),
        (dict(dropout=0.3), "model 'wide_resnet' has no setting 'dropout'; allowed: depth, width"),
    ],
)
def test_unknown_settings_are_errors_that_name_the_known(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make(**settings)
