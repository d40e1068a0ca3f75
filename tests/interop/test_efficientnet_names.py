"""EfficientNet-Lite0's two dialects of names: efficientnet_pytorch's and timm's."""

import jax
import numpy as np
import pytest

from ltjax import models
from ltjax.interop import torch
from ltjax.interop.torch import export_state_dict, implied, import_state_dict, place
from ltjax.optim import flatten
from ltjax.types import UserError


@pytest.fixture(scope="module")
def net():
    return models.create("efficientnet_lite0", 10)


@pytest.fixture(scope="module", autouse=True)
def one_trace(net):
    """Trace the network for its shapes once, not in each import."""
    shapes, traced = torch._shapes(net, {}), torch._shapes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_shapes", lambda model, arrays: shapes if model is net else traced(model, arrays))
        yield


@pytest.fixture(scope="module")
def variables(net, variables_of):
    return variables_of(net)


@pytest.fixture(scope="module")
def timm(net, variables):
    """Return a state_dict of different numbers, as we export it."""
    return export_state_dict(variables, net)


@pytest.fixture(scope="module")
def package(golden, timm):
    """Return the same arrays in efficientnet_pytorch's names."""
    numbers = golden("efficientnet_lite0")
    theirs = dict(zip(numbers["names_timm"].tolist(), numbers["names_package"].tolist(), strict=True))
    return {theirs[key]: value for key, value in timm.items()}


def test_an_export_has_every_name_of_timm_and_no_other(golden, timm):
    assert timm.keys() == set(golden("efficientnet_lite0")["names_timm"].tolist())


@pytest.fixture(scope="module")
def imported(package, net):
    """Return {our path: array} of an import of the package's names."""
    variables = import_state_dict(package, net)
    return jax.device_get({**flatten(variables.params["net"]), **flatten(variables.stats["net"])})


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
@pytest.mark.parametrize("dialect", ["package", "timm"])
def test_both_dialects_are_the_same_network(request, net, variables, dialect, prefix, same):
    state_dict = {prefix + key: value for key, value in request.getfixturevalue(dialect).items()}
    placed = place(state_dict, net)
    same(placed.variables, variables)
    assert len(placed.placed) == 247 and len(placed.ignored) == 49


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ("backbone/conv/kernel", "_conv_stem.weight"),
        ("backbone/norm/var", "_bn0.running_var"),
        ("backbone/stage1_block1/depthwise/kernel", "_blocks.0._depthwise_conv.weight"),
        ("backbone/stage1_block1/depthwise_norm/mean", "_blocks.0._bn1.running_mean"),
        ("backbone/stage1_block1/project/kernel", "_blocks.0._project_conv.weight"),
        ("backbone/stage1_block1/project_norm/scale", "_blocks.0._bn2.weight"),
        ("backbone/stage2_block1/expand/kernel", "_blocks.1._expand_conv.weight"),
        ("backbone/stage2_block2/expand_norm/bias", "_blocks.2._bn0.bias"),
        ("backbone/stage4_block3/depthwise_norm/var", "_blocks.7._bn1.running_var"),
        ("backbone/stage7_block1/project_norm/bias", "_blocks.15._bn2.bias"),
        ("backbone/head/kernel", "_conv_head.weight"),
        ("backbone/head_norm/scale", "_bn1.weight"),
        ("classifier/bias", "_fc.bias"),
    ],
)
def test_an_array_of_the_package_has_its_place(package, imported, ours, theirs):
    value = package[theirs]
    expected = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
    np.testing.assert_array_equal(imported[ours], expected)


@pytest.mark.parametrize("dialect", ["package", "timm"])
def test_the_number_of_classes_is_that_of_the_classifier(request, dialect):
    assert implied(request.getfixturevalue(dialect)) == {"name": "efficientnet_lite0", "num_classes": 10}


@pytest.mark.parametrize("dialect", ["package", "timm"])
def test_a_backbone_without_a_classifier_is_imported(request, net, variables, dialect, same):
    state_dict = {
        key: value
        for key, value in request.getfixturevalue(dialect).items()
        if not key.startswith(("_fc.", "classifier."))
    }
    placed = place(state_dict, net, ("backbone",))
    assert placed.variables.params["net"].keys() == {"backbone"}
    same(placed.variables.params["net"]["backbone"], variables.params["net"]["backbone"])
    same(placed.variables.stats, variables.stats)


@pytest.mark.parametrize("key", ["_blocks.16._bn2.weight", "blocks.6.1.bn3.weight", "blocks.0.0.bn3.weight"])
def test_a_block_of_a_larger_network_is_named(timm, net, key):
    with pytest.raises(UserError, match=rf"no place for \['{key}'\]; nothing for \[\]"):
        import_state_dict({**timm, key: np.zeros(3, np.float32)}, net)


def test_another_networks_names_are_refused(net, variables_of):
    resnet = models.create("resnet", 10, width=2)
    with pytest.raises(UserError, match=r"no place for .*'layer1\.0\.conv1\.weight'.*; nothing for .*backbone/head"):
        import_state_dict(export_state_dict(variables_of(resnet), resnet), net)
