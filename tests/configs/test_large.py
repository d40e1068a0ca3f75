"""The configs of large images follow the papers' recipes."""

import inspect

import numpy as np
import pytest

from configs import common
from ltjax import config
from ltjax.models import vit
from tests.configs.reading import factors_of, parsed, rates_of, read

# epochs, network, weight decay, head and tail of the smoothing, ranks of the groups
PAPERS = {
    "imagenet_lt": (180, 50, 5e-4, (0.3, 0.0), (390, 835)),
    "inat18": (200, 50, 1e-4, (0.3, 0.0), (842, 4543)),
    "places_lt": (90, 152, 5e-4, (0.4, 0.1), (131, 288)),
}


@pytest.mark.parametrize("name", PAPERS)
def test_mislas_follows_the_paper(name):
    epochs, depth, decay, (head, tail), ranks = PAPERS[name]
    run, stages = parsed(name, "method=mislas")
    features, classifier = stages["features"], stages["classifier"]
    assert (run.epochs, run.batch_size, run.optimizer) == (epochs, 256, config.OptimizerConfig(0.9, False, decay))
    assert (run.model["depth"], run.model["stem"], run.data.size, run.data.resize) == (depth, "large", 224, 256)
    assert (features.lr, features.augment["mixup_alpha"], features.augment["color_jitter"]) == (0.1, 0.2, 0.4)
    assert run.model["classifier_init"] == "torch"
    np.testing.assert_allclose(factors_of(features), (1 + np.cos(np.pi * np.arange(epochs) / epochs)) / 2)
    assert classifier.method == dict(name="mislas", head=head, tail=tail, shape="concave")
    assert (classifier.epochs, classifier.lr, classifier.batch_norm) == (10, 0.1, "train")
    assert rates_of(classifier)["classifier"] == 0.05 and rates_of(classifier)["logit_scale"] == 1.0
    assert (run.data.profile, run.data.ranges, run.data.groups) == ("natural", ranks, "counts")


def test_places_trains_one_new_block_on_a_frozen_backbone():
    run, stages = parsed("places_lt", "method=mislas")
    assert run.model["extra_block"] and (run.weights, run.weights_parts) == ("resnet152", ("backbone",))
    assert run.model["blocks"] == (3, 8, 36, 2)  # the authors delete layer4.2, whose place the new block takes
    rates = dict(backbone=0.0, block=1.0, classifier=1.0, logit_scale=0.0)
    assert rates_of(stages["features"]) == rates
    assert rates_of(stages["classifier"]) == dict(backbone=0.0, block=0.0, classifier=0.05, logit_scale=1.0)


@pytest.mark.parametrize("argument", ["method=mislas,model=resnet50", "method=trades", "method=mislas,runlocal"])
def test_only_a_frozen_resnet_152_leaves_out_its_last_block(argument):
    assert "blocks" not in parsed("places_lt", argument)[0].model


@pytest.mark.parametrize("name", ["pgd_at", "trades", "alp", "bgat", "lbgat"])
def test_adversarial_training_on_places_trains_from_scratch(name):
    run, stages = parsed("places_lt", f"method={name}")
    assert (run.model["extra_block"], run.weights) == (False, "")
    trained = {part for stage in stages.values() for part, rate in rates_of(stage).items() if rate}
    assert trained >= {"backbone", "classifier"}


# file, arguments -> epochs, depth, groups of convolutions, weight decay, beta, starts of branches, their number, gamma
RESLT = {
    ("imagenet_lt", "model=resnet10"): (180, 10, 1, 5e-4, 0.99, (175, 780), 3, 0.3),
    ("imagenet_lt", "model=resnext50"): (180, 50, 32, 5e-4, 0.99, (175, 780), 3, 0.7),
    ("imagenet_lt", "model=resnext101"): (180, 101, 32, 5e-4, 0.99, (175, 780), 3, 0.7),
    ("inat18", "model=auto"): (200, 50, 1, 1e-4, 0.85, (1542, None), 2, 0.3),
}


@pytest.mark.parametrize("name, model", RESLT)
def test_reslt_follows_the_paper(name, model):
    epochs, depth, groups, decay, beta, (medium, tail), branches, gamma = RESLT[name, model]
    run, stages = parsed(name, f"method=reslt,{model}")
    stage = stages["reslt"]
    assert (run.epochs, run.model["depth"], run.model.get("groups", 1)) == (epochs, depth, groups)
    assert stage.optimizer == dict(momentum=0.9, nesterov=False, weight_decay=decay)
    assert (stage.method["beta"], stage.method["medium_start"], stage.method.get("tail_start")) == (beta, medium, tail)
    pooled = model == "model=resnet10"
    assert (run.model["branches"], run.model["branch_kind"]) == (branches, "pooled_conv" if pooled else "conv")
    assert run.model["classifier_init"] == "torch"
    assert stage.eval_classifier == dict(tau=gamma, bias=False)
    if name == "inat18":
        expected = (1 + np.cos(np.pi * np.arange(200) / 200)) / 2
    else:
        expected = [0.2, 0.4, 0.6, 0.8, *(1 + np.cos(np.pi * np.arange(176) / 176)) / 2]
    np.testing.assert_allclose(factors_of(stage), expected)


