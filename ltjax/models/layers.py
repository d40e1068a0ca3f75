"""Layers that the networks share: convolution, batch norm, pooling, classifiers, and the network around a backbone."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from ltjax.system import xla
from ltjax.types import Outputs, UserError

CLASSIFIERS = ("linear", "cosine")
CLASSIFIER_INITS = ("he", "torch", "torch_no_bias")
Fan = Literal["fan_in", "fan_out"]
Init = Literal["fan_in", "fan_out", "torch"] | Callable[..., jax.Array]


def he_normal(fan: Fan = "fan_in") -> Callable[..., jax.Array]:
    """Normal weights of variance 2 / fan, as PyTorch's `kaiming_normal_`."""
    return nn.initializers.variance_scaling(2.0, fan, "normal")


def torch_kernel_init() -> Callable[..., jax.Array]:
    """PyTorch's default for the weights of a linear layer or a convolution: uniform in +-1 / sqrt(fan_in)."""
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def at_least_float32(dtype: Any) -> Any:
    """The type of all that is not the network's body - statistics, means over space, logits: float32 or float64."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def torch_bias_init(fan_in: int) -> Callable[..., jax.Array]:
    """PyTorch's default for the bias of a linear layer: uniform in +-1 / sqrt(fan_in)."""

    def init(rng, shape, dtype=jnp.float32):
        bound = fan_in**-0.5
        return jax.random.uniform(rng, shape, dtype, -bound, bound)

    return init


# XLA's CPU backend runs the two gradient convolutions of `lax.conv_general_dilated` 8 to 25 times slower inside a
# loop, because their transposed dimension order stays as it is there. Written as plain NHWC convolutions they run at
# full speed. The result is the same to rounding; forward-mode differentiation is not available through it.
# The kernel's gradient of a grouped convolution is slow outside of loops, too (30 times, at 32 groups of 4 channels).
# So its kernel is filled up with zeros to that of a plain convolution, for `groups` times the work.


def _dilate(x: jax.Array, strides: Sequence[int]) -> jax.Array:
    """Put stride - 1 zeros between the pixels of x [B, H, W, channels]."""
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((0, 0, s - 1) for s in strides), (0, 0, 0)))


def _nhwc(lhs: jax.Array, rhs: jax.Array, strides, padding, precision, dilation=(1, 1)) -> jax.Array:
    """A convolution that sums in float32 at least. dilation: of the kernel."""
    if lhs.dtype == jnp.bfloat16 and not xla.has_onednn():
        lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
        return _nhwc(lhs, rhs, strides, padding, precision, dilation).astype(jnp.bfloat16)
    if max(lhs.shape[1:3]) <= 2 and tuple(strides) == (1, 1) and tuple(dilation) == (1, 1):
        return _by_taps(lhs, rhs, padding, precision)
    settings = dict[str, Any](rhs_dilation=dilation, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision)
    return lax.conv_general_dilated(lhs, rhs, strides, padding, **settings)


def _by_taps(lhs: jax.Array, rhs: jax.Array, padding, precision) -> jax.Array:
    """A convolution of stride 1 as one matrix product for each tap: on a map of 2x2 pixels, where ResNets for large
    images end that are given small ones, XLA's CPU backend takes 13 times as long for it."""
    zero = jnp.zeros((), lhs.dtype)
    padded = lax.pad(lhs, zero, ((0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)))
    taps_h, taps_w = rhs.shape[:2]
    height, width = padded.shape[1] - taps_h + 1, padded.shape[2] - taps_w + 1
    total = jnp.zeros((lhs.shape[0], height, width, rhs.shape[3]), lhs.dtype)
    (rows, _), (columns, _) = padding  # zeros before the map; taps that meet nothing else are left out
    for i in range(max(0, rows - height + 1), min(taps_h, rows + lhs.shape[1])):
        for j in range(max(0, columns - width + 1), min(taps_w, columns + lhs.shape[2])):
            total += jnp.matmul(padded[:, i : i + height, j : j + width], rhs[i, j], precision=precision)
    return total


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _cpu_convolution(x, kernel, strides, padding, precision):
    return _nhwc(x, kernel, strides, padding, precision)


