"""Layers of all networks: convolution, batch norm, pooling, classifiers."""

import math
from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.errors import ScopeParamShapeError
from jax import lax

from ltjax.models.convolution import accelerator_convolution, convolution_for, depthwise_by_taps
from ltjax.models.precision import at_least_float32, widened

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


def torch_bias_init(fan_in: int) -> Callable[..., jax.Array]:
    """Initialise the bias of a linear layer by PyTorch's default: uniform in +-1 / sqrt(fan_in)."""

    def init(rng, shape, dtype=jnp.float32):
        bound = fan_in**-0.5
        return jax.random.uniform(rng, shape, dtype, -bound, bound)

    return init


def _initialiser(init: Init) -> Callable[..., jax.Array]:
    if callable(init):
        return init
    return torch_kernel_init() if init == "torch" else he_normal(init)


def parameter(module: nn.Module, name: str, init: Callable[..., jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """Return a float32 parameter as `module.param` does, without tracing the initialiser of one that exists.

    Flax traces it for the shape, which is half of the time to trace the forward pass of a ResNet-50.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape, jnp.float32)
    value = module.get_variable("params", name)
    if np.shape(value) != shape:
        raise ScopeParamShapeError(name, f"/{'/'.join(module.path)}", np.shape(value), shape)
    return value


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
        kernel = parameter(self, "kernel", _initialiser(self.kernel_init), shape)
        return convolution_for(self.platform)(
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
      dtype: Of the computation. Sums are at least float32.
      platform: See `ltjax.models.create`.
    """

    kernel_size: int = 3
    strides: int = 1
    dtype: Any = jnp.float32
    platform: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels, strides = x.shape[-1], (self.strides, self.strides)
        shape = (self.kernel_size, self.kernel_size, 1, channels)
        kernel = parameter(self, "kernel", he_normal(), shape)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if (self.platform or jax.default_backend()) == "cpu":
            padding = lax.padtype_to_pads(x.shape[1:3], shape[:2], strides, "SAME")
            return depthwise_by_taps(x, kernel, self.strides, tuple(padding))
        return accelerator_convolution(
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
        scale = parameter(self, "scale", nn.initializers.ones_init(), (channels,))
        bias = parameter(self, "bias", nn.initializers.zeros_init(), (channels,))
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
    y = widened(x) * factor + (bias - mean * factor)
    y = y if residual is None else y + widened(residual)
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
        dy = (widened(dy) * _slope(widened(y), ceiling)).astype(dy.dtype)
    dy, count, inverse_std = _apart(dy, 1), x.size // x.shape[-1], lax.rsqrt(var + epsilon)
    dbias = _channel_sums(_apart(dy, 1))
    dscale = inverse_std * (_channel_sums(_apart(dy, 2), _apart(x, 3)) - mean * dbias)
    factor = scale * inverse_std
    slope = factor * inverse_std * dscale / count
    dx = widened(dy) * factor - widened(x) * slope + (slope * mean - factor * dbias / count)
    return dx.astype(x.dtype), dscale, dbias, dy if has_residual else None


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


def _channel_sums(x: jax.Array, times: jax.Array | None = None) -> jax.Array:
    """Sum x, or x * times, over all axes but the last, in at least float32."""
    dtype, axes = at_least_float32(x.dtype), tuple(range(x.ndim - 1))
    return jnp.sum(x if times is None else x.astype(dtype) * times.astype(dtype), axes, dtype=dtype)


# On CPUs, YNNPACK's sums read bfloat16 directly, unless something else uses the conversion to float32. XLA then stores
# the conversion as a float32 map, and a step takes 1.5 times as long. So each sum of a map has a different number of
# barriers, and everything else converts by `widened`.


def _apart(x: jax.Array, barriers: int) -> jax.Array:
    """Return x behind barriers, for one sum. No two sums of a map may have the same number of barriers."""
    if x.dtype == jnp.bfloat16:
        for _ in range(barriers):
            x = lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)
    return x


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
