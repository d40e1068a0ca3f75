"""Vision transformers against timm's, DINOv2's and CLIP's numbers, and their adapters and settings."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export

from ltjax import methods, models, optim
from ltjax.engine import stage
from ltjax.interop.torch import implied, place
from ltjax.models import vit
from ltjax.system import parallel
from ltjax.types import Batch, UserError
from tests import stages

TINY = dict(depth=2, width=8, heads=2, patch=4, grid=2)
IMAGES = np.random.default_rng(0).uniform(size=(8, 8, 8, 3)).astype(np.float32)
CLOSE = 1e-5  # of the largest number


def tiny(num_classes=10, **settings):
    return models.create("vit", num_classes, **{**TINY, **settings})


def shapes(net):
    return jax.eval_shape(net.init, jax.random.key(0), models.example(net))


def random_params(net, seed=1):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: draw.normal(0, 0.3, leaf.shape).astype(np.float32), shapes(net)["params"])


def agree(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=CLOSE * np.abs(expected).max())


def outcomes(net, params, images):
    """Return the outputs, and tokens: embedded, before each block, after the last, after the last LayerNorm.

    CLIP has a LayerNorm between the first two.
    """

    def run(params, images):
        tokens, embedded = [], []

        def watch(call, arguments, keywords, context):
            value = call(*arguments, **keywords)
            if isinstance(context.module, vit.Block):
                tokens.append(arguments[0])
            elif context.module.name == "pre_norm":
                embedded.append(arguments[0])
            elif isinstance(context.module, vit.LayerNorm) and context.module.name == "norm":
                tokens.extend((arguments[0], value))
            return value

        with nn.intercept_methods(watch):
            outputs = net.apply({"params": params}, images)
        return outputs, [*embedded, tokens[0]][0], tokens[:-1], tokens[-1]

    outputs, embedded, tokens, last = jax.jit(run)(params, images)
    return SimpleNamespace(outputs=outputs, embedded=embedded, tokens=tokens, last=last)


# file: (settings that its arrays do not tell, its names of features)
GOLDEN = {"dinov2_reg4_timm": ({}, "features"), "clip_visual": ({}, "embedding")}


@pytest.fixture(scope="module", params=GOLDEN)
def imported(request, golden):
    """Return the golden numbers, the network with their weights, and what it computes."""
    numbers, (settings, features) = golden(request.param), GOLDEN[request.param]
    return whole(numbers, features, **settings)


def whole(numbers, named, **settings):
    state_dict = {k.removeprefix("state_dict/"): v for k, v in numbers.items() if k.startswith("state_dict/")}
    pixels = {key: tuple(numbers[key].tolist()) for key in ("mean", "std")}
    settings = {**implied(state_dict), **pixels, **settings}
    name, num_classes = settings.pop("name"), settings.pop("num_classes", 0)
    net = models.create(name, num_classes or 1, **settings)
    params = place(state_dict, net, () if num_classes else ("backbone",)).variables.params["net"]
    if not num_classes:
        width = numbers[named].shape[1]
        params["classifier"] = dict(kernel=np.zeros((width, 1), np.float32), bias=np.zeros(1, np.float32))
    computed = outcomes(net, params, numbers["images"].astype(np.float32) / 255)
    return SimpleNamespace(numbers=numbers, net=net, params=params, features=named, computed=computed)


def test_features_and_logits_are_timms_and_clips(imported):
    agree(imported.computed.outputs.features, imported.numbers[imported.features])
    if imported.features == "features":  # CLIP has no classifier
        agree(imported.computed.outputs.logits, imported.numbers["logits"])


def test_tokens_before_the_blocks_are_theirs(imported):
    agree(imported.computed.embedded, imported.numbers["tokens_embedded"])


def test_class_tokens_of_all_blocks_are_timms_and_clips(imported):
    taps = [tokens[:, 0] for tokens in (imported.computed.embedded, *imported.computed.tokens[1:])]
    assert len(taps) == len(imported.numbers["taps_cls"]) == 4
    for actual, expected in zip(taps, imported.numbers["taps_cls"], strict=True):
        agree(actual, expected)


def test_tokens_after_the_last_norm_are_theirs(imported):
    agree(imported.computed.last, imported.numbers["tokens"])


@pytest.mark.parametrize("which", [0, 1])
def test_images_of_another_size_have_their_features(imported, which):
    size = sorted(key.removeprefix("images_") for key in imported.numbers if key.startswith("images_"))[which]
    images = imported.numbers[f"images_{size}"].astype(np.float32) / 255
    outputs = outcomes(imported.net, imported.params, images).outputs
    agree(outputs.features, imported.numbers[f"{imported.features}_{size}"])
    if f"logits_{size}" in imported.numbers:
        agree(outputs.logits, imported.numbers[f"logits_{size}"])


def test_the_mean_of_the_patches_follows_the_class_token_in_probes(golden):
    numbers = golden("dinov2_reg4_timm")
    state_dict = {k: v for k, v in numbers.items() if not k.startswith("state_dict/head")}
    done = whole({**state_dict, "both": np.zeros((1, 256))}, "both", features="class_and_mean")
    agree(done.computed.outputs.features, np.concatenate([numbers["features"], numbers["patch_mean"]], -1))


def test_clips_features_before_the_projection_are_theirs(golden):
    done = whole(golden("clip_visual"), "features", projection=0)
    agree(done.computed.outputs.features, done.numbers["features"])


def test_laions_activation_gives_other_features(golden):
    done = whole(golden("clip_visual"), "embedding", activation="gelu")
    agree(done.computed.outputs.features, done.numbers["embedding_gelu"])
    assert np.abs(done.numbers["embedding_gelu"] - done.numbers["embedding"]).max() > 0.01


@pytest.fixture(scope="module")
def first_block(golden):
    """timm's ViT cut after its first block; the last LayerNorm and the head are ours."""
    numbers = golden("vit_timm")
    width = numbers["state_dict/cls_token"].shape[-1]
    rest = {"norm.weight": np.ones(width), "norm.bias": np.zeros(width)}
    rest |= {"head.weight": np.zeros((2, width)), "head.bias": np.zeros(2)}
    return whole({**numbers, **{f"state_dict/{key}": np.float32(value) for key, value in rest.items()}}, "tokens")


