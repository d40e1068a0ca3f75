"""ResLT's branches (Cui et al. 2022, "ResLT: Residual Learning for Long-tailed Recognition"): light layers on the final
map of a backbone, one set for each group of classes, in front of one classifier that all of them share.

A module here is `(x [B, h, w, D], train) -> features of each branch [R, B, D]`, float32 (of a float64 network,
float64). Branch 0 is the authors' head branch, which answers for all classes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ltjax.models.layers import BatchNorm, Conv, pool


class NormBranches(nn.Module):
    """A batch norm for each branch, then the mean over space; no ReLU. The authors' branches for CIFAR."""

    num_branches: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norms = [BatchNorm(name=f"norm{number + 1}") for number in range(self.num_branches)]
        return jnp.stack([pool(norm(x, train)) for norm in norms])  # [R, B, D]


class ConvBranches(nn.Module):
    """One 1x1 convolution to D channels for each branch, batch norm, ReLU, mean over space: for large images.

    In evaluation the mean over space comes before the convolution, as in the authors' code, whose figures need it. The
    ReLU makes that another function than the one trained. Channels r D to (r + 1) D are those of branch r.

    pool_first: the mean over space comes first in training, too, as in the authors' script for ResNet-10.
    Weights begin as the authors' do: normal, of variance 2 / (3 D), whatever the number of branches.
    """

    num_branches: int
    pool_first: bool = False
    dtype: Any = jnp.float32
    platform: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        batch_size, width = x.shape[0], x.shape[-1]
        if self.pool_first or not train:
            x = pool(x)[:, None, None]  # [B, 1, 1, D]
        settings = dict[str, Any](kernel_size=1, dtype=self.dtype, platform=self.platform)
        initial = nn.initializers.normal((2 / (3 * width)) ** 0.5)
        conv = Conv(self.num_branches * width, **settings, kernel_init=initial, name="conv")
        x = BatchNorm(relu=True, name="norm")(conv(x), train)  # [B, h, w, R D]
        return pool(x).reshape(batch_size, self.num_branches, width).swapaxes(0, 1)  # [R, B, D]
