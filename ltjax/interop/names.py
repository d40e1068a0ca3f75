"""What PyTorch's networks and ours call the same thing: one table, read in both directions."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn

PREFIXES = r"(?:(?:module|model|_orig_mod)\.)*"  # of wrappers, and of the backbone in MiSLAS's and ResLT's networks
_BLOCK = r"(?:layer(?P<stage>\d)|block(?P<wide_stage>\d)\.layer)\.(?P<block>\d+)\."  # the latter in wide ResNets
_OURS = "backbone/stage{stage}_block{block}/"
# What a state_dict may hold and a network has no use for: the batches PyTorch has counted; a stage that the class of
# LBGAT's wide ResNets holds and never uses; the margins that DRO-LT learns, which are its loss's.
IGNORED = r"(?:.*\.)?num_batches_tracked|sub_block1\..*|(?:.*\.)?(?:learnable_)?epsilons"


class Rule(NamedTuple):
    theirs: str  # regular expression for a module's name without `PREFIXES`
    ours: str
    written: str  # the name that an export gives it
    families: Mapping[str, str] = {}  # where that differs, by the kind of backbone


RULES = (
    Rule(r"conv1", "backbone/conv", "conv1"),
    # after the first convolution; in pre-activation networks, after the last block
    Rule(r"bn1?", "backbone/norm", "bn1", {"preact_resnet": "bn"}),
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
    Rule(r"block\.conv(?P<n>\d)", "block/conv{n}", "block.conv{n}"),  # MiSLAS's further block for Places-LT
    Rule(r"block\.bn(?P<n>\d)", "block/norm{n}", "block.bn{n}"),
    Rule(r"BNH", "branches/norm1", "BNH"),  # ResLT's head, medium and tail branch
    Rule(r"BNM", "branches/norm2", "BNM"),
    Rule(r"BNT", "branches/norm3", "BNT"),
    Rule(r"branches\.0", "branches/conv", "branches.0"),  # see `branches_by_shape` for other names
    Rule(r"branches\.1", "branches/norm", "branches.1"),
    Rule(r"(?:classifier\.)?(?:fc|linear)", "classifier", "fc", {"resnet_cifar": "linear", "preact_resnet": "linear"}),
)
LEAVES = {"weight": "kernel", "bias": "bias", "running_mean": "mean", "running_var": "var"}
_WRITTEN = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
SCALE = "lws_model.learned_norm"  # MiSLAS's, [1, C]


def bare(key: str) -> str:
    """A name without what wrappers put before it."""
    return re.sub(f"^{PREFIXES}", "", key)


def path_of(key: str, ndim: int) -> str | None:
    """Our path ("backbone/conv/kernel") of a bare PyTorch name, or None. ndim: of its array."""
    if key.removeprefix("lws_model.") == "learned_norm":
        return "logit_scale"
    name, _, leaf = key.rpartition(".")
    if leaf not in LEAVES:
        return None
    for rule in RULES:
        if match := re.fullmatch(rule.theirs, name):
            parts = match.groupdict()
            if "block" in parts:
                parts["stage"] = parts["stage"] or parts["wide_stage"]
                parts["block"] = str(int(parts["block"]) + 1)  # ours count from 1
            return f"{rule.ours.format(**parts)}/{'scale' if leaf == 'weight' and ndim == 1 else LEAVES[leaf]}"
    return None


def branches_by_shape(unplaced: dict[str, np.ndarray], width: int) -> dict[str, str]:
    """{name: our path} of a 1x1 convolution to several times `width` channels and the batch norm after it.

    The modules of ResLT's branches for large images have been given several names; they are known by being the only
    ones left. None where more or less is left than one of each.
    """
    convolutions = [key for key, value in unplaced.items() if value.ndim == 4]
    if len(convolutions) != 1 or (convolution := unplaced[convolutions[0]]).shape[1:] != (width, 1, 1):
        return {}
    found = {convolutions[0]: "branches/conv/kernel"}
    for key in unplaced.keys() - found.keys():
        leaf = key.rpartition(".")[2]
        if leaf in LEAVES and unplaced[key].shape == convolution.shape[:1]:
            found[key] = f"branches/norm/{'scale' if leaf == 'weight' else LEAVES[leaf]}"
    modules = {key.rpartition(".")[0] for key in found}
    return found if len(found) == len(set(found.values())) == 5 and len(modules) == 2 else {}


def family(model: nn.Module) -> str:
    """The kind of a network's backbone, as in `Rule.families`; those of three stages may share another one's class."""
    backbone: Any = model.backbone  # pyrefly: ignore[missing-attribute]
    name = type(backbone).__module__.rpartition(".")[2]
    three = len(getattr(backbone, "blocks", ())) == 3
    return {"preact_resnet": "wide_resnet", "resnet": "resnet_cifar"}.get(name, name) if three else name


def key_of(path: str, kind: str, *, mislas: bool, reslt: bool) -> str:
    """The PyTorch name of one of our paths. kind: from `family`. mislas, reslt: in the form of their networks, whose
    backbone is a part called `model`, and whose classifier, in MiSLAS, is one of its own."""
    if path == "logit_scale":
        return SCALE
    module, _, leaf = path.rpartition("/")
    for rule in RULES:
        pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>\\d+)", rule.ours)
        if match := re.fullmatch(pattern, module):
            parts = match.groupdict()
            if "block" in parts:
                parts["block"] = str(int(parts["block"]) - 1)
            name = rule.families.get(kind, rule.written).format(**parts)
            if mislas and module == "classifier":
                name = "classifier.fc"
            inside = module.startswith("backbone/") and (mislas or (reslt and kind == "resnet_cifar"))
            return f"{'model.' if inside else ''}{name}.{_WRITTEN[leaf]}"
    raise KeyError(path)
