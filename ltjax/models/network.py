"""The network around a backbone: normalisation, branches, classifier."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ltjax.models.layers import CosineClassifier, LinearClassifier, LinearMap, pool
from ltjax.models.precision import at_least_float32
from ltjax.types import Outputs, UserError


class Network(nn.Module):
    """Normalisation, a backbone, a classifier and, optionally, an extra block, branches, a linear map, logit scales.

    The network normalises images in [0, 1] itself, so attacks work in pixels. Parameter paths begin with `backbone`,
    `block`, `branches`, `linear_map`, `classifier` and `logit_scale`.

    The output `features` is the mean over space of the final map, `layers` that of every stage's, at least float32. A
    backbone may return features [B, D] instead of a map, which stay as they are.
    With branches, the classifier takes their features [R, B, D]: the output `branches` holds the logits of each, and
    `logits` their sum. `features` does not depend on the branches, so class means and losses on features keep their
    meaning.

    Attributes:
      backbone: See `ltjax.models`.
      block: A module of `ltjax.models.blocks` after the backbone. Its map is an additional stage, the final one. The
        backbone is then always in evaluation mode: MiSLAS freezes it for Places-LT, including its batch norms.
      branches: A module of `ltjax.models.branches`.
      linear_map: A linear map of the features [D, D], initially the identity, so that losses on features can train
        something if the backbone is frozen. The output `features` is behind it, `layers` is before it.
      logit_scale: MiSLAS's learnable weight scaling, `logits = s * (W z + b)`, with s [C] initially 1. It applies to
        each branch.
    """

    backbone: nn.Module
    num_classes: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    block: nn.Module | None = None
    branches: nn.Module | None = None
    classifier: str = "linear"
    classifier_init: str = "he"
    cosine_scale: float = 1.0
    logit_scale: bool = False
    linear_map: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        if self.classifier == "cosine":
            self.head = CosineClassifier(self.num_classes, self.cosine_scale, name="classifier")
        else:
            self.head = LinearClassifier(self.num_classes, self.classifier_init, name="classifier")
        if self.logit_scale:
            self.scale = self.param("logit_scale", nn.initializers.ones_init(), (self.num_classes,), jnp.float32)
        if self.linear_map:
            self.map = LinearMap(name="linear_map")

    def __call__(self, images: jax.Array, train: bool = False) -> Outputs:
        if len(self.mean) not in (1, images.shape[-1]):
            raise UserError(f"model mean = {self.mean}: images have {images.shape[-1]} channels")
        dtype = at_least_float32(self.dtype)
        mean, std = jnp.asarray(self.mean, dtype), jnp.asarray(self.std, dtype)
        x = ((images.astype(dtype) - mean) / std).astype(self.dtype)
        maps = self.backbone(x, train and self.block is None)
        if self.block is not None:
            if list(maps.values())[-1].ndim != 4:
                raise UserError("model extra_block = True: the backbone returns features, without a map for a block")
            maps = {**maps, f"stage{len(maps) + 1}": self.block(list(maps.values())[-1], train)}
        layers = {name: pool(x) for name, x in maps.items()}  # dead code if unused
        last = list(maps)[-1]
        if self.branches is None:
            features = self.map(layers[last]) if self.linear_map else layers[last]
            return Outputs(self._logits(features), features, None, layers)
        logits = self._logits(self.branches(maps[last], train))  # [R, B, C]
        return Outputs(logits.sum(0), layers[last], logits, layers)

    def _logits(self, features: jax.Array) -> jax.Array:
        """Classify [..., D] -> [..., C]."""
        logits = self.head(features)
        return logits * self.scale.astype(logits.dtype) if self.logit_scale else logits