def _cpu_convolution_forward(x, kernel, strides, padding, precision):
    return _nhwc(x, kernel, strides, padding, precision), (x, kernel)


def _cpu_convolution_backward(strides, padding, precision, residuals, dy):
    x, kernel = residuals
    stuffed = _dilate(dy, strides)  # [B, (Ho - 1) * s + 1, (Wo - 1) * s + 1, Cout]
    pad_x = []
    for axis in (0, 1):
        size, taps, span, low = x.shape[1 + axis], kernel.shape[axis], stuffed.shape[1 + axis], padding[axis][0]
        pad_x.append((taps - 1 - low, size - span + low))
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)  # [kh, kw, Cout, Cin]
    dx = _nhwc(stuffed, flipped, (1, 1), pad_x, precision)
    return dx, _kernel_gradient(x, dy, kernel.shape, strides, padding, precision)


def _kernel_gradient(x, dy, shape, strides, padding, precision) -> jax.Array:
    """Gradient to a kernel of `shape` [kh, kw, Cin, Cout]: one image of width W Cin, convolved with dy as the kernel.

    Input channels lie side by side in the image, and taps a whole pixel apart, so that one row of what comes out has
    kw Cin entries. Matrix units compute that twice as fast as one image of kw columns for each channel.
    """
    (batch, height, width, channels), (_, rows, columns, _) = x.shape, dy.shape
    kind = x.dtype
    if channels == 1 and x.dtype == jnp.bfloat16:  # oneDNN 3.12 computes that wrongly for a batch of 8
        x, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
    high = [
        taps + (count - 1) * stride - size - low
        for taps, count, stride, size, (low, _) in zip(
            shape[:2], (rows, columns), strides, (height, width), padding, strict=True
        )
    ]
    (top, _), (left, _) = padding
    dk = _nhwc(
        x.transpose(1, 2, 3, 0).reshape(1, height, width * channels, batch),
        dy.transpose(1, 2, 0, 3),  # [Ho, Wo, B, Cout]
        (1, 1),
        ((top, high[0]), (left * channels, high[1] * channels)),
        precision,
        dilation=(strides[0], strides[1] * channels),
    )  # [1, kh, kw Cin, Cout]
    return dk.reshape(shape).astype(kind)


_cpu_convolution.defvjp(_cpu_convolution_forward, _cpu_convolution_backward)


