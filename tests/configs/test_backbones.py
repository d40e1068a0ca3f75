"""Pretrained backbones in the configs of large images."""

import jax
import numpy as np
import pytest

from configs import backbones, common
from ltjax import models, optim
from ltjax.engine import fixed_backbone
from ltjax.interop import pretrained
from ltjax.runs.weights import hash_weights
from tests.configs.reading import parsed, rates_of, read

NAME = "efficientnet_lite0"


def shapes(run, size=64):
    settings = dict(run.model)
    net = models.create(settings.pop("name"), 23, **settings)
    return jax.eval_shape(lambda: net.init(jax.random.key(0), jax.numpy.zeros((1, size, size, 3))))["params"]


def test_a_folder_of_images_has_a_fixed_backbone_by_default():
    run, stages = parsed("image_folder")
    assert list(stages) == ["lift"] and run.model["name"] == NAME
    assert (run.weights, run.weights_sha256, run.weights_parts) == (NAME, hash_weights(NAME), ("backbone",))
    np.testing.assert_allclose(run.model["mean"] + run.model["std"], [127 / 255] * 3 + [128 / 255] * 3)
    assert (run.data.size, run.data.resize, run.data.min_area) == (224, 256, 1.0)
    assert fixed_backbone.is_fixed(run, {"net": shapes(run)})


@pytest.mark.parametrize("argument", ["model=resnet18", "pretrained=none", "runlocal"])
def test_another_network_is_trained_from_scratch(argument):
    run, stages = parsed("image_folder", argument)
    assert run.weights == "" and list(stages) == ["features", "classifier"]


@pytest.mark.parametrize("name", ["imagenet_lt", "inat18"])
def test_the_papers_configs_train_from_scratch_by_default(name):
    assert parsed(name)[0].weights == ""


@pytest.mark.parametrize("name", ["imagenet_lt", "inat18", "places_lt"])
def test_every_config_of_large_images_takes_a_backbone(name):
    run, _ = parsed(name, f"pretrained={NAME}")
    assert run.model["name"] == NAME and not run.model["extra_block"] and run.data.min_area == 1.0
    assert run.name == f"{name}-lift-{NAME}-backbone"


def test_a_given_size_has_priority_and_keeps_the_crop():
    run, _ = parsed("image_folder", "size=160")
    assert (run.data.size, run.data.resize) == (160, 183)


@pytest.mark.parametrize(
    "method", ["lift", "ce", "balanced_softmax", "crt", "lws", "mislas", "ncm", "tau_norm", "drolt"]
)
def test_a_fixed_backbone_trains_with_every_method_of_classifiers(method):
    run, stages = parsed("image_folder", f"method={method}")
    assert fixed_backbone.is_fixed(run, {"net": shapes(run)})
    assert not any(rates_of(stage).get("backbone") for stage in stages.values())


def test_dro_lt_maps_fixed_features_linearly():
    run, stages = parsed("image_folder", "method=drolt")
    assert run.model["linear_map"] and rates_of(stages["dro"])["linear_map"] == 1.0
    assert not parsed("image_folder", "method=drolt,finetune=all")[0].model.get("linear_map")


LOCAL_VIT = dict(name="vit", depth=12, width=8, heads=2, patch=16, grid=14, mean=(0.5,) * 3, std=(0.5,) * 3)
RESNET = dict(name="resnet", depth=50, stem="large", width=8, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture
def backbone(monkeypatch):
    """Replace every name by a backbone of these settings."""

    def put(settings):
        actual = pretrained.Backbone("weights", "0" * 64, settings, {"size": 64, "crop": 1.0}, "mit")
        monkeypatch.setattr(pretrained, "find", lambda name: actual)

    return put


def rates(run, stage):
    """Return the rate of each parameter."""
    assigned = optim.assign_groups(list(optim.flatten({"net": shapes(run)})), stage.groups)
    return {path: stage.groups[group]["rate"] for path, group in assigned.items()}


@pytest.mark.parametrize(
    ("settings", "first", "middle", "last"),
    [
        (dict(name=NAME, mean=(0.5,) * 3, std=(0.5,) * 3), "conv", "stage4_block1", "head"),
        (RESNET, "stage2_block4", "stage3_block1", "stage4_block3"),
        (LOCAL_VIT, "positions", "block5", "block12"),
    ],
)
@pytest.mark.parametrize("finetune, expected", [("all", (0.01, 0.03, 0.1)), ("last", (0.0, 0.0, 0.1))])
def test_earlier_layers_have_a_lower_rate(backbone, settings, first, middle, last, finetune, expected):
    backbone(settings)
    run, stages = parsed("image_folder", f"finetune={finetune}")
    actual = rates(run, stages["lift"])
    for part, rate in zip((first, middle, last), expected, strict=True):
        assert {value for path, value in actual.items() if path.startswith(f"net/backbone/{part}")} == {rate}
    assert actual["net/classifier/kernel"] == 1.0
    assert stages["lift"].batch_norm == "eval" and run.data.min_area < 1


@pytest.mark.parametrize("adapter", ["adaptformer", "lora"])
def test_adapters_train_with_a_frozen_transformer(backbone, adapter):
    backbone(LOCAL_VIT)
    run, stages = parsed("image_folder", f"finetune={adapter}")
    actual = rates(run, stages["lift"])
    assert {rate for path, rate in actual.items() if "/adapter/" in path} == {1.0}
    assert {rate for path, rate in actual.items() if "backbone" in path and "/adapter/" not in path} == {0.0}
    assert (stages["lift"].lr, stages["lift"].epochs, run.batch_size) == (0.01, 10, 128)
    assert run.model["cosine_scale"] == 25.0


def test_stage_2_of_a_finetuned_backbone_trains_only_the_classifier():
    _, stages = parsed("image_folder", "method=crt,finetune=all")
    assert rates_of(stages["crt"])["backbone"] == 0.0 and "late" in rates_of(stages["ce"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("method=reslt", r"reslt trains a whole network.*or finetune=all, or pretrained=none"),
        ("method=trades,finetune=last", r"adversarial training needs finetune=all, or pretrained=none"),
        ("finetune=lora", r"is for vision transformers; allowed: head, last, all"),
        ("pretrained=none,finetune=all", r"needs a pretrained= backbone"),
        ("pretrained=efficientnet_lite0,model=resnet10", r"the network is that of the weights"),
        ("pretrained=efficientnet_lite0,runlocal", r"the network is that of the weights"),
        ("pretrained=resnet", r"pretrained=resnet: a name \(efficientnet_lite0\)"),
        ("finetune=most", r"allowed values of finetune: head, last, all, adaptformer, lora"),
    ],
)
def test_exclusive_arguments_are_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        read("image_folder", argument)


def test_the_methods_for_a_backbone_are_those_of_large_images_and_lift():
    assert set(backbones.FOR_PRETRAINED) - {"lift"} == set(common.recipes.LARGE)


@pytest.mark.parametrize(
    ("value", "short"),
    [
        ("hub:timm/resnet50.a1_in1k@v1", "resnet50.a1_in1k@v1"),
        ("/data/models/r50.safetensors", "r50"),
        ("weights/r50/", "r50"),
        ("none", "none"),
        (0.2, 0.2),
    ],
)
def test_a_runs_name_has_the_last_part_of_a_backbones(value, short):
    assert common._short(value) == short
