"""Wide ResNets (Zagoruyko and Komodakis 2016) for 32x32 images, without dropout, as in TRADES and LBGAT.

They have a convolution to 16 channels, three stages of (depth - 4) / 6 pre-activation blocks with 16, 32 and 64 times
width channels, a batch norm and a ReLU. With a 10-way classifier, WRN-34-10 has 46,160,474 parameters, without the
unused stage `sub_block1` of LBGAT's class. As there, initial weights are He-normal with fan_out.
"""

from typing import Any

from ltjax.models.preact_resnet import PreActBackbone
from ltjax.types import UserError


def backbone(dtype: Any, platform: str | None, remat: bool, *, depth: int = 34, width: int = 10) -> PreActBackbone:
    """Create a wide ResNet's backbone. Other arguments: see `ltjax.models.create`.

    Args:
      depth: 6 n + 4, such as 16, 28, 34 (10 for tests).
      width: Factor on 16, 32 and 64 channels, 10 in LBGAT.
    """
    if depth < 10 or (depth - 4) % 6:
        raise UserError(f"model depth = {depth} is no wide ResNet: take 6 n + 4, such as 10, 16, 28 or 34")
    if width < 1:
        raise UserError(f"model width = {width}: channels are 16, 32 and 64 times it, so it is at least 1")
    features, blocks = (16 * width, 32 * width, 64 * width), ((depth - 4) // 6,) * 3
    settings = dict[str, Any](dtype=dtype, platform=platform, remat=remat, kernel_init="fan_out")
    return PreActBackbone(16, features, blocks, family="wide_resnet", **settings)
