"""Vision transformers (Dosovitskiy et al. 2021): timm's ViTs, DINOv2 with or without registers, CLIP's visual tower.

An image is cut into square patches, which are embedded linearly. A class token and, in DINOv2, registers (Darcet et al.
2024) come before them. Each block adds attention, then a perceptron, to its input, each after a LayerNorm. Positions
belong to a grid of patches; for images of other sizes they are resampled. The features are the class token after the
last LayerNorm.

| settings | network | parameters of the backbone |
|---|---|---|
| `width=384, depth=12, patch=16` | ViT-S/16 | 21,665,280 |
| `width=768, depth=12, patch=16` | ViT-B/16 | 85,797,888 |
| `width=384, depth=12, patch=14, grid=37, layer_scale=True` | DINOv2 ViT-S/14 | 22,055,808 |
| `width=768, depth=12, patch=16, pre_norm=True, epsilon=1e-5, activation="quick_gelu"` | CLIP ViT-B/16 | 85,798,656 |
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from ltjax.models.blocks import rematerialised
from ltjax.models.layers import parameter, torch_kernel_init
from ltjax.models.precision import at_least_float32
from ltjax.system import registry
from ltjax.types import UserError

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
FEATURES = ("class", "class_and_mean", "mean")
ADAPTERS = ("none", "adaptformer", "lora")


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, computed in at least float32. The result has the type of x."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype, width = at_least_float32(x.dtype), x.shape[-1]
        scale = parameter(self, "scale", nn.initializers.ones_init(), (width,)).astype(dtype)
        bias = parameter(self, "bias", nn.initializers.zeros_init(), (width,)).astype(dtype)
        y = x.astype(dtype)
        y -= y.mean(-1, keepdims=True)
        return (y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon) * scale + bias).astype(x.dtype)


class LayerScale(nn.Module):
    """Multiply each channel by a learned number, initially 1e-5 (DINOv2)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.param("gamma", nn.initializers.constant(1e-5), (x.shape[-1],), jnp.float32).astype(x.dtype)


def _dense(features: int, dtype: Any, name: str, bias: bool = True, init: Callable | None = None) -> nn.Dense:
    init = init or nn.initializers.truncated_normal(0.02)  # timm's
    return nn.Dense(features, bias, dtype=dtype, param_dtype=jnp.float32, kernel_init=init, name=name)


class AdaptFormer(nn.Module):
    """LIFT's adapter beside a perceptron: LayerNorm, to `rank` channels, ReLU, back, times a learned number.

    The last layer is initially 0. Source: Chen et al., "AdaptFormer", NeurIPS 2022, as in LIFT's code.
    """

    rank: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        normal = nn.initializers.variance_scaling(1 / 3, "fan_in", "normal")
        y = _dense(self.rank, self.dtype, "down", init=normal)(LayerNorm(1e-5, name="norm")(x))
        y = _dense(x.shape[-1], self.dtype, "up", init=nn.initializers.zeros_init())(nn.relu(y))
        return y * self.param("scale", nn.initializers.ones_init(), (), jnp.float32).astype(y.dtype)


class LoRA(nn.Module):
    """LIFT's low-rank changes of queries and values [B, N, D] times 1 / rank. The second matrices begin with 0.

    Source: Hu et al., "LoRA", ICLR 2022. LIFT initialises the first matrix uniformly in +-1 / sqrt(rank).
    """

    rank: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")  # in +-1 / sqrt(rank)

        def change(kind: str) -> jax.Array:
            y = _dense(self.rank, self.dtype, f"{kind}_down", False, uniform)(x)
            return _dense(x.shape[-1], self.dtype, f"{kind}_up", False, nn.initializers.zeros_init())(y) / self.rank

        return change("query"), change("value")


