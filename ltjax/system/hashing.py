"""Stateless pseudo-randomness: hashes, and permutations that compute single elements.

The functions take NumPy scalars and arrays, or JAX arrays inside `jit`, and give the same results. All integers are
uint32.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROUNDS = 32
SMALL = 1 << 18  # elements that NumPy hashes in less time than XLA compiles the hash


def hash32(*words: Any) -> Any:
    """Hash uint32 words (scalars or arrays that broadcast) to one uint32."""
    digest = np.uint32(0x9E3779B9)
    with np.errstate(over="ignore"):  # the hash relies on wrap-around
        for word in words:
            digest = (digest ^ word) * np.uint32(0x85EBCA6B) + np.uint32(0x52DCE729)
            digest = (digest ^ (digest >> np.uint32(16))) * np.uint32(0x7FEB352D)
            digest = (digest ^ (digest >> np.uint32(15))) * np.uint32(0x846CA68B)
            digest = digest ^ (digest >> np.uint32(16))
    return digest


def shuffled(index: Any, size: Any, seed: Any) -> Any:
    """Return the image of `index` under a pseudo-random permutation of `range(size)` chosen by `seed`.

    The arguments are uint32 scalars or arrays that broadcast, so one call can use many permutations. The cost depends
    on the number of indices, not on `size` (below 2**31). The algorithm is swap-or-not: each round swaps an index with
    its mirror image about a random point if a bit that both share is set.

    Source: Hoang, Morris & Rogaway, "An Enciphering Scheme Based on a Card Shuffle", CRYPTO 2012.
    """

    def swap_or_not(number, index):
        key = hash32(seed, number)
        with np.errstate(over="ignore"):
            mirror = (key % size + size - index) % size
            larger = mirror + (index - mirror) * (index > mirror).astype(np.uint32)
            swap = hash32(key, larger) & np.uint32(1)
            return index + (mirror - index) * swap

    if any(isinstance(x, jax.Array) for x in (index, size, seed)):
        shape = jnp.broadcast_shapes(*(jnp.shape(x) for x in (index, size, seed)))
        # Unrolled, XLA takes 5 s to compile for a CPU, for no speed; on accelerators, each iteration costs a launch.
        unroll = 1 if jax.default_backend() == "cpu" else ROUNDS
        start = jnp.broadcast_to(jnp.asarray(index), shape)
        return jax.lax.fori_loop(0, ROUNDS, lambda n, i: swap_or_not(n.astype(jnp.uint32), i), start, unroll=unroll)
    for number in range(ROUNDS):
        index = swap_or_not(np.uint32(number), index)
    return index


def fingerprint(tree: Any) -> np.uint32:
    """Hash a pytree of arrays of 32, 16 or 8 bits. Trees that differ in any bit have the same hash by chance of 2**-32.

    The hash is a sum over elements, so it does not depend on sharding.
    """
    # Wait for each program: on CPUs, two programs on sharded arrays can deadlock.
    leaves = enumerate(jax.tree.leaves(tree))
    return np.sum([_array_fingerprint(np.uint32(number), leaf) for number, leaf in leaves], dtype=np.uint32)


def _array_fingerprint(number: np.uint32, array: Any) -> np.uint32:
    """Hash an array: on the host if it is small and lies there, because XLA compiles a program for each shape."""
    if array.size <= SMALL and is_local(array):
        flat = np.ascontiguousarray(array).reshape(-1)
        bits = flat if flat.dtype == bool else flat.view(f"uint{8 * flat.dtype.itemsize}")
        return hash32(number, bits.astype(np.uint32), np.arange(flat.size, dtype=np.uint32)).sum(dtype=np.uint32)
    return np.uint32(_on_devices(number, array))


@jax.jit
def _on_devices(number: jax.Array, array: jax.Array) -> jax.Array:
    bits = array if array.dtype == bool else jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")
    flat = bits.astype(jnp.uint32).reshape(-1)
    return hash32(number, flat, jnp.arange(flat.size, dtype=jnp.uint32)).sum(dtype=jnp.uint32)


def is_local(array: Any) -> bool:
    """Return whether an array is NumPy's, or lies in this process's memory and not on an accelerator."""
    if not isinstance(array, jax.Array):
        return True
    return array.is_fully_addressable and all(device.platform == "cpu" for device in array.devices())
