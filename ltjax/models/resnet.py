"""ResNets (He et al. 2016) and ResNeXts (Xie et al. 2017), for large and small images.

They have four stages with width, 2, 4 and 8 times width channels (times 4 after bottlenecks). Depths 10, 18 and 34 have
basic blocks, 50, 101 and 152 bottlenecks. If the shape changes, the shortcut is option B: a 1x1 convolution and a batch
norm.

- `stem="large"`: a 7x7 convolution of stride 2, max-pooling, stages of strides 1, 2, 2, 2. These are torchvision's, as
  in the long-tailed papers for ImageNet-LT, iNaturalist 2018 and Places-LT. With a 1000-way classifier ResNet-50 has
  25,557,032 parameters, and ResNeXt-50 32x4d (`depth=50, groups=32, group_width=4`) 25,028,904.
- `stem="small"`: a 3x3 convolution and no max-pooling. As in LBGAT's teacher, the second stage keeps the size of the
  image, so 32x32 becomes 8x8. With `strides=(1, 2, 2, 2)` it is the usual ResNet-18 for CIFAR, which has 11,173,962
  parameters with a 10-way classifier.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ltjax.models.blocks import BasicBlock, Bottleneck, rematerialised
from ltjax.models.layers import BatchNorm, Conv, Init, max_pool
from ltjax.system import registry
from ltjax.types import UserError

BLOCKS = {  # of each stage, by depth
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
BASIC = (10, 18, 34)  # depths with basic blocks
STRIDES = {"small": (1, 1, 2, 2), "large": (1, 2, 2, 2)}  # of each stage, by stem
CONV_INITS: dict[str, Init] = {"he": "fan_in", "torch": "torch"}  # of convolutions, see `ltjax.models.layers.Conv`


class ResNetBackbone(nn.Module):
    """[B, H, W, channels] -> {"stage1": [B, h, w, D], "stage2": [B, h/s2, w/s2, 2 D], ...}.

    D is `width`, or 4 `width` with bottlenecks. h is H/s1, or H/(4 s1) with the large stem.

    Attributes:
      blocks: Number of blocks of each stage.
      strides: Stride of each stage's first block.
      width: Channels of the first stage's blocks.
      stem: "small" or "large".
      inner: Channels of the 3x3 convolution in the first stage's bottlenecks. None: basic blocks.
      groups: Of the same convolution.
      shortcut: Of basic blocks.
      family: See `ltjax.models`.
      kernel_init: See `ltjax.models.layers.Conv`.
    """

    blocks: tuple[int, ...]
    strides: tuple[int, ...]
    width: int = 64
    stem: str = "small"
    inner: int | None = None
    groups: int = 1
    shortcut: str = "conv"
    family: str = "resnet"
    kernel_init: Init = "fan_in"
    dtype: Any = jnp.float32
    platform: str | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
        large = self.stem == "large"
        conv: dict[str, Any] = dict(dtype=self.dtype, platform=self.platform, kernel_init=self.kernel_init)
        taps, stride = (7, 2) if large else (3, 1)
        x = Conv(self.width, kernel_size=taps, strides=stride, **conv, name="conv")(x)
        x = BatchNorm(relu=True, name="norm")(x, train)
        if large:
            x = max_pool(x, self.platform)
        maps = {}
        for stage, (num_blocks, stride) in enumerate(zip(self.blocks, self.strides, strict=True)):
            if self.inner is None:
                kind, settings = BasicBlock, dict(features=self.width * 2**stage, shortcut=self.shortcut)
            else:
                sizes = dict(features=4 * self.width * 2**stage, inner=self.inner * 2**stage)
                kind, settings = Bottleneck, dict(**sizes, groups=self.groups)
            for number in range(num_blocks):
                name, strides = f"stage{stage + 1}_block{number + 1}", stride if number == 0 else 1
                x = rematerialised(kind, self.remat)(**settings, strides=strides, **conv, name=name)(x, train)
            maps[f"stage{stage + 1}"] = x
        return maps


def stage_blocks(depth: int, blocks: tuple[int, ...] | None, known: tuple[int, ...] = tuple(BLOCKS)) -> tuple[int, ...]:
    """Return the number of blocks of each of the four stages: `blocks`, or those of the depth, one of `known`."""
    if depth not in known:
        *others, last = map(str, known)
        raise UserError(f"model depth = {depth}: take {', '.join(others)} or {last}")
    return BLOCKS[depth] if blocks is None else of_each_stage("blocks", blocks)


def of_each_stage(setting: str, values: tuple[int, ...]) -> tuple[int, ...]:
    """Return `values` as a tuple, or raise a UserError if they are not four integers above 0."""
    if not isinstance(values, tuple | list) or len(values) != 4 or not all(type(v) is int and v > 0 for v in values):
        raise UserError(f"model {setting} = {values}: one integer above 0 for each of the four stages")
    return tuple(values)


def backbone(
    dtype: Any,
    platform: str | None,
    remat: bool,
    *,
    depth: int = 18,
    stem: str = "small",
    width: int = 64,
    strides: tuple[int, ...] | None = None,
    blocks: tuple[int, ...] | None = None,
    groups: int = 1,
    group_width: int = 64,
    init: str = "he",
) -> ResNetBackbone:
    """Create a ResNet's or ResNeXt's backbone. Other arguments: see `ltjax.models.create`.

    The many parameters are its settings in a config.

    Args:
      depth: 10, 18, 34, 50, 101 or 152.
      stem: "small" or "large".
      width: Channels of the first stage's blocks, 64 in the papers.
      strides: Of each stage's first block, instead of those of the stem.
      blocks: Of each stage, instead of those of the depth. MiSLAS's frozen ResNet-152 has (3, 8, 36, 2), because an
        extra block replaces the last.
      groups: Of the bottlenecks' 3x3 convolutions, 32 in ResNeXt "32x4d".
      group_width: Channels of a group, 4 in ResNeXt "32x4d": group_width * width / 64 in the first stage, twice as many
        in each next one.
      init: "he": He-normal weights with fan_in, or fan_out with the large stem. "torch": PyTorch's default, as in
        LBGAT's natural model.
    """
    if width < 1:
        raise UserError(f"model width = {width}: the first stage needs at least one channel")
    numbers = stage_blocks(depth, blocks)
    of_stem = registry.choose("model stem", STRIDES, stem)
    weights = registry.choose("model init", CONV_INITS, init)
    if stem == "large" and init == "he":
        weights = "fan_out"  # torchvision's
    strides = of_stem if strides is None else of_each_stage("strides", strides)
    inner = None
    if depth not in BASIC:
        if groups < 1 or group_width < 1 or group_width * width % 64:
            raise UserError(
                f"model groups = {groups}, group_width = {group_width}: at least 1 each, and "
                f"group_width * width / 64 a whole number (width = {width})"
            )
        inner = group_width * width // 64 * groups
    elif (groups, group_width) != (1, 64):
        raise UserError(
            f"model groups = {groups}, group_width = {group_width}: depth {depth} has no bottlenecks for them; take "
            "depth 50, 101 or 152"
        )
    settings = dict[str, Any](kernel_init=weights, dtype=dtype, platform=platform, remat=remat)
    return ResNetBackbone(numbers, strides, width, stem, inner, groups, **settings)
