"""Backbones by name: shipped, in files, in folders, in the Hub's cache, and refused ones."""

import json
import sys
from types import ModuleType

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ltjax import models
from ltjax.interop import pretrained
from ltjax.interop.torch import export_state_dict
from ltjax.runs.weights import hash_weights, load_weights, save_weights
from ltjax.types import UserError, Variables

RESNET = dict(depth=18, stem="large", width=8)
TIMM = {
    "architecture": "resnet18",
    "pretrained_cfg": {
        "mean": [0.5, 0.25, 0.125],
        "std": [0.2, 0.3, 0.4],
        "input_size": [3, 160, 160],
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "license": "mit",
    },
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # not installed
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def arrays():
    """Return {name: array} of a ResNet-18 under torchvision's names."""
    net = models.create("resnet", 3, **RESNET)
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), models.example(net)))
    rng = np.random.default_rng(0)
    random = jax.tree.map(lambda leaf: rng.uniform(0.5, 1.0, leaf.shape).astype(np.float32), shapes)
    return export_state_dict(Variables({"net": random["params"]}, {"net": random["batch_stats"]}, {}), net)


def write(folder, arrays, config=TIMM, name="model.safetensors", config_name="config.json"):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays, folder / name)
    if config is not None:
        (folder / config_name).write_text(json.dumps(config))
    return folder / name


def features(settings, variables, size=32):
    net = models.create(num_classes=3, **settings)
    image = np.ones((1, size, size, 3), np.float32)

    @jax.jit
    def of(backbone, stats):
        fresh = net.init(jax.random.key(0), image)
        params = {**fresh["params"], "backbone": backbone}
        return net.apply({"params": params, "batch_stats": stats}, image, False).features

    return np.asarray(of(variables.params["net"]["backbone"], variables.stats["net"]))


def test_the_shipped_backbone_has_its_image_settings_and_licence():
    actual = pretrained.find("efficientnet_lite0")
    assert (actual.weights, actual.settings["name"], actual.licence) == ("efficientnet_lite0",) * 2 + ("Apache-2.0",)
    np.testing.assert_allclose(actual.settings["mean"], np.full(3, 127 / 255))
    assert (actual.images["size"], actual.images["crop"]) == (224, 0.875)
    assert actual.sha256 == hash_weights("efficientnet_lite0")


@pytest.mark.parametrize("named", ["file", "folder"])
def test_a_file_sets_the_network_and_its_image_settings(tmp_path, arrays, named):
    file = write(tmp_path / "r18", arrays)
    actual = pretrained.find(str(file if named == "file" else file.parent))
    expected = dict(name="resnet", mean=(0.5, 0.25, 0.125), std=(0.2, 0.3, 0.4), **RESNET)
    assert actual.settings == expected
    assert actual.images == {"size": 160, "crop": 0.95, "interpolation": "bicubic"} and actual.licence == "mit"
    weights = load_weights(actual.weights, actual.sha256)
    direct = pretrained.torch.import_state_dict(arrays, models.create("resnet", 3, **RESNET))
    np.testing.assert_array_equal(features(actual.settings, weights.variables), features(actual.settings, direct))


@pytest.mark.parametrize("change", ["headless", "bfloat16"])
def test_files_without_a_classifier_and_in_half_precision_are_read(tmp_path, arrays, change):
    changed = {name: value for name, value in arrays.items() if not name.startswith("fc.")}
    if change == "bfloat16":
        changed = {name: value.astype(ml_dtypes.bfloat16) for name, value in arrays.items()}
    weights = load_weights(pretrained.find(str(write(tmp_path / "r18", changed))).weights)
    kernel = weights.variables.params["net"]["backbone"]["conv"]["kernel"]
    assert weights.num_classes == 0 and set(weights.variables.params["net"]) == {"backbone"}
    np.testing.assert_allclose(kernel, arrays["conv1.weight"].transpose(2, 3, 1, 0), rtol=0.004)


@pytest.mark.parametrize("depth, more", [(34, {}), (50, {}), (50, dict(groups=32, group_width=4)), (101, {})])
def test_the_networks_of_torchvision_are_recognised(depth, more):
    net = models.create("resnet", 3, depth=depth, stem="large", width=64, **more)
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), models.example(net)))
    empty = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    state_dict = export_state_dict(Variables({"net": empty["params"]}, {"net": empty["batch_stats"]}, {}), net)
    assert pretrained.torch.implied(state_dict) == {
        **dict(name="resnet", depth=depth, stem="large", width=64, num_classes=3),
        **more,
    }


def test_a_file_without_a_mean_is_refused_with_advice(tmp_path, arrays):
    with pytest.raises(UserError, match=r"how its images are normalised.*--model=resnet,normalise=imagenet"):
        pretrained.find(str(write(tmp_path, arrays, config=None)))


def test_the_advice_for_a_file_without_a_mean_works(tmp_path, arrays):
    file = write(tmp_path / "r18", arrays, config=None)
    assert pretrained.torch.main([str(file), "--model=resnet,normalise=imagenet", f"--out={tmp_path / 'out'}"]) == 0
    actual = pretrained.find(str(tmp_path / "out"))
    assert actual.settings["mean"] == (0.485, 0.456, 0.406) and actual.settings["depth"] == 18
    assert actual.images == {"size": 224, "crop": 0.875}


def test_a_folder_of_weights_without_a_mean_is_refused(tmp_path, arrays):
    weights = pretrained.torch.import_state_dict(arrays, models.create("resnet", 3, **RESNET))
    save_weights(tmp_path / "w", weights, dict(name="resnet", **RESNET), num_classes=3)
    with pytest.raises(UserError, match=r"does not say with which mean .* normalise="):
        pretrained.find(str(tmp_path / "w"))


