"""ResNets for 32x32 images (He et al. 2016, section 4.2), as the long-tailed papers use them.

Three stages of (depth - 2) / 6 basic blocks with 16, 32 and 64 channels. Shortcuts are option A: where the shape
changes, every second pixel is taken and the new channels are zeros, so a shortcut has no parameters. ResNet-32 with
a 100-way linear classifier has 470,004 parameters; a "ResNet-32" of width 64 in some papers is another network.
"""

from typing import Any

from ltjax.models.resnet import ResNetBackbone
from ltjax.types import UserError


def backbone(dtype: Any, platform: str | None, remat: bool, *, depth: int = 32, width: int = 16) -> ResNetBackbone:
    """depth: 6 n + 2, such as 20, 32, 44, 56, 110 (8 for tests). width: channels of the first stage, 16 in the paper.

    dtype, platform, remat: as in `ltjax.models.create`.
    """
    if depth < 8 or (depth - 2) % 6:
        raise UserError(f"model depth = {depth} is no CIFAR ResNet: take 6 n + 2, such as 20, 32, 44, 56 or 110")
    if width < 1:
        raise UserError(f"model width = {width}: the first stage needs at least one channel")
    blocks = ((depth - 2) // 6,) * 3
    return ResNetBackbone(blocks, (1, 2, 2), width, shortcut="pad", dtype=dtype, platform=platform, remat=remat)
