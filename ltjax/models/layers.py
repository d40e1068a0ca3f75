"""Layers of all networks: convolution, batch norm, pooling, classifiers, and the network around a backbone."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from ltjax.system import xla
from ltjax.types import Outputs, UserError

CLASSIFIERS = ("linear", "cosine")
CLASSIFIER_INITS = ("he", "torch", "torch_no_bias")
Fan = Literal["fan_in", "fan_out"]
Init = Literal["fan_in", "fan_out", "torch"] | Callable[..., jax.Array]


def he_normal(fan: Fan = "fan_in") -> Callable[..., jax.Array]:
    """Initialise normal weights of variance 2 / fan, as PyTorch's `kaiming_normal_`."""
    return nn.initializers.variance_scaling(2.0, fan, "normal")


def torch_kernel_init() -> Callable[..., jax.Array]:
    """Initialise weights of a linear layer or a convolution by PyTorch's default: uniform in +-1 / sqrt(fan_in)."""
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def at_least_float32(dtype: Any) -> Any:
    """Return the type of statistics, means over space and logits: float64 for float64, otherwise float32."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def torch_bias_init(fan_in: int) -> Callable[..., jax.Array]:
    """Initialise the bias of a linear layer by PyTorch's default: uniform in +-1 / sqrt(fan_in)."""

    def init(rng, shape, dtype=jnp.float32):
        bound = fan_in**-0.5
        return jax.random.uniform(rng, shape, dtype, -bound, bound)

    return init


# XLA's CPU backend runs both gradient convolutions of `lax.conv_general_dilated` 8 to 25 times slower inside a loop,
# because it keeps their transposed dimension order there. As plain NHWC convolutions they run at full speed, with the
# same result up to rounding, but without forward-mode differentiation.
# The kernel's gradient of a grouped convolution is slow outside of loops, too (30 times, at 32 groups of 4 channels).
# So zeros extend its kernel to that of a plain convolution, for `groups` times the work.


def _dilate(x: jax.Array, strides: Sequence[int]) -> jax.Array:
    """Insert stride - 1 zeros between the pixels of x [B, H, W, channels]."""
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((0, 0, s - 1) for s in strides), (0, 0, 0)))


def _padded(x: jax.Array, padding) -> jax.Array:
    """Put zeros around the maps [B, H, W, channels]."""
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)))


def _nhwc(lhs: jax.Array, rhs: jax.Array, strides, padding, precision, dilation=(1, 1)) -> jax.Array:
    """Convolve, with sums in at least float32. dilation: of the kernel."""
    if lhs.dtype == jnp.bfloat16 and not xla.has_onednn():
        lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
        return _nhwc(lhs, rhs, strides, padding, precision, dilation).astype(jnp.bfloat16)
    if max(lhs.shape[1:3]) <= 2 and tuple(strides) == (1, 1) and tuple(dilation) == (1, 1):
        return _by_taps(lhs, rhs, padding, precision)
    settings = dict[str, Any](rhs_dilation=dilation, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision)
    return lax.conv_general_dilated(lhs, rhs, strides, padding, **settings)


def _by_taps(lhs: jax.Array, rhs: jax.Array, padding, precision) -> jax.Array:
    """Convolve with stride 1, by one matrix product for each tap.

    For maps of 2x2 pixels, such as the last ones of large-image ResNets on small images, XLA's CPU convolution takes 13
    times as long.
    """
    padded = _padded(lhs, padding)
    taps_h, taps_w = rhs.shape[:2]
    height, width = padded.shape[1] - taps_h + 1, padded.shape[2] - taps_w + 1
    total = jnp.zeros((lhs.shape[0], height, width, rhs.shape[3]), lhs.dtype)
    (rows, _), (columns, _) = padding  # zeros before the map; taps that cover only zeros are skipped
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
    """Compute the gradient to a kernel of `shape` [kh, kw, Cin, Cout] by convolving one image of width W Cin with dy.

    The image holds the input channels side by side, and taps are a whole pixel apart, so an output row has kw Cin
    entries. Matrix units compute it twice as fast as one image of kw columns for each channel.
    """
    (batch, height, width, channels), (_, rows, columns, _) = x.shape, dy.shape
    dtype = x.dtype
    if channels == 1 and x.dtype == jnp.bfloat16:  # oneDNN 3.12 is wrong for a batch of 8
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
    return dk.reshape(shape).astype(dtype)


_cpu_convolution.defvjp(_cpu_convolution_forward, _cpu_convolution_backward)


