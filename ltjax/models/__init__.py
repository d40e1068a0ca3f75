"""Networks. A file gives `backbone(dtype, platform, *, settings) -> module: (x, train) -> features [B, D]`; around it
go the normalisation, the classifier and the logit scale that all of them share."""

from typing import Any

import jax.numpy as jnp

from ltjax import registry
from ltjax.models.layers import CLASSIFIERS, Network
from ltjax.types import UserError

MODELS = {name: f"ltjax.models.{name}" for name in ("resnet_cifar",)}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def create(
    name: str,
    num_classes: int,
    *,
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
    classifier: str = "linear",
    cosine_scale: float = 1.0,
    logit_scale: bool = False,
    dtype: str = "float32",
    platform: str | None = None,
    **backbone: Any,
) -> Network:
    """The network of a config: a flax module, `module.apply(variables, images, train) -> ltjax.types.Outputs`.

    Args:
      name: one of `MODELS`. num_classes: C. backbone: the model's own settings, such as `depth`.
      mean, std: of each channel, for images in [0, 1].
      classifier: "linear" or "cosine" (whose logits are `cosine_scale` times a cosine).
      logit_scale: learn a factor for each class's logit.
      dtype: of the computation, "float32" or "bfloat16"; parameters, statistics and logits stay float32.
      platform: "cpu", "gpu" or "tpu", whose convolution to build; None: that of JAX's own devices.
    Raises: UserError for an unknown name or setting.
    """
    registry.choose("classifier", {name: None for name in CLASSIFIERS}, classifier)
    if len(mean) != len(std) or not all(s > 0 for s in std):
        raise UserError(f"model mean = {mean}, std = {std}: one value each for every channel, std above 0")
    compute = registry.choose("model dtype", DTYPES, dtype)
    function = registry.bind(f"model {name!r}", registry.load("model", MODELS, name, "backbone"), backbone)
    return Network(
        backbone=function(compute, platform),
        num_classes=num_classes,
        mean=tuple(mean),
        std=tuple(std),
        classifier=classifier,
        cosine_scale=cosine_scale,
        logit_scale=logit_scale,
        dtype=compute,
    )