INAT = dict(mean=(0.466, 0.471, 0.380), std=(0.195, 0.194, 0.192))


@pytest.mark.parametrize(
    "method, stage, jitter", [("mislas", "features", 0.4), ("reslt", "reslt", 0), ("crt", "ce", 0)]
)
def test_inaturalist_has_its_normalisation_and_jitter_only_for_mislas(method, stage, jitter):
    run, stages = parsed("inat18", f"method={method}")
    assert {key: run.model[key] for key in INAT} == INAT
    assert stages[stage].augment["color_jitter"] == jitter


@pytest.mark.parametrize("name", [*PAPERS, "image_folder"])
def test_runlocal_shrinks_everything(name):
    run, stages = parsed(name, "method=mislas,runlocal")
    assert (run.model["depth"], run.data.size, run.batch_size, run.epochs) == (10, 64, 64, 6)
    assert (run.data.classes, run.data.max_count, run.weights) == (50, 100, "")
    assert all(stage.epochs <= 6 for stage in stages.values())
    assert run.name.endswith("-runlocal")


@pytest.mark.parametrize("name", [*PAPERS, "image_folder"])
def test_folders_of_images_are_upright_and_benchmarks_are_not(name):
    run, _ = parsed(name, "")
    assert run.data.upright is (name == "image_folder")


def test_augmentation_of_large_images_is_jitter_or_rand_augment():
    paper, auto = (parsed("imagenet_lt", f"method=ce,augment={kind}")[1]["ce"].augment for kind in ("paper", "auto"))
    assert (paper["crop_padding"], paper["rand_augment"], paper["color_jitter"]) == (0, (), 0.4)
    assert (auto["rand_augment"], auto["color_jitter"]) == ((2, 9.0), 0.0)


@pytest.mark.parametrize("size, resize", [(112, 128), (64, 73), (224, 256)])
def test_evaluation_crops_the_same_part_of_an_image_at_every_size(size, resize):
    run, _ = parsed("image_folder", f"size={size}")
    assert (run.data.size, run.data.resize) == (size, resize)


@pytest.mark.parametrize(
    "argument, message",
    [
        ("model=resnet20", "config argument 'model=resnet20': one of resnet10, resnet18"),
        ("model=resnext10", "config argument 'model=resnext10': one of"),
        ("size=16", "config argument size=16: a whole number of pixels, 32 or more"),
        ("size=100.5", "config argument size=100.5"),
        ("imbalance=10", "unknown config argument 'imbalance'; allowed: method, recipe, model"),
    ],
)
def test_an_invalid_argument_is_named_with_the_allowed_values(argument, message):
    with pytest.raises(ValueError, match=message):
        read("imagenet_lt", argument)


# name: (width, depth, patch, patches on a side of the images that its positions are for, registers, pixels)
TRANSFORMERS = {
    "vit_ti16": (192, 12, 16, 14, 0, 224),
    "vit_s16": (384, 12, 16, 14, 0, 224),
    "vit_b16": (768, 12, 16, 14, 0, 224),
    "vit_l16": (1024, 24, 16, 14, 0, 224),
    "dinov2_s14": (384, 12, 14, 37, 0, 518),
    "dinov2_b14_reg": (768, 12, 14, 37, 4, 518),
    "dinov2_l14": (1024, 24, 14, 37, 0, 518),
    "clip_b16": (768, 12, 16, 14, 0, 224),
    "clip_b32": (768, 12, 32, 7, 0, 224),
    "clip_l14": (1024, 24, 14, 16, 0, 224),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_vision_transformer_has_its_papers_sizes(name):
    run, _ = parsed("image_folder", f"method=ce,model={name}")
    keys = ("width", "depth", "patch", "grid", "registers")
    *sizes, pixels = TRANSFORMERS[name]
    assert run.model["name"] == "vit" and [run.model[key] for key in keys] == sizes
    assert run.model["patch"] * run.model["grid"] == pixels
    assert run.model["layer_scale"] == name.startswith("dinov2")
    of_clip = (run.model["pre_norm"], run.model["epsilon"], run.model["activation"]) == (True, 1e-5, "quick_gelu")
    assert of_clip == name.startswith("clip")


def test_a_vision_transformer_of_a_config_has_every_setting():
    """Check that each can be changed on the command line."""
    parameters = inspect.signature(vit.backbone).parameters.values()
    assert {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} == common.VIT
