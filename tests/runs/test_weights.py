"""Folders of weights, and loading them into a run's networks."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ltjax import models
from ltjax.optim import flatten
from ltjax.runs.weights import (
    Weights,
    in_our_order,
    load_weights,
    save_weights,
    surplus,
    taken,
    with_weights,
    with_zeros,
)
from ltjax.types import UserError

SETTINGS = dict(name="resnet_cifar", depth=8, width=4, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))


def network(num_classes=5, **changes):
    settings = {**SETTINGS, **changes}
    return models.create(settings.pop("name"), num_classes, **settings)


@pytest.fixture(scope="module")
def weights(variables_of):
    return Weights(variables_of(network(logit_scale=True)), {**SETTINGS, "logit_scale": True}, 5)


@pytest.fixture(scope="module")
def fresh(variables_of):
    return variables_of(network(logit_scale=True), seed=1)


def test_a_folder_holds_all_that_was_saved(weights, tmp_path, same):
    order = (4, 0, 1, 2, 3)
    source = {"file": "net.pth", "sha256": "0"}
    images, licence = {"size": 224, "crop": 0.875, "interpolation": "bicubic"}, "MIT"
    more = dict(num_classes=5, class_order=order, source=source, images=images, licence=licence)
    save_weights(tmp_path / "w", weights.variables, weights.settings, **more)
    actual = load_weights(tmp_path / "w")
    same(actual.variables, weights.variables)
    assert actual._replace(variables=None) == Weights(None, weights.settings, 5, order, images, licence)
    assert json.loads((tmp_path / "w" / "weights.json").read_text())["source"] == source


def test_others_may_read_the_files_as_any_new_file(weights, tmp_path):
    save_weights(tmp_path / "w", weights.variables, weights.settings, num_classes=5)
    (tmp_path / "new").touch()
    files = [tmp_path / "w" / name for name in ("weights.json", "weights.safetensors")]
    assert [file.stat().st_mode for file in files] == [(tmp_path / "new").stat().st_mode] * 2


def test_float16_arrays_are_stored_as_such_and_loaded_as_float32(weights, tmp_path, same):
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), weights.variables)
    save_weights(tmp_path, rounded, weights.settings, num_classes=5)
    assert {array.dtype for array in load_file(tmp_path / "weights.safetensors").values()} == {np.dtype(np.float16)}
    same(load_weights(tmp_path).variables, jax.tree.map(lambda leaf: leaf.astype(np.float32), rounded))


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"format": 99}'])
def test_an_unknown_description_is_named(tmp_path, content):
    (tmp_path / "weights.json").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        load_weights(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        *({"class_order": order} for order in ([0, 1], [0, 1, 2, 3, 3], [5, 6, 7, 8, 9], "abcde", 5, [None] * 5, {})),
        {"class_order": [0.0, 1.0, 2.0, 3.0, 4.0]},
        {"model": {**SETTINGS, "num_classes": 5.0}},
        {"model": {**SETTINGS, "num_classes": True}},
        {"model": [1]},
    ],
)
def test_a_description_of_other_classes_is_refused(weights, tmp_path, change):
    save_weights(tmp_path, weights.variables, SETTINGS, num_classes=5)
    file = tmp_path / "weights.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match="cannot read the weights in"):
        load_weights(tmp_path)


def test_a_description_nested_too_deeply_is_refused(weights, tmp_path):
    save_weights(tmp_path, weights.variables, SETTINGS, num_classes=5)
    (tmp_path / "weights.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="nested too deeply"):
        load_weights(tmp_path)


@pytest.mark.parametrize("name", ["params/classifier/kernel", "params", "params/", "other/x", "params/classifier", ""])
def test_arrays_of_other_names_or_a_scalar_classifier_are_refused(weights, tmp_path, name):
    save_weights(tmp_path, weights.variables, SETTINGS, num_classes=5)
    arrays = load_file(tmp_path / "weights.safetensors")
    save_file({**arrays, name: np.array(1, np.float32)}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="cannot read the weights in"):
        load_weights(tmp_path)


def test_a_folder_without_weights_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match=r"python -m ltjax\.interop\.torch"):
        load_weights(tmp_path)


def test_an_order_of_other_classes_is_refused(weights, tmp_path):
    with pytest.raises(UserError, match="each class from 0 to 4 once"):
        save_weights(tmp_path, weights.variables, {}, num_classes=5, class_order=(0, 1, 2, 3, 3))


def test_output_k_becomes_class_order_k(weights):
    order = (3, 0, 4, 1, 2)
    theirs = weights.variables.params["net"]
    ours = in_our_order(weights._replace(class_order=order)).variables.params["net"]
    for k, ours_of in enumerate(order):
        np.testing.assert_array_equal(ours["classifier"]["kernel"][:, ours_of], theirs["classifier"]["kernel"][:, k])
        assert ours["classifier"]["bias"][ours_of] == theirs["classifier"]["bias"][k]
        assert ours["logit_scale"][ours_of] == theirs["logit_scale"][k]


def test_all_parts_are_taken(weights, fresh, same):
    same(with_weights(fresh, weights), weights.variables)


def test_the_order_of_classes_is_applied_on_the_way_in(weights, fresh, same):
    ordered = weights._replace(class_order=(3, 0, 4, 1, 2))
    same(with_weights(fresh, ordered), in_our_order(ordered).variables)


def test_parts_not_named_stay_as_they_are(weights, fresh, same):
    actual = with_weights(fresh, weights, ("backbone",))
    same(actual.params["net"]["backbone"], weights.variables.params["net"]["backbone"])
    same(actual.stats, weights.variables.stats)
    same(actual.params["net"]["classifier"], fresh.params["net"]["classifier"])


def test_each_replica_gets_the_same_weights_on_its_device(weights, fresh, same):
    device = jax.devices()[3]
    replicas = jax.device_put(jax.tree.map(lambda x: np.stack([x, x + 1]), fresh), device)
    actual = with_weights(replicas, weights)
    for replica in (0, 1):
        same(jax.tree.map(lambda x, r=replica: x[r], actual), weights.variables)
    assert {d for leaf in jax.tree.leaves(actual) for d in leaf.devices()} == {device}


def test_another_network_keeps_its_weights(weights, fresh, same):
    both = fresh._replace(
        params={"net": fresh.params["net"], "guide": fresh.params["net"]},
        stats={"net": fresh.stats["net"], "guide": fresh.stats["net"]},
    )
    actual = with_weights(both, weights, net="guide")
    same(actual.params, {"net": fresh.params["net"], "guide": weights.variables.params["net"]})


def test_another_number_of_classes_leaves_the_backbone(weights, variables_of):
    with pytest.raises(UserError, match=r"classifier/kernel \(weights \(16, 5\), network \(16, 7\)\).*\('backbone',\)"):
        with_weights(variables_of(network(7, logit_scale=True)), weights)


def test_a_part_that_the_weights_lack_is_named(weights, variables_of):
    with pytest.raises(UserError, match=r"params/branches/norm1/bias \(weights none, network \(16,\)\)"):
        with_weights(variables_of(network(logit_scale=True, branches=2)), weights)


def test_a_part_that_the_network_lacks_is_named(weights, variables_of):
    with pytest.raises(UserError, match=r"logit_scale \(weights \(5,\), network none\).*\('backbone', 'classifier'\)"):
        with_weights(variables_of(network()), weights)


def test_another_width_is_refused_with_the_network_of_the_weights(weights, variables_of):
    with pytest.raises(UserError, match=r"and \d+ more; set config\.model to their network: resnet_cifar\(depth=8"):
        with_weights(variables_of(network(width=2)), weights)


def test_a_part_that_is_not_there_is_refused(weights, fresh):
    with pytest.raises(UserError, match="names 'block': the network has backbone, classifier, logit_scale"):
        with_weights(fresh, weights, ("backbone", "block"))


LARGE = dict(name="resnet", depth=50, width=2, stem="large")


@pytest.fixture(scope="module")
def whole(variables_of):
    """Return a torchvision network with two blocks in its last stage."""
    settings = dict(LARGE, blocks=(1, 1, 1, 2))
    return Weights(variables_of(network(**settings)), settings, 5)


@pytest.fixture(scope="module")
def places(variables_of):
    """Return MiSLAS's network for Places-LT, with an extra block instead of the last one."""
    return variables_of(network(**LARGE, blocks=(1, 1, 1, 1), extra_block=True), seed=1)


