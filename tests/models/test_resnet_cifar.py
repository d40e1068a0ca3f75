"""CIFAR ResNets: sizes, initial weights, outputs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax import models
from ltjax.models import layers
from ltjax.models.blocks import BasicBlock
from ltjax.optim import assign_groups, flatten, unflatten
from ltjax.types import UserError

IMAGES = np.random.default_rng(0).uniform(size=(4, 8, 8, 3)).astype(np.float32)


def make(**settings):
    return models.create("resnet_cifar", settings.pop("num_classes", 10), **{"depth": 8, "width": 4, **settings})


@functools.cache
def shapes(net):
    return jax.eval_shape(net.init, jax.random.key(0), IMAGES)


def some_variables(net, seed=1):
    """Return arbitrary weights and statistics, variances above 0: no compiling, and nothing at its initial value."""
    random = np.random.default_rng(seed)
    like = flatten(shapes(net))
    draw = {path: random.normal(0.3, 0.5, leaf.shape).astype(np.float32) for path, leaf in like.items()}
    return unflatten({path: np.abs(value) + 0.1 if path.endswith("/var") else value for path, value in draw.items()})


def num_parameters(net):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(net)["params"]))


def count_by_hand(depth, num_classes, width=16):
    """Count 3x3 convolutions without bias, two numbers a channel for each batch norm, and a linear layer."""
    blocks = (depth - 2) // 6
    convolutions = [(3, width)]
    for channels, before in ((width, width), (2 * width, width), (4 * width, 2 * width)):
        convolutions += [(before, channels)] + [(channels, channels)] * (2 * blocks - 1)
    return sum(9 * a * b + 2 * b for a, b in convolutions) + 4 * width * num_classes + num_classes


def test_resnet_32_of_100_classes_has_470004_parameters():
    assert num_parameters(models.create("resnet_cifar", 100, depth=32)) == 470_004


@pytest.mark.parametrize("depth, published", [(20, "0.27"), (32, "0.46"), (44, "0.66"), (56, "0.85"), (110, "1.7")])
def test_parameters_are_those_that_he_et_al_published(depth, published):
    actual = num_parameters(models.create("resnet_cifar", 10, depth=depth))
    assert actual == count_by_hand(depth, 10)
    assert f"{actual / 1e6:.{len(published) - 2}f}" == published


@pytest.mark.parametrize("width", [1, 8, 64])
def test_width_multiplies_the_channels_of_every_stage(width):
    net = make(width=width)
    assert num_parameters(net) == count_by_hand(8, 10, width)
    assert shapes(net)["params"]["classifier"]["kernel"].shape == (4 * width, 10)


@pytest.fixture(scope="module")
def fresh():
    """Return {path: array} of a newly initialised network, and with another key."""
    init = jax.jit(make(num_classes=100, width=16, logit_scale=True).init)
    return [flatten(init(jax.random.key(seed), IMAGES)) for seed in (0, 1)]


def test_initial_weights_are_he_normal(fresh):
    kernels = {path: np.asarray(value) for path, value in fresh[0].items() if path.endswith("kernel")}
    assert len(kernels) == 8
    for path, kernel in kernels.items():
        standard = kernel / np.sqrt(2 / kernel[..., 0].size)
        assert abs(standard.std() - 1) < 4.5 / np.sqrt(2 * kernel.size), path
        assert abs(standard.mean()) < 4.5 / np.sqrt(kernel.size), path
        assert np.abs(standard).max() > 2.3, path  # not truncated at 2 standard deviations


def test_an_unknown_start_of_the_classifier_names_the_known_ones():
    with pytest.raises(UserError, match="unknown model classifier_init 'xavier'; known: he, torch, torch_no_bias"):
        models.create("resnet_cifar", 10, classifier_init="xavier")


def test_initial_batch_norms_are_the_identity(fresh):
    initial = {"scale": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0}
    norms = {path: value for path, value in fresh[0].items() if "norm" in path}
    assert len(norms) == 4 * 7
    for path, value in norms.items():
        np.testing.assert_array_equal(value, np.full(value.shape, initial[path.split("/")[-1]]), err_msg=path)


def test_the_initial_logit_scale_is_1(fresh):
    np.testing.assert_array_equal(fresh[0]["params/logit_scale"], np.ones(100))


def test_keys_make_different_networks(fresh):
    for path in fresh[0]:
        if path.endswith("kernel"):
            assert np.mean(np.asarray(fresh[0][path]) == np.asarray(fresh[1][path])) < 0.01, path


def zeros(block, x):
    like = jax.eval_shape(lambda rng: block.init(rng, x, False), jax.random.key(0))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)


@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("before, after", [(4, 8), (3, 8)])
def test_the_shortcut_takes_every_second_pixel_and_adds_zero_channels(before, after, size):
    x = np.random.default_rng(0).normal(size=(2, size, size, before)).astype(np.float32)
    block = BasicBlock(after, 2, shortcut="pad")
    variables = zeros(block, x)  # so that only the shortcut remains
    expected = np.zeros((2, (size + 1) // 2, (size + 1) // 2, after), np.float32)
    first = (after - before) // 2
    expected[..., first : first + before] = np.maximum(x[:, ::2, ::2], 0)
    np.testing.assert_array_equal(block.apply(variables, x, False), expected)


def test_a_block_of_the_same_shape_adds_its_input():
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 4)).astype(np.float32)
    block = BasicBlock(4, shortcut="pad")
    np.testing.assert_array_equal(block.apply(zeros(block, x), x, False), np.maximum(x, 0))


def run(net, variables, images=IMAGES):
    return jax.jit(net.apply)(variables, images)


def test_the_network_normalises_its_images():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    variables = some_variables(make())
    expected = run(make(), variables, (IMAGES - np.float32(mean)) / np.float32(std)).logits
    np.testing.assert_allclose(run(make(mean=mean, std=std), variables).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_mean_of_three_channels_does_not_make_grey_images_coloured():
    net = make(mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    with pytest.raises(UserError, match="mean"):
        jax.eval_shape(net.init, jax.random.key(0), IMAGES[..., :1])


def test_logits_are_the_classifier_of_the_features():
    variables = some_variables(make())
    outputs = run(make(), variables)
    head = variables["params"]["classifier"]
    assert (outputs.features.shape, outputs.logits.shape, outputs.branches) == ((4, 16), (4, 10), None)
    np.testing.assert_allclose(outputs.logits, outputs.features @ head["kernel"] + head["bias"], rtol=1e-4, atol=1e-4)


def test_layers_are_the_width_of_every_stage():
    outputs = jax.eval_shape(make().apply, shapes(make()), IMAGES)
    assert {name: layer.shape for name, layer in outputs.layers.items()} == {
        "stage1": (4, 4),
        "stage2": (4, 8),
        "stage3": (4, 16),
    }


def test_layers_are_the_means_over_space_of_the_stages():
    net, variables = make(), some_variables(make())
    of_backbone = {name: tree["backbone"] for name, tree in variables.items()}
    maps = jax.jit(net.backbone.apply, static_argnums=2)(of_backbone, IMAGES, False)
    assert [x.shape[1:3] for x in maps.values()] == [(8, 8), (4, 4), (2, 2)]
    layers = run(net, variables).layers
    assert layers.keys() == maps.keys()
    for name, x in maps.items():
        np.testing.assert_allclose(layers[name], np.float64(x).mean((1, 2)), rtol=1e-4, atol=1e-5)


def test_the_last_layer_is_the_features():
    outputs = run(make(), some_variables(make()))
    np.testing.assert_array_equal(outputs.layers["stage3"], outputs.features)


def test_the_logit_scale_multiplies_each_classs_logit():
    net = make(logit_scale=True)
    variables = some_variables(net)
    outputs, params = run(net, variables), variables["params"]
    plain = outputs.features @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    np.testing.assert_allclose(outputs.logits, params["logit_scale"] * plain, rtol=1e-4, atol=1e-4)


def test_no_pattern_for_batch_norm_takes_the_logit_scale_for_one():
    paths = [f"net/{path}" for path in flatten(shapes(make(logit_scale=True))["params"])]
    assert {path.split("/")[1] for path in paths} == {"backbone", "classifier", "logit_scale"}
    norms, rest = {"match": ".*/(scale|norm.?/bias)"}, {"match": ".*/(kernel|logit_scale)|net/classifier/bias"}
    assert assign_groups(paths, {"norms": norms, "rest": rest})["net/logit_scale"] == "rest"


def test_a_network_takes_the_cosine_classifier_with_its_scale():
    net = make(classifier="cosine", cosine_scale=16.0)
    variables = some_variables(net)
    assert variables["params"]["classifier"].keys() == {"kernel"}
    outputs = run(net, variables)
    head = layers.CosineClassifier(len(variables["params"]["classifier"]["kernel"][0]), 16.0)
    expected = head.apply({"params": variables["params"]["classifier"]}, outputs.features)
    np.testing.assert_allclose(outputs.logits, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def trained():
    """Return {dtype: (outputs, new variables)} of one pass in training mode, and the variables."""
    nets = {dtype: make(dtype=dtype) for dtype in ("float32", "bfloat16")}
    variables = some_variables(nets["bfloat16"])
    step = jax.jit(lambda net, variables: net.apply(variables, IMAGES, True, mutable=True), static_argnums=0)
    return {dtype: step(net, variables) for dtype, net in nets.items()}, variables


def test_bfloat16_keeps_float32_outside(trained):
    net = make(dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves((shapes(net), trained[0]["bfloat16"]))} == {jnp.dtype("float32")}


def test_bfloat16_computes_alike(trained):
    whole, half = (np.asarray(trained[0][dtype][0].logits) for dtype in ("float32", "bfloat16"))
    assert 0 < np.linalg.norm(whole - half) / np.linalg.norm(whole) < 0.02


def test_training_mode_changes_every_statistic_and_nothing_else(trained):
    (_, after), before = trained[0]["float32"], trained[1]
    jax.tree.map(np.testing.assert_array_equal, after["params"], before["params"])
    for path, value in flatten(before["batch_stats"]).items():
        assert not np.any(flatten(after["batch_stats"])[path] == value), path


def test_evaluation_mode_changes_nothing():
    net, variables = make(), some_variables(make())
    _, after = jax.jit(lambda v: net.apply(v, IMAGES, False, mutable=True))(variables)
    jax.tree.map(np.testing.assert_array_equal, after, variables)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(name="resnet50"), "unknown model 'resnet50'; known: resnet_cifar"),
        (dict(classifier="mlp"), "unknown classifier 'mlp'; known: linear, cosine"),
        (dict(dtype="float8"), "unknown model dtype 'float8'; known: float32, bfloat16"),
        (dict(layers=3), "model 'resnet_cifar' has no setting 'layers'; allowed: depth, width"),
        (dict(depth=18), "model depth = 18 is no CIFAR ResNet: take 6 n + 2"),
        (dict(depth=2), "model depth = 2 is no CIFAR ResNet"),
        (dict(width=0), "model width = 0: the first stage needs at least one channel"),
        (dict(std=(0.0,)), "model mean = (0.0,), std = (0.0,): one value each for every channel, std above 0"),
        (dict(mean=(0.5, 0.5)), "model mean = (0.5, 0.5), std = (1.0,): one value each"),
    ],
)
def test_unknown_settings_are_errors_that_name_the_known(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        models.create(**{"name": "resnet_cifar", "num_classes": 10, **settings})


@pytest.mark.parametrize("batch_size", [1, 16])
def test_bfloat16_evaluation_is_finite_when_compiled(batch_size, optimised):
    """XLA on CPUs returns nan if it fuses the last mean with the layers before it."""
    net = make(dtype="bfloat16", width=16)
    images = np.random.default_rng(0).random((batch_size, 32, 32, 3), np.float32)
    evaluate = jax.jit(lambda variables, images: net.apply(variables, images), compiler_options=optimised)
    assert np.isfinite(evaluate(some_variables(net), images).logits).all()


def test_float64_is_refused_if_jax_has_it_disabled():
    with pytest.raises(UserError, match="model dtype = 'float64', which JAX has switched off: set JAX_ENABLE_X64=1"):
        make(dtype="float64")


@pytest.mark.parametrize("given", ["float32", "float64"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "settings", [{}, dict(classifier="cosine", logit_scale=True, branches=3), dict(branches=2, branch_kind="conv")]
)
def test_float64_reaches_all_outputs_and_variables_keep_their_type(settings, train, given):
    with jax.enable_x64(True):
        net = make(dtype="float64", **settings)
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes(net))} == {jnp.dtype("float32")}
        variables = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, given), shapes(net))
        outputs, after = jax.eval_shape(lambda v: net.apply(v, IMAGES, train, mutable=True), variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype("float64")}
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype(given)}


def test_float64_images_are_normalised_in_float64():
    with jax.enable_x64(True):
        net, images = make(mean=(0.1, 0.2, 0.3), std=(0.3, 0.3, 0.7), dtype="float64"), IMAGES.astype(np.float64)
        variables = some_variables(net)
        actual = run(net, variables, images).logits
        expected = run(make(dtype="float64"), variables, (images - [0.1, 0.2, 0.3]) / [0.3, 0.3, 0.7]).logits
    np.testing.assert_allclose(actual, expected, rtol=1e-10)
