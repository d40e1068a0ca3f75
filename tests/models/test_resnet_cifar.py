"""CIFAR ResNets and their layers: sizes, initial weights, and each layer against another implementation."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from ltjax import models
from ltjax.models import convolution, layers
from ltjax.models.blocks import BasicBlock
from ltjax.optim import assign_groups, flatten, unflatten
from ltjax.types import UserError

IMAGES = np.random.default_rng(0).uniform(size=(4, 8, 8, 3)).astype(np.float32)


def make(**settings):
    return models.create("resnet_cifar", settings.pop("num_classes", 10), **{"depth": 8, "width": 4, **settings})


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


@pytest.mark.parametrize(
    "init, weights, biases", [("he", 2, 1 / 3), ("torch", 1 / 3, 1 / 3), ("torch_no_bias", 1 / 3, 0)]
)
def test_a_classifier_begins_as_its_authors_does(init, weights, biases):
    """Variances times the width: He's are 2, PyTorch's 1/3."""
    width = 64
    actual = layers.LinearClassifier(500, init).init(jax.random.key(0), jnp.ones((1, width)))["params"]
    assert float(actual["kernel"].var()) * width == pytest.approx(weights, rel=0.05)
    assert float(actual["bias"].var()) * width == pytest.approx(biases, rel=0.2)
    if init != "he":
        assert float(jnp.abs(actual["kernel"]).max()) <= width**-0.5


def test_an_unknown_start_of_the_classifier_names_the_known_ones():
    with pytest.raises(UserError, match="unknown model classifier_init 'xavier'; known: he, torch, torch_no_bias"):
        models.create("resnet_cifar", 10, classifier_init="xavier")


def test_initial_bias_is_uniform_within_one_over_the_root_of_the_width():
    classifier = layers.LinearClassifier(4000)
    bias = np.asarray(classifier.init(jax.random.key(0), jnp.ones((1, 16)))["params"]["bias"])
    assert np.abs(bias).max() <= 1 / 4
    actual, uniform = [bias.min(), bias.max(), bias.mean(), bias.std()], [-0.25, 0.25, 0, 0.5 / 12**0.5]
    np.testing.assert_allclose(actual, uniform, atol=0.01)


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


ONE = ((1, 1), (1, 1))
CONVOLUTIONS = [  # image, kernel, strides, padding
    ((8, 8), (3, 3), (1, 1), ONE),
    ((8, 8), (3, 3), (2, 2), ONE),
    ((7, 9), (3, 3), (2, 2), ONE),
    ((7, 9), (3, 3), (1, 1), ((0, 0), (0, 0))),
    ((8, 8), (1, 1), (1, 1), ((0, 0), (0, 0))),
    ((8, 7), (1, 1), (2, 2), ((0, 0), (0, 0))),
    ((6, 6), (1, 1), (1, 1), ONE),
    ((9, 8), (3, 3), (2, 2), ((0, 1), (2, 0))),
    ((9, 8), (5, 2), (2, 3), ((4, 1), (0, 3))),
    ((3, 3), (3, 3), (1, 1), ((3, 0), (0, 3))),
    ((1, 1), (3, 3), (2, 2), ONE),
    ((2, 2), (3, 3), (1, 1), ONE),
    ((1, 2), (3, 3), (1, 1), ((2, 1), (1, 2))),
    ((2, 2), (2, 1), (1, 1), ((0, 0), (0, 0))),
    ((11, 10), (7, 7), (2, 2), ((3, 3), (3, 3))),
    ((7, 8), (3, 3), (2, 2), "SAME"),
    ((7, 8), (3, 3), (2, 2), "VALID"),
]


@pytest.mark.parametrize("size, taps, strides, padding", CONVOLUTIONS)
def test_the_cpu_convolution_and_both_gradients_are_laxs(size, taps, strides, padding):
    compare_with_lax(size, taps, strides, padding, came=4, out=5, groups=1)


@pytest.mark.parametrize("came, out, groups", [(4, 6, 2), (6, 3, 3), (4, 4, 4), (3, 6, 3)])
@pytest.mark.parametrize("size, taps, strides, padding", [CONVOLUTIONS[0], CONVOLUTIONS[2], CONVOLUTIONS[-2]])
def test_the_grouped_cpu_convolution_and_both_gradients_are_laxs(size, taps, strides, padding, came, out, groups):
    compare_with_lax(size, taps, strides, padding, came=came, out=out, groups=groups)


def compare_with_lax(size, taps, strides, padding, *, came, out, groups):
    random = np.random.default_rng(0)
    x = random.normal(size=(3, *size, came)).astype(np.float32)
    kernel = random.normal(size=(*taps, came // groups, out)).astype(np.float32)

    def both(convolution):
        def run(x, kernel):
            rest = dict(lhs_dilation=(1, 1), rhs_dilation=(1, 1), dimension_numbers=("NHWC", "HWIO", "NHWC"))
            return convolution(x, kernel, strides, padding, feature_group_count=groups, **rest)

        value, pull_back = jax.vjp(run, x, kernel)
        weights = np.random.default_rng(1).normal(size=value.shape).astype(np.float32)
        return value, pull_back(jnp.asarray(weights))

    ours = jax.jit(partial(both, convolution.convolution_for("cpu")))()
    theirs = jax.jit(partial(both, lax.conv_general_dilated))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


@pytest.mark.parametrize("name", ["rhs_dilation", "lhs_dilation"])
def test_dilated_convolutions_are_laxs(name):
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 8, 8, 4)).astype(np.float32)
    kernel = random.normal(size=(3, 3, 4, 6)).astype(np.float32)
    settings = dict(lhs_dilation=(1, 1), rhs_dilation=(1, 1), dimension_numbers=("NHWC", "HWIO", "NHWC"), padding=ONE)
    settings[name] = (2, 2)
    actual = convolution.convolution_for("cpu")(x, kernel, (1, 1), **settings)
    np.testing.assert_array_equal(actual, lax.conv_general_dilated(x, kernel, (1, 1), **settings))


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_accelerators_run_laxs_convolution(platform):
    def program(convolution):
        run = lambda x, kernel: convolution(x, kernel, (2, 2), ONE, **NHWC)  # noqa: E731
        both = lambda x, kernel, dy: jax.vjp(run, x, kernel)[1](dy)  # noqa: E731
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 8, 8, 4), (3, 3, 4, 6), (2, 4, 4, 6))]
        return convolutions(jax.jit(both).lower(*shapes))

    assert len(program(lax.conv_general_dilated)) == 2
    assert set(program(convolution.convolution_for(platform))) == set(program(lax.conv_general_dilated))


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_of_vmapped_convolutions_are_those_of_a_grouped_one(groups):
    """Two with respect to the maps' channels, and none whose window is as wide as the map."""

    def gradients(convolution):
        def one(x, kernel, dy):
            run = lambda x, kernel: convolution(x, kernel, (2, 2), ONE, feature_group_count=groups, **NHWC)  # noqa: E731
            return jax.vjp(run, x, kernel)[1](dy)

        return jax.jit(jax.vmap(one))

    random = np.random.default_rng(0)
    operands = [
        random.normal(size=(5, *s)).astype(np.float32) for s in ((2, 8, 8, 4), (3, 3, 4 // groups, 6), (2, 4, 4, 6))
    ]
    ours, laxs = gradients(convolution.convolution_for("gpu")), gradients(lax.conv_general_dilated)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours(*operands), laxs(*operands))
    (to_x, to_kernel) = sorted(
        convolutions(ours.lower(*operands)), key=lambda line: "batch_group_count = 1 " not in line
    )
    assert f"feature_group_count = {5 * groups} " in to_x and f"batch_group_count = {5 * groups} " in to_kernel


@pytest.mark.parametrize("which, batched", [("x", (0, None)), ("kernel", (None, 0))])
def test_one_operand_of_a_vmapped_convolution_may_be_shared(which, batched):
    random = np.random.default_rng(0)
    x, kernel = (random.normal(size=s).astype(np.float32) for s in ((2, 8, 8, 4), (3, 3, 4, 6)))
    operands = [np.stack([value, 2 * value]) if batched[i] == 0 else value for i, value in enumerate((x, kernel))]

    def gradients(convolution):
        loss = lambda x, kernel: jnp.sin(convolution(x, kernel, (1, 1), ONE, **NHWC)).sum()  # noqa: E731
        return jax.vmap(jax.grad(loss, (0, 1)), batched)(*operands)

    ours, laxs = gradients(convolution.convolution_for("gpu")), gradients(lax.conv_general_dilated)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, laxs)


