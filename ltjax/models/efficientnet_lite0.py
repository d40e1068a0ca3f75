"""EfficientNet-Lite0 (Tan and Le 2019, "EfficientNet", arXiv 1905.11946; the Lite variant is of 2020).

It is EfficientNet-B0 with ReLU6 and without squeeze-and-excite. Seven stages of inverted bottlenecks follow a 3x3
convolution of stride 2, and a 1x1 convolution to 1,280 channels follows them. It has 4,652,008 parameters with a
1000-way classifier, and 385 million multiplications for an image of 224 pixels, most of them in 1x1 convolutions.

As in TensorFlow, padding is "SAME", batch norm's epsilon 1e-3 and its momentum 0.01. Dropout before the classifier and
drop-connect, with which its authors trained it, are left out: blocks and features are the same in training and
evaluation, but for batch norm.

timm's `tf_efficientnet_lite0` is this network. Its `efficientnet_lite0` has the same arrays and other padding and
epsilon, so its weights import without an error and give other features.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ltjax.models.blocks import rematerialised
from ltjax.models.layers import BatchNorm, Conv, DepthwiseConv

STEM, HEAD = 32, 1280  # channels
NORM = dict(momentum=0.01, epsilon=1e-3)
RELU6 = dict(relu=True, ceiling=6.0, **NORM)


class Stage(NamedTuple):
    """Blocks with the same kernel and output channels; the first has the stride."""

    expansion: int
    kernel_size: int
    strides: int
    features: int
    blocks: int


STAGES = (
    Stage(1, 3, 1, 16, 1),
    Stage(6, 3, 2, 24, 2),
    Stage(6, 5, 2, 40, 2),
    Stage(6, 3, 2, 80, 3),
    Stage(6, 5, 1, 112, 3),
    Stage(6, 5, 2, 192, 4),
    Stage(6, 3, 1, 320, 1),
)


class InvertedBottleneck(nn.Module):
    """A 1x1 convolution to more channels, a depthwise one and a 1x1 convolution: see `ltjax.models.blocks`.

    ReLU6 follows the first two, and nothing the last. The input is added if the shape stays (Sandler et al. 2018,
    "MobileNetV2").

    Attributes:
      features: Output channels.
      expansion: Channels between, as a multiple of the input channels. 1: the first convolution is left out.
      kernel_size: Of the depthwise convolution.
      strides: Of the depthwise convolution.
      dtype: See `ltjax.models.layers.Conv`.
      platform: See `ltjax.models.create`.
    """

    features: int
    expansion: int = 6
    kernel_size: int = 3
    strides: int = 1
    dtype: Any = jnp.float32
    platform: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        settings: dict[str, Any] = dict(dtype=self.dtype, platform=self.platform)
        pointwise: dict[str, Any] = dict(kernel_size=1, kernel_init="fan_out", **settings)
        y = x
        if self.expansion != 1:
            y = Conv(self.expansion * x.shape[-1], **pointwise, name="expand")(y)
            y = BatchNorm(**RELU6, name="expand_norm")(y, train)
        y = DepthwiseConv(self.kernel_size, self.strides, **settings, name="depthwise")(y)
        y = BatchNorm(**RELU6, name="depthwise_norm")(y, train)
        y = Conv(self.features, **pointwise, name="project")(y)
        residual = x if self.strides == 1 and x.shape[-1] == self.features else None
        return BatchNorm(**NORM, name="project_norm")(y, train, residual)


class EfficientNetLite0Backbone(nn.Module):
    """[B, H, W, channels] -> {"stage1": [B, H/2, W/2, 16], ..., "stage7": [B, H/32, W/32, 320], "stage8": 1,280 wide}.

    Sides are rounded up. The last map is that of the head, a 1x1 convolution. Initial weights are the authors':
    He-normal by the channels out, those of a depthwise convolution by its one channel.

    Attributes:
      family: See `ltjax.models`.
    """

    dtype: Any = jnp.float32
    platform: str | None = None
    remat: bool = False
    family: str = "efficientnet_lite0"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
        settings: dict[str, Any] = dict(dtype=self.dtype, platform=self.platform)
        conv: dict[str, Any] = dict(kernel_init="fan_out", **settings)
        x = Conv(STEM, strides=2, padding="SAME", **conv, name="conv")(x)
        x = BatchNorm(**RELU6, name="norm")(x, train)
        maps, block = {}, rematerialised(InvertedBottleneck, self.remat)
        for number, stage in enumerate(STAGES, 1):
            for index in range(stage.blocks):
                strides, name = stage.strides if index == 0 else 1, f"stage{number}_block{index + 1}"
                sizes = (stage.features, stage.expansion, stage.kernel_size, strides)
                x = block(*sizes, **settings, name=name)(x, train)
            maps[f"stage{number}"] = x
        x = Conv(HEAD, kernel_size=1, **conv, name="head")(x)
        return {**maps, f"stage{len(STAGES) + 1}": BatchNorm(**RELU6, name="head_norm")(x, train)}


def backbone(dtype: Any, platform: str | None, remat: bool) -> EfficientNetLite0Backbone:
    """Create the backbone; it has no settings. Arguments: see `ltjax.models.create`."""
    return EfficientNetLite0Backbone(dtype, platform, remat)
