import jax
import numpy as np
import pytest

from ltjax import models
from ltjax.interop.torch import class_order, export_state_dict, implied, import_state_dict, place, read_model
from ltjax.optim import flatten
from ltjax.types import UserError


@pytest.fixture(scope="module")
def net():
    return models.create("resnet_cifar", 100, depth=8)


def initial(golden):
    numbers = golden("mislas_stage1")
    return {key.removeprefix("init/"): value for key, value in numbers.items() if key.startswith("init/")}


def test_module_prefixes_change_nothing(golden, net):
    state_dict = initial(golden)
    plain = import_state_dict(state_dict, net)
    wrapped = import_state_dict({f"module.{key}": value for key, value in state_dict.items()}, net)
    jax.tree.map(np.testing.assert_array_equal, plain, wrapped)


def test_a_missing_logit_scale_is_one(golden):
    scaled = models.create("resnet_cifar", 100, depth=8, logit_scale=True)
    variables = import_state_dict(initial(golden), scaled)
    np.testing.assert_array_equal(variables.params["net"]["logit_scale"], np.ones(100))


def test_every_key_without_a_place_is_named(golden, net):
    state_dict = {**initial(golden), "model.layer4.0.conv1.weight": np.zeros((1, 1, 3, 3)), "extra": np.zeros(3)}
    with pytest.raises(
        UserError, match=r"no place for \['model\.layer4\.0\.conv1\.weight', 'extra'\]; nothing for \[\]"
    ):
        import_state_dict(state_dict, net)


def test_another_shape_is_named(golden, net):
    state_dict = {**initial(golden), "classifier.fc.weight": np.zeros((10, 64), np.float32)}
    with pytest.raises(UserError, match=r"classifier\.fc\.weight \(shape \(64, 10\), the model has \(64, 100\)\)"):
        import_state_dict(state_dict, net)


def test_a_weight_that_no_key_gives_is_named(golden, net):
    state_dict = initial(golden)
    del state_dict["model.layer2.0.bn1.running_var"]
    with pytest.raises(UserError, match=r"nothing for \['backbone/stage2_block1/norm1/var'\]"):
        import_state_dict(state_dict, net)


def test_drolts_names_give_the_same_network(golden, net):
    state_dict = initial(golden)
    renamed = {key.removeprefix("model.").replace("classifier.fc", "linear"): v for key, v in state_dict.items()}
    assert {"conv1.weight", "layer1.0.conv1.weight", "linear.bias"} <= renamed.keys()
    jax.tree.map(np.testing.assert_array_equal, import_state_dict(state_dict, net), import_state_dict(renamed, net))


def test_reslts_head_medium_and_tail_norms_are_branches_1_2_and_3(golden):
    numbers = golden("reslt_train")
    state_dict = {key.removeprefix("final/"): value for key, value in numbers.items() if key.startswith("final/")}
    branched = models.create("resnet_cifar", 100, depth=8, branches=3)
    variables = import_state_dict(state_dict, branched)
    for number, theirs in enumerate(("BNH", "BNM", "BNT")):
        params, stats = (tree["net"]["branches"][f"norm{number + 1}"] for tree in (variables.params, variables.stats))
        ours = {"weight": params["scale"], "bias": params["bias"]}
        ours |= {"running_mean": stats["mean"], "running_var": stats["var"]}
        for leaf, value in ours.items():
            np.testing.assert_array_equal(value, state_dict[f"{theirs}.{leaf}"])


def lbgats(golden, which):
    """Return the weights of one of LBGAT's two networks, without `teacher.`."""
    numbers = golden("lbgat_step")
    return {k.removeprefix(f"init/{which}."): v for k, v in numbers.items() if k.startswith(f"init/{which}.")}


@pytest.fixture(scope="module")
def wide():
    return models.create("wide_resnet", 100, depth=10, width=1)


@pytest.mark.parametrize("prefix", ["model.", "module.model.", "module."])
def test_lbgats_prefixes_change_nothing(golden, wide, prefix):
    state_dict = lbgats(golden, "model")
    wrapped = {prefix + key: value for key, value in state_dict.items()}
    jax.tree.map(np.testing.assert_array_equal, import_state_dict(state_dict, wide), import_state_dict(wrapped, wide))


def test_the_names_of_a_wide_resnet_have_their_places(golden, wide):
    state_dict = lbgats(golden, "teacher")
    variables = import_state_dict(state_dict, wide)
    backbone, stats = variables.params["net"]["backbone"], variables.stats["net"]["backbone"]
    for path, value in {
        "block2.layer.0.convShortcut.weight": backbone["stage2_block1"]["shortcut"]["kernel"].transpose(3, 2, 0, 1),
        "block1.layer.0.conv2.weight": backbone["stage1_block1"]["conv2"]["kernel"].transpose(3, 2, 0, 1),
        "block3.layer.0.bn2.weight": backbone["stage3_block1"]["norm2"]["scale"],
        "bn1.running_var": stats["norm"]["var"],
    }.items():
        np.testing.assert_array_equal(value, state_dict[path])


