"""Pseudo-randomness without state: hashes and permutations that can be asked for one element at a time.

The same code takes numpy scalars and arrays on a host and traced arrays inside a compiled step; all integers are
uint32, and all results are the same everywhere.
"""

import jax
import jax.numpy as jnp
import numpy as np

ROUNDS = 32


def hash32(*words):
    """A uint32 that looks random, from uint32 words (scalars or arrays that broadcast)."""
    digest = np.uint32(0x9E3779B9)
    with np.errstate(over="ignore"):  # wrapping around is the point
        for word in words:
            digest = (digest ^ word) * np.uint32(0x85EBCA6B) + np.uint32(0x52DCE729)
            digest = (digest ^ (digest >> np.uint32(16))) * np.uint32(0x7FEB352D)
            digest = (digest ^ (digest >> np.uint32(15))) * np.uint32(0x846CA68B)
            digest = digest ^ (digest >> np.uint32(16))
    return digest


def shuffled(index, size, seed):
    """Where a pseudo-random permutation of `range(size)`, chosen by `seed`, sends `index`.

    All arguments are uint32, scalars or arrays that broadcast, so one call can walk many permutations at once; the cost
    is that of the indices asked for, not of `size` (below 2**31). Swap-or-not: in each round an index and its mirror
    image about a random point change places, or do not, on the toss of a coin that both share.
    Source: Hoang, Morris & Rogaway, "An Enciphering Scheme Based on a Card Shuffle", CRYPTO 2012.
    """

    def one_round(number, index):
        key = hash32(seed, number)
        with np.errstate(over="ignore"):
            mirror = (key % size + size - index) % size
            larger = mirror + (index - mirror) * (index > mirror).astype(np.uint32)
            swap = hash32(key, larger) & np.uint32(1)
            return index + (mirror - index) * swap

    if any(isinstance(x, jax.Array) for x in (index, size, seed)):
        shape = jnp.broadcast_shapes(*(jnp.shape(x) for x in (index, size, seed)))
        # In one piece, the rounds take XLA on a CPU 5 s to compile and run no faster; elsewhere a loop costs launches.
        unroll = 1 if jax.default_backend() == "cpu" else ROUNDS
        start = jnp.broadcast_to(jnp.asarray(index), shape)
        return jax.lax.fori_loop(0, ROUNDS, lambda n, i: one_round(n.astype(jnp.uint32), i), start, unroll=unroll)
    for number in range(ROUNDS):
        index = one_round(np.uint32(number), index)
    return index


def fingerprint(tree) -> np.uint32:
    """A number that changes, but for one chance in 2**32, with any bit of any array of 32, 16 or 8 bits in a pytree.

    A sum of element hashes, so it does not depend on how the arrays are sharded.
    """
    # One small program for each shape instead of one for the tree: networks have few shapes, and every tree its own.
    # They run one after the other: of arrays that are split, two at a time could wait for each other on a CPU.
    leaves = enumerate(jax.tree.leaves(tree))
    return np.sum([np.asarray(_array_fingerprint(np.uint32(number), leaf)) for number, leaf in leaves], dtype=np.uint32)


@jax.jit
def _array_fingerprint(number: jax.Array, array: jax.Array) -> jax.Array:
    bits = array if array.dtype == bool else jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")
    flat = bits.astype(jnp.uint32).reshape(-1)
    return hash32(number, flat, jnp.arange(flat.size, dtype=jnp.uint32)).sum(dtype=jnp.uint32)
