"""ResLT's branches (Cui et al. 2022, "ResLT: Residual Learning for Long-tailed Recognition").

Branches are light layers between the backbone's final map, or its features, and the shared classifier, a module
`(x [B, h, w, D] or [B, D], train) -> [R, B, D]`, float32 (in a float64 network, float64). Branch 0 is the authors' head
branch, which covers all classes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ltjax.models.layers import BatchNorm, Conv, pool


class NormBranches(nn.Module):
    """A batch norm for each branch, then the mean over space, without ReLU. The authors use it for CIFAR."""

    num_branches: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norms = [BatchNorm(name=f"norm{number + 1}") for number in range(self.num_branches)]
        return jnp.stack([pool(norm(x, train)) for norm in norms])  # [R, B, D]


class ConvBranches(nn.Module):
    """A 1x1 convolution to D channels for each branch, batch norm, ReLU, mean over space: for large images.

    In evaluation, the mean over space comes before the convolution. Because of the ReLU, this is not the function that
    is trained, but the authors' code does it and their figures depend on it. Channels r D to (r + 1) D are branch r's.
    As theirs, initial weights are normal with variance 2 / (3 D), for any number of branches.

    Attributes:
      num_branches: R.
      pool_first: Take the mean over space first in training, too, as in the authors' script for ResNet-10.
    """

    num_branches: int
    pool_first: bool = False
    dtype: Any = jnp.float32
    platform: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        batch_size, width = x.shape[0], x.shape[-1]
        if self.pool_first or not train or x.ndim == 2:
            x = pool(x)[:, None, None]  # [B, 1, 1, D]
        settings = dict[str, Any](kernel_size=1, dtype=self.dtype, platform=self.platform)
        initial = nn.initializers.normal((2 / (3 * width)) ** 0.5)
        conv = Conv(self.num_branches * width, **settings, kernel_init=initial, name="conv")
        x = BatchNorm(relu=True, name="norm")(conv(x), train)  # [B, h, w, R D]
        return pool(x).reshape(batch_size, self.num_branches, width).swapaxes(0, 1)  # [R, B, D]
