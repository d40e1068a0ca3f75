"""The search space of an attack: an l-inf or l2 ball around each image, intersected with the pixel range [0, 1]."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ltjax.losses.arrays import positive_counts

NORMS = ("linf", "l2")
ROUNDING = 1e-3  # pixels outside [0, 1] by at most this are rounding errors


def radius(value: Any, *, norm: str = "linf", name: str = "epsilon", size: int | None = None) -> Any:
    """Parse an epsilon: 0.031, "8/255" or "0.5" -> float, in pixel units of [0, 1]. Tracers are returned unchanged.

    Args:
      value: Number or text.
      norm: "linf" or "l2".
      name: Name in the error message.
      size: Numbers in an image, H * W * channels. None if unknown.

    Raises:
      ValueError: It is not a number, or below 0, or so large that it probably counts in 255ths: above 1 for l-inf,
        above sqrt(size), the largest distance of two images, for l2.

    Examples:
      >>> attacks.radius("8/255") == 8 / 255, attacks.radius(0.031)
      (True, 0.031)
    """
    check_norm(norm)
    if isinstance(value, jax.core.Tracer):
        return value
    try:
        top, slash, bottom = str(value).partition("/")
        number = float(top) / float(bottom) if slash else float(value)
    except (ValueError, TypeError, ZeroDivisionError):
        raise ValueError(f'{name} = {value!r}: a number such as 0.031, or a fraction such as "8/255"') from None
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} = {value}: a number from 0 up")
    if norm == "linf" and number > 1:
        raise ValueError(f"{name} = {value}: l-inf radii are in [0, 1], as pixels are; did you mean {number:g}/255?")
    if norm == "l2" and size is not None and number > math.sqrt(size):
        raise ValueError(
            f"{name} = {value}: no two images of {size} numbers in [0, 1] are further apart in l2 than "
            f"{math.sqrt(size):.3g}; did you mean {number:g}/255?"
        )
    return number


def radius_by_count(class_counts: ArrayLike, *, epsilon: Any, share: float) -> jax.Array:
    """Compute RobustLT's radius of each class, larger for rarer ones: class_counts [C] -> [C] float32.

    With `r_c = sqrt(log(n_max / n_c))`, the radius is `epsilon (1 - share + share r_c / mean(r))`. The mean is over the
    training images, and so is `epsilon` the mean radius of an image. The step of the attack is in proportion.

    Source: RobustLT, CVPR 2026 (github.com/zhang-lilin/RobustLT).

    Args:
      class_counts: [C] training images of each class, at least 1 each.
      epsilon: Radius in pixel units of [0, 1]: 8/255 (or "8/255"), not 8.
      share: Share of the radius that depends on the count, in [0, 1]. Theirs: 0.3 on CIFAR-10, 0.4 on CIFAR-100.

    Returns:
      [C]. Balanced counts give every class `epsilon`.

    Raises:
      ValueError: epsilon is invalid, the share is outside [0, 1], or a class has no training images.

    Examples:
      >>> 255 * attacks.radius_by_count(jnp.array([5000, 500, 50]), epsilon="8/255", share=0.3)
      Array([ 5.6  , 28.939, 38.607], dtype=float32)
    """
    epsilon = radius(epsilon)
    if isinstance(share, (int, float)) and not 0 <= share <= 1:
        raise ValueError(f"share = {share}: of the radius that depends on the count, from 0 to 1")
    counts = positive_counts(class_counts)
    r = jnp.sqrt(jnp.log1p((counts.max() - counts) / counts))  # [C], accurate also for counts that are nearly equal
    mean = (counts * r).sum() / counts.sum()
    return epsilon * (1 - share + share * jnp.where(mean > 0, r / jnp.where(mean > 0, mean, 1), 1))


def check_norm(norm: str) -> None:
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; known: {', '.join(NORMS)}")


def check_floats(images: Any) -> None:
    """Raise a ValueError unless images are floats."""
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images are {images.dtype}: give floats in [0, 1] (of uint8: images / 255)")


def check_images(images: Any) -> None:
    """Raise a ValueError unless images [B, ...] are floats in [0, 1]. Inside `jit`, only the type is checked."""
    check_floats(images)
    if not isinstance(images, jax.core.Tracer) and images.size:
        values = np.asarray(images)  # NumPy, because inside `jit` JAX traces constants, too
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # also catches nan
            if -ROUNDING <= low and high <= 1 + ROUNDING:
                hint = "clip what rounding has left outside: images.clip(0, 1)"
            else:
                hint = "divide by 255" if high > 2 else "undo the normalisation, and put it inside the model"
            raise ValueError(f"images run from {low!r} to {high!r}: attacks work on pixels in [0, 1]; {hint}")


def per_image(values: jax.Array, like: jax.Array) -> jax.Array:
    """Reshape [B] to [B, 1, ...], to broadcast with images [B, ...]."""
    return values.reshape(values.shape[0], *(1,) * (like.ndim - 1))


def length(x: jax.Array, *, norm: str) -> jax.Array:
    """Compute the norm of each image's perturbation: [B, ...] -> [B]."""
    axes = tuple(range(1, x.ndim))
    return jnp.abs(x).max(axes) if norm == "linf" else jnp.sqrt(jnp.square(x).sum(axes))


def direction(x: jax.Array, *, norm: str) -> jax.Array:
    """Compute the direction of steepest ascent [B, ...]: the sign for l-inf, x over its l2 length (or 0) for l2."""
    if norm == "linf":
        return jnp.sign(x)
    # Divide by the largest entry first, so that squares of tiny gradients do not underflow.
    largest = per_image(jnp.abs(x).max(tuple(range(1, x.ndim))), x)
    x = x / jnp.where(largest > 0, largest, 1)
    size = per_image(length(x, norm="l2"), x)
    return x / jnp.where(size > 0, size, 1)


def project(x: jax.Array, images: jax.Array, *, epsilon: Any, norm: str) -> jax.Array:
    """Project x [B, ...] into the ball of radius `epsilon` around images, then clip to [0, 1].

    The result lies in both, because clipping only moves pixels closer to the image.
    """
    if norm == "linf":
        return jnp.clip(jnp.clip(x, images - epsilon, images + epsilon), 0, 1)
    delta = x - images
    size = per_image(length(delta, norm="l2"), x)
    shrink = jnp.minimum(1, epsilon / jnp.where(size > 0, size, 1))
    return jnp.clip(images + delta * shrink, 0, 1)
