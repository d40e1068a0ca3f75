"""ResNets and ResNeXts for small and large images: sizes, strides, groups, and the blocks against NumPy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamShapeError
from jax import export

from ltjax import models
from ltjax.models.blocks import BasicBlock, Bottleneck
from ltjax.optim import flatten, unflatten
from ltjax.types import UserError
from tests.jaxprs import equations

IMAGES = np.random.default_rng(0).uniform(size=(4, 16, 16, 3)).astype(np.float32)


def make(num_classes=10, **settings):
    return models.create("resnet", num_classes, **settings)


def tiny(**settings):
    return make(**{"width": 4, "blocks": (1, 1, 1, 1), **settings})


RESNEXT = dict(groups=32, group_width=4)  # "32x4d"
NETWORKS = {f"ResNet-{depth}": dict(depth=depth) for depth in (10, 18, 34, 50, 101, 152)}
NETWORKS |= {f"ResNeXt-{depth}": dict(depth=depth, **RESNEXT) for depth in (50, 101)}


def large(num_classes=1000, **settings):
    return make(num_classes, stem="large", **settings)


@functools.cache
def shapes(net):
    return jax.eval_shape(net.init, jax.random.key(0), IMAGES)


def num_parameters(net):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(net)["params"]))


def count_by_hand(blocks, width, num_classes):
    """Count convolutions without bias, two numbers a channel for each norm, and a linear layer."""
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


RESNET_10 = (  # 7x7 from 3 channels, eight 3x3, three 1x1 shortcuts, two numbers for each norm's channel, a classifier
    49 * 3 * 64
    + 9 * (2 * 64 * 64 + 64 * 128 + 128 * 128 + 128 * 256 + 256 * 256 + 256 * 512 + 512 * 512)
    + (64 * 128 + 128 * 256 + 256 * 512)
    + 2 * (64 + 2 * 64 + 3 * 128 + 3 * 256 + 3 * 512)
    + 512 * 1000
    + 1000
)


def bottlenecks(came, out, inner, groups, number):
    """Count a stage's parameters: 1x1, grouped 3x3 and 1x1 convolutions, their norms, and the first shortcut."""
    each = 9 * inner * inner // groups + inner * out + 2 * (2 * inner + out)
    return number * each + came * inner + (number - 1) * out * inner + came * out + 2 * out


RESNEXT_101 = (
    49 * 3 * 64
    + 2 * 64
    + bottlenecks(64, 256, 128, 32, 3)
    + bottlenecks(256, 512, 256, 32, 4)
    + bottlenecks(512, 1024, 512, 32, 23)
    + bottlenecks(1024, 2048, 1024, 32, 3)
    + 2048 * 1000
    + 1000
)


@pytest.mark.parametrize(
    "name, published",
    [
        ("ResNet-10", RESNET_10),
        ("ResNet-18", 11_689_512),
        ("ResNet-34", 21_797_672),
        ("ResNet-50", 25_557_032),
        ("ResNet-101", 44_549_160),
        ("ResNet-152", 60_192_808),
        ("ResNeXt-50", 25_028_904),
        ("ResNeXt-101", RESNEXT_101),
    ],
)
def test_parameters_of_large_networks_are_the_published(name, published):
    assert num_parameters(large(**NETWORKS[name])) == published


def test_unpublished_counts_are_those_of_other_code():
    assert (RESNET_10, RESNEXT_101) == (5_418_792, 44_177_704)


@pytest.mark.parametrize(
    "name, published",
    [
        ("ResNet-18", 1.814),
        ("ResNet-34", 3.664),
        ("ResNet-50", 4.089),
        ("ResNet-101", 7.801),
        ("ResNet-152", 11.514),
        ("ResNeXt-50", 4.23),
    ],
)
def test_multiplications_for_an_image_are_those_torchvision_gives(name, published):
    """Count for 224x224 pixels, in units of 1e9, with products with the zeros of padding."""
    net, variables = large(**NETWORKS[name], platform="gpu"), shapes(large(**NETWORKS[name]))
    program = jax.make_jaxpr(net.apply)(variables, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)).jaxpr
    convolutions = [eqn for eqn in equations(program) if eqn.primitive.name == "conv_general_dilated"]
    products = [eqn.outvars[0].aval.size * np.prod(eqn.invars[1].aval.shape[:-1]) for eqn in convolutions]
    classifier = variables["params"]["classifier"]["kernel"].size
    assert (sum(products) + classifier) / 1e9 == pytest.approx(published, abs=6e-4)


