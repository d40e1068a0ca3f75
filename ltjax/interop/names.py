"""Names of PyTorch's networks and ours: one table for both directions."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

# Of wrappers, of the backbone in MiSLAS's and ResLT's networks, and of the images' tower in CLIP's
PREFIXES = r"(?:(?:module|model|_orig_mod|visual)\.)*"
_BLOCK = r"(?:layer(?P<stage>\d)|block(?P<wide_stage>\d)\.layer)\.(?P<block>\d+)\."  # the second in wide ResNets
_OURS = "backbone/stage{stage}_block{block}/"
_VIT_BLOCK = r"(?:blocks|transformer\.resblocks)\.(?P<block>\d+)\."  # timm's and Meta's; CLIP's
_OUR_VIT_BLOCK = "backbone/block{block}/"
# Blocks of EfficientNet-Lite0: counted through, or by stage as in timm, whose first stage has blocks without expansion.
_LITE, _TIMM = r"_blocks\.(?P<number>\d+)\._", r"blocks\.(?P<timm_stage>{stages})\.(?P<block>\d+)\."
_FIRST, _LATER, _ANY = (_TIMM.format(stages=stages) for stages in ("0", "[1-9]", r"\d"))
_OURS_FIRST, _TIMMS = "backbone/stage1_block{block}/", "blocks.{timm_stage}.{block}."
_LITE_BLOCKS = tuple((stage, block) for stage, blocks in enumerate((1, 2, 2, 3, 3, 4, 1), 1) for block in range(blocks))
# Names without use for a network: PyTorch's batch counts, the unused stage of LBGAT's wide ResNets, DRO-LT's margins,
# and DINOv2's token of masked patches.
IGNORED = r"(?:.*\.)?num_batches_tracked|sub_block1\..*|(?:.*\.)?(?:learnable_)?epsilons|mask_token"


class Rule(NamedTuple):
    """Names of one module or several.

    Attributes:
      theirs: Regular expression for PyTorch's names without `PREFIXES`.
      ours: Our path.
      exported: PyTorch's name in an export.
      exceptions: {family of backbones: name in an export}, see `ltjax.models`.
    """

    theirs: str
    ours: str
    exported: str
    exceptions: Mapping[str, str] = {}


RULES = (
    Rule(
        r"conv1|patch_embed\.proj|_?conv_stem",
        "backbone/conv",
        "conv1",
        {"vit": "patch_embed.proj", "efficientnet_lite0": "conv_stem"},
    ),
    # after the first convolution; in pre-activation networks and vision transformers, after the last block
    Rule(r"bn1?|norm|ln_post|_bn0", "backbone/norm", "bn1", {"preact_resnet": "bn", "vit": "norm"}),
    Rule(
        _BLOCK + r"conv(?P<n>\d)",
        _OURS + "conv{n}",
        "layer{stage}.{block}.conv{n}",
        {"wide_resnet": "block{stage}.layer.{block}.conv{n}"},
    ),
    Rule(
        _BLOCK + r"bn(?P<n>\d)",
        _OURS + "norm{n}",
        "layer{stage}.{block}.bn{n}",
        {"wide_resnet": "block{stage}.layer.{block}.bn{n}"},
    ),
    Rule(
        _BLOCK + r"(?:convShortcut|(?:shortcut|downsample)\.0)",
        _OURS + "shortcut",
        "layer{stage}.{block}.downsample.0",
        {"wide_resnet": "block{stage}.layer.{block}.convShortcut", "preact_resnet": "layer{stage}.{block}.shortcut.0"},
    ),
    Rule(_BLOCK + r"(?:shortcut|downsample)\.1", _OURS + "shortcut_norm", "layer{stage}.{block}.downsample.1"),
    Rule(r"block\.conv(?P<n>\d)", "block/conv{n}", "block.conv{n}"),  # MiSLAS's extra block for Places-LT
    Rule(r"block\.bn(?P<n>\d)", "block/norm{n}", "block.bn{n}"),
    Rule(r"BNH", "branches/norm1", "BNH"),  # ResLT's head, medium and tail branch
    Rule(r"BNM", "branches/norm2", "BNM"),
    Rule(r"BNT", "branches/norm3", "BNT"),
    Rule(r"branches\.0", "branches/conv", "branches.0"),  # see `branches_by_shape` for other names
    Rule(r"branches\.1", "branches/norm", "branches.1"),
    Rule(
        r"(?:classifier\.)?(?:fc|linear)|head|_fc|classifier",
        "classifier",
        "fc",
        {"resnet_cifar": "linear", "preact_resnet": "linear", "vit": "head", "efficientnet_lite0": "classifier"},
    ),
    Rule(r"norm_pre|ln_pre", "backbone/pre_norm", "norm_pre"),
    Rule(_VIT_BLOCK + r"(?:norm|ln_)(?P<n>[12])", _OUR_VIT_BLOCK + "norm{n}", "blocks.{block}.norm{n}"),
    Rule(_VIT_BLOCK + r"attn\.(?:qkv|in_proj)", _OUR_VIT_BLOCK + "attention/qkv", "blocks.{block}.attn.qkv"),
    Rule(_VIT_BLOCK + r"attn\.(?:out_)?proj", _OUR_VIT_BLOCK + "attention/out", "blocks.{block}.attn.proj"),
    Rule(_VIT_BLOCK + r"mlp\.(?:fc1|c_fc)", _OUR_VIT_BLOCK + "mlp1", "blocks.{block}.mlp.fc1"),
    Rule(_VIT_BLOCK + r"mlp\.(?:fc2|c_proj)", _OUR_VIT_BLOCK + "mlp2", "blocks.{block}.mlp.fc2"),
    Rule(_VIT_BLOCK + r"ls(?P<n>[12])", _OUR_VIT_BLOCK + "layer_scale{n}", "blocks.{block}.ls{n}"),
    Rule(rf"{_LITE}expand_conv|{_LATER}conv_pw", _OURS + "expand", _TIMMS + "conv_pw"),
    Rule(rf"{_LITE}bn0|{_LATER}bn1", _OURS + "expand_norm", _TIMMS + "bn1"),
    Rule(rf"{_LITE}depthwise_conv|{_ANY}conv_dw", _OURS + "depthwise", _TIMMS + "conv_dw"),
    Rule(rf"{_FIRST}bn1", _OURS_FIRST + "depthwise_norm", "blocks.0.{block}.bn1"),
    Rule(rf"{_LITE}bn1|{_LATER}bn2", _OURS + "depthwise_norm", _TIMMS + "bn2"),
    Rule(rf"{_FIRST}conv_pw", _OURS_FIRST + "project", "blocks.0.{block}.conv_pw"),
    Rule(rf"{_LITE}project_conv|{_LATER}conv_pwl", _OURS + "project", _TIMMS + "conv_pwl"),
    Rule(rf"{_FIRST}bn2", _OURS_FIRST + "project_norm", "blocks.0.{block}.bn2"),
    Rule(rf"{_LITE}bn2|{_LATER}bn3", _OURS + "project_norm", _TIMMS + "bn3"),
    Rule(r"_?conv_head", "backbone/head", "conv_head"),
    Rule(r"bn2|_bn1", "backbone/head_norm", "bn2"),
)
LEAVES = {"weight": "kernel", "bias": "bias", "running_mean": "mean", "running_var": "var", "gamma": "gamma"}
_EXPORTED = {"scale": "weight", **{ours: theirs for theirs, ours in LEAVES.items()}}
# Names that have no module, the exported ones first: timm's, Meta's (DINOv2), CLIP's.
TOKENS = {
    "cls_token": "backbone/class_token",  # [1, 1, D]
    "class_embedding": "backbone/class_token",  # [D]
    "pos_embed": "backbone/positions",  # [1, N, D], of the patches or of the class token and them
    "positional_embedding": "backbone/positions",  # [N, D]
    "reg_token": "backbone/registers",  # [1, R, D]
    "register_tokens": "backbone/registers",
    "proj": "backbone/projection",  # [D, E]
}
# Names of the mean and standard deviation with which some networks, mostly robust ones, normalise their images.
NORMALISATION = re.compile(r"(?:normali[sz]\w*\.)?(?:(?P<mean>mean|mu)|std|sigma)")
SCALE = "lws_model.learned_norm"  # MiSLAS's, [1, C]


def bare(key: str) -> str:
    """Remove the prefixes of wrappers from a name."""
    return re.sub(f"^{PREFIXES}", "", key)


def path_of(key: str, ndim: int) -> str | None:
    """Return our path ("backbone/conv/kernel") of a bare PyTorch name, or None. ndim: of its array."""
    if key.removeprefix("lws_model.") == "learned_norm":
        return "logit_scale"
    if key in TOKENS:
        return TOKENS[key]
    name, _, leaf = re.sub(r"\.in_proj_(?=\w+$)", ".in_proj.", key).rpartition(".")
    if leaf not in LEAVES:
        return None
    for rule in RULES:
        if match := re.fullmatch(rule.theirs, name):
            try:
                module = rule.ours.format(**_our_numbers(match.groupdict()))
            except IndexError:
                return None  # a block more than EfficientNet-Lite0 has
            return f"{module}/{'scale' if leaf == 'weight' and ndim == 1 else LEAVES[leaf]}"
    return None


def _our_numbers(parts: Mapping[str, str | None]) -> dict[str, str | int]:
    """Return the numbers of one of our paths, which count from 1, from the parts of a name. Raises: IndexError."""
    numbers: dict[str, str | int] = {key: value for key, value in parts.items() if value is not None}
    if "number" in numbers:
        numbers["stage"], numbers["block"] = _LITE_BLOCKS[int(numbers["number"])]
    elif "timm_stage" in numbers:
        numbers["stage"] = int(numbers["timm_stage"]) + 1
    elif "wide_stage" in numbers:
        numbers["stage"] = numbers["wide_stage"]
    if "block" in numbers:
        numbers["block"] = int(numbers["block"]) + 1
    return numbers


def prepared(state_dict: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Return the network's arrays, and the ignored names.

    Ignored are `IGNORED`, and names outside of CLIP's `visual.`, such as its text tower. The position of a class token
    is added to the token, so positions are those of the patches.
    """
    inside = re.compile(r"(?:(?:module|model|_orig_mod)\.)*visual\.")
    visual = any(inside.match(key) for key in state_dict)
    arrays = {
        key: np.asarray(value)
        for key, value in state_dict.items()
        if not re.fullmatch(IGNORED, bare(key)) and (inside.match(key) or not visual)
    }
    keys = {path_of(bare(key), value.ndim): key for key, value in arrays.items()}
    token, positions = keys.get("backbone/class_token"), keys.get("backbone/positions")
    if token and positions and arrays[token].size and arrays[positions].shape[-1:] == (arrays[token].size,):
        rows = arrays[positions].reshape(-1, arrays[token].size)
        if len(rows) > 1 and math.isqrt(len(rows) - 1) ** 2 == len(rows) - 1:
            kind = np.result_type(rows.dtype, arrays[token].dtype, np.float32)
            arrays[token] = arrays[token].reshape(-1).astype(kind) + rows[0].astype(kind)
            arrays[positions] = rows[1:]
    return arrays, tuple(key for key in state_dict if key not in arrays)


