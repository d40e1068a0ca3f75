"""Networks. A file gives `backbone(dtype, platform, remat, *, settings) -> module`, which is
`(x, train) -> {stage: map [B, h, w, D_l]}`: maps named stage1, stage2, ..., the final one last (at most nine, since JAX
hands dictionaries back sorted). Around it go what all of them share: the normalisation, one more block, the mean over
space, ResLT's branches, the classifier and the logit scale."""

from typing import Any

import jax.numpy as jnp

from ltjax import registry
from ltjax.models.blocks import Bottleneck, rematerialised
from ltjax.models.branches import ConvBranches, NormBranches
from ltjax.models.layers import CLASSIFIER_INITS, CLASSIFIERS, Network
from ltjax.types import UserError

MODELS = {name: f"ltjax.models.{name}" for name in ("resnet_cifar", "resnet", "preact_resnet", "wide_resnet")}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}
BRANCH_KINDS = ("norm", "conv", "pooled_conv")


def create(
    name: str,
    num_classes: int,
    *,
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
    classifier: str = "linear",
    classifier_init: str = "he",
    cosine_scale: float = 1.0,
    logit_scale: bool = False,
    extra_block: bool = False,
    branches: int = 0,
    branch_kind: str = "norm",
    remat: bool = False,
    dtype: str = "float32",
    platform: str | None = None,
    **backbone: Any,
) -> Network:
    """The network of a config: a flax module, `module.apply(variables, images, train) -> ltjax.types.Outputs`.

    Args:
      name: one of `MODELS`. num_classes: C. backbone: the model's own settings, such as `depth`.
      mean, std: of each channel, for images in [0, 1].
      classifier: "linear" or "cosine" (whose logits are `cosine_scale` times a cosine).
      classifier_init: of a linear one: "he" (He-normal weights; the authors of MiSLAS and DRO-LT on CIFAR), "torch"
        (PyTorch's default, whose weights are 2.4 times smaller) or "torch_no_bias" (the same, the bias from 0; wide
        ResNets).
      logit_scale: learn a factor for each class's logit.
      extra_block: one more bottleneck after the backbone, `block/...`, with as many channels out as in; the backbone is
        then frozen: in evaluation mode always. MiSLAS's network for Places-LT: `depth=152, blocks=(3, 8, 36, 2)`, since
        the block takes the place of the last one, and parameter groups that hold `net/backbone/.*` still. It begins
        with PyTorch's default weights, as theirs does.
      branches: R, ResLT's branches in front of the classifier: 0 for none, 2 or 3.
      branch_kind: "norm" (batch norms; the authors on CIFAR), "conv" (a 1x1 convolution, batch norm and ReLU; the
        authors on larger images, with 2 branches on iNaturalist) or "pooled_conv" (the same on features whose mean over
        space was taken before; the authors with ResNet-10). See `ltjax.models.branches`.
      remat: compute the inside of each block once more in the backward pass, instead of keeping it in memory.
      dtype: of the computation. "float32" or "bfloat16": parameters, statistics and logits are float32. "float64",
        which needs JAX_ENABLE_X64=1: statistics and logits are computed in float64, and parameters begin as float32.
      platform: "cpu", "gpu" or "tpu", whose convolution to build; None: that of JAX's own devices.
    Raises: UserError for an unknown name or setting, and for float64 where JAX has it switched off.

    Examples:
      >>> net = models.create("resnet_cifar", 10, depth=8, width=4, logit_scale=True)
      >>> variables = net.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
      >>> found = net.apply(variables, jnp.zeros((2, 16, 16, 3)), False)  # False: evaluation
      >>> found.logits.shape, found.features.shape
      ((2, 10), (2, 16))
    """
    registry.choose("classifier", {name: None for name in CLASSIFIERS}, classifier)
    if len(mean) != len(std) or not all(s > 0 for s in std):
        raise UserError(f"model mean = {mean}, std = {std}: one value each for every channel, std above 0")
    registry.choose("model classifier_init", {name: None for name in CLASSIFIER_INITS}, classifier_init)
    registry.choose("model branch_kind", {name: None for name in BRANCH_KINDS}, branch_kind)
    if not isinstance(branches, int) or branches not in (0, 2, 3):
        raise UserError(f"model branches = {branches}: take 0 for none, or 2 or 3")
    compute = registry.choose("model dtype", DTYPES, dtype)
    if dtype == "float64" and jnp.result_type(float) != jnp.float64:
        raise UserError("model dtype = 'float64', which JAX has switched off: set JAX_ENABLE_X64=1")
    function = registry.bind(f"model {name!r}", registry.load("model", MODELS, name, "backbone"), backbone)
    branch_layers = None
    if branches:
        pooled = branch_kind == "pooled_conv"
        branch_layers = (
            NormBranches(branches) if branch_kind == "norm" else ConvBranches(branches, pooled, compute, platform)
        )
    block = None
    if extra_block:
        block = rematerialised(Bottleneck, remat)(dtype=compute, platform=platform, kernel_init="torch")
    return Network(
        backbone=function(compute, platform, remat),
        num_classes=num_classes,
        mean=tuple(mean),
        std=tuple(std),
        block=block,
        branches=branch_layers,
        classifier=classifier,
        classifier_init=classifier_init,
        cosine_scale=cosine_scale,
        logit_scale=logit_scale,
        dtype=compute,
    )