def _ungrouped(kernel: jax.Array, groups: int) -> jax.Array:
    """[kh, kw, Cin / groups, Cout] -> [kh, kw, Cin, Cout]: zeros where input and output are of different groups."""
    height, width, came, out = kernel.shape
    blocks = kernel.reshape(height, width, 1, came, groups, out // groups)
    own = jnp.eye(groups, dtype=bool)[:, None, :, None]  # [groups, 1, groups, 1]
    blocks = jnp.where(own, blocks, 0)  # [kh, kw, groups, Cin / groups, groups, Cout / groups]
    return blocks.reshape(height, width, groups * came, out)


# `jax.vmap` makes one grouped convolution of the convolutions of several replicas. Of a kernel's gradient it makes a
# forward convolution whose window is as wide as the map, for which cuDNN is slow. So the gradients of vmapped
# convolutions are those of the grouped one, which cuDNN computes as backward-data and backward-filter.


def _accelerator_convolution(lhs, rhs, window_strides, padding, *, precision=None, **settings) -> jax.Array:
    settings["precision"] = precision or jax.config.values["jax_default_matmul_precision"]  # of the gradients, too
    convolve = partial(lax.conv_general_dilated, window_strides=window_strides, padding=padding, **settings)

    def transposed(convolve, x, kernel, dy):
        (dx,) = jax.linear_transpose(lambda x: convolve(x, kernel), x)(dy)
        (dkernel,) = jax.linear_transpose(lambda kernel: convolve(x, kernel), kernel)(dy)
        return dx, dkernel

    @jax.custom_batching.custom_vmap
    def gradients(x, kernel, dy):
        return transposed(convolve, x, kernel, dy)

    @gradients.def_vmap
    def gradients_of_several(replicas, is_batched, *operands):
        several = (
            operand if batched else jnp.broadcast_to(operand, (replicas, *operand.shape))
            for operand, batched in zip(operands, is_batched, strict=True)
        )
        return transposed(jax.vmap(convolve), *several), (True, True)

    @jax.custom_vjp
    def differentiable(x, kernel):
        return convolve(x, kernel)

    differentiable.defvjp(
        lambda x, kernel: (convolve(x, kernel), (x, kernel)), lambda residuals, dy: gradients(*residuals, dy)
    )
    return differentiable(lhs, rhs)


def _convolution_for(platform: str | None) -> Callable[..., jax.Array]:
    """The `conv_general_dilated` of a platform ("cpu", "gpu", "tpu"); None means the one that JAX runs on."""
    if (platform or jax.default_backend()) != "cpu":
        return _accelerator_convolution

    def convolution(lhs, rhs, window_strides, padding, *, feature_group_count=1, precision=None, **rest):
        if any(d != 1 for d in (*rest["lhs_dilation"], *rest["rhs_dilation"])):
            return lax.conv_general_dilated(
                lhs, rhs, window_strides, padding, feature_group_count=feature_group_count, precision=precision, **rest
            )
        if isinstance(padding, str):
            padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
        padding = tuple((int(low), int(high)) for low, high in padding)
        rhs = rhs if feature_group_count == 1 else _ungrouped(rhs, feature_group_count)
        return _cpu_convolution(lhs, rhs, tuple(window_strides), padding, precision)

    return convolution


def _initialiser(init: Init) -> Callable[..., jax.Array]:
    if callable(init):
        return init
    return torch_kernel_init() if init == "torch" else he_normal(init)


class Conv(nn.Module):
    """2-D convolution without bias, padded as in PyTorch (`padding` pixels on each side).

    groups: of channels, each output seeing the inputs of its own group alone.
    kernel_init: "fan_in" or "fan_out": `he_normal`, where, as in PyTorch, fan_in counts the channels of one group and
      fan_out those of all. "torch": `torch_kernel_init`. Or an initialiser.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    padding: int | None = None  # None: (kernel_size - 1) // 2
    groups: int = 1
    kernel_init: Init = "fan_in"
    dtype: Any = jnp.float32
    platform: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        pad = (self.kernel_size - 1) // 2 if self.padding is None else self.padding
        shape = (self.kernel_size, self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", _initialiser(self.kernel_init), shape, jnp.float32)
        return _convolution_for(self.platform)(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.strides, self.strides),
            ((pad, pad), (pad, pad)),
            lhs_dilation=(1, 1),
            rhs_dilation=(1, 1),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )


class BatchNorm(nn.Module):
    """Batch norm with PyTorch's running statistics: momentum 0.1, epsilon 1e-5, and an *unbiased* running variance.

    Flax's own keeps the biased one, which drifts away from the authors' evaluation figures on small batches.
    Statistics are taken over the whole batch, however many devices it is sharded over. All of it is computed in
    float32 (in float64 of float64 maps) and returned in the type of x. Running statistics keep the type they come in.

    relu: end in a ReLU. A call may add a residual before that: `relu(norm(x) + residual)`.
    """

    relu: bool = False
    momentum: float = 0.1
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, residual: jax.Array | None = None) -> jax.Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,), jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        dtype = at_least_float32(x.dtype)
        old_mean, old_var = running_mean.value.astype(dtype), running_var.value.astype(dtype)
        scale, bias = scale.astype(dtype), bias.astype(dtype)
        if not train:
            return _affine(x, scale, bias, old_mean, lax.rsqrt(old_var + self.epsilon), residual, self.relu)
        y, mean, var = _batch_norm(x, scale, bias, residual, self.relu, self.epsilon)
        if not self.is_initializing():
            count = x.size // channels
            unbiased = var * (count / max(count - 1, 1))
            new_mean = old_mean + self.momentum * (mean - old_mean)
            new_var = old_var + self.momentum * (unbiased - old_var)
            running_mean.value = new_mean.astype(running_mean.value.dtype)
            running_var.value = new_var.astype(running_var.value.dtype)
        return y


def _affine(x, scale, bias, mean, inverse_std, residual, relu: bool) -> jax.Array:
    factor = scale * inverse_std
    y = _widened(x) * factor + (bias - mean * factor)
    y = y if residual is None else y + _widened(residual)
    return (_relu(y) if relu else y).astype(x.dtype)


# A product with 0 or 1: a choice by `where` becomes branches on XLA's CPU backend, and takes ten times as long.
@jax.custom_vjp
def _relu(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0)


_relu.defvjp(lambda x: (jnp.maximum(x, 0),) * 2, lambda y, dy: (dy * jnp.sign(y),))


# The gradient of batch norm, residual and ReLU in three passes over the maps, one of which makes the gradient to x.
# `mean` and `var` are there for the running statistics: no gradient comes through them.


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _batch_norm(x, scale, bias, residual, relu: bool, epsilon: float):
    """x, residual [..., channels], scale, bias [channels] -> `relu(norm(x) + residual)`, mean, var [channels]."""
    count = x.size // x.shape[-1]
    mean = _channel_sums(_apart(x, 1)) / count
    var = jnp.maximum(_channel_sums(*(_apart(x, 2),) * 2) / count - jnp.square(mean), 0.0)
    return _affine(x, scale, bias, mean, lax.rsqrt(var + epsilon), residual, relu), mean, var


def _batch_norm_forward(x, scale, bias, residual, relu, epsilon):
    y, mean, var = _batch_norm(x, scale, bias, residual, relu, epsilon)
    return (y, mean, var), (x, scale, mean, var, y if relu else None, residual is not None)


def _batch_norm_backward(relu, epsilon, residuals, cotangents):
    (x, scale, mean, var, y, added), (dy, *_) = residuals, cotangents
    if relu:  # y is 0 or above
        dy = (_widened(dy) * jnp.sign(_widened(y))).astype(dy.dtype)
    dy, count, inverse_std = _apart(dy, 1), x.size // x.shape[-1], lax.rsqrt(var + epsilon)
    dbias = _channel_sums(_apart(dy, 1))
    dscale = inverse_std * (_channel_sums(_apart(dy, 2), _apart(x, 3)) - mean * dbias)
    factor = scale * inverse_std
    slope = factor * inverse_std * dscale / count
    dx = _widened(dy) * factor - _widened(x) * slope + (slope * mean - factor * dbias / count)
    return dx.astype(x.dtype), dscale, dbias, dy if added else None


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


def _channel_sums(x: jax.Array, times: jax.Array | None = None) -> jax.Array:
    """Sums of x, or of x * times, over all axes but the last, in float32 (of float64, float64)."""
    dtype, axes = at_least_float32(x.dtype), tuple(range(x.ndim - 1))
    return jnp.sum(x if times is None else x.astype(dtype) * times.astype(dtype), axes, dtype=dtype)


# On a CPU, YNNPACK's sums read bfloat16 directly if nothing else uses its conversion to float32. XLA writes a shared
# conversion out as a map of float32, and a step then takes half as long again. So each sum of a map stands behind
# another number of barriers, and all that is not a sum converts by `_shifted`.


def _apart(x: jax.Array, barriers: int) -> jax.Array:
    """x, for one sum: no two sums of a map may have the same number of `barriers`."""
    if x.dtype == jnp.bfloat16:
        for _ in range(barriers):
            x = lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)
    return x


def _widened(x: jax.Array) -> jax.Array:
    """x as float32 (float64 stays)."""
    return _wide(x) if x.dtype == jnp.bfloat16 else x.astype(at_least_float32(x.dtype))


@jax.custom_vjp
def _wide(x: jax.Array) -> jax.Array:
    return lax.platform_dependent(x, cpu=_shifted, default=lambda x: x.astype(jnp.float32))


_wide.defvjp(lambda x: (_wide(x), None), lambda _, dy: (dy.astype(jnp.bfloat16),))


def _shifted(x: jax.Array) -> jax.Array:
    """bfloat16 as float32, of which it is the upper half."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16, jnp.float32)


class LinearClassifier(nn.Module):
    """logits = features @ kernel + bias, of the features' type.

    classifier_init: "he": weights by `he_normal`, bias by `torch_bias_init`; "torch": all as PyTorch's linear layer
      begins; "torch_no_bias": the same, but the bias begins with zeros.
    """

    num_classes: int
    classifier_init: str = "he"

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        width = features.shape[-1]
        weights = he_normal() if self.classifier_init == "he" else torch_kernel_init()
        biases = nn.initializers.zeros_init() if self.classifier_init == "torch_no_bias" else torch_bias_init(width)
        kernel = self.param("kernel", weights, (width, self.num_classes), jnp.float32)
        bias = self.param("bias", biases, (self.num_classes,), jnp.float32)
        return features @ kernel.astype(features.dtype) + bias.astype(features.dtype)


class CosineClassifier(nn.Module):
    """logits = scale * cosine(features, class weight), of the features' type, in [-scale, scale]; no bias.

    Weights begin with length 1, as LDAM's do: a cosine does not see their length, but the longer they are, the less a
    step of the optimizer turns them. `ltjax.losses.ldam` multiplies by its own scale, so it takes scale=1.
    """

    num_classes: int
    scale: float = 1.0

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        kernel = self.param("kernel", _unit_columns, (features.shape[-1], self.num_classes), jnp.float32)
        return self.scale * unit(features, axis=-1) @ unit(kernel.astype(features.dtype), axis=0)


def _unit_columns(rng: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return unit(jax.random.normal(rng, shape, dtype), axis=0)


def unit(x: jax.Array, *, axis: int) -> jax.Array:
    """x over its Euclidean length along `axis`; finite, with a finite gradient, where the length is 0."""
    return x * lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis, keepdims=True), 1e-12))