def test_gradients_have_the_precision_of_their_convolution():
    """Check that the precision is that of the forward call's context."""

    def loss(x, kernel):
        with jax.default_matmul_precision("float32"):
            return jnp.sin(convolution.convolution_for("gpu")(x, kernel, (1, 1), ONE, **NHWC)).sum()

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 8, 8, 4), (3, 3, 4, 6))]
    actual = convolutions(jax.jit(jax.grad(loss, (0, 1))).lower(*shapes))
    assert len(actual) == 3 and all("precision HIGHEST" in line and "DEFAULT" not in line for line in actual)


NHWC = dict(lhs_dilation=(1, 1), rhs_dilation=(1, 1), dimension_numbers=("NHWC", "HWIO", "NHWC"))


def convolutions(lowered):
    """Return the convolutions of a program, without the names of operands."""
    lines = [line for line in lowered.as_text().splitlines() if "stablehlo.convolution" in line]
    return [line.partition(" dim_numbers")[2] for line in lines]


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 6), (2, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_max_pool_and_its_gradient_are_flaxs(size, dtype):
    """The forward pass is bit-identical. Gradients of a pixel in several windows are summed in float32."""
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(np.random.default_rng(0).integers(-3, 4, (2, *size, 5)), dtype)  # many are equal
        ours, pull_back = jax.vjp(layers.max_pool, x)
        theirs, their_pull_back = jax.vjp(lambda x: nn.max_pool(x, (3, 3), (2, 2), ONE), x)
        np.testing.assert_array_equal(np.asarray(ours, np.float64), np.asarray(theirs, np.float64))
        assert ours.dtype == theirs.dtype
        dy = jnp.asarray(np.random.default_rng(1).integers(-8, 9, ours.shape) / 8, dtype)  # sums are exact
        (dx,), (expected,) = pull_back(dy), their_pull_back(dy)
        assert dx.dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(dx, np.float64), np.asarray(expected, np.float64))


