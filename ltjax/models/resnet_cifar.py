"""ResNets for 32x32 images (He et al. 2016, section 4.2), as the long-tailed papers use them.

Three stages of (depth - 2) / 6 basic blocks with 16, 32 and 64 channels. Shortcuts are option A: where the shape
changes, every second pixel is taken and the new channels are zeros, so a shortcut has no parameters. ResNet-32 with
a 100-way linear classifier has 470,004 parameters; a "ResNet-32" of width 64 in some papers is another network.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ltjax.models.layers import BatchNorm, Conv
from ltjax.types import UserError


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
            new = self.features - x.shape[-1]
            x = jnp.pad(x[:, :: self.strides, :: self.strides], ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))
        return nn.relu(x + y)


class ResNetCifarBackbone(nn.Module):
    """[B, H, W, channels] -> {"stage1": [B, H, W, width], "stage2": [B, H/2, W/2, 2 width], "stage3": ...}."""

    depth: int
    width: int = 16
    dtype: Any = jnp.float32
    platform: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
        x = Conv(self.width, dtype=self.dtype, platform=self.platform, name="conv")(x)
        x = nn.relu(BatchNorm(name="norm")(x, train))
        maps = {}
        for stage in range(3):
            for block in range((self.depth - 2) // 6):
                strides = 2 if stage > 0 and block == 0 else 1
                name = f"stage{stage + 1}_block{block + 1}"
                x = BasicBlock(self.width * 2**stage, strides, self.dtype, self.platform, name=name)(x, train)
            maps[f"stage{stage + 1}"] = x
        return maps


def backbone(dtype: Any, platform: str | None, *, depth: int = 32, width: int = 16) -> ResNetCifarBackbone:
    """depth: 6 n + 2, such as 20, 32, 44, 56, 110 (8 for tests). width: channels of the first stage, 16 in the paper.

    dtype, platform: as in `ltjax.models.create`.
    """
    if depth < 8 or (depth - 2) % 6:
        raise UserError(f"model depth = {depth} is no CIFAR ResNet: take 6 n + 2, such as 20, 32, 44, 56 or 110")
    if width < 1:
        raise UserError(f"model width = {width}: the first stage needs at least one channel")
    return ResNetCifarBackbone(depth, width, dtype, platform)
