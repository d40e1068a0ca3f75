"""Infer the network of weights of torchvision's or timm's ResNets, or of EfficientNet-Lite0, from their arrays."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from ltjax.interop import names
from ltjax.models.resnet import BASIC, BLOCKS

BLOCK = re.compile(r"backbone/stage(\d)_block\d+/conv1/kernel")


def implied(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the settings of `ltjax.models.create`, with `name`; {} if the arrays are of another network.

    Args:
      arrays: From `ltjax.interop.names.prepared`.
    """
    paths = {names.path_of(names.bare(key), value.ndim): value for key, value in arrays.items()}
    if {"backbone/head/kernel", "backbone/stage7_block1/depthwise/kernel"} <= set(paths):
        return dict(name="efficientnet_lite0")
    first, inner = paths.get("backbone/conv/kernel"), paths.get("backbone/stage1_block1/conv2/kernel")
    if first is None or inner is None or first.shape[2:] != (7, 7) or inner.ndim != 4 or 0 in inner.shape:
        return {}
    stages = Counter(match[1] for path in paths if path and (match := BLOCK.fullmatch(path)))
    blocks = tuple(stages[stage] for stage in sorted(stages))
    bottlenecks = "backbone/stage1_block1/conv3/kernel" in paths
    depths = [depth for depth, known in BLOCKS.items() if known == blocks and (depth not in BASIC) == bottlenecks]
    if not depths:
        return {}
    settings: dict[str, Any] = dict(name="resnet", depth=depths[0], stem="large", width=first.shape[0])
    groups = inner.shape[0] // inner.shape[1]
    if bottlenecks and (groups, inner.shape[1]) != (1, settings["width"]):
        settings.update(groups=groups, group_width=64 * inner.shape[1] // max(settings["width"], 1))
    return settings
