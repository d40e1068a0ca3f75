"""The smallest network with all the parts that stages handle: XLA compiles its training in a few seconds."""

from typing import Any

from flax import linen as nn

from ltjax.models.layers import BatchNorm, Conv


class TinyBackbone(nn.Module):
    dtype: Any
    platform: str | None
    width: int

    @nn.compact
    def __call__(self, x, train):
        conv = dict(dtype=self.dtype, platform=self.platform)
        first = nn.relu(BatchNorm(name="norm1")(Conv(self.width, **conv, name="conv1")(x), train))
        second = Conv(2 * self.width, strides=2, **conv, name="conv2")(first)
        return {"stage1": first, "stage2": nn.relu(BatchNorm(name="norm2")(second, train))}


def backbone(dtype, platform, remat=False, *, width=8):
    return TinyBackbone(dtype, platform, width)
