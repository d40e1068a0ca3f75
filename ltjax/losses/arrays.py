"""Labels, counts, lengths and types for all kernels."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike


def positive_counts(class_counts: ArrayLike) -> jax.Array:
    """Return the counts as float32 [C]: half precision cannot represent large ones.

    Raises:
      ValueError: A class has none. Counts that are traced cannot be checked; those of 0 give infinities and nan.
    """
    if not isinstance(class_counts, jax.core.Tracer):
        counts = np.asarray(class_counts)
        if (absent := np.flatnonzero(~(counts > 0))).size:
            raise ValueError(
                f"class_counts = {counts[absent[0]]} for class {absent[0]}: every class needs 1 training image or more"
            )
    return jnp.asarray(class_counts).astype(jnp.float32)


def whole(x: ArrayLike) -> jax.Array:
    """Replicate x if it is explicitly sharded; otherwise the compiler decides."""
    x = jnp.asarray(x)
    spec = jax.typeof(x).sharding.spec
    return jax.sharding.reshard(x, PartitionSpec()) if any(axis is not None for axis in spec) else x


def at_label(values: jax.Array, labels: jax.Array) -> jax.Array:
    """Take each row's value at its label: [B, C], [B] -> [B]."""
    is_label = jax.nn.one_hot(labels, values.shape[-1], dtype=bool)
    return jnp.where(is_label, values, jnp.zeros((), values.dtype)).sum(-1)  # a product would turn infinities into nan


def at_least_float32(x: ArrayLike) -> jax.Array:
    """Return bfloat16 and float16 as float32, and other floats as they are."""
    x = jnp.asarray(x)
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def length(x: jax.Array) -> jax.Array:
    """Compute the Euclidean length of each row, [N, P] -> [N], with gradient 0 where it is 0."""
    squared = jnp.square(x).sum(-1)
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)


def check_temperature(temperature: float | jax.Array) -> None:
    """Raise a ValueError unless the temperature is above 0. One that is traced cannot be checked."""
    if not isinstance(temperature, jax.core.Tracer) and not 0 < float(temperature) < math.inf:
        raise ValueError(f"temperature = {temperature}: a number above 0")