class Attention(nn.Module):
    """Self-attention [B, N, D] -> [B, N, D]. Its softmax is in at least float32.

    Attributes:
      heads: Their number.
      qkv_bias: Whether queries, keys and values have a bias.
      rank: Of `LoRA`; 0: none.
    """

    heads: int
    qkv_bias: bool
    rank: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, number, width = x.shape
        q, k, v = jnp.split(_dense(3 * width, self.dtype, "qkv", self.qkv_bias)(x), 3, axis=-1)
        if self.rank:
            dq, dv = LoRA(self.rank, self.dtype, name="adapter")(x)
            q, v = q + dq, v + dv
        q, k, v = (each.reshape(batch, number, self.heads, width // self.heads) for each in (q, k, v))
        similarity = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=at_least_float32(q.dtype))
        shares = jax.nn.softmax(similarity * (width // self.heads) ** -0.5).astype(v.dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", shares, v).reshape(batch, number, width)
        return _dense(width, self.dtype, "out")(y)


class Block(nn.Module):
    """Attention and a perceptron, each after a LayerNorm and added to its input: [B, N, D] -> [B, N, D].

    Attributes: see `backbone`.
    """

    heads: int
    mlp_width: int
    qkv_bias: bool
    layer_scale: bool
    epsilon: float
    activation: str
    adapter: str
    rank: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        lora = self.rank if self.adapter == "lora" else 0
        attention = Attention(self.heads, self.qkv_bias, lora, self.dtype, name="attention")
        y = attention(LayerNorm(self.epsilon, name="norm1")(x))
        x += LayerScale(name="layer_scale1")(y) if self.layer_scale else y
        y = _dense(self.mlp_width, self.dtype, "mlp1")(LayerNorm(self.epsilon, name="norm2")(x))
        y = _dense(x.shape[-1], self.dtype, "mlp2")(ACTIVATIONS[self.activation](y))
        y = LayerScale(name="layer_scale2")(y) if self.layer_scale else y
        if self.adapter == "adaptformer":
            y += AdaptFormer(self.rank, self.dtype, name="adapter")(x)
        return x + y


class PatchEmbedding(nn.Module):
    """Linear embedding of square patches: [B, H, W, channels] -> [B, H / patch, W / patch, width]."""

    width: int
    patch: int
    bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        if height % self.patch or width % self.patch:
            lower = max(min(height, width) // self.patch, 1) * self.patch
            raise UserError(
                f"images of {height} x {width} pixels do not divide into patches of {self.patch} x {self.patch} "
                f"(model.patch): take a side such as {lower} or {lower + self.patch}"
            )
        rows, columns = height // self.patch, width // self.patch
        x = x.reshape(batch, rows, self.patch, columns, self.patch, channels).swapaxes(2, 3)
        shape = (self.patch, self.patch, channels, self.width)
        kernel = self.param("kernel", torch_kernel_init(), shape, jnp.float32).astype(self.dtype)
        x = x.reshape(batch, rows, columns, self.patch * self.patch * channels) @ kernel.reshape(-1, self.width)
        if self.bias:
            x += self.param("bias", nn.initializers.zeros_init(), (self.width,), jnp.float32).astype(self.dtype)
        return x


class ViTBackbone(nn.Module):
    """[B, H, W, channels] -> {"stage1": features [B, F]}, see `backbone`.

    Its own parameters are `class_token` [D], `registers` [R, D], `positions` [grid, grid, D] of the patches and
    `projection` [D, F]. A class token has no position of its own: the import adds it to the token.

    Attributes:
      block: Settings of the blocks.
      family: See `ltjax.models`.
      Others: See `backbone`.
    """

    depth: int
    width: int
    patch: int
    grid: int
    registers: int
    pre_norm: bool
    projection: int
    features: str
    block: dict[str, Any]
    dtype: Any
    remat: bool
    family: str = "vit"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
        epsilon, normal = self.block["epsilon"], nn.initializers.truncated_normal(0.02)
        x = PatchEmbedding(self.width, self.patch, not self.pre_norm, self.dtype, name="conv")(x.astype(self.dtype))
        batch, rows, columns, _ = x.shape
        positions = self.param("positions", normal, (self.grid, self.grid, self.width), jnp.float32)
        x = (x + resampled(positions, rows, columns).astype(self.dtype)).reshape(batch, rows * columns, self.width)
        first = [self.param("class_token", nn.initializers.normal(1e-6), (self.width,), jnp.float32)[None]]
        if self.registers:
            shape = (self.registers, self.width)
            first.append(self.param("registers", nn.initializers.normal(1e-6), shape, jnp.float32))
        before = jnp.concatenate(first).astype(self.dtype)  # [1 + R, D]
        x = jnp.concatenate([jnp.broadcast_to(before, (batch, *before.shape)), x], axis=1)
        if self.pre_norm:
            x = LayerNorm(epsilon, name="pre_norm")(x)
        block = rematerialised(Block, self.remat)
        for number in range(self.depth):
            x = block(**self.block, dtype=self.dtype, name=f"block{number + 1}")(x, train)
        x = LayerNorm(epsilon, name="norm")(x)
        token = x[:, 0].astype(at_least_float32(self.dtype))
        mean = x[:, len(before) :].astype(at_least_float32(self.dtype)).mean(1)
        y = {"class": token, "mean": mean, "class_and_mean": jnp.concatenate([token, mean], -1)}[self.features]
        if self.projection:
            shape = (self.width, self.projection)
            y @= self.param("projection", nn.initializers.normal(self.width**-0.5), shape, jnp.float32).astype(y.dtype)
        return {"stage1": y}


def resampled(positions: jax.Array, rows: int, columns: int) -> jax.Array:
    """Resample positions [g, g, D] to another grid [rows, columns, D]: bicubic, with antialiasing, as timm does."""
    if positions.shape[:2] == (rows, columns):
        return positions
    return jax.image.resize(positions, (rows, columns, positions.shape[-1]), "cubic", antialias=True)


def default_rank(num_classes: int, depth: int) -> int:
    """Return LIFT's rank of adapters, 2^floor(log2(C / (2 depth))), at least 1.

    Examples:
      >>> vit.default_rank(1000, 12), vit.default_rank(23, 12)
      (32, 1)
    """
    return 1 << max((num_classes // (2 * depth)).bit_length() - 1, 0)


def backbone(
    dtype: Any,
    platform: str | None,
    remat: bool,
    num_classes: int = 1,
    *,
    depth: int = 12,
    width: int = 768,
    heads: int = 0,
    mlp_width: int = 0,
    patch: int = 16,
    grid: int = 14,
    registers: int = 0,
    layer_scale: bool = False,
    pre_norm: bool = False,
    qkv_bias: bool = True,
    epsilon: float = 1e-6,
    activation: str = "gelu",
    projection: int = 0,
    features: str = "class",
    adapter: str = "none",
    rank: int = 0,
) -> ViTBackbone:
    """Create a vision transformer's backbone. Other arguments: see `ltjax.models.create`.

    The many parameters are its settings in a config. An import finds them in the file's arrays.

    Args:
      num_classes: Of the network, for `rank`.
      depth: Number of blocks.
      width: D, channels of a token.
      heads: Of each attention. 0: width / 64, as in all ViTs up to ViT-L; ViT-H has 16.
      mlp_width: Inner channels of the perceptrons. 0: 4 width.
      patch: Side of a patch in pixels. An image's sides are multiples of it.
      grid: Patches on a side of the images that the positions are for: 224 / 16 = 14, DINOv2 518 / 14 = 37.
      registers: R, tokens after the class token that no output reads, 4 in DINOv2 "with registers".
      layer_scale: Multiply the channels of each addition by learned numbers (DINOv2).
      pre_norm: A LayerNorm before the first block, and patches without bias (CLIP).
      qkv_bias: Whether queries, keys and values have a bias.
      epsilon: Of LayerNorm: 1e-6, in CLIP 1e-5.
      activation: "gelu", "gelu_tanh" (its approximation) or "quick_gelu" (OpenAI's CLIP, x sigmoid(1.702 x)). The wrong
        one lowers the accuracy of imported weights, and raises no error.
      projection: E, channels of a last linear layer without bias, CLIP's embedding. 0: none.
      features: "class": the class token [D]. "class_and_mean": it, and the mean of the patches [2 D], as probes of
        DINOv2. "mean": that mean. All after the last LayerNorm, before the projection.
      adapter: Small layers to train beside frozen weights, LIFT's (Shi et al., ICML 2024). "adaptformer": beside the
        perceptrons. "lora": in queries and values. Before training they change nothing. Paths of their parameters have
        a part `adapter`.
      rank: Channels inside an adapter. 0: LIFT's, see `default_rank`.
    """
    sizes = dict(depth=depth, width=width, patch=patch, grid=grid)
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"model {name} = {value}: at least 1")
    for name, value in dict(heads=heads, mlp_width=mlp_width, registers=registers, rank=rank).items():
        if value < 0:
            raise UserError(f"model {name} = {value}: from 0 up")
    heads = heads or max(width // 64, 1)
    if width % heads:
        raise UserError(f"model width = {width}, heads = {heads}: the width is a multiple of the heads")
    if projection < 0 or (projection and features == "class_and_mean"):
        raise UserError(f"model projection = {projection}, features = {features!r}: a projection is of D channels")
    registry.choose("model activation", ACTIVATIONS, activation)
    registry.choose("model features", FEATURES, features)
    registry.choose("model adapter", ADAPTERS, adapter)
    if rank and adapter == "none":
        raise UserError(f"model rank = {rank}: it is for an adapter; set model.adapter to adaptformer or lora")
    block = dict(heads=heads, mlp_width=mlp_width or 4 * width, qkv_bias=qkv_bias, layer_scale=layer_scale)
    block |= dict(epsilon=epsilon, activation=activation, adapter=adapter)
    block["rank"] = 0 if adapter == "none" else rank or default_rank(num_classes, depth)
    settings = dict[str, Any](registers=registers, pre_norm=pre_norm, projection=projection, features=features)
    return ViTBackbone(**sizes, **settings, block=block, dtype=dtype, remat=remat)
