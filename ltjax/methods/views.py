"""One pass over all views of the images, and heads that project features, for contrastive methods.

A head is part of the method, `method/...` in the parameters: it is trained and resumed with it, and no evaluation,
export or later stage has it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ltjax.models.layers import BatchNorm, torch_bias_init, torch_kernel_init, unit
from ltjax.types import Apply, Batch, Outputs, UserError, Variables


class _Layers(nn.Module):
    """Linear layers with a batch norm and a ReLU between two of them: [N, D] -> [N, P], of length 1."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for number, width in enumerate(self.widths, 1):
            bias = torch_bias_init(x.shape[-1])
            x = nn.Dense(width, kernel_init=torch_kernel_init(), bias_init=bias, name=f"linear{number}")(x)
            if number < len(self.widths):
                x = BatchNorm(relu=True, name=f"norm{number}")(x, True)
        return unit(x, axis=-1)


class Head(NamedTuple):
    """A projection to unit vectors. Batch norms use the statistics of the batch, and keep none.

    Attributes:
      widths: Of the layers; the last is P.
      num_features: D.
    """

    widths: tuple[int, ...]
    num_features: int

    def init(self, rng: jax.Array) -> Mapping[str, Any]:
        """Initialise the parameters, as PyTorch does."""
        return _Layers(self.widths).init(rng, jnp.zeros((2, self.num_features)))["params"]

    def __call__(self, params: Mapping[str, Any], features: jax.Array) -> jax.Array:
        """Project features [N, D] -> [N, P]."""
        projected, _ = _Layers(self.widths).apply({"params": params}, features, mutable=["batch_stats"])
        return projected


def create_head(widths: Sequence[int], num_features: int) -> Head:
    """Return a head. ValueError if it has no layer, or one without outputs."""
    if not widths or min(widths) < 1:
        raise ValueError(f"projection = {tuple(widths)}: widths of its layers, such as (512, 128)")
    return Head(tuple(widths), num_features)


def forward(apply: Apply, variables: Variables, batch: Batch) -> tuple[Outputs, Variables]:
    """Run the network on the images and all their views, in one batch of (1 + V) B images.

    Rows of the outputs come image by image: those of image i begin at (1 + V) i. The batch norms see all views.
    UserError if the stage has none.
    """
    if batch.views is None:
        raise UserError("the method compares views of an image: give the stage `views`, such as {'first': {...}}")
    images = jnp.concatenate([batch.images[:, None], batch.views], 1)  # [B, 1 + V, H, W, channels]
    return apply(variables, images.reshape(-1, *images.shape[2:]))


def by_view(x: jax.Array, batch: Batch) -> jax.Array:
    """Rearrange rows of `forward`: [(1 + V) B, ...] -> [1 + V, B, ...]. Row 0 belongs to the batch's own images."""
    return x.reshape(len(batch.labels), -1, *x.shape[1:]).swapaxes(0, 1)