@pytest.mark.parametrize("branches", [2, 3])
@pytest.mark.parametrize("name, width", [("ResNet-10", 512), ("ResNeXt-50", 2048)])
def test_reslts_branches_add_a_convolution_and_a_norm_for_each(name, width, branches):
    plain, branched = large(**NETWORKS[name]), large(**NETWORKS[name], branches=branches, branch_kind="conv")
    assert num_parameters(branched) - num_parameters(plain) == branches * (width**2 + 2 * width)


@pytest.mark.parametrize("depth, factor", [(18, 1), (50, 4)])
@pytest.mark.parametrize("size, sizes", [(224, [56, 28, 14, 7]), (97, [25, 13, 7, 4])])
def test_the_large_stem_quarters_the_image_and_later_stages_halve_it(depth, factor, size, sizes):
    net, image = large(depth=depth, width=8), jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    backbone = {name: tree["backbone"] for name, tree in shapes(net).items()}
    maps = jax.eval_shape(lambda variables, image: net.backbone.apply(variables, image, False), backbone, image)
    assert [x.shape for x in maps.values()] == [(1, s, s, factor * 8 * 2**stage) for stage, s in enumerate(sizes)]


@pytest.mark.parametrize("settings", [dict(groups=2, group_width=32), dict(groups=4, group_width=8)])
def test_group_width_gives_the_channels_of_a_group(settings):
    params = shapes(tiny(depth=50, width=8, **settings))["params"]["backbone"]
    for stage in range(4):
        group = settings["group_width"] * 8 // 64 * 2**stage
        expected = (3, 3, group, settings["groups"] * group)
        assert params[f"stage{stage + 1}_block1"]["conv2"]["kernel"].shape == expected


@pytest.mark.parametrize("stem, axes", [("small", (0, 1, 2)), ("large", (0, 1, 3))])
def test_initial_weights_are_hes_by_fan_in_or_fan_out(stem, axes):
    """The extra block is an exception: its authors keep PyTorch's variance 1 / (3 fan_in)."""
    key = jax.random.key(0, impl="unsafe_rbg")  # quick to compile
    net = tiny(depth=50, stem=stem, width=16, groups=2, group_width=32, extra_block=True)
    params = jax.device_get(jax.jit(net.init)(key, IMAGES)["params"])
    kernels = {path: kernel for path, kernel in flatten(params).items() if kernel.ndim == 4}
    assert len(kernels) == 1 + 4 * (3 + 1) + 3
    for path, kernel in kernels.items():
        fans, variance = ((0, 1, 2), 1 / 3) if path.startswith("block/") else (axes, 2)
        standard = np.std(kernel) * np.sqrt(np.prod([kernel.shape[axis] for axis in fans]) / variance)
        assert abs(standard - 1) < 4.5 / np.sqrt(2 * kernel.size), path


@pytest.mark.parametrize("name, stem", [("resnet", "small"), ("resnet", "large"), ("preact_resnet", None)])
def test_weights_start_as_pytorchs_on_request(name, stem):
    """Uniform in +-1 / sqrt(fan_in)."""
    settings = dict(stem=stem) if stem else {}
    net = models.create(name, 10, depth=18, blocks=(1, 1, 1, 1), width=8, init="torch", **settings)
    key = jax.random.key(0, impl="unsafe_rbg")
    params = jax.device_get(jax.jit(net.init)(key, IMAGES)["params"]["backbone"])
    for kernel in (leaf for leaf in flatten(params).values() if leaf.ndim == 4):
        scaled = kernel * kernel[..., 0].size ** 0.5
        assert 0.9 < np.abs(scaled).max() <= 1.0001
        assert abs(scaled.std() * 3**0.5 - 1) < 0.2


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


@pytest.mark.parametrize("path", ["params/backbone/conv/kernel", "params/backbone/norm/scale"])
def test_an_array_of_another_shape_is_refused(path):
    net = tiny()
    variables = unflatten({**flatten(shapes(net)), path: jax.ShapeDtypeStruct((5,), jnp.float32)})
    *_, layer, name = path.split("/")
    with pytest.raises(ScopeParamShapeError, match=f'"{name}" in "/backbone/{layer}"'):
        jax.eval_shape(lambda variables: net.apply(variables, IMAGES), variables)