def normalisation(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[str, tuple[float, ...]]]:
    """Find the normalisation of images in [0, 1] in a state_dict.

    Return {"mean" and "std": (its name, a value of each input channel)}; {} if there is none.
    """
    first = [value for key, value in arrays.items() if path_of(bare(key), value.ndim) == "backbone/conv/kernel"]
    constants = {}
    for key, value in arrays.items():
        match = NORMALISATION.fullmatch(bare(key))
        if match and first and first[0].shape[1:2] == (value.size,) and np.max(value) <= 1:
            constants["mean" if match["mean"] else "std"] = (key, tuple(round(float(x), 6) for x in value.reshape(-1)))
    return constants if len(constants) == 2 else {}


def branches_by_shape(unplaced: dict[str, np.ndarray], width: int) -> dict[str, str]:
    """Find ResLT's branches for large images by their shapes: {name: our path}.

    Their modules have different names in different checkpoints. They are the only ones left: a 1x1 convolution from
    `width` channels and its batch norm. If anything else is left, the result is empty.
    """
    convolutions = [key for key, value in unplaced.items() if value.ndim == 4]
    if len(convolutions) != 1 or (convolution := unplaced[convolutions[0]]).shape[1:] != (width, 1, 1):
        return {}
    paths = {convolutions[0]: "branches/conv/kernel"}
    for key in unplaced.keys() - paths.keys():
        leaf = key.rpartition(".")[2]
        if leaf in LEAVES and unplaced[key].shape == convolution.shape[:1]:
            paths[key] = f"branches/norm/{'scale' if leaf == 'weight' else LEAVES[leaf]}"
    modules = {key.rpartition(".")[0] for key in paths}
    return paths if len(paths) == len(set(paths.values())) == 5 and len(modules) == 2 else {}