@pytest.mark.parametrize("platform, scatters", [("cpu", False), ("gpu", False), ("tpu", True)])
def test_max_pools_gradient_scatters_only_on_a_tpu(platform, scatters):
    x = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.bfloat16)
    program = jax.jit(jax.grad(lambda x: layers.max_pool(x, platform).sum())).lower(x).as_text()
    assert ("select_and_scatter" in program) == scatters


@pytest.mark.parametrize("kernel_size, strides, size", [(3, 1, 9), (3, 2, 5), (1, 1, 9), (1, 2, 5), (7, 2, 5)])
def test_convolutions_are_padded_as_in_pytorch(kernel_size, strides, size):
    conv = layers.Conv(2, kernel_size=kernel_size, strides=strides)
    out, _ = conv.init_with_output(jax.random.key(0), jnp.ones((1, 9, 9, 3)))
    assert out.shape == (1, size, size, 2)


def batch_norm(x, *, scale=1.0, bias=0.0, mean=0.0, var=1.0, train=True, steps=1):
    """Return the output and the running statistics after some steps on the same x."""
    width = x.shape[-1]
    scale, bias, mean, var = (np.full(width, v, np.float32) for v in (scale, bias, mean, var))
    params, stats = {"scale": scale, "bias": bias}, {"mean": mean, "var": var}
    for _ in range(steps):
        variables = {"params": params, "batch_stats": stats}
        out, new = layers.BatchNorm().apply(variables, jnp.asarray(x), train, mutable=["batch_stats"])
        stats = new["batch_stats"]
    return out, stats


def test_batch_norm_is_pytorchs():
    random = np.random.default_rng(0)
    x = random.normal(2, 3, (4, 3, 2, 5)).astype(np.float32)  # 24 numbers a channel
    scale, bias = (random.normal(size=5).astype(np.float32) for _ in range(2))
    out, stats = batch_norm(x, scale=scale, bias=bias, steps=2)
    flat = x.astype(np.float64).reshape(-1, 5)
    expected = (x - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5) * scale + bias
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats["mean"], (1 - 0.9**2) * flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9**2 + (1 - 0.9**2) * flat.var(0, ddof=1), rtol=1e-5)


def test_batch_norm_in_evaluation_uses_and_keeps_running_statistics():
    x = np.random.default_rng(0).normal(size=(2, 3, 3, 2)).astype(np.float32)
    settings = {"scale": [1.0, 3.0], "bias": [0.5, 0.0], "mean": [1.0, -2.0], "var": [4.0, 0.25]}
    scale, bias, mean, var = (np.array(v, np.float32) for v in settings.values())
    out, after = batch_norm(x, **settings, train=False)
    np.testing.assert_allclose(out, (x - mean) / np.sqrt(var + 1e-5) * scale + bias, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, dict(after), {"mean": mean, "var": var})