def evaluated(module, variables, x):
    return jax.jit(module.apply, static_argnums=2)(variables, x, False)


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
    actual = evaluated(block, zeros(block, x, params__shortcut__kernel=kernel, **norm), x)
    expected = (x[:, ::strides, ::strides] @ kernel[0, 0] - mean) / np.sqrt(var + 1e-5) * scale + bias
    np.testing.assert_allclose(actual, np.maximum(expected, 0), rtol=1e-4, atol=1e-5)


def test_a_block_of_the_same_shape_adds_its_input():
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 4)).astype(np.float32)
    block = BasicBlock(4, 1, jnp.float32, None)
    np.testing.assert_array_equal(evaluated(block, zeros(block, x), x), np.maximum(x, 0))


def test_training_mode_changes_every_statistic_and_no_parameter():
    net = tiny()
    before = random_variables(shapes(net))
    outputs, after = jax.jit(lambda variables: net.apply(variables, IMAGES, True, mutable=True))(before)
    assert np.isfinite(outputs.logits).all()
    jax.tree.map(np.testing.assert_array_equal, after["params"], before["params"])
    statistics = flatten(jax.tree.map(np.asarray, after["batch_stats"]))
    for path, value in flatten(before["batch_stats"]).items():
        assert not np.any(statistics[path] == value), path


def random_variables(like, seed=1):
    draw = np.random.default_rng(seed)
    values = {path: draw.normal(0.1, 0.5, leaf.shape).astype(np.float32) for path, leaf in flatten(like).items()}
    return unflatten({path: abs(value) + 0.1 if path.endswith("/var") else value for path, value in values.items()})


def convolution(x, kernel, strides=1):
    """3x3, padded by a pixel on each side."""
    padded = np.pad(np.float64(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    taps = [
        padded[:, i : i + height : strides, j : j + width : strides] @ kernel[i, j] for i in range(3) for j in range(3)
    ]
    return np.sum(taps, 0)


@pytest.mark.parametrize("strides, features, groups", [(1, 8, 1), (2, 8, 1), (2, 12, 3), (1, None, 2)])
def test_a_bottlenecks_3x3_convolution_has_stride_and_groups(strides, features, groups):
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 8)).astype(np.float32)
    block = Bottleneck(features, strides, inner=6, groups=groups)
    like = jax.eval_shape(lambda rng: block.init(rng, x, False), jax.random.key(0))
    variables = random_variables(like)
    params, stats = variables["params"], variables["batch_stats"]

    def norm(x, name):
        scaled = (x - stats[name]["mean"]) / np.sqrt(stats[name]["var"] + 1e-5)
        return scaled * params[name]["scale"] + params[name]["bias"]

    y = np.maximum(norm(np.float64(x) @ params["conv1"]["kernel"][0, 0], "norm1"), 0)
    parts = zip(np.split(y, groups, -1), np.split(params["conv2"]["kernel"], groups, -1), strict=True)
    y = np.concatenate([convolution(part, kernel, strides) for part, kernel in parts], -1)
    y = norm(np.maximum(norm(y, "norm2"), 0) @ params["conv3"]["kernel"][0, 0], "norm3")
    if strides != 1 or features == 12:
        y += norm(np.float64(x)[:, ::strides, ::strides] @ params["shortcut"]["kernel"][0, 0], "shortcut_norm")
    else:
        assert "shortcut" not in params
        y += x
    np.testing.assert_allclose(evaluated(block, variables, x), np.maximum(y, 0), rtol=1e-4, atol=1e-4)


def places(**settings):
    return tiny(depth=50, extra_block=True, **settings)


def test_mislass_network_for_places_is_as_large_as_resnet_152():
    """The extra block replaces the last one, and has the same size."""
    net = large(depth=152, blocks=(3, 8, 36, 2), extra_block=True)
    assert num_parameters(net) == 60_192_808
    block = flatten(shapes(net)["params"]["block"])
    kernels = {path: leaf.shape for path, leaf in block.items() if path.endswith("kernel")}
    expected = {"conv1": (1, 1, 2048, 512), "conv2": (3, 3, 512, 512), "conv3": (1, 1, 512, 2048)}
    assert kernels == {f"{name}/kernel": shape for name, shape in expected.items()}


@pytest.fixture(scope="module")
def extended():
    """Return variables, outputs, and new variables of evaluation and training with an extra block."""
    net = places()
    variables = random_variables(shapes(net))
    run = jax.jit(lambda variables, train: net.apply(variables, IMAGES, train, mutable=True), static_argnums=1)
    return net, variables, run(variables, False), run(variables, True)


