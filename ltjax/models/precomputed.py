"""Features that another network has computed, instead of images: nothing but a classifier is left to train.

Features [B, D] take the place of images as maps of one pixel, [B, 1, 1, D].
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from ltjax.models.layers import unit
from ltjax.system import registry

NORMALISE = ("none", "unit", "standardise")


class FeaturesBackbone(nn.Module):
    """[B, 1, 1, D] -> {"stage1": [B, 1, 1, D]}.

    Attributes:
      normalise: "none". "unit": divide by the length. "standardise": subtract the mean of each dimension and divide by
        its standard deviation, the statistics `mean` and `var`, which `fitted` computes. A dimension without variance
        is 0.
      family: See `ltjax.models`.
    """

    normalise: str = "none"
    family: str = "features"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
        if self.normalise == "unit":
            x = unit(x, axis=-1)
        elif self.normalise == "standardise":
            mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:], jnp.float32).value
            var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1:], jnp.float32).value
            factor = jnp.where(var > 0, lax.rsqrt(jnp.where(var > 0, var, 1)), 0)
            x = ((x - mean) * factor).astype(x.dtype)
        return {"stage1": x}


def fitted(features: jax.Array) -> dict[str, jax.Array]:
    """Compute the statistics that "standardise" needs, from training features [N, 1, 1, D], N above 0."""
    axes = (0, 1, 2)
    mean = features.mean(axes, dtype=jnp.float32)
    return {"mean": mean, "var": jnp.square(features.astype(jnp.float32) - mean).mean(axes)}


def backbone(dtype: Any, platform: str | None, remat: bool, *, normalise: str = "none") -> FeaturesBackbone:
    """Create a backbone that passes features on.

    Args:
      normalise: See `FeaturesBackbone`.

    Raises:
      UserError: `normalise` is unknown.
    """
    registry.choose("model normalise", NORMALISE, normalise)
    return FeaturesBackbone(normalise)
