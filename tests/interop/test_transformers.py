"""Vision transformers of timm, DINOv2 and CLIP: their names, and settings from their arrays and configs."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from ltjax import models
from ltjax.interop import torch, vit
from ltjax.interop.torch import export_state_dict, implied, import_state_dict, place, read_checkpoint
from ltjax.runs.weights import load_weights, with_weights
from ltjax.types import UserError

TINY = dict(depth=2, width=8, heads=2, patch=4, grid=3)


def stored(golden, name, prefix="state_dict/"):
    numbers = golden(name)
    return {key.removeprefix(prefix): value for key, value in numbers.items() if key.startswith(prefix)}


@pytest.fixture(scope="module")
def dinov2(golden):
    """Return the same weights under timm's names and Meta's."""
    timm = stored(golden, "dinov2_reg4_timm")
    meta = {key: value for key, value in timm.items() if not key.startswith(("head.", "reg_token"))}
    meta |= stored(golden, "dinov2_reg4_timm", "state_dict_hub/")
    return timm, {**meta, "register_tokens": timm["reg_token"]}


@pytest.fixture(scope="module")
def clip(golden):
    """Return CLIP's visual tower and its text tower, whose names are the same without `visual.`."""
    visual = stored(golden, "clip_visual")
    text = {key.removeprefix("visual."): value for key, value in visual.items() if "resblocks" in key}
    text |= {"positional_embedding": np.zeros((77, 8)), "token_embedding.weight": np.zeros((100, 8))}
    return {**text, "text_projection": np.zeros((8, 64)), "logit_scale": np.zeros(()), **visual}


def model(state_dict, **settings):
    settings = {**implied(state_dict), **settings}
    num_classes = settings.pop("num_classes", 1)
    return models.create(settings.pop("name"), num_classes, **settings)


def test_metas_names_give_the_network_of_timms(dinov2, same):
    timm, meta = dinov2
    theirs, ours = place(meta, model(meta), ("backbone",)), place(timm, model(timm), ("backbone",))
    same(theirs.variables, ours.variables)
    assert theirs.ignored == ("mask_token",)
    assert set(ours.ignored) == {"head.weight", "head.bias"}


SETTINGS = ("depth", "width", "heads", "patch", "registers", "layer_scale", "epsilon")