def key_of(path: str, family: str, *, mislas: bool, reslt: bool) -> str:
    """Return the PyTorch name of one of our paths.

    Args:
      path: Such as "backbone/conv/kernel".
      family: Of the network's backbone, see `ltjax.models`.
      mislas: Use the form of MiSLAS's networks, with parts `model` and `classifier`.
      reslt: Use the form of ResLT's networks, with a part `model`.
    """
    if path == "logit_scale":
        return SCALE
    if tokens := [theirs for theirs, ours in TOKENS.items() if ours == path]:
        return f"{'model.' if mislas else ''}{tokens[0]}"
    module, _, leaf = path.rpartition("/")
    for rule in RULES:
        pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>\\d+)", rule.ours)
        if match := re.fullmatch(pattern, module):
            parts = match.groupdict()
            if "block" in parts:
                parts["block"] = str(int(parts["block"]) - 1)
                parts["timm_stage"] = str(int(parts.get("stage", 1)) - 1)
            name = rule.exceptions.get(family, rule.exported).format(**parts)
            if mislas and module == "classifier":
                name = "classifier.fc"
            inside = module.startswith("backbone/") and (mislas or (reslt and family == "resnet_cifar"))
            return f"{'model.' if inside else ''}{name}.{_EXPORTED[leaf]}"
    raise KeyError(path)