def test_a_plain_block_is_timms(first_block):
    agree(first_block.computed.embedded, first_block.numbers["tokens_embedded"])
    for actual, expected in zip(first_block.computed.tokens, first_block.numbers["taps_cls"], strict=True):
        agree(actual[:, 0], expected)


@pytest.mark.parametrize("side", [32, 96])
def test_positions_are_resampled_as_in_timm(first_block, side):
    expected = first_block.numbers[f"pos_embed_{side}"][0, 1:]
    actual = vit.resampled(first_block.params["backbone"]["positions"], side // 16, side // 16)
    np.testing.assert_allclose(np.reshape(actual, expected.shape), expected, rtol=0, atol=2e-6)


COUNTS = {  # of timm's networks with num_classes=0, and of CLIP's visual tower
    "ViT-S/16": (dict(width=384), 21_665_664),
    "ViT-B/16": (dict(width=768), 85_798_656),
    "DINOv2 ViT-S/14": (dict(width=384, patch=14, grid=37, layer_scale=True), 22_056_192),
    "CLIP ViT-B/16": (dict(width=768, pre_norm=True, projection=512), 86_192_640),
}


@pytest.mark.parametrize("name", COUNTS)
def test_numbers_of_parameters(name):
    """There is one number less for each channel than in theirs: the class token has no position."""
    settings, theirs = COUNTS[name]
    net = models.create("vit", 2, **settings)
    number = sum(leaf.size for leaf in jax.tree.leaves(shapes(net)["params"]["backbone"]))
    assert number == theirs - settings["width"]


@pytest.mark.parametrize("features, width", [("class", 8), ("mean", 8), ("class_and_mean", 16)])
def test_features_are_vectors_in_float32(features, width):
    net = tiny(features=features, dtype="bfloat16")
    outputs = jax.eval_shape(net.apply, shapes(net), IMAGES)
    assert (outputs.features.shape, outputs.features.dtype) == ((8, width), jnp.float32)
    assert {name: layer.shape for name, layer in outputs.layers.items()} == {"stage1": (8, width)}
    assert outputs.logits.dtype == jnp.float32


def test_bfloat16_computes_alike_with_float32_parameters(golden):
    numbers = golden("dinov2_reg4_timm")
    half = whole(numbers, "features", dtype="bfloat16")
    error = np.linalg.norm(half.computed.outputs.features - numbers["features"]) / np.linalg.norm(numbers["features"])
    assert 1e-4 < error < 0.02
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes(half.net))} == {jnp.dtype("float32")}