def test_batch_norm_of_one_pixel_is_finite():
    out, stats = batch_norm(np.full((1, 1, 1, 2), 3.0, np.float32))
    np.testing.assert_allclose(out, np.zeros((1, 1, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(stats["var"], [0.9, 0.9], rtol=1e-6)


def test_batch_norm_of_equal_values_has_a_finite_gradient():
    norm, x = layers.BatchNorm(), jnp.full((2, 2, 2, 1), 7.1)
    variables = norm.init(jax.random.key(0), x, True)
    gradient = jax.grad(lambda x: jnp.square(norm.apply(variables, x, True, mutable=["batch_stats"])[0] - 1).sum())(x)
    assert np.isfinite(gradient).all()


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
    maps = net.backbone.apply({name: tree["backbone"] for name, tree in variables.items()}, IMAGES, False)
    assert [x.shape[1:3] for x in maps.values()] == [(8, 8), (4, 4), (2, 2)]
    layers = net.apply(variables, IMAGES).layers
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


def cosine(features, kernel, scale=1.0):
    module = layers.CosineClassifier(kernel.shape[1], scale)
    return module.apply({"params": {"kernel": kernel}}, features)


def test_cosine_logits_are_scaled_cosines():
    random = np.random.default_rng(0)
    features, kernel = random.normal(size=(6, 8)).astype(np.float32), random.normal(size=(8, 5)).astype(np.float32)
    lengths = np.linalg.norm(features, axis=1)[:, None] * np.linalg.norm(kernel, axis=0)
    np.testing.assert_allclose(cosine(features, kernel, 30.0), 30 * (features @ kernel) / lengths, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [0.0, 1e-20, 1e-6, 1.0, 1e15])
def test_cosine_logits_stay_within_the_scale(length):
    kernel = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    features = kernel.T * np.float32(length)
    logits = cosine(features, kernel, 30.0)
    assert np.abs(logits).max() <= 30 * (1 + 1e-5)


def test_cosine_weights_begin_with_length_1():
    """LDAM's authors do so, too: a step turns longer vectors less."""
    kernel = layers.CosineClassifier(5).init(jax.random.key(0), jnp.zeros((1, 64)))["params"]["kernel"]
    np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), np.ones(5), rtol=1e-6)


def test_cosine_classifier_has_a_finite_gradient_at_zero_features():
    kernel = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    gradients = jax.grad(lambda f, k: jnp.square(cosine(f, k, 30.0) - 1).sum(), (0, 1))(jnp.zeros((3, 8)), kernel)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_a_network_takes_the_cosine_classifier_with_its_scale():
    net = make(classifier="cosine", cosine_scale=16.0)
    variables = some_variables(net)
    assert variables["params"]["classifier"].keys() == {"kernel"}
    outputs = run(net, variables)
    expected = cosine(outputs.features, variables["params"]["classifier"]["kernel"], 16.0)
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


def test_float64_batch_norm_and_pooling_are_numpys():
    x = np.random.default_rng(0).normal(2, 3, (4, 3, 2, 5))
    with jax.enable_x64(True):
        params, stats = {"scale": np.full(5, 3.0), "bias": np.ones(5)}, {"mean": np.zeros(5), "var": np.ones(5)}
        variables = {"params": params, "batch_stats": stats}
        out, new = layers.BatchNorm().apply(variables, jnp.asarray(x), True, mutable=["batch_stats"])
        pooled = layers.pool(out)
    flat, stats = x.reshape(-1, 5), new["batch_stats"]
    expected = (x - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5) * 3 + 1
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(pooled, expected.mean((1, 2)), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(stats["mean"], 0.1 * flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-12)


def test_float64_images_are_normalised_in_float64():
    with jax.enable_x64(True):
        net, images = make(mean=(0.1, 0.2, 0.3), std=(0.3, 0.3, 0.7), dtype="float64"), IMAGES.astype(np.float64)
        variables = some_variables(net)
        actual = run(net, variables, images).logits
        expected = run(make(dtype="float64"), variables, (images - [0.1, 0.2, 0.3]) / [0.3, 0.3, 0.7]).logits
    np.testing.assert_allclose(actual, expected, rtol=1e-10)
