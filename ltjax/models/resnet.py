"""ResNets (He et al. 2016) and ResNeXts (Xie et al. 2017), for large images and, with another stem, for small ones.

Four stages with width, 2, 4 and 8 times width channels, or four times as many after bottlenecks. Depth 10, 18 and 34
are of basic blocks, 50, 101 and 152 of bottlenecks, and where a block changes the shape its shortcut is option B: a 1x1
convolution and a batch norm.

- `stem="large"`: a 7x7 convolution of stride 2, max-pooling, stages of strides 1, 2, 2, 2. These are torchvision's,
  which the long-tailed papers take for ImageNet-LT, iNaturalist 2018 and Places-LT. With a 1000-way classifier
  ResNet-50 has 25,557,032 parameters, and ResNeXt-50 32x4d (`depth=50, groups=32, group_width=4`) 25,028,904.
- `stem="small"`: a 3x3 convolution and no max-pooling. LBGAT's teacher keeps the size of the image in the second stage
  too, so that 32x32 ends as 8x8; `strides = (1, 2, 2, 2)` is the usual ResNet-18 for CIFAR. With a 10-way classifier it
  has 11,173,962 parameters.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ltjax import registry
from ltjax.models.blocks import BasicBlock, Bottleneck, rematerialised
from ltjax.models.layers import BatchNorm, Conv, Init, max_pool
from ltjax.types import UserError

BLOCKS = {  # of each stage, by depth
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
BASIC = (10, 18, 34)  # depths of basic blocks
STRIDES = {"small": (1, 1, 2, 2), "large": (1, 2, 2, 2)}  # of each stage, by stem
CONV_INITS: dict[str, Init] = {"he": "fan_in", "torch": "torch"}  # of convolutions, see `ltjax.models.layers.Conv`


class ResNetBackbone(nn.Module):
    """[B, H, W, channels] -> {"stage1": [B, h, w, D], "stage2": [B, h/s2, w/s2, 2 D], ...}.

    D is `width`, of bottlenecks 4 `width`; h is H/s1, after the large stem H/(4 s1).

    blocks, strides: of each stage; the first block of a stage takes its stride. stem: "small" or "large".
    inner: channels of the 3x3 convolution in the first stage's bottlenecks; None: basic blocks. groups: of the same.
    shortcut: of basic blocks. kernel_init: as in `ltjax.models.layers.Conv`. dtype, platform, remat: as in
    `ltjax.models.create`.
    """

    blocks: tuple[int, ...]
    strides: tuple[int, ...]
    width: int = 64
    stem: str = "small"
    inner: int | None = None
    groups: int = 1
    shortcut: str = "conv"
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
            x = max_pool(x)
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
    """Blocks of each of the four stages: `blocks` where given, else those of the depth. known: depths there are."""
    if depth not in known:
        *others, last = map(str, known)
        raise UserError(f"model depth = {depth}: take {', '.join(others)} or {last}")
    return BLOCKS[depth] if blocks is None else of_each_stage("blocks", blocks)


def of_each_stage(setting: str, values: tuple[int, ...]) -> tuple[int, ...]:
    """`values` as a tuple. Raises: UserError where they are not four integers above 0."""
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
    """depth: 10, 18, 34, 50, 101 or 152. stem: "small" or "large". width: channels of the first stage's blocks, 64 in
    the papers. strides: of each stage's first block, instead of those of the stem. blocks: of each stage, instead of
    those of the depth: MiSLAS's frozen ResNet-152 is (3, 8, 36, 2), without the block that its new one is there for.

    groups, group_width: of the bottlenecks' 3x3 convolutions, 32 and 4 in ResNeXt "32x4d". In the first stage each
    group has group_width * width / 64 channels, and twice as many in every further one.

    init: "he", He-normal weights: for the channels that come in, with the large stem for those that go out. "torch",
    PyTorch's default, as LBGAT's authors leave their natural model's.

    dtype, platform, remat: as in `ltjax.models.create`.
    """
    if width < 1:
        raise UserError(f"model width = {width}: the first stage needs at least one channel")
    numbers = stage_blocks(depth, blocks)
    if stem not in STRIDES:
        raise UserError(f"unknown model stem {stem!r}; known: {', '.join(STRIDES)}")
    weights = registry.choose("model init", CONV_INITS, init)
    if stem == "large" and init == "he":
        weights = "fan_out"  # torchvision's
    strides = STRIDES[stem] if strides is None else of_each_stage("strides", strides)
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
    own = dict[str, Any](inner=inner, groups=groups, kernel_init=weights)
    return ResNetBackbone(numbers, strides, width, stem, **own, dtype=dtype, platform=platform, remat=remat)