def test_float64_is_float64_throughout():
    with jax.enable_x64(True):
        net = tiny(dtype="float64", layer_scale=True, registers=1, adapter="lora")
        images = IMAGES.astype(np.float64)
        text = str(jax.make_jaxpr(net.apply)({"params": random_params(net)}, images))
    assert "convert_element_type[new_dtype=float32" not in text and "f64[8,10]" in text


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_networks_lower_for_accelerators(platform):
    net = models.create("vit", 10, width=384, dtype="bfloat16", platform={"tpu": "tpu", "cuda": "gpu"}[platform])
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    lowered = export.export(jax.jit(net.apply), platforms=[platform])(shapes(net), images)
    assert lowered.platforms == (platform,)


def test_images_that_do_not_divide_into_patches_are_refused():
    net = tiny(patch=14)
    with pytest.raises(UserError, match=r"100 x 112 pixels .* 14 x 14 \(model.patch\): take a side such as 98 or 112"):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 100, 112, 3)))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(width=0), "model width = 0: at least 1"),
        (dict(heads=3), "model width = 8, heads = 3: the width is a multiple of the heads"),
        (dict(activation="relu"), "unknown model activation 'relu'; known: gelu, gelu_tanh, quick_gelu"),
        (dict(features="patches"), "unknown model features 'patches'; known: class, class_and_mean, mean"),
        (dict(adapter="prompts"), "unknown model adapter 'prompts'; known: none, adaptformer, lora"),
        (dict(rank=4), "model rank = 4: it is for an adapter"),
        (dict(projection=4, features="class_and_mean"), "a projection is of D channels"),
        (dict(num_class=4), "model 'vit' has no setting 'num_class'; allowed: depth, width, heads"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        tiny(**settings)


def test_an_extra_block_is_refused():
    with pytest.raises(UserError, match="extra_block = True: the backbone returns features"):
        shapes(tiny(extra_block=True))


@pytest.mark.parametrize("kind", ["norm", "conv", "pooled_conv"])
def test_branches_take_the_class_token(kind):
    net = tiny(branches=2, branch_kind=kind)
    variables = shapes(net)
    outputs, _ = jax.eval_shape(lambda v: net.apply(v, IMAGES, True, mutable=["batch_stats"]), variables)
    assert (outputs.branches.shape, outputs.features.shape) == ((2, 8, 10), (8, 8))


@pytest.mark.parametrize("num_classes, depth, rank", [(1000, 12, 32), (8142, 12, 256), (23, 12, 1), (48, 12, 2)])
def test_the_rank_of_adapters_is_lifts(num_classes, depth, rank):
    assert vit.default_rank(num_classes, depth) == rank
    params = optim.flatten(shapes(models.create("vit", num_classes, depth=depth, width=8, adapter="lora"))["params"])
    assert params["backbone/block1/attention/adapter/query_down/kernel"].shape == (8, rank)


def test_adaptformers_for_imagenet_lt_have_lifts_parameters():
    net = models.create("vit", 1000, adapter="adaptformer")
    assert sum(leaf.size for path, leaf in optim.flatten(shapes(net)).items() if "/adapter/" in path) == 617_868


ADAPTED = {"adaptformer": dict(adapter="adaptformer", rank=4), "lora": dict(adapter="lora", rank=4)}
adapters = pytest.mark.parametrize("kind", ADAPTED)


@adapters
def test_a_new_adapter_changes_nothing(kind):
    plain, adapted = tiny(), tiny(**ADAPTED[kind])
    params = random_params(plain)

    def of_adapters(key):
        fresh = optim.flatten(adapted.init(key, IMAGES)["params"])
        return {path: value for path, value in fresh.items() if "/adapter/" in path}

    added = jax.jit(of_adapters)(jax.random.key(0, impl="unsafe_rbg"))
    assert added.keys() == optim.flatten(shapes(adapted)["params"]).keys() - optim.flatten(params).keys()
    both = optim.unflatten({**optim.flatten(params), **added})
    logits = [jax.jit(net.apply)({"params": p}, IMAGES).logits for net, p in ((plain, params), (adapted, both))]
    np.testing.assert_array_equal(*logits)


def test_an_adaptformer_computes_lifts_formula():
    draw, x = np.random.default_rng(0), np.random.default_rng(1).normal(size=(2, 3, 8)).astype(np.float32)
    module = vit.AdaptFormer(4, jnp.float32)
    like = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    p = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), like)
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-5) * p["norm"]["scale"] + p["norm"]["bias"]
    y = np.maximum(y @ p["down"]["kernel"] + p["down"]["bias"], 0) @ p["up"]["kernel"] + p["up"]["bias"]
    np.testing.assert_allclose(jax.jit(module.apply)({"params": p}, x), y * p["scale"], rtol=1e-4, atol=1e-4)


