"""Pre-activation ResNet-18 and 34 (He et al. 2016, "Identity mappings in deep residual networks"), for 32x32 images.

It is common in adversarial training. Four stages have width, 2, 4 and 8 times width channels and strides 1, 2, 2, 2; a
batch norm and a ReLU follow. With a 10-way classifier, PreAct-ResNet-18 has 11,172,170 parameters. Some code has
11,171,146, without the last norm of 512 channels.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ltjax.models.blocks import rematerialised
from ltjax.models.layers import BatchNorm, Conv, Init
from ltjax.models.resnet import CONV_INITS, stage_blocks
from ltjax.system import registry
from ltjax.types import UserError


class PreActBlock(nn.Module):
    """Norm, ReLU, convolution, twice. If the shape changes, the shortcut convolves the first ReLU; else it is x."""

    features: int
    strides: int
    dtype: Any
    platform: str | None
    kernel_init: Init = "fan_in"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = dict(features=self.features, dtype=self.dtype, platform=self.platform, kernel_init=self.kernel_init)
        active = BatchNorm(relu=True, name="norm1")(x, train)
        y = Conv(**conv, strides=self.strides, name="conv1")(active)
        y = Conv(**conv, name="conv2")(BatchNorm(relu=True, name="norm2")(y, train))
        if self.strides != 1 or x.shape[-1] != self.features:
            x = Conv(**conv, kernel_size=1, strides=self.strides, name="shortcut")(active)
        return x + y


class PreActBackbone(nn.Module):
    """[B, H, W, channels] -> {"stage1": [B, H, W, features[0]], "stage2": [B, H/2, W/2, features[1]], ...}.

    The last map is taken after the last norm and ReLU, the others after a stage's last addition.

    Attributes:
      stem: Channels of the first convolution.
      features: Channels of each stage.
      blocks: Number of blocks of each stage.
      family: See `ltjax.models`.
      kernel_init: See `ltjax.models.layers.Conv`.
    """

    stem: int
    features: tuple[int, ...]
    blocks: tuple[int, ...]
    family: str = "preact_resnet"
    dtype: Any = jnp.float32
    platform: str | None = None
    remat: bool = False
    kernel_init: Init = "fan_in"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
        conv = dict[str, Any](dtype=self.dtype, platform=self.platform, kernel_init=self.kernel_init)
        x = Conv(self.stem, **conv, name="conv")(x)
        block_class = rematerialised(PreActBlock, self.remat)
        maps = {}
        for stage, (features, num_blocks) in enumerate(zip(self.features, self.blocks, strict=True)):
            for block in range(num_blocks):
                strides = 2 if stage > 0 and block == 0 else 1
                name = f"stage{stage + 1}_block{block + 1}"
                x = block_class(features, strides, **conv, name=name)(x, train)
            maps[f"stage{stage + 1}"] = x
        return {**maps, f"stage{len(self.blocks)}": BatchNorm(relu=True, name="norm")(x, train)}


def backbone(
    dtype: Any,
    platform: str | None,
    remat: bool,
    *,
    depth: int = 18,
    width: int = 64,
    blocks: tuple[int, ...] | None = None,
    init: str = "he",
) -> PreActBackbone:
    """Create a PreAct-ResNet's backbone. Other arguments: see `ltjax.models.create`.

    Args:
      depth: 18 or 34.
      width: Channels of the first stage, 64 in the paper.
      blocks: Of each stage, instead of those of the depth.
      init: See `ltjax.models.resnet.backbone`.
    """
    if width < 1:
        raise UserError(f"model width = {width}: the first stage needs at least one channel")
    features = tuple(width * 2**stage for stage in range(4))
    numbers, weights = stage_blocks(depth, blocks, (18, 34)), registry.choose("model init", CONV_INITS, init)
    settings = dict[str, Any](dtype=dtype, platform=platform, remat=remat, kernel_init=weights)
    return PreActBackbone(width, features, numbers, **settings)