def test_a_replaced_block_is_ignored_by_name(whole, places, same):
    assert surplus(places, whole) == ("stage4_block2",)
    actual = with_weights(places, whole, ("backbone",))
    theirs = {k: v for k, v in whole.variables.params["net"]["backbone"].items() if k != "stage4_block2"}
    same(actual.params["net"]["backbone"], theirs)
    same(actual.params["net"]["block"], places.params["net"]["block"])


@pytest.mark.parametrize("blocks, extra_block", [((1, 1, 1, 1), False), ((1, 1, 2, 1), True), ((1, 1, 1, 3), True)])
def test_other_blocks_are_not_ignored(whole, blocks, extra_block, variables_of):
    net = variables_of(network(**LARGE, blocks=blocks, extra_block=extra_block))
    assert surplus(net, whole) == ()
    with pytest.raises(UserError, match=r"do not fit the network: params/backbone/stage"):
        with_weights(net, whole, ("backbone",))


def test_weights_with_an_extra_block_are_taken_whole(places, same):
    mislas = Weights(jax.tree.map(lambda x: x + 1, places), dict(LARGE, blocks=(1, 1, 1, 1), extra_block=True), 5)
    same(with_weights(places, mislas), mislas.variables)


@pytest.mark.parametrize("kind", ["adaptformer", "lora"])
def test_adapters_stay_new_if_the_weights_have_none(variables_of, kind, same):
    settings = dict(depth=2, width=8, heads=2, patch=4, grid=2)
    plain, adapted = (models.create("vit", 5, **settings, **more) for more in ({}, dict(adapter=kind, rank=2)))
    weights, fresh = Weights(variables_of(plain), {"name": "vit", **settings}, 5), variables_of(adapted, seed=1)
    taken, new = flatten(with_weights(fresh, weights).params["net"]), flatten(fresh.params["net"])
    for path, value in flatten(weights.variables.params["net"]).items():
        same(taken.pop(path), value)
    assert taken and all("/adapter/" in path for path in taken)
    for path, value in taken.items():
        same(value, new[path])