def test_a_lora_adds_low_rank_products_to_queries_and_values():
    draw, x = np.random.default_rng(0), np.random.default_rng(1).normal(size=(2, 3, 8)).astype(np.float32)
    module = vit.LoRA(4, jnp.float32)
    like = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    p = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), like)
    for change, kind in zip(jax.jit(module.apply)({"params": p}, x), ("query", "value"), strict=True):
        expected = x @ p[f"{kind}_down"]["kernel"] @ p[f"{kind}_up"]["kernel"] / 4
        np.testing.assert_allclose(change, expected, rtol=1e-4, atol=1e-4)


def test_a_lora_is_only_in_queries_and_values():
    """Compare with a network whose weights of queries and values include the product."""
    net, params = tiny(adapter="lora", rank=2), random_params(tiny(adapter="lora", rank=2))
    merged, flat = tiny(), optim.flatten(params)
    for block in ("backbone/block1", "backbone/block2"):
        adapter = f"{block}/attention/adapter"
        kinds = ("query", "value")
        query, value = (flat[f"{adapter}/{k}_down/kernel"] @ flat[f"{adapter}/{k}_up/kernel"] / 2 for k in kinds)
        kernel = flat[f"{block}/attention/qkv/kernel"]
        flat[f"{block}/attention/qkv/kernel"] = kernel + np.concatenate([query, np.zeros_like(query), value], 1)
    alone = optim.unflatten({path: value for path, value in flat.items() if "/adapter/" not in path})
    logits = [jax.jit(n.apply)({"params": p}, IMAGES).logits for n, p in ((net, params), (merged, alone))]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)


# Regular expressions of the body and of the adapters, as parameter groups of a stage; docs/weights.md has them, too.
BODY, ADAPTERS = r"net/backbone/(?!.*/adapter/).*", r"net/backbone/.*/adapter/.*"
FROZEN = {
    "body": dict(match=BODY, rate=0.0),
    "adapter": dict(match=ADAPTERS, rate=1.0),
    "classifier": dict(match="net/classifier/.*", rate=1.0),
}
WHOLE = {"all": dict(match=".*", rate=1.0)}


