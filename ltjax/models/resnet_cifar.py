"""ResNets for 32x32 images (He et al. 2016, section 4.2), as the long-tailed papers use them.

They have three stages of (depth - 2) / 6 basic blocks with 16, 32 and 64 channels. Shortcuts are option A: if the shape
changes, they take every second pixel and zeros for the added channels, without parameters. ResNet-32 with a 100-way
linear classifier has 470,004 parameters. The "ResNet-32" of width 64 in some papers is another network.
"""

from typing import Any

from ltjax.models.resnet import ResNetBackbone
from ltjax.types import UserError


def backbone(dtype: Any, platform: str | None, remat: bool, *, depth: int = 32, width: int = 16) -> ResNetBackbone:
    """Create a CIFAR ResNet's backbone. Other arguments: see `ltjax.models.create`.

    Args:
      depth: 6 n + 2, such as 20, 32, 44, 56, 110 (8 for tests).
      width: Channels of the first stage, 16 in the paper.
    """
    if depth < 8 or (depth - 2) % 6:
        raise UserError(f"model depth = {depth} is no CIFAR ResNet: take 6 n + 2, such as 20, 32, 44, 56 or 110")
    if width < 1:
        raise UserError(f"model width = {width}: the first stage needs at least one channel")
    blocks = ((depth - 2) // 6,) * 3
    settings = dict[str, Any](dtype=dtype, platform=platform, remat=remat)
    return ResNetBackbone(blocks, (1, 2, 2), width, shortcut="pad", family="resnet_cifar", **settings)
