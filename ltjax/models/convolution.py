"""Convolutions and their gradients, as each platform computes them fast."""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ltjax.models.precision import at_least_float32, widened
from ltjax.system import xla

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
def cpu_convolution(x, kernel, strides, padding, precision):
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
    sums = _kernel_gradient_in_parts if _needs_parts(dy) else _kernel_gradient
    return dx, sums(x, dy, kernel.shape, strides, padding, precision)


# The gradient of a kernel reads dy once for each row of the kernel. In float32, that takes 1.3 to 2 times as long if dy
# is larger than a core's cache. In bfloat16, oneDNN gains nothing from parts.
PARTS = 4
CACHE = 2**21  # bytes


def _needs_parts(dy: jax.Array) -> bool:
    in_float32 = dy.dtype == jnp.float32 or (dy.dtype == jnp.bfloat16 and not xla.has_onednn())
    return in_float32 and dy.size * 4 >= CACHE and len(dy) >= 64 and len(dy) % PARTS == 0


def _kernel_gradient_in_parts(x, dy, *settings) -> jax.Array:
    """Add up the `_kernel_gradient` of every fourth image, so that each part has images of every device."""
    x, dy = (maps.reshape(-1, PARTS, *maps.shape[1:]) for maps in (x, dy))
    return reduce(jnp.add, (_kernel_gradient(x[:, part], dy[:, part], *settings) for part in range(PARTS)))


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


cpu_convolution.defvjp(_cpu_convolution_forward, _cpu_convolution_backward)


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


def accelerator_convolution(lhs, rhs, window_strides, padding, *, precision=None, **settings) -> jax.Array:
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


def convolution_for(platform: str | None) -> Callable[..., jax.Array]:
    """Return the `conv_general_dilated` of a platform: "cpu", "gpu", "tpu" or, for None, JAX's default backend."""
    if (platform or jax.default_backend()) != "cpu":
        return accelerator_convolution

    def convolution(lhs, rhs, window_strides, padding, *, feature_group_count=1, precision=None, **rest):
        if any(d != 1 for d in (*rest["lhs_dilation"], *rest["rhs_dilation"])):
            return lax.conv_general_dilated(
                lhs, rhs, window_strides, padding, feature_group_count=feature_group_count, precision=precision, **rest
            )
        if isinstance(padding, str):
            padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
        padding = tuple((int(low), int(high)) for low, high in padding)
        rhs = rhs if feature_group_count == 1 else _ungrouped(rhs, feature_group_count)
        return cpu_convolution(lhs, rhs, tuple(window_strides), padding, precision)

    return convolution


# XLA's CPU backend takes 7 times as long for a grouped convolution with one channel a group as for the products of one
# tap after the other (672 channels, 14x14 pixels, 5x5 taps), and 25 times for its gradients. oneDNN computes it in
# float32 and forward alone. JAX's gradient of the products would take 6 times as long, because XLA is slow at sums over
# whole maps, so a loop over rows sums the kernel's gradient.


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise_by_taps(x: jax.Array, kernel: jax.Array, stride: int, padding) -> jax.Array:
    """Convolve each channel of x [B, H, W, D] with its own kernel, of [k, k, 1, D]. Sums are at least float32."""
    padded = lax.optimization_barrier(_padded(x, padding))  # XLA would pad again for each tap
    rows, columns = (_size_out(size, kernel.shape[0], stride) for size in padded.shape[1:3])
    kernel, total = widened(kernel), jnp.zeros((), at_least_float32(x.dtype))
    for i, j in np.ndindex(kernel.shape[:2]):
        pixels = padded[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride]
        total = total + widened(pixels) * kernel[i, j, 0]
    return total.astype(x.dtype)


def _size_out(padded: int, taps: int, stride: int) -> int:
    """Return the number of outputs along an axis."""
    return (padded - taps) // stride + 1


def _depthwise_forward(x, kernel, stride, padding):
    return depthwise_by_taps(x, kernel, stride, padding), (x, kernel)


def _depthwise_backward(stride, padding, residuals, dy):
    x, kernel = residuals
    taps, stuffed = kernel.shape[0], _dilate(dy, (stride, stride))
    pad_x = tuple(
        (taps - 1 - low, size - span + low)
        for size, span, (low, _) in zip(x.shape[1:3], stuffed.shape[1:3], padding, strict=True)
    )
    dx = depthwise_by_taps(stuffed, jnp.flip(kernel, (0, 1)), 1, pad_x)
    return dx, _depthwise_kernel_gradient(x, dy, taps, stride, padding).astype(kernel.dtype)


def _depthwise_kernel_gradient(x, dy, taps: int, stride: int, padding) -> jax.Array:
    """Sum x [B, H, W, D] times dy [B, h, w, D] over a kernel's outputs, row by row of dy: [k, k, 1, D]."""
    padded = _padded(x, padding)
    (batch, rows, columns, channels), width = dy.shape, padded.shape[2]

    def add_row(number, sums):
        image, row = number // rows, number % rows
        of_dy = widened(lax.dynamic_slice(dy, (image, row, 0, 0), (1, 1, columns, channels))[0])
        seen = widened(lax.dynamic_slice(padded, (image, row * stride, 0, 0), (1, taps, width, channels))[0])
        return tuple(
            total + seen[:, j : j + (columns - 1) * stride + 1 : stride] * of_dy for j, total in enumerate(sums)
        )

    zeros = jnp.zeros((taps, columns, channels), at_least_float32(x.dtype))
    sums = lax.fori_loop(0, batch * rows, add_row, (zeros,) * taps)  # of each column of the kernel
    return jnp.stack([total.sum(1) for total in sums], axis=1)[:, :, None]


depthwise_by_taps.defvjp(_depthwise_forward, _depthwise_backward)