@pytest.mark.parametrize("name", ["dinov2_reg4_timm", "clip_visual", "vit_timm"])
def test_settings_are_read_off_the_arrays(golden, name):
    net = model(stored(golden, name)).backbone
    about = json.loads(str(golden(name)["settings"]))
    assert (net.width, net.patch, net.grid) == (about["width"], about["patch"], about["image_size"] // about["patch"])
    assert net.depth == (1 if name == "vit_timm" else about["depth"])  # one block of three is kept
    assert (net.block["heads"], net.block["epsilon"]) == (about["heads"], about["layer_norm_eps"])
    assert net.registers == about["prefix_tokens"] - 1
    assert net.block["layer_scale"] == about.get("layer_scale", False)
    assert net.projection == about.get("output", 0)


def test_every_setting_of_an_exported_network_is_read_off_its_arrays(variables_of):
    settings = dict(depth=11, width=128, heads=2, mlp_width=36, patch=5, grid=3, registers=2, layer_scale=True)
    net = models.create("vit", 7, **settings, qkv_bias=False)
    actual = implied(export_state_dict(variables_of(net), net))
    assert actual == dict(name="vit", num_classes=7, qkv_bias=False, **settings)


def test_clips_text_tower_is_ignored(golden, clip, same):
    alone = stored(golden, "clip_visual")
    done = place(clip, model(clip), ("backbone",))
    same(done.variables, place(alone, model(alone), ("backbone",)).variables)
    assert set(done.placed) == set(alone)
    assert set(done.ignored) == clip.keys() - alone.keys()


def test_the_projection_is_not_transposed(clip):
    params = place(clip, model(clip), ("backbone",)).variables.params["net"]["backbone"]
    np.testing.assert_array_equal(params["projection"], clip["visual.proj"].astype(np.float32))
    square = {**clip, "visual.proj": np.arange(128.0 * 128).reshape(128, 128)}
    params = place(square, model(square), ("backbone",)).variables.params["net"]["backbone"]
    np.testing.assert_array_equal(params["projection"], square["visual.proj"].astype(np.float32))


def test_the_files_projection_is_ignored_without_one_in_the_network(clip):
    assert "visual.proj" in place(clip, model(clip, projection=0), ("backbone",)).ignored


def test_the_position_of_the_class_token_is_added_to_the_token(golden):
    theirs = stored(golden, "vit_timm")
    theirs |= {"norm.weight": np.ones(192), "norm.bias": np.zeros(192)}
    backbone = place(theirs, model(theirs), ("backbone",)).variables.params["net"]["backbone"]
    token, positions = (theirs[key].astype(np.float32) for key in ("cls_token", "pos_embed"))
    np.testing.assert_array_equal(backbone["class_token"], token[0, 0] + positions[0, 0])
    np.testing.assert_array_equal(backbone["positions"].reshape(16, 192), positions[0, 1:])


OPEN_CLIP = {"model_cfg": {"vision_cfg": {"width": 128, "head_width": 32}}}
CONFIGS = {
    "OpenAI's": ("open_clip_config.json", {"model_cfg": {"quick_gelu": True}}, "quick_gelu", 2),
    "LAION's": ("open_clip_config.json", OPEN_CLIP, "gelu", 4),
    "timm's": ("config.json", {"architecture": "vit_base_patch16_clip_224"}, "gelu", 2),
    "timm's of OpenAI": ("config.json", {"architecture": "vit_base_patch16_clip_quickgelu_224"}, "quick_gelu", 2),
    "arguments": ("config.json", {"architecture": "vit", "model_args": {"act_layer": "gelu_tanh"}}, "gelu_tanh", 2),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_in_the_same_folder_sets_the_activation(clip, kind, tmp_path):
    name, content, activation, heads = CONFIGS[kind]
    save_file(clip, tmp_path / "model.safetensors")
    (tmp_path / name).write_text(json.dumps(content))
    done = read_checkpoint(tmp_path / "model.safetensors", {})
    assert done.weights.settings["activation"] == activation
    assert done.weights.settings["heads"] == heads
    assert not any("activation" in note for note in done.notes)


def test_a_file_of_open_clip_uses_open_clips_config(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "vit_base_patch16_clip_224"}')
    (tmp_path / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    assert vit.config_beside(tmp_path / "open_clip_model.safetensors") == OPEN_CLIP
    assert "architecture" in vit.config_beside(tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", ["{", "[1]", '{"model": 3}', '{"architecture": 3, "model_args": 4}'])
def test_a_config_of_something_else_says_nothing(clip, content, tmp_path):
    save_file(clip, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(content)
    assert read_checkpoint(tmp_path / "model.safetensors", {}).weights.settings["activation"] == "quick_gelu"


def test_an_assumed_activation_is_printed(clip, tmp_path):
    save_file(clip, tmp_path / "model.safetensors")
    (note,) = (n for n in read_checkpoint(tmp_path / "model.safetensors", {}).notes if "activation" in n)
    assert "activation=quick_gelu is assumed" in note and "LAION's have gelu" in note
    given = read_checkpoint(tmp_path / "model.safetensors", {"activation": "gelu"})
    assert given.weights.settings["activation"] == "gelu"
    assert not any("activation" in note for note in given.notes)


@pytest.mark.parametrize(
    "width, heads, said", [(1280, 16, "as in others of this width"), (96, 1, "width / 64"), (384, 6, "")]
)
def test_heads_are_the_usual_ones_of_a_width(variables_of, width, heads, said):
    net = models.create("vit", 2, depth=1, width=width, heads=1, mlp_width=1, patch=1, grid=1)
    settings, assumed = vit.implied(export_state_dict(variables_of(net), net), {})
    assert settings.get("heads", width // 64) == heads
    assert assumed.get("heads", "") == said


@pytest.mark.parametrize(
    "key", ["blocks.0.attn.q_norm.weight", "fc_norm.weight", "attn_pool.latent", "blocks.0.mlp.w12.weight"]
)
def test_names_of_other_transformers_are_refused_by_name(dinov2, key):
    timm, _ = dinov2
    with pytest.raises(UserError, match=rf"no place for \['{key}'\]; nothing for \[\]"):
        import_state_dict({**timm, key: np.zeros(128, np.float32)}, model(timm))


def test_positions_of_another_grid_are_named(dinov2):
    timm, _ = dinov2
    with pytest.raises(UserError, match=r"pos_embed \(shape \(1, 16, 128\), the model has \(5, 5, 128\)\)"):
        import_state_dict(timm, model(timm, grid=5))


@pytest.mark.parametrize(
    "settings, reason",
    [
        (dict(adapter="lora"), r"nothing for model\.adapter,"),
        (dict(projection=4), r"nothing for model\.projection,"),
        (dict(features="class_and_mean"), r"nothing for model\.features,"),
    ],
)
def test_networks_without_timm_names_are_not_exported(variables_of, settings, reason):
    net = models.create("vit", 3, **TINY, **settings)
    with pytest.raises(UserError, match=reason):
        export_state_dict(variables_of(net), net)


def test_an_exported_class_token_has_the_position_0(variables_of):
    net = models.create("vit", 3, **TINY)
    state_dict = export_state_dict(variables_of(net), net)
    assert (state_dict["cls_token"].shape, state_dict["pos_embed"].shape) == ((1, 1, 8), (1, 10, 8))
    assert not state_dict["pos_embed"][0, 0].any() and state_dict["pos_embed"][0, 1:].all()


def test_a_file_of_clip_becomes_a_folder_of_weights(clip, variables_of, tmp_path, capsys, same):
    save_file(clip, tmp_path / "model.safetensors")
    assert (
        torch.main([str(tmp_path / "model.safetensors"), "--model=vit,normalise=clip", f"--out={tmp_path / 'w'}"]) == 0
    )
    output = capsys.readouterr().out
    assert "44 tensors placed in vit(" in output and "no classifier" in output
    assert f"and {len(clip) - 44 - 5} more" in output  # names beside the visual tower
    assert "activation=quick_gelu is assumed" in output and "they have no classifier" in output
    weights = load_weights(tmp_path / "w")
    assert (weights.num_classes, weights.settings["mean"][0]) == (0, 0.48145466)
    settings = dict(weights.settings)
    fresh = variables_of(models.create(settings.pop("name"), 23, **settings))
    started = with_weights(fresh, weights)
    same(started.params["net"]["backbone"], weights.variables.params["net"]["backbone"])
    same(started.params["net"]["classifier"], fresh.params["net"]["classifier"])


def test_a_vision_transformer_is_not_imported_as_another_network(clip, tmp_path):
    save_file(clip, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="holds a vision transformer, not a resnet: set the model to vit"):
        read_checkpoint(tmp_path / "model.safetensors", {"name": "resnet"})