# As `reduce_window` max-pooling has a scatter for a gradient, which an accelerator does one value after the other, and
# in bfloat16. Nine strided slices have the same maxima, and a gradient of selections and sums.


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """Take the maxima of 3x3 windows, 2 pixels apart, of x with one pixel of -inf around it.

    x: [B, h, w, D]. Returns: [B, h / 2, w / 2, D], rounded up.

    The gradient goes to the first maximum of a window, by rows, as PyTorch's and `lax.reduce_window`'s. It is summed in
    float32 (of float64, float64).
    """
    return reduce(jnp.maximum, (taken for taken, _ in _nine(x)))


def _nine(x: jax.Array) -> Iterator[tuple[jax.Array, Callable[[jax.Array], jax.Array]]]:
    """What each of the nine places of a window takes of x, and how its gradient [B, h / 2, w / 2, D] becomes x's."""
    low = jnp.asarray(-jnp.inf, x.dtype)
    padded = lax.pad(x, low, ((0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)))
    height, width = padded.shape[1:3]
    rows, columns = (height - 3) // 2 * 2 + 1, (width - 3) // 2 * 2 + 1  # from the first to the last that are taken

    for i in range(3):
        for j in range(3):

            def put_back(dy: jax.Array, i: int = i, j: int = j) -> jax.Array:
                around = ((i - 1, height - i - rows - 1, 1), (j - 1, width - j - columns - 1, 1))
                return lax.pad(dy, jnp.zeros((), dy.dtype), ((0, 0, 0), *around, (0, 0, 0)))

            yield padded[:, i : i + rows : 2, j : j + columns : 2], put_back