def test_open_clips_description_is_read():
    config = {"model_cfg": {"vision_cfg": {"image_size": 336}}, "preprocess_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3}}
    assert pretrained._images(config) == dict(mean=(0.1,) * 3, std=(0.2,) * 3, size=336, crop=1.0)


@pytest.mark.parametrize("config", [{"architecture": 5}, {"pretrained_cfg": 5}, {"model_cfg": {}}, {"crop_pct": "x"}])
def test_a_description_of_something_else_says_nothing(config):
    assert set(pretrained._images(config)) <= {"crop"}


def test_timms_other_lite_network_is_refused_by_name(tmp_path, arrays):
    config = {**TIMM, "architecture": "efficientnet_lite0"}
    with pytest.raises(UserError, match=r"timm's efficientnet_lite0: .*tf_efficientnet_lite0"):
        pretrained.find(str(write(tmp_path, arrays, config)))


def test_an_unknown_network_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"of no network that ltjax recognises.*--model"):
        pretrained.find(str(write(tmp_path, {"conv1.0.weight": np.zeros((8, 3, 3, 3), np.float32)})))


def test_a_name_of_nothing_is_refused_with_the_forms():
    with pytest.raises(UserError, match=r"pretrained=resnet: a name \(efficientnet_lite0\), hub:"):
        pretrained.find("resnet")


def test_other_weights_under_the_same_name_are_refused(tmp_path, arrays):
    actual = pretrained.find(str(write(tmp_path / "r18", arrays)))
    with pytest.raises(UserError, match=r"other weights than those of config.weights_sha256"):
        load_weights(actual.weights, "0" * 64)


# The Hugging Face Hub.


def in_cache(cache, arrays, card="---\ntags: [timm]\nlicense: apache-2.0\n---\n# ResNet\nlicense: none"):
    folder = cache / "huggingface" / "hub" / "models--timm--r18"
    write(folder / "snapshots" / COMMIT, arrays, {**TIMM, "pretrained_cfg": {**TIMM["pretrained_cfg"], "license": ""}})
    (folder / "snapshots" / COMMIT / "README.md").write_text(card)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return folder


def test_a_file_in_the_hubs_cache_needs_neither_network_nor_library(caches, arrays):
    in_cache(caches, arrays)
    actual = pretrained.find("hub:timm/r18")
    assert (actual.weights, actual.licence) == (f"hub:timm/r18@{COMMIT}", "apache-2.0")
    assert load_weights(actual.weights, actual.sha256).num_classes == 0


def test_a_pinned_backbone_is_found_after_the_hubs_cache_is_gone(caches, arrays):
    folder = in_cache(caches, arrays)
    before = pretrained.find("hub:timm/r18")
    folder.rename(folder.with_name("gone"))
    assert pretrained.find(before.weights) == before


def test_without_the_library_the_extra_is_named():
    with pytest.raises(UserError, match=r"not in the Hub's cache.*pip install ltjax\[hub\]"):
        pretrained.find("hub:timm/r18")


def test_missing_weights_of_the_hub_are_named_with_the_download_command():
    with pytest.raises(UserError, match=r"python -m ltjax.interop.pretrained hub:timm/r18@abc"):
        load_weights("hub:timm/r18@abc")


@pytest.mark.parametrize("name", ["hub:r18", "hub:a/b/c", "hub:../..", "hub:a/b@c d", "hub:a/b@../c", "hub:"])
def test_a_name_that_is_no_repository_is_refused(name):
    with pytest.raises(UserError, match=r"hub:OWNER/NAME"):
        pretrained.find(name)


class Gated(OSError):
    pass


class Missing(Exception):
    pass


class NotHere(FileNotFoundError, Missing):
    pass


def library(monkeypatch, download):
    """Put a library of this interface in the place of huggingface_hub."""
    module, errors = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.errors")
    vars(module).update(hf_hub_download=download, errors=errors)
    vars(errors).update(EntryNotFoundError=Missing, GatedRepoError=Gated)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)


def test_a_download_is_pinned_and_prints_the_licence_first(caches, arrays, monkeypatch, capsys):
    snapshot, asked = in_cache(caches, arrays).rename(caches / "elsewhere") / "snapshots" / COMMIT, []

    def download(repository, file, revision):
        asked.append((repository, file, revision))
        if not (snapshot / file).exists():
            raise Missing(file)
        return str(snapshot / file)

    library(monkeypatch, download)
    assert pretrained.find("hub:timm/r18@v1").weights == f"hub:timm/r18@{COMMIT}"
    assert capsys.readouterr().err == "note: fetching timm/r18, licence apache-2.0\n"
    assert asked[0] == ("timm/r18", "README.md", "v1") and ("timm/r18", "model.safetensors", "v1") in asked


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (Gated("401"), r"is gated: accept its terms"),
        (NotHere("x"), r"is not in the Hub's cache, and the Hub is offline"),
        (ConnectionError("refused"), r"cannot fetch README.md of timm/r18@main: .*refused"),
        (Missing("x"), r"has none of model.safetensors, open_clip_model.safetensors"),
    ],
)
def test_a_failed_download_is_one_line(monkeypatch, error, message):
    def download(repository, file, revision):
        raise error

    library(monkeypatch, download)
    with pytest.raises(UserError, match=message):
        pretrained.find("hub:timm/r18")


def test_the_command_lists_the_shipped_backbones(capsys):
    assert pretrained.main([]) == 0
    assert capsys.readouterr().out.startswith("efficientnet_lite0: efficientnet_lite0(), no classifier, images of 224")


def test_the_command_reports_a_mistake_in_one_line(capsys):
    assert pretrained.main(["nothing"]) == 2
    assert capsys.readouterr().err.startswith("error: pretrained=nothing: ")