def test_adapters_that_the_network_lacks_are_refused(variables_of):
    settings = dict(depth=2, width=8, heads=2, patch=4, grid=2)
    adapted = models.create("vit", 5, **settings, adapter="lora", rank=2)
    weights = Weights(variables_of(adapted), {"name": "vit", **settings}, 5)
    with pytest.raises(
        UserError, match=r"block1/attention/adapter/query_down/kernel \(weights \(8, 2\), network none\)"
    ):
        with_weights(variables_of(models.create("vit", 5, **settings)), weights)


def test_a_projection_is_left_out_if_the_network_has_none(variables_of, same):
    settings = dict(depth=2, width=8, heads=2, patch=4, grid=2)
    weights = Weights(variables_of(models.create("vit", 5, **settings, projection=3)), {"name": "vit", **settings}, 5)
    fresh = variables_of(models.create("vit", 5, **settings), seed=1)
    taken = with_weights(fresh, weights, ("backbone",)).params["net"]
    expected = dict(weights.variables.params["net"]["backbone"])
    del expected["projection"]
    same(taken["backbone"], expected)


def test_arrays_that_weights_replace_are_not_computed(variables_of):
    weights = Weights(variables_of(models.create("resnet_cifar", 5, depth=8, width=4)), {"name": "resnet_cifar"}, 5)
    paths = taken(weights, ("backbone",))
    assert paths and all(path.split("/")[1] == "backbone" for path in paths) and paths < taken(weights)
    network = models.create("resnet_cifar", 5, depth=8, width=4)
    zeros = with_zeros(variables_of(network, seed=1), paths)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), zeros.params["net"]["backbone"])
    np.testing.assert_array_equal(
        zeros.params["net"]["classifier"]["kernel"], variables_of(network, seed=1).params["net"]["classifier"]["kernel"]
    )
