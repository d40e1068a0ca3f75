"""Types of sums, and conversions of bfloat16 that are fast on CPUs."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def at_least_float32(dtype: Any) -> Any:
    """Return the type of statistics, means over space and logits: float64 for float64, otherwise float32."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def widened(x: jax.Array) -> jax.Array:
    """Convert x to float32; float64 stays."""
    return _wide(x) if x.dtype == jnp.bfloat16 else x.astype(at_least_float32(x.dtype))


@jax.custom_vjp
def _wide(x: jax.Array) -> jax.Array:
    return lax.platform_dependent(x, cpu=_shifted, default=lambda x: x.astype(jnp.float32))


_wide.defvjp(lambda x: (_wide(x), None), lambda _, dy: (dy.astype(jnp.bfloat16),))


def _shifted(x: jax.Array) -> jax.Array:
    """Convert bfloat16 to float32, whose upper half it is."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16, jnp.float32)