def test_the_unused_stage_of_wide_resnets_is_ignored(golden, wide):
    state_dict = lbgats(golden, "model")
    used = {key: value for key, value in state_dict.items() if not key.startswith("sub_block1.")}
    assert len(used) < len(state_dict)
    jax.tree.map(np.testing.assert_array_equal, import_state_dict(state_dict, wide), import_state_dict(used, wide))


def test_lbgats_second_network_has_no_place(golden, wide):
    both = {f"{which}.{key}": v for which in ("model", "teacher") for key, v in lbgats(golden, which).items()}
    with pytest.raises(UserError, match=r"no place for \['teacher\.conv1\.weight', .*; nothing for \[\]"):
        import_state_dict(both, wide)


BLOCK = {"conv1": "conv1", "bn1": "norm1", "conv2": "conv2", "bn2": "norm2"}


def written_by_hand(net, names, head):
    """Return a state_dict of different numbers in PyTorch's names and layouts, and {our path: array} of the same.

    names: {their module: ours below `backbone`}. head: their name of the classifier.
    """
    like = jax.eval_shape(net.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    like = {path.split("/", 1)[1]: leaf.shape for path, leaf in flatten(like).items()}
    leaves = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    theirs_of = {**{f"backbone/{ours}": theirs for theirs, ours in names.items()}, "classifier": head}
    random, state_dict, expected = np.random.default_rng(0), {}, {}
    for path, shape in like.items():
        module, leaf = path.rsplit("/", 1)
        value = random.normal(size=shape).astype(np.float32)
        expected[path] = value
        layout = (3, 2, 0, 1) if value.ndim == 4 else tuple(reversed(range(value.ndim)))
        state_dict[f"{theirs_of[module]}.{leaves[leaf]}"] = value.transpose(layout)
        if leaf == "mean":
            state_dict[f"{theirs_of[module]}.num_batches_tracked"] = np.asarray(7)
    return state_dict, expected


def block_names(inside, shortcut):
    """Return {their module: ours} of all blocks of [2, 2, 2, 2], stages 2 to 4 beginning with a shortcut."""
    names = {}
    for stage in range(1, 5):
        for block in (0, 1):
            parts = {**inside, **(shortcut if stage > 1 and block == 0 else {})}
            names |= {f"layer{stage}.{block}.{a}": f"stage{stage}_block{block + 1}/{b}" for a, b in parts.items()}
    return names


@pytest.mark.parametrize("head", ["linear", "fc"])
@pytest.mark.parametrize("model", ["shortcut", "downsample", "preact"])
def test_the_names_of_resnets_have_their_places(model, head):
    if model == "preact":
        net = models.create("preact_resnet", 10, width=2)
        names = {"conv1": "conv", "bn": "norm", **block_names(BLOCK, {"shortcut.0": "shortcut"})}
    else:
        net = models.create("resnet", 10, width=2)
        shortcut = {f"{model}.0": "shortcut", f"{model}.1": "shortcut_norm"}
        names = {"conv1": "conv", "bn1": "norm", **block_names(BLOCK, shortcut)}
    state_dict, expected = written_by_hand(net, names, head)
    variables = import_state_dict(state_dict, net)
    actual = {**flatten(variables.params["net"]), **flatten(variables.stats["net"])}
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(actual[path], value, err_msg=path)


@pytest.mark.parametrize("x64", [True, False])
@pytest.mark.parametrize("given", ["float16", "float32", "float64"])
def test_weights_are_float32_unless_both_sides_say_float64(golden, net, given, x64):
    state_dict = {key: value.astype(given) for key, value in initial(golden).items()}
    with jax.enable_x64(x64):
        variables = import_state_dict(state_dict, net)
    expected = "float64" if x64 and given == "float64" else "float32"
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(expected)}


def test_two_names_of_one_weight_are_named(golden, net):
    state_dict = initial(golden)
    with pytest.raises(UserError, match=r"'conv1\.weight \(backbone/conv/kernel is already set\)'"):
        import_state_dict({**state_dict, "conv1.weight": state_dict["model.conv1.weight"]}, net)


def test_margins_of_drolts_loss_are_ignored_by_name(golden, net):
    margins = {"learnable_epsilons": np.ones(100), "module.epsilons": np.ones(100)}
    done = place({**initial(golden), **margins}, net)
    assert set(margins) <= set(done.ignored)
    assert not set(margins) & done.placed.keys()