def _max_pool_backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array]:
    x, y = residuals
    left = dy.astype(at_least_float32(x.dtype))
    total = jnp.zeros(x.shape, left.dtype)
    for taken, put_back in _nine(x):
        here = taken == y
        total += put_back(jnp.where(here, left, 0))
        left = jnp.where(here, 0, left)
    return (total.astype(x.dtype),)


max_pool.defvjp(lambda x: (y := max_pool(x), (x, y)), _max_pool_backward)


def pool(x: jax.Array) -> jax.Array:
    """Mean over space: a map [B, h, w, D] of any float type -> [B, D], float32 or, of a float64 map, float64."""
    dtype = at_least_float32(x.dtype)
    if x.dtype != dtype:
        x = lax.optimization_barrier(x)  # XLA on CPU, jax 0.11 and 0.12, makes nan of this mean fused with a relu
    return x.astype(dtype).mean((1, 2))


class Network(nn.Module):
    """Normalisation, a backbone, a classifier and, as switches, one more block, branches and a scale for each logit.

    `backbone(x, train) -> {stage: map [B, h, w, D_l]}`, whose last map is the final one. Images come in [0, 1]: the
    network normalises them itself, so that attacks work in pixels. Parameter paths begin with `backbone`, `block`,
    `branches`, `classifier` and `logit_scale`.

    `features` is the mean over space of the final map, `layers` that of every stage's, float32 (of a float64
    network, float64). With branches the classifier sees theirs instead, each [B, D]: `branches` holds the logits of
    each and `logits` their sum, while `features` stays what it is without branches, so that class means and losses on
    features have one meaning.

    block: a module of `ltjax.models.blocks` after the backbone, whose map is one more stage and the final one. The
    backbone in front of it is in evaluation mode always: MiSLAS's for Places-LT is frozen, batch norms and all.
    branches: a module of `ltjax.models.branches`. logit_scale: MiSLAS's learnable weight scaling,
    `logits = s * (W z + b)` with s [C] initially 1; with branches, of each one's logits.
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
    dtype: Any = jnp.float32

    def setup(self):
        if self.classifier == "cosine":
            self.head = CosineClassifier(self.num_classes, self.cosine_scale, name="classifier")
        else:
            self.head = LinearClassifier(self.num_classes, self.classifier_init, name="classifier")
        if self.logit_scale:
            self.scale = self.param("logit_scale", nn.initializers.ones_init(), (self.num_classes,), jnp.float32)

    def __call__(self, images: jax.Array, train: bool = False) -> Outputs:
        if len(self.mean) not in (1, images.shape[-1]):
            raise UserError(f"model mean = {self.mean}: images have {images.shape[-1]} channels")
        dtype = at_least_float32(self.dtype)
        mean, std = jnp.asarray(self.mean, dtype), jnp.asarray(self.std, dtype)
        x = ((images.astype(dtype) - mean) / std).astype(self.dtype)
        maps = self.backbone(x, train and self.block is None)
        if self.block is not None:
            maps = {**maps, f"stage{len(maps) + 1}": self.block(list(maps.values())[-1], train)}
        layers = {name: pool(x) for name, x in maps.items()}  # unused ones are dead code once compiled
        last = list(maps)[-1]
        if self.branches is None:
            return Outputs(self._logits(layers[last]), layers[last], None, layers)
        logits = self._logits(self.branches(maps[last], train))  # [R, B, C]
        return Outputs(logits.sum(0), layers[last], logits, layers)

    def _logits(self, features: jax.Array) -> jax.Array:
        """[..., D] -> [..., C]"""
        logits = self.head(features)
        return logits * self.scale.astype(logits.dtype) if self.logit_scale else logits
