"""Residual blocks with a batch norm after each convolution (He et al. 2016, "Deep residual learning").

A block is a module `(x [B, H, W, channels], train) -> [B, H/strides, W/strides, features]`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ltjax.models.layers import BatchNorm, Conv, Init


def rematerialised(block: Callable[..., nn.Module], remat: bool) -> Callable[..., nn.Module]:
    """Return the class `block`; with `remat`, the backward pass stores only a block's input and recomputes the rest.

    It takes a third more work. Stored activations grow with the number of blocks, not of layers. Paths and values of
    parameters do not change.
    """
    return nn.remat(block, static_argnums=(2,)) if remat else block  # (self, x, train)


def _shortcut(x: jax.Array, block: "BasicBlock | Bottleneck", features: int, kind: str, train: bool) -> jax.Array:
    """Bring x to the output shape of `block`. Layers are named `shortcut` and `shortcut_norm`."""
    if block.strides == 1 and x.shape[-1] == features:
        return x
    if kind == "pad":
        added = features - x.shape[-1]
        return jnp.pad(x[:, :: block.strides, :: block.strides], ((0, 0),) * 3 + ((added // 2, added - added // 2),))
    conv = dict(dtype=block.dtype, platform=block.platform, kernel_init=block.kernel_init)
    x = Conv(features, kernel_size=1, strides=block.strides, **conv, name="shortcut")(x)
    return BatchNorm(name="shortcut_norm")(x, train)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the first has the stride. Other attributes: see `ltjax.models.layers.Conv`.

    Attributes:
      shortcut: Used if the shape changes. "conv" (option B of the paper) is a 1x1 convolution and a batch norm. "pad"
        (option A) takes every `strides`-th pixel and zeros for the added channels, without parameters.
    """

    features: int
    strides: int = 1
    dtype: Any = jnp.float32
    platform: str | None = None
    kernel_init: Init = "fan_in"
    shortcut: str = "conv"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = dict(features=self.features, dtype=self.dtype, platform=self.platform, kernel_init=self.kernel_init)
        y = BatchNorm(relu=True, name="norm1")(Conv(**conv, strides=self.strides, name="conv1")(x), train)
        y = Conv(**conv, name="conv2")(y)
        return BatchNorm(relu=True, name="norm2")(y, train, _shortcut(x, self, self.features, self.shortcut, train))


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution. Other attributes: see `ltjax.models.layers.Conv`.

    The 3x3 convolution has the stride, as in torchvision and in the code of MiSLAS, OLTR and classifier-balancing. He
    et al. put it in the first.

    Attributes:
      features: Output channels. None: as many as input channels.
      inner: Channels of the 3x3 convolution. None: a quarter of the output channels.
      groups: Of the 3x3 convolution.
    """

    features: int | None = None
    strides: int = 1
    dtype: Any = jnp.float32
    platform: str | None = None
    kernel_init: Init = "fan_in"
    inner: int | None = None
    groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = dict(dtype=self.dtype, platform=self.platform, kernel_init=self.kernel_init)
        features = x.shape[-1] if self.features is None else self.features
        inner = features // 4 if self.inner is None else self.inner
        y = BatchNorm(relu=True, name="norm1")(Conv(inner, kernel_size=1, **conv, name="conv1")(x), train)
        y = Conv(inner, strides=self.strides, groups=self.groups, **conv, name="conv2")(y)
        y = BatchNorm(relu=True, name="norm2")(y, train)
        y = Conv(features, kernel_size=1, **conv, name="conv3")(y)
        return BatchNorm(relu=True, name="norm3")(y, train, _shortcut(x, self, features, "conv", train))