@pytest.mark.parametrize("names", [("branches.0", "branches.1"), ("final.conv", "final.bn"), ("conv1x1", "bn_last")])
def test_branches_for_large_images_are_found_under_any_name(names, variables_of, same):
    large = models.create("resnet", 10, width=2, branches=3, branch_kind="conv")
    variables = variables_of(large)
    state_dict = export_state_dict(variables, large)
    for ours, theirs in zip(("branches.0", "branches.1"), names, strict=True):
        state_dict = {
            f"module.{theirs}{key.removeprefix(ours)}" if key.startswith(ours) else key: value
            for key, value in state_dict.items()
        }
    same(import_state_dict(state_dict, large), variables)


def test_branches_for_large_images_are_not_guessed_among_several(variables_of):
    large = models.create("resnet", 10, width=2, branches=3, branch_kind="conv")
    state_dict = export_state_dict(variables_of(large), large)
    state_dict["other.weight"] = state_dict["final.weight"] = state_dict.pop("branches.0.weight")
    with pytest.raises(UserError, match=r"no place for \['other\.weight', 'final\.weight'\]; nothing for \['branches"):
        import_state_dict(state_dict, large)


def test_a_network_for_grey_images_takes_them(variables_of, same):
    grey = models.create("resnet_cifar", 10, depth=8)
    variables = variables_of(grey, channels=1)
    same(import_state_dict(export_state_dict(variables, grey), grey), variables)


def test_a_model_is_read_from_its_spec():
    assert read_model("resnet,blocks=(3, 8,36,2),logit_scale=True,classifier=cosine,normalise=imagenet") == {
        "name": "resnet",
        "blocks": (3, 8, 36, 2),
        "logit_scale": True,
        "classifier": "cosine",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }


@pytest.mark.parametrize(
    "spec, message", [("resnet,depth", "'depth' is not a setting"), ("x,normalise=mnist", "imagenet")]
)
def test_a_mistake_in_a_spec_is_named(spec, message):
    with pytest.raises(UserError, match=message):
        read_model(spec)


def test_names_imply_settings_of_the_model(golden):
    numbers = golden("reslt_train")
    state_dict = {key.removeprefix("final/"): value for key, value in numbers.items() if key.startswith("final/")}
    assert implied(state_dict) == {"num_classes": 100, "branches": 3}
    assert implied({"lws_model.learned_norm": np.ones((1, 7))}) == {"logit_scale": True}


NORMALISED = [("mu", "sigma"), ("normalize.mean", "normalize.std"), ("module.normalizer.mean", "module.normalizer.std")]


@pytest.mark.parametrize("mean, std", NORMALISED)
def test_the_normalisation_of_a_state_dict_is_the_models(golden, mean, std):
    shape = (3,) if mean == "mu" else (1, 3, 1, 1)
    constants = {mean: np.reshape([0.4, 0.5, 0.6], shape), std: np.reshape([0.1, 0.2, 0.3], shape)}
    state_dict = {**initial(golden), **constants}
    settings = {"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)}
    assert implied(state_dict) == {**settings, "num_classes": 100}
    placed = place(state_dict, models.create("resnet_cifar", 100, depth=8, **settings))
    assert set(placed.ignored) >= {mean, std}
    with pytest.raises(UserError, match=r"normalises images: .* is \(0\.4, 0\.5, 0\.6\), .* give the model mean="):
        import_state_dict(state_dict, models.create("resnet_cifar", 100, depth=8))


@pytest.mark.parametrize(
    "kind, content, order",
    [
        ("", "[2, 0, 1, 3]", [2, 0, 1, 3]),
        ("", "2 0\n1 3\n", [2, 0, 1, 3]),
        ("map:", "[1, 2, 0, 3]", [2, 0, 1, 3]),  # class 2 is output 0, class 0 output 1
        ("counts:", "[5, 9, 5, 20]", [3, 1, 0, 2]),
        ("counts-ascending:", "[5, 9, 5, 20]", [0, 2, 1, 3]),
    ],
)
def test_the_order_of_classes_is_read(kind, content, order, tmp_path):
    (tmp_path / "order").write_text(content)
    assert class_order(f"{kind}{tmp_path / 'order'}", 4) == order


@pytest.mark.parametrize(
    "content, message",
    [
        ("[0, 1]", "2 numbers for 4"),
        ("[0, 1, 1, 3]", "counts:FILE"),
        *(
            (wrong, "no list")
            for wrong in ("a b c d", "[0.9, 1, 2, 3]", "[true, 0, 2, 3]", f"[{10**30}]", "[" * 200_000)
        ),
    ],
    ids=lambda text: text[:20],
)
def test_an_invalid_order_of_classes_is_named(content, message, tmp_path):
    (tmp_path / "order").write_text(content)
    with pytest.raises(UserError, match=message):
        class_order(str(tmp_path / "order"), 4)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_arrays_without_the_shape_of_a_kernel_imply_nothing(shape):
    constants = {"mean": np.full(3, 0.5), "std": np.full(3, 0.5)}
    assert implied({"conv1.weight": np.ones(shape), "fc.weight": np.ones(shape), **constants}) == {}
