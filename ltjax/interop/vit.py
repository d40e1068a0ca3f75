"""Vision transformers of timm, DINOv2 and CLIP: their settings, read off their arrays, and their exported shapes."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ltjax.interop import names
from ltjax.models import vit
from ltjax.system.files import load_json
from ltjax.types import UserError

HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}  # of ViT-SO400M, H, g and G, by width; otherwise width / 64
USUAL = (192, 384, 768, 1024, *HEADS)
CONFIGS = ("config.json", "open_clip_config.json")  # timm's and open_clip's, beside their files


def config_beside(checkpoint: Path) -> dict[str, Any]:
    """Read what timm or open_clip says about a file of weights in its folder; {} if there is nothing.

    A folder of the Hugging Face Hub may have both. `open_clip_config.json` is of the files that begin with open_clip.
    """
    files = reversed(CONFIGS) if checkpoint.name.startswith("open_clip") else CONFIGS
    for name in files:
        try:
            content = load_json(checkpoint.parent / name)
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and ({"architecture", "model_cfg"} & set(content)):
            return content
    return {}


def _said(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the activation and the heads, as far as the config of timm or open_clip says them."""
    if isinstance(model := config.get("model_cfg"), Mapping):  # open_clip's
        said: dict[str, Any] = {"activation": "quick_gelu" if model.get("quick_gelu") else "gelu"}
        vision = model.get("vision_cfg")
        width, of_head = (vision.get("width"), vision.get("head_width", 64)) if isinstance(vision, Mapping) else (0, 0)
        if isinstance(width, int) and isinstance(of_head, int) and of_head > 0:
            said["heads"] = width // of_head
        return said
    name, arguments = config.get("architecture"), config.get("model_args")
    said = {"activation": "quick_gelu" if "quickgelu" in name else "gelu"} if isinstance(name, str) else {}
    if isinstance(arguments, Mapping):
        given = {"activation": arguments.get("act_layer"), "heads": arguments.get("num_heads")}
        said |= {key: value for key, value in given.items() if value is not None}
    return said


def implied(arrays: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Infer the settings of `ltjax.models.vit.backbone` from a state_dict; {} if it is of another network.

    Args:
      arrays: From `ltjax.interop.names.prepared`.
      config: From `config_beside`.

    Returns:
      The settings, with the name of the model, and {setting: reason} of those that had to be assumed.
    """
    paths = {names.path_of(names.bare(key), value.ndim): value for key, value in arrays.items()}
    kernel, positions = paths.get("backbone/conv/kernel"), paths.get("backbone/positions")
    perceptron = paths.get("backbone/block1/mlp1/kernel")
    if kernel is None or positions is None or perceptron is None or (kernel.ndim, perceptron.ndim) != (4, 2):
        return {}, {}
    width = kernel.shape[0]
    blocks = {match[1] for path in paths if path and (match := re.match(r"backbone/block(\d+)/", path))}
    settings: dict[str, Any] = dict(name="vit", depth=len(blocks), width=width, patch=kernel.shape[2])
    settings["grid"] = math.isqrt(positions.size // max(width, 1))
    if perceptron.shape[0] != 4 * width:
        settings["mlp_width"] = perceptron.shape[0]
    if "backbone/registers" in paths:
        settings["registers"] = paths["backbone/registers"].size // max(width, 1)
    if "backbone/block1/layer_scale1/gamma" in paths:
        settings["layer_scale"] = True
    if "backbone/block1/attention/qkv/bias" not in paths:
        settings["qkv_bias"] = False
    if "backbone/projection" in paths:
        settings["projection"] = paths["backbone/projection"].size // max(width, 1)
    assumed = {}
    if width in HEADS or width not in USUAL:
        settings["heads"] = HEADS.get(width, max(width // 64, 1))
        assumed["heads"] = "as in others of this width" if width in HEADS else "width / 64"
    if "backbone/pre_norm/scale" in paths:
        settings.update(pre_norm=True, epsilon=1e-5)
        is_openais = any(names.bare(key) == "class_embedding" for key in arrays)
        settings["activation"] = "quick_gelu" if is_openais else "gelu"
        assumed["activation"] = "as in OpenAI's; LAION's have gelu" if is_openais else "OpenAI's have quick_gelu"
    said = _said(config)
    return settings | said, {key: reason for key, reason in assumed.items() if key not in said}


def check_export(model: vit.ViTBackbone) -> None:
    """Raise UserError if timm has no names for a network."""
    kept = {"adapter": model.block["adapter"] != "none", "projection": bool(model.projection)}
    kept["features"] = model.features != "class"
    if reasons := [f"model.{name}" for name, is_set in kept.items() if is_set]:
        raise UserError(
            f"timm's vision transformers have nothing for {', '.join(reasons)}, so there are no PyTorch names for this "
            "network: export --format=weights or stablehlo"
        )


def exported(path: str, value: np.ndarray, registers: int) -> np.ndarray:
    """Bring a token or positions to timm's shape. The class token's own position, where timm has one, is 0."""
    width = value.shape[-1]
    value = value.reshape(1, -1, width)
    if path == "backbone/positions" and not registers:
        value = np.concatenate([np.zeros((1, 1, width), value.dtype), value], axis=1)
    return value
