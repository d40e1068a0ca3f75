"""Names of PyTorch's networks and ours: one table for both directions."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

PREFIXES = r"(?:(?:module|model|_orig_mod)\.)*"  # of wrappers, and of the backbone in MiSLAS's and ResLT's networks
_BLOCK = r"(?:layer(?P<stage>\d)|block(?P<wide_stage>\d)\.layer)\.(?P<block>\d+)\."  # the second in wide ResNets
_OURS = "backbone/stage{stage}_block{block}/"
# Names without use for a network: PyTorch's batch counts, the unused stage of LBGAT's wide ResNets, and DRO-LT's
# margins.
IGNORED = r"(?:.*\.)?num_batches_tracked|sub_block1\..*|(?:.*\.)?(?:learnable_)?epsilons"


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
    Rule(r"block\.conv(?P<n>\d)", "block/conv{n}", "block.conv{n}"),  # MiSLAS's extra block for Places-LT
    Rule(r"block\.bn(?P<n>\d)", "block/norm{n}", "block.bn{n}"),
    Rule(r"BNH", "branches/norm1", "BNH"),  # ResLT's head, medium and tail branch
    Rule(r"BNM", "branches/norm2", "BNM"),
    Rule(r"BNT", "branches/norm3", "BNT"),
    Rule(r"branches\.0", "branches/conv", "branches.0"),  # see `branches_by_shape` for other names
    Rule(r"branches\.1", "branches/norm", "branches.1"),
    Rule(r"(?:classifier\.)?(?:fc|linear)", "classifier", "fc", {"resnet_cifar": "linear", "preact_resnet": "linear"}),
)
LEAVES = {"weight": "kernel", "bias": "bias", "running_mean": "mean", "running_var": "var"}
_EXPORTED = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
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


def normalisation(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[str, tuple[float, ...]]]:
    """Find the normalisation of images in [0, 1] in a state_dict.

    Returns:
      {"mean" and "std": (its name, a value of each input channel)}; {} if there is none.
    """
    first = [value for key, value in arrays.items() if path_of(bare(key), value.ndim) == "backbone/conv/kernel"]
    constants = {}
    for key, value in arrays.items():
        match = NORMALISATION.fullmatch(bare(key))
        if match and first and value.size == first[0].shape[1] and np.max(value) <= 1:
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
    module, _, leaf = path.rpartition("/")
    for rule in RULES:
        pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>\\d+)", rule.ours)
        if match := re.fullmatch(pattern, module):
            parts = match.groupdict()
            if "block" in parts:
                parts["block"] = str(int(parts["block"]) - 1)
            name = rule.exceptions.get(family, rule.exported).format(**parts)
            if mislas and module == "classifier":
                name = "classifier.fc"
            inside = module.startswith("backbone/") and (mislas or (reslt and family == "resnet_cifar"))
            return f"{'model.' if inside else ''}{name}.{_EXPORTED[leaf]}"
    raise KeyError(path)
