import jax
import numpy as np
import pytest

from ltjax import models
from ltjax.interop.torch import import_state_dict
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