def _ungrouped(kernel: jax.Array, groups: int) -> jax.Array:
    """Extend a grouped kernel by zeros: [kh, kw, Cin / groups, Cout] -> [kh, kw, Cin, Cout]."""
    height, width, group_in, out = kernel.shape
    blocks = kernel.reshape(height, width, 1, group_in, groups, out // groups)
    same_group = jnp.eye(groups, dtype=bool)[:, None, :, None]  # [groups, 1, groups, 1]
    blocks = jnp.where(same_group, blocks, 0)  # [kh, kw, groups, Cin / groups, groups, Cout / groups]
    return blocks.reshape(height, width, groups * group_in, out)


# `jax.vmap` turns the convolutions of several replicas into one grouped convolution. It turns a kernel's gradient into
# a forward convolution with a window as wide as the map, which is slow in cuDNN. So vmapped convolutions take the
# gradients of the grouped one, which cuDNN computes as backward-data and backward-filter.


def _accelerator_convolution(lhs, rhs, window_strides, padding, *, precision=None, **settings) -> jax.Array:
    settings["precision"] = precision or jax.config.values["jax_default_matmul_precision"]  # for gradients, too
    convolve = partial(lax.conv_general_dilated, window_strides=window_strides, padding=padding, **settings)

    def transposed(convolve, x, kernel, dy):
        (dx,) = jax.linear_transpose(lambda x: convolve(x, kernel), x)(dy)
        (dkernel,) = jax.linear_transpose(lambda kernel: convolve(x, kernel), kernel)(dy)
        return dx, dkernel

    @jax.custom_batching.custom_vmap
    def gradients(x, kernel, dy):
        return transposed(convolve, x, kernel, dy)

    @gradients.def_vmap
    def batched_gradients(replicas, is_batched, *operands):
        batched = (
            operand if has_axis else jnp.broadcast_to(operand, (replicas, *operand.shape))
            for operand, has_axis in zip(operands, is_batched, strict=True)
        )
        return transposed(jax.vmap(convolve), *batched), (True, True)

    @jax.custom_vjp
    def differentiable(x, kernel):
        return convolve(x, kernel)

    differentiable.defvjp(
        lambda x, kernel: (convolve(x, kernel), (x, kernel)), lambda residuals, dy: gradients(*residuals, dy)
    )
    return differentiable(lhs, rhs)


def _convolution_for(platform: str | None) -> Callable[..., jax.Array]:
    """Return the `conv_general_dilated` of a platform: "cpu", "gpu", "tpu" or, for None, JAX's default backend."""
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


# XLA's CPU backend takes 7 times as long for a grouped convolution with one channel a group as for the products of one
# tap after the other (672 channels, 14x14 pixels, 5x5 taps), and 25 times for its gradients. oneDNN computes it in
# float32 and forward alone. JAX's gradient of the products would take 6 times as long, because XLA is slow at sums over
# whole maps, so a loop over rows sums the kernel's gradient.


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise_by_taps(x: jax.Array, kernel: jax.Array, stride: int, padding) -> jax.Array:
    """Convolve each channel of x [B, H, W, D] with its own kernel, of [k, k, 1, D]. Sums are at least float32."""
    padded = lax.optimization_barrier(_padded(x, padding))  # XLA would make it anew for each tap
    rows, columns = (_size_out(size, kernel.shape[0], stride) for size in padded.shape[1:3])
    kernel, total = _widened(kernel), jnp.zeros((), at_least_float32(x.dtype))
    for i, j in np.ndindex(kernel.shape[:2]):
        pixels = padded[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride]
        total = total + _widened(pixels) * kernel[i, j, 0]
    return total.astype(x.dtype)


def _size_out(padded: int, taps: int, stride: int) -> int:
    """Return the number of outputs along an axis."""
    return (padded - taps) // stride + 1


def _depthwise_forward(x, kernel, stride, padding):
    return _depthwise_by_taps(x, kernel, stride, padding), (x, kernel)


def _depthwise_backward(stride, padding, residuals, dy):
    x, kernel = residuals
    taps, stuffed = kernel.shape[0], _dilate(dy, (stride, stride))
    pad_x = tuple(
        (taps - 1 - low, size - span + low)
        for size, span, (low, _) in zip(x.shape[1:3], stuffed.shape[1:3], padding, strict=True)
    )
    dx = _depthwise_by_taps(stuffed, jnp.flip(kernel, (0, 1)), 1, pad_x)
    return dx, _depthwise_kernel_gradient(x, dy, taps, stride, padding).astype(kernel.dtype)


def _depthwise_kernel_gradient(x, dy, taps: int, stride: int, padding) -> jax.Array:
    """Sum x [B, H, W, D] times dy [B, h, w, D] over a kernel's outputs, row by row of dy: [k, k, 1, D]."""
    padded = _padded(x, padding)
    (batch, rows, columns, channels), width = dy.shape, padded.shape[2]

    def add_row(number, sums):
        image, row = number // rows, number % rows
        of_dy = _widened(lax.dynamic_slice(dy, (image, row, 0, 0), (1, 1, columns, channels))[0])
        seen = _widened(lax.dynamic_slice(padded, (image, row * stride, 0, 0), (1, taps, width, channels))[0])
        return tuple(
            total + seen[:, j : j + (columns - 1) * stride + 1 : stride] * of_dy for j, total in enumerate(sums)
        )

    zeros = jnp.zeros((taps, columns, channels), at_least_float32(x.dtype))
    sums = lax.fori_loop(0, batch * rows, add_row, (zeros,) * taps)  # of each column of the kernel
    return jnp.stack([total.sum(1) for total in sums], axis=1)[:, :, None]


_depthwise_by_taps.defvjp(_depthwise_forward, _depthwise_backward)


def _initialiser(init: Init) -> Callable[..., jax.Array]:
    if callable(init):
        return init
    return torch_kernel_init() if init == "torch" else he_normal(init)


class Conv(nn.Module):
    """2-D convolution without bias, by default padded as in PyTorch.

    Attributes:
      features: Output channels.
      kernel_size: Of both sides.
      strides: Of both sides.
      padding: Pixels on each side, or "SAME", as in TensorFlow: with a stride, the side after the image may have one
        more than the side before it. None: (kernel_size - 1) // 2.
      groups: Of channels. An output depends only on the inputs of its group.
      kernel_init: "fan_in" or "fan_out" for `he_normal` (as in PyTorch, fan_in counts the channels of one group,
        fan_out those of all), "torch" for `torch_kernel_init`, or an initialiser.
      dtype: Of the computation.
      platform: See `ltjax.models.create`.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    padding: int | Literal["SAME"] | None = None
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
            pad if pad == "SAME" else ((pad, pad), (pad, pad)),
            lhs_dilation=(1, 1),
            rhs_dilation=(1, 1),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )


class DepthwiseConv(nn.Module):
    """2-D convolution of each channel on its own, without bias, padded as TensorFlow's "SAME". See `Conv`.

    Attributes:
      kernel_size: Of both sides.
      strides: Of both sides.
      kernel_init: See `Conv`.
      dtype: Of the computation. Sums are at least float32.
      platform: See `ltjax.models.create`.
    """

    kernel_size: int = 3
    strides: int = 1
    kernel_init: Init = "fan_in"
    dtype: Any = jnp.float32
    platform: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels, strides = x.shape[-1], (self.strides, self.strides)
        shape = (self.kernel_size, self.kernel_size, 1, channels)
        kernel = self.param("kernel", _initialiser(self.kernel_init), shape, jnp.float32)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if (self.platform or jax.default_backend()) == "cpu":
            padding = lax.padtype_to_pads(x.shape[1:3], shape[:2], strides, "SAME")
            return _depthwise_by_taps(x, kernel, self.strides, tuple(padding))
        return _accelerator_convolution(
            x, kernel, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=channels
        )


class BatchNorm(nn.Module):
    """Batch norm with PyTorch's running statistics: the running variance is *unbiased*.

    Flax's batch norm keeps the biased variance, which changes the authors' evaluation figures on small batches.
    Statistics cover the whole batch, over all devices. The computation is in float32 (float64 for float64 maps), the
    result in the type of x. Running statistics keep their type.

    Attributes:
      relu: End with a ReLU. A call may add a residual before it: `relu(norm(x) + residual)`.
      ceiling: The ReLU's largest value: 6 in ReLU6.
      momentum: Weight of a batch in the running statistics.
      epsilon: Added to the variance.
    """

    relu: bool = False
    ceiling: float = math.inf
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
        ceiling = self.ceiling if self.relu else None
        if not train:
            return _affine(x, scale, bias, old_mean, lax.rsqrt(old_var + self.epsilon), residual, ceiling)
        y, mean, var = _batch_norm(x, scale, bias, residual, ceiling, self.epsilon)
        if not self.is_initializing():
            count = x.size // channels
            unbiased = var * (count / max(count - 1, 1))
            new_mean = old_mean + self.momentum * (mean - old_mean)
            new_var = old_var + self.momentum * (unbiased - old_var)
            running_mean.value = new_mean.astype(running_mean.value.dtype)
            running_var.value = new_var.astype(running_var.value.dtype)
        return y


def _affine(x, scale, bias, mean, inverse_std, residual, ceiling: float | None) -> jax.Array:
    """Normalise x, add the residual, and apply a ReLU up to `ceiling`; None: no ReLU."""
    factor = scale * inverse_std
    y = _widened(x) * factor + (bias - mean * factor)
    y = y if residual is None else y + _widened(residual)
    return (y if ceiling is None else _relu(y, ceiling)).astype(x.dtype)


# The gradient is a product with 0 or 1, because XLA's CPU backend compiles `where` to branches, ten times as slow.
@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _relu(x: jax.Array, ceiling: float) -> jax.Array:
    y = jnp.maximum(x, 0.0)  # not 0, because jax2onnx makes float64 of float32 and an integer
    return y if ceiling == math.inf else jnp.minimum(y, ceiling)


def _slope(y: jax.Array, ceiling: float) -> jax.Array:
    """Return the ReLU's slope, 1 or 0, from its value y; 0 at both ends."""
    return jnp.sign(y) if ceiling == math.inf else jnp.sign(y) * jnp.sign(ceiling - y)


_relu.defvjp(lambda x, ceiling: (_relu(x, ceiling),) * 2, lambda ceiling, y, dy: (dy * _slope(y, ceiling),))


# The gradient of batch norm, residual and ReLU takes three passes over the maps, one of them for the gradient to x. The
# outputs `mean` and `var` are for the running statistics, and have no gradient.


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _batch_norm(x, scale, bias, residual, ceiling: float | None, epsilon: float):
    """x, residual [..., channels], scale, bias [channels] -> `relu(norm(x) + residual)`, mean, var [channels]."""
    count = x.size // x.shape[-1]
    mean = _channel_sums(_apart(x, 1)) / count
    var = jnp.maximum(_channel_sums(*(_apart(x, 2),) * 2) / count - jnp.square(mean), 0.0)
    return _affine(x, scale, bias, mean, lax.rsqrt(var + epsilon), residual, ceiling), mean, var


def _batch_norm_forward(x, scale, bias, residual, ceiling, epsilon):
    y, mean, var = _batch_norm(x, scale, bias, residual, ceiling, epsilon)
    return (y, mean, var), (x, scale, mean, var, None if ceiling is None else y, residual is not None)


def _batch_norm_backward(ceiling, epsilon, residuals, cotangents):
    (x, scale, mean, var, y, has_residual), (dy, *_) = residuals, cotangents
    if ceiling is not None:
        dy = (_widened(dy) * _slope(_widened(y), ceiling)).astype(dy.dtype)
    dy, count, inverse_std = _apart(dy, 1), x.size // x.shape[-1], lax.rsqrt(var + epsilon)
    dbias = _channel_sums(_apart(dy, 1))
    dscale = inverse_std * (_channel_sums(_apart(dy, 2), _apart(x, 3)) - mean * dbias)
    factor = scale * inverse_std
    slope = factor * inverse_std * dscale / count
    dx = _widened(dy) * factor - _widened(x) * slope + (slope * mean - factor * dbias / count)
    return dx.astype(x.dtype), dscale, dbias, dy if has_residual else None


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


def _channel_sums(x: jax.Array, times: jax.Array | None = None) -> jax.Array:
    """Sum x, or x * times, over all axes but the last, in at least float32."""
    dtype, axes = at_least_float32(x.dtype), tuple(range(x.ndim - 1))
    return jnp.sum(x if times is None else x.astype(dtype) * times.astype(dtype), axes, dtype=dtype)


# On CPUs, YNNPACK's sums read bfloat16 directly, unless something else uses the conversion to float32. XLA then stores
# the conversion as a float32 map, and a step takes 1.5 times as long. So each sum of a map has a different number of
# barriers, and everything else converts by `_shifted`.


def _apart(x: jax.Array, barriers: int) -> jax.Array:
    """Return x behind barriers, for one sum. No two sums of a map may have the same number of barriers."""
    if x.dtype == jnp.bfloat16:
        for _ in range(barriers):
            x = lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)
    return x