def compiled(net, *, groups, devices=1, replicas=1, replicate="loop"):
    """Return a stage of cross-entropy on 16 images, its initial state and its images."""
    mesh, method = parallel.make_mesh(jax.devices()[:devices], replicas), methods.create("erm", (8, 8))
    source = (np.concatenate([IMAGES, IMAGES[::-1] ** 2]), np.asarray([0, 1] * 8, np.int32))
    source, params = jax.device_put(source, parallel.replicated(mesh)), {"net": random_params(net, seed=3)}

    def draw(source, seed, step, rng):
        return Batch(*(parallel.split(x, mesh) for x in source))

    layout = dict(mesh=mesh, image_shape=(8, 8, 3), replicas=replicas, replicate=replicate)
    settings = dict(groups=groups, lr=0.5, factors=np.ones(1), steps_per_epoch=4, momentum=0.9)
    done = stages.build({"net": net}, method, draw, params, **settings, **layout)
    start = stage.Variables(params, {"net": {}}, {})
    if replicas > 1:
        start = jax.tree.map(lambda x: np.stack([x * (1 + 0.1 * r) for r in range(replicas)]), start)
    seed = np.arange(replicas, dtype=np.uint32) if replicas > 1 else np.uint32(0)
    return done, lambda: done.init(seed, jax.device_put(start, parallel.state_sharding(mesh, replicas))), source


@adapters
def test_a_stage_trains_adapters_and_classifier_with_a_frozen_body(kind):
    done, start, source = compiled(tiny(2, **ADAPTED[kind]), groups=FROZEN)
    before = jax.tree.map(np.array, optim.flatten(start().variables.params))
    state, metrics = jax.device_get(done.run(start(), source, 4))
    after = optim.flatten(state.variables.params)
    changed = {path for path in after if np.any(after[path] != before[path])}
    expected = {path for path in after if re.fullmatch(f"{ADAPTERS}|net/classifier/.*", path)}
    assert changed == expected == set(done.trained)
    assert metrics["loss"][-1] < metrics["loss"][0]


def test_a_stage_trains_the_whole_network():
    done, start, source = compiled(tiny(2, layer_scale=True, registers=1, pre_norm=True, projection=4), groups=WHOLE)
    before = jax.tree.map(np.array, optim.flatten(start().variables.params))
    state, metrics = jax.device_get(done.run(start(), source, 4))
    after = optim.flatten(state.variables.params)
    assert {path for path in after if np.array_equal(after[path], before[path])} == set()
    assert metrics["loss"][-1] < metrics["loss"][0]


@adapters
def test_a_frozen_body_has_no_gradients_of_weights(kind):
    """Check that two of the three products of a step remain, without those for gradients of weights."""
    wide = dict(width=64, grid=2, heads=1, **ADAPTED[kind])
    flops = {}
    for name, groups in (("whole", WHOLE), ("frozen", FROZEN)):
        done, start, source = compiled(tiny(2, **wide), groups=groups)
        program = done.run.lower(jax.eval_shape(start), source, 1).compile()
        flops[name] = program.cost_analysis()["flops"]
    assert flops["frozen"] < 0.72 * flops["whole"]  # 2 of 3 products, and small things


def trained(**layout):
    """Return the state and the metrics after three steps of a network with registers and adapters."""
    net = tiny(2, registers=1, layer_scale=True, **ADAPTED["adaptformer"])
    done, start, source = compiled(net, groups=FROZEN, **layout)
    return jax.device_get(done.run(start(), source, 3))


@pytest.fixture(scope="module")
def on_one_device():
    return trained()


@pytest.mark.parametrize("devices, replicas, replicate", [(8, 1, "loop"), (1, 2, "vmap"), (4, 2, "loop")])
def test_devices_and_replicas_train_as_one_device(on_one_device, devices, replicas, replicate):
    state, metrics = trained(devices=devices, replicas=replicas, replicate=replicate)
    expected, losses = on_one_device
    first = (lambda x: x[0]) if replicas > 1 else (lambda x: x)
    np.testing.assert_allclose(first(metrics["loss"]), losses["loss"], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(first(a), b, rtol=1e-3, atol=1e-5),
        state.variables.params,
        expected.variables.params,
    )
