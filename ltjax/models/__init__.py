"""Networks: a backbone, with normalisation, an extra block, pooling, ResLT's branches, classifier and logit scale.

A file of this package defines a kind of backbone with a function `backbone(dtype, platform, remat, *, settings)`. It
returns a flax module `(x, train) -> {stage: map [B, h, w, D_l]}` with these properties:

- Maps are named stage1, stage2, ..., the final one last; at most nine, because JAX sorts dictionaries. The network
  takes their means over space. Features [B, D_l] instead of a map, such as a class token, stay as they are.
- The first convolution is named `conv`, see `input_channels`.
- If images have to be multiples of a number of pixels, its attribute `patch` is that number, see `example`.
- For exports to PyTorch, its attribute `family` is the name of the kind, see `ltjax.interop.names`.

If `backbone` has an argument `num_classes` that is no setting, it gets the network's.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ltjax.models.blocks import Bottleneck, rematerialised
from ltjax.models.branches import ConvBranches, NormBranches
from ltjax.models.layers import CLASSIFIER_INITS, CLASSIFIERS
from ltjax.models.network import Network
from ltjax.system import registry
from ltjax.types import UserError

NAMES = (
    "resnet_cifar",
    "resnet",
    "preact_resnet",
    "wide_resnet",
    "efficientnet_lite0",
    "features",
    "vit",
)
FILES = {"features": "precomputed"}  # of kinds that are not called like their file
MODELS = {name: f"ltjax.models.{FILES.get(name, name)}" for name in NAMES}
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
    linear_map: bool = False,
    remat: bool = False,
    dtype: str = "float32",
    platform: str | None = None,
    **backbone: Any,
) -> Network:
    """Create a network: a flax module, `module.apply(variables, images, train) -> ltjax.types.Outputs`.

    The many parameters are the settings of `model` in a config.

    Args:
      name: One of `MODELS`.
      num_classes: C.
      mean: Of each channel, for images in [0, 1].
      std: Of each channel.
      classifier: "linear", or "cosine", whose logits are `cosine_scale` times a cosine.
      classifier_init: Of a linear classifier. "he": He-normal weights (MiSLAS and DRO-LT on CIFAR). "torch": PyTorch's
        default, whose weights are 2.4 times smaller. "torch_no_bias": the same, with a bias of 0 (wide ResNets).
      cosine_scale: See `classifier`.
      logit_scale: Learn a factor for each class's logit.
      extra_block: Add a bottleneck `block` after the backbone, with as many output as input channels. The backbone is
        then always in evaluation mode. MiSLAS's network for Places-LT has it with `depth=152, blocks=(3, 8, 36, 2)`,
        because it replaces the last block, and with parameter groups that freeze `net/backbone/.*`. Its initial weights
        are PyTorch's default, as theirs.
      branches: R, ResLT's branches before the classifier: 0, 2 or 3.
      branch_kind: "norm" (batch norms; the authors on CIFAR), "conv" (a 1x1 convolution, batch norm and ReLU; the
        authors on larger images, with 2 branches on iNaturalist) or "pooled_conv" (the same after pooling; the authors
        with ResNet-10). See `ltjax.models.branches`.
      linear_map: Add a linear map of the features before the classifier, see `ltjax.models.network.Network`.
      remat: Recompute each block in the backward pass instead of storing its activations.
      dtype: Of the computation. "float32" or "bfloat16": parameters, statistics and logits are float32. "float64" needs
        JAX_ENABLE_X64=1: statistics and logits are float64, and parameters are initialised as float32.
      platform: Build the layers of "cpu", "gpu" or "tpu"; or of "onnx", for `ltjax.interop.export.onnx`. None: those of
        JAX's default backend.
      **backbone: Settings of the kind of backbone, such as `depth`.

    Raises:
      UserError: A name or setting is unknown, or dtype is "float64" and JAX has it disabled.

    Examples:
      >>> net = models.create("resnet_cifar", 10, depth=8, width=4, logit_scale=True)
      >>> variables = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
      >>> outputs = jax.jit(net.apply)(variables, jnp.zeros((2, 16, 16, 3)))  # in evaluation mode
      >>> outputs.logits.shape, outputs.features.shape
      ((2, 10), (2, 16))
    """
    settings = {key: value for key, value in locals().items() if key not in ("num_classes", "backbone")}
    registry.check_types("model", create, settings)
    registry.choose("classifier", CLASSIFIERS, classifier)
    if len(mean) != len(std) or not all(s > 0 for s in std):
        raise UserError(f"model mean = {mean}, std = {std}: one value each for every channel, std above 0")
    registry.choose("model classifier_init", CLASSIFIER_INITS, classifier_init)
    registry.choose("model branch_kind", BRANCH_KINDS, branch_kind)
    if branches and linear_map:
        raise UserError("model linear_map = True, and branches: take one of them")
    if branches not in (0, 2, 3):
        raise UserError(f"model branches = {branches}: take 0 for none, or 2 or 3")
    compute = registry.choose("model dtype", DTYPES, dtype)
    if dtype == "float64" and jnp.result_type(float) != jnp.float64:
        raise UserError("model dtype = 'float64', which JAX has switched off: set JAX_ENABLE_X64=1")
    function = registry.load("model", MODELS, name, "backbone")
    context = {"num_classes": num_classes} if "num_classes" in inspect.signature(function).parameters else {}
    function = registry.bind(f"model {name!r}", function, backbone)
    branch_layers = None
    if branches and branch_kind == "norm":
        branch_layers = NormBranches(branches)
    elif branches:
        branch_layers = ConvBranches(branches, branch_kind == "pooled_conv", compute, platform)
    block = None
    if extra_block:
        block = rematerialised(Bottleneck, remat)(dtype=compute, platform=platform, kernel_init="torch")
    return Network(
        backbone=function(compute, platform, remat, **context),
        num_classes=num_classes,
        mean=tuple(mean),
        std=tuple(std),
        block=block,
        branches=branch_layers,
        classifier=classifier,
        classifier_init=classifier_init,
        cosine_scale=cosine_scale,
        logit_scale=logit_scale,
        linear_map=linear_map,
        dtype=compute,
    )


def input_channels(params: Mapping[str, Any]) -> int:
    """Return the number of image channels of a network, or of features that it takes instead, from its parameters.

    Examples:
      >>> net = models.create("resnet_cifar", 10, depth=8, width=4)
      >>> models.input_channels(jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"])
      3
    """
    if "backbone" not in params:  # `ltjax.models.precomputed`
        return int(params["linear_map" if "linear_map" in params else "classifier"]["kernel"].shape[0])
    return int(params["backbone"]["conv"]["kernel"].shape[2])


def example(model: nn.Module, channels: int = 3) -> jax.Array:
    """Return an image [1, H, W, channels] of zeros that a network takes, to initialise it.

    Examples:
      >>> models.example(models.create("resnet_cifar", 10, depth=8)).shape
      (1, 32, 32, 3)
    """
    side = getattr(getattr(model, "backbone", None), "patch", 32)
    return jnp.zeros((1, side, side, channels))
