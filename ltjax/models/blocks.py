"""Residual blocks with the norm after each convolution (He et al. 2016, "Deep residual learning"), and their
rematerialisation.

A module here is `(x [B, H, W, channels], train) -> [B, H/strides, W/strides, features]`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ltjax.models.layers import BatchNorm, Conv, Init


def rematerialised(block: Callable[..., nn.Module], remat: bool) -> Callable[..., nn.Module]:
    """`block`, a class of modules as above; with `remat`, a backward pass keeps what goes into one and no more of it.

    All that is inside is computed once more on the way back: a third more work, for activations that grow with the
    number of blocks and no longer with that of layers. Parameters have the same paths and the same values.
    """
    return nn.remat(block, static_argnums=(2,)) if remat else block  # (self, x, train)


def _shortcut(x: jax.Array, block: "BasicBlock | Bottleneck", features: int, kind: str, train: bool) -> jax.Array:
    """x in the shape that `block` gives; its layers, where it has any, are the block's `shortcut`, `shortcut_norm`."""
    if block.strides == 1 and x.shape[-1] == features:
        return x
    if kind == "pad":
        new = features - x.shape[-1]
        return jnp.pad(x[:, :: block.strides, :: block.strides], ((0, 0),) * 3 + ((new // 2, new - new // 2),))
    conv = dict(dtype=block.dtype, platform=block.platform, kernel_init=block.kernel_init)
    x = Conv(features, kernel_size=1, strides=block.strides, **conv, name="shortcut")(x)
    return BatchNorm(name="shortcut_norm")(x, train)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, the first of which has the stride.

    shortcut: what a change of shape makes of it. "conv", option B of the paper: a 1x1 convolution and a batch norm.
      "pad", option A: one pixel of each `strides` along a side, and zeros for the new channels; no parameters.
    dtype, platform, kernel_init: as in `ltjax.models.layers.Conv`.
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
    """A 1x1, a 3x3 and a 1x1 convolution. The 3x3 one has the stride, as in torchvision and in the code of MiSLAS, OLTR
    and classifier-balancing; He et al. have it in the first.

    features: channels that go out; None: as many as come in.
    inner: channels of the 3x3 convolution; None: a quarter of those that go out. groups: of the 3x3 convolution.
    dtype, platform, kernel_init: as in `ltjax.models.layers.Conv`.
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