def _widened(x: jax.Array) -> jax.Array:
    """Convert x to float32; float64 stays."""
    return _wide(x) if x.dtype == jnp.bfloat16 else x.astype(at_least_float32(x.dtype))


@jax.custom_vjp
def _wide(x: jax.Array) -> jax.Array:
    return lax.platform_dependent(x, cpu=_shifted, default=lambda x: x.astype(jnp.float32))


_wide.defvjp(lambda x: (_wide(x), None), lambda _, dy: (dy.astype(jnp.bfloat16),))


def _shifted(x: jax.Array) -> jax.Array:
    """Convert bfloat16 to float32, whose upper half it is."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16, jnp.float32)


class LinearClassifier(nn.Module):
    """`logits = features @ kernel + bias`, in the features' type.

    Attributes:
      num_classes: C.
      classifier_init: "he": weights by `he_normal`, bias by `torch_bias_init`. "torch": as PyTorch's linear layer.
        "torch_no_bias": the same, with a bias of 0.
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
    """`logits = scale * cosine(features, class weight)`, in the features' type, without bias.

    Initial weights have length 1, as LDAM's do: the longer they are, the less an optimizer step turns them. With
    `ltjax.losses.ldam`, which has a scale, use scale=1.
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
    """Divide x by its Euclidean length along `axis`. Value and gradient stay finite if the length is 0."""
    return x * lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis, keepdims=True), 1e-12))


class LinearMap(nn.Module):
    """A linear map of features [..., D] -> [..., D], initially the identity."""

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        width = features.shape[-1]
        identity = lambda rng, shape, dtype: jnp.eye(*shape, dtype=dtype)  # noqa: E731
        kernel = self.param("kernel", identity, (width, width), jnp.float32)
        return features @ kernel.astype(features.dtype)


def max_pool(x: jax.Array, platform: str | None = None) -> jax.Array:
    """Take the maxima of 3x3 windows with stride 2 and padding 1: [B, h, w, D] -> [B, h / 2, w / 2, D], rounded up.

    The gradient goes to a window's first maximum, by rows, as in PyTorch and `lax.reduce_window`.

    Args:
      platform: "cpu", "gpu", "tpu" or "onnx"; None: the default backend's.
    """
    if platform == "onnx":  # jax2onnx 0.17 knows neither padding of windows nor `lax.pad` of batches of any size
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
        return nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding="VALID")
    if (platform or jax.default_backend()) == "tpu":
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    return _max_pool_by_slices(x)


# On a GPU the gradient of `reduce_window` is a scatter in bfloat16, in any order. Nine strided slices have the same
# maxima, and their gradient needs only selections and sums, in float32. For a TPU the slices are worse: XLA plans 36 %
# more temporaries for ResNet-50's step, and estimates 18 % more time.


@jax.custom_vjp
def _max_pool_by_slices(x: jax.Array) -> jax.Array:
    return reduce(jnp.maximum, (pixels for pixels, _ in _nine_slices(x)))


def _nine_slices(x: jax.Array) -> Iterator[tuple[jax.Array, Callable[[jax.Array], jax.Array]]]:
    """Yield the pixels of x at each of a window's nine places, and a function from their gradient to that of x."""
    low = jnp.asarray(-jnp.inf, x.dtype)
    padded = lax.pad(x, low, ((0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)))
    height, width = padded.shape[1:3]
    rows, columns = (height - 3) // 2 * 2 + 1, (width - 3) // 2 * 2 + 1  # from the first to the last slice element

    for i in range(3):
        for j in range(3):

            def put_back(dy: jax.Array, i: int = i, j: int = j) -> jax.Array:
                padding = ((i - 1, height - i - rows - 1, 1), (j - 1, width - j - columns - 1, 1))
                return lax.pad(dy, jnp.zeros((), dy.dtype), ((0, 0, 0), *padding, (0, 0, 0)))

            yield padded[:, i : i + rows : 2, j : j + columns : 2], put_back


def _max_pool_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    maxima = _max_pool_by_slices(x)  # not kept from the forward pass: XLA shares what it can
    remaining = dy.astype(at_least_float32(x.dtype))
    total = jnp.zeros(x.shape, remaining.dtype)
    for pixels, put_back in _nine_slices(x):
        is_maximum = pixels == maxima
        total += put_back(jnp.where(is_maximum, remaining, 0))
        remaining = jnp.where(is_maximum, 0, remaining)
    return (total.astype(x.dtype),)


_max_pool_by_slices.defvjp(lambda x: (_max_pool_by_slices(x), x), _max_pool_backward)


def pool(x: jax.Array) -> jax.Array:
    """Take the mean over space: [B, h, w, D] of any float type -> [B, D], at least float32. Features [B, D] stay."""
    dtype = at_least_float32(x.dtype)
    if x.ndim == 2:
        return x.astype(dtype)
    if x.dtype != dtype:
        x = lax.optimization_barrier(x)  # in jax 0.11 and 0.12, XLA on CPUs makes nan of this mean and a relu
    return x.astype(dtype).mean((1, 2))


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
