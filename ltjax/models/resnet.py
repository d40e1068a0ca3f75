"""ResNet-18 and 34 of basic blocks (He et al. 2016), for small images: a 3x3 convolution first, and no max-pooling.

Four stages with width, 2, 4 and 8 times width channels. LBGAT's teacher keeps the size of the image in the second stage
too, so that 32x32 ends as 8x8; `strides = (1, 2, 2, 2)` is the usual ResNet-18 for CIFAR. Shortcuts are option B: where
the shape changes, a 1x1 convolution and a batch norm. ResNet-18 with a 10-way classifier has 11,173,962 parameters.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ltjax.models.layers import BatchNorm, Conv
from ltjax.types import UserError

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}  # of each stage, by depth


class BasicBlock(nn.Module):
    features: int
    strides: int
    dtype: Any
    platform: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = dict(features=self.features, dtype=self.dtype, platform=self.platform)
        y = nn.relu(BatchNorm(name="norm1")(Conv(**conv, strides=self.strides, name="conv1")(x), train))
        y = BatchNorm(name="norm2")(Conv(**conv, name="conv2")(y), train)
        if self.strides != 1 or x.shape[-1] != self.features:
            x = Conv(**conv, kernel_size=1, strides=self.strides, name="shortcut")(x)
            x = BatchNorm(name="shortcut_norm")(x, train)
        return nn.relu(x + y)


class ResNetBackbone(nn.Module):
    """[B, H, W, channels] -> {"stage1": [B, H/s1, W/s1, width], "stage2": [B, H/(s1 s2), W/(s1 s2), 2 width], ...}.

    blocks, strides: of each stage; the first block of a stage takes its stride.
    """

    blocks: tuple[int, ...]
    strides: tuple[int, ...]
    width: int = 64
    dtype: Any = jnp.float32
    platform: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
        x = Conv(self.width, dtype=self.dtype, platform=self.platform, name="conv")(x)
        x = nn.relu(BatchNorm(name="norm")(x, train))
        maps = {}
        for stage, (num_blocks, stride) in enumerate(zip(self.blocks, self.strides, strict=True)):
            for block in range(num_blocks):
                strides = stride if block == 0 else 1
                name = f"stage{stage + 1}_block{block + 1}"
                x = BasicBlock(self.width * 2**stage, strides, self.dtype, self.platform, name=name)(x, train)
            maps[f"stage{stage + 1}"] = x
        return maps


def stage_blocks(depth: int, blocks: tuple[int, ...] | None) -> tuple[int, ...]:
    """Blocks of each of the four stages: `blocks` where given, else those of the depth."""
    if depth not in BLOCKS:
        raise UserError(f"model depth = {depth}: take {' or '.join(map(str, BLOCKS))}")
    return BLOCKS[depth] if blocks is None else of_each_stage("blocks", blocks)


def of_each_stage(setting: str, values: tuple[int, ...]) -> tuple[int, ...]:
    """`values` as a tuple. Raises: UserError where they are not four integers above 0."""
    if not isinstance(values, tuple | list) or len(values) != 4 or not all(type(v) is int and v > 0 for v in values):
        raise UserError(f"model {setting} = {values}: one integer above 0 for each of the four stages")
    return tuple(values)


def backbone(
    dtype: Any,
    platform: str | None,
    *,
    depth: int = 18,
    width: int = 64,
    strides: tuple[int, ...] = (1, 1, 2, 2),
    blocks: tuple[int, ...] | None = None,
) -> ResNetBackbone:
    """depth: 18 or 34. width: channels of the first stage, 64 in the paper. strides: of each stage's first block.
    blocks: of each stage, instead of those of the depth.

    dtype, platform: as in `ltjax.models.create`.
    """
    if width < 1:
        raise UserError(f"model width = {width}: the first stage needs at least one channel")
    return ResNetBackbone(stage_blocks(depth, blocks), of_each_stage("strides", strides), width, dtype, platform)