def parts_of(variables, name):
    return {kind: tree[name] for kind, tree in variables.items()}


def test_the_classifier_follows_the_extra_block(extended):
    net, variables, (outputs, _), _ = extended
    maps = evaluated(net.backbone, parts_of(variables, "backbone"), IMAGES)
    last = evaluated(Bottleneck(), parts_of(variables, "block"), maps["stage4"])
    head, outputs = variables["params"]["classifier"], jax.tree.map(np.asarray, outputs)
    assert list(outputs.layers) == ["stage1", "stage2", "stage3", "stage4", "stage5"]
    np.testing.assert_allclose(outputs.layers["stage4"], np.mean(maps["stage4"], (1, 2)), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(outputs.features, np.mean(last, (1, 2)), rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(outputs.layers["stage5"], outputs.features)
    np.testing.assert_allclose(outputs.logits, outputs.features @ head["kernel"] + head["bias"], rtol=1e-3, atol=1e-3)


def test_with_an_extra_block_the_backbone_is_in_evaluation_mode(extended):
    _, before, (in_evaluation, _), (trained, after) = extended
    after = flatten(jax.tree.map(np.asarray, after))
    changed = {path for path, value in flatten(before).items() if np.any(after[path] != value)}
    assert changed == {f"batch_stats/block/norm{n}/{leaf}" for n in (1, 2, 3) for leaf in ("mean", "var")}
    np.testing.assert_allclose(trained.layers["stage4"], in_evaluation.layers["stage4"], rtol=1e-4, atol=1e-4)
    assert np.abs(trained.features - in_evaluation.features).max() > 0.1


def test_branches_follow_the_extra_block():
    outputs = jax.eval_shape(lambda rng: places(branches=3).init_with_output(rng, IMAGES)[0], jax.random.key(0))
    assert (outputs.branches.shape, outputs.features.shape) == ((3, 4, 10), (4, 128))


def test_bfloat16_computes_alike_with_float32_outside():
    """Check a network for large images with all optional parts."""
    settings = dict(depth=50, stem="large", width=8, groups=2, group_width=32, extra_block=True)
    whole, half = (tiny(**settings, branches=2, branch_kind="conv", dtype=dtype) for dtype in ("float32", "bfloat16"))
    variables = random_variables(shapes(whole))
    images = np.random.default_rng(0).uniform(size=(4, 64, 64, 3)).astype(np.float32)
    logits = [jax.jit(net.apply)(variables, images).logits for net in (whole, half)]
    after = jax.eval_shape(lambda v: half.apply(v, images, True, mutable=True), variables)
    assert {leaf.dtype for leaf in jax.tree.leaves((shapes(half), after, logits))} == {jnp.dtype("float32")}
    assert 0 < np.linalg.norm(logits[0] - logits[1]) / np.linalg.norm(logits[0]) < 0.03


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", ["ResNet-50", "ResNeXt-50"])
def test_large_networks_lower_for_accelerators(name, platform):
    settings = dict(dtype="bfloat16", platform={"tpu": "tpu", "cuda": "gpu"}[platform])
    net, images = large(**NETWORKS[name], **settings), jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    lowered = export.export(jax.jit(net.apply), platforms=[platform])(shapes(large(**NETWORKS[name])), images)
    assert lowered.platforms == (platform,)
    assert lowered.mlir_module().count("stablehlo.convolution") == 53


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(depth=20), "model depth = 20: take 10, 18, 34, 50, 101 or 152"),
        (dict(stem="7x7"), "unknown model stem '7x7'; known: small, large"),
        (dict(depth=50, groups=0), "model groups = 0, group_width = 64: at least 1 each"),
        (dict(depth=50, width=8, groups=2, group_width=4), "group_width * width / 64 a whole number (width = 8)"),
        (dict(groups=32, group_width=4), "depth 18 has no bottlenecks for them; take depth 50, 101 or 152"),
        (dict(width=0), "model width = 0: the first stage needs at least one channel"),
        (dict(blocks=(2, 2, 0, 2)), "model blocks = (2, 2, 0, 2): one integer above 0 for each of the four stages"),
        (dict(strides=(1, 2, 2)), "model strides = (1, 2, 2): one integer above 0 for each of the four stages"),
        (dict(pool=3), "model 'resnet' has no setting 'pool'; allowed: depth, stem, width, strides, blocks, groups"),
    ],
)
def test_unknown_settings_are_errors_that_name_the_known(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make(**settings)
