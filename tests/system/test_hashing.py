"""Hashes and permutations: uniform enough, equal on host and device, and frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ltjax.system import hashing
from ltjax.system.hashing import fingerprint, hash32, shuffled


def permutation(size, seed):
    return shuffled(np.arange(size, dtype=np.uint32), np.uint32(size), np.uint32(seed))


def chi_square_is_plausible(counts):
    """Return whether counts of equally likely cells are this uneven with probability above 1e-4."""
    counts = np.asarray(counts)
    statistic = np.square(counts - counts.mean()).sum() / counts.mean()
    return jax.scipy.special.gammaincc((counts.size - 1) / 2, statistic / 2) > 1e-4


@pytest.mark.parametrize("sizes", [range(1, 201), (1023, 1024, 50_000, 115_846)], ids=["small", "large"])
def test_shuffled_is_a_permutation(sizes):
    for size in sizes:
        np.testing.assert_array_equal(np.sort(permutation(size, seed=size)), np.arange(size))


def test_shuffled_stays_inside_the_largest_sizes():
    size = np.uint32(2**31 - 1)
    index = np.concatenate([np.arange(500), int(size) - 1 - np.arange(500)]).astype(np.uint32)
    actual = shuffled(index, size, np.uint32(3))
    assert actual.max() < size and len(set(actual.tolist())) == 1000


def test_host_and_device_agree_on_every_size_and_seed_at_once():
    sizes = np.arange(1, 201, dtype=np.uint32)[:, None]
    index = np.arange(200, dtype=np.uint32) % sizes  # [200, 200]
    seeds = np.arange(2**32 - 100, 2**32 + 100).astype(np.uint32)[:, None]
    on_device = jax.jit(shuffled)(index, sizes, seeds)
    assert on_device.dtype == jnp.uint32
    np.testing.assert_array_equal(on_device, shuffled(index, sizes, seeds))


def test_arrays_of_sizes_and_seeds_walk_many_permutations_at_once():
    sizes, seeds = np.array([5, 17, 1], np.uint32), np.array([1, 2, 3], np.uint32)
    together = shuffled(np.array([4, 11, 0], np.uint32), sizes, seeds)
    alone = [permutation(size, seed)[i] for i, size, seed in zip((4, 11, 0), sizes, seeds, strict=True)]
    np.testing.assert_array_equal(together, alone)


def test_scalars_give_what_arrays_give():
    alone = [shuffled(np.uint32(i), np.uint32(10), np.uint32(7)) for i in range(10)]
    np.testing.assert_array_equal(alone, permutation(10, 7))


def test_each_seed_has_its_own_permutation():
    assert len({tuple(permutation(100, seed).tolist()) for seed in range(200)}) == 200


def test_all_orders_of_four_are_equally_frequent():
    seeds = np.arange(4800, dtype=np.uint32)[:, None]
    orders = shuffled(np.arange(4, dtype=np.uint32), np.uint32(4), seeds)  # [4800, 4]
    counts = np.unique(orders @ np.array([64, 16, 4, 1], np.uint32), return_counts=True)[1]
    assert len(counts) == 24 and chi_square_is_plausible(counts)


@pytest.mark.parametrize("index", [0, 1, 9, 18])
def test_every_place_is_equally_likely(index):
    seeds = np.arange(3800, dtype=np.uint32)
    places = shuffled(np.full(3800, index, np.uint32), np.uint32(19), seeds)
    assert chi_square_is_plausible(np.bincount(places, minlength=19))


def test_neighbours_do_not_stay_together():
    moved = permutation(50_000, seed=1).astype(np.int64)
    steps = (moved[1:] - moved[:-1]) % 50_000
    assert chi_square_is_plausible(np.bincount(steps // 1000, minlength=50))


def test_hashes_of_consecutive_words_fill_the_range_evenly():
    hashes = hash32(np.uint32(1), np.arange(25_600, dtype=np.uint32))
    for shift in (0, 8, 16, 24):
        assert chi_square_is_plausible(np.bincount((hashes >> np.uint32(shift)) & np.uint32(255), minlength=256))


def test_every_bit_of_a_word_moves_half_of_the_hash():
    words = np.arange(2000, dtype=np.uint32)
    for bit in range(32):
        flipped = hash32(words ^ np.uint32(1 << bit), np.uint32(5)) ^ hash32(words, np.uint32(5))
        assert 15.5 < np.bitwise_count(flipped).mean() < 16.5


def test_the_order_and_number_of_words_matter():
    words = [(1, 2), (2, 1), (1,), (0, 1), (1, 0)]
    assert len({int(hash32(*(np.uint32(word) for word in w))) for w in words}) == 5


# Splits, samples and checkpoints of all users depend on the next three tests: these numbers must never change.


def test_the_hash_is_frozen():
    words = [(0,), (1,), (2**32 - 1,), (1, 2, 3), (86309, 0)]
    actual = [int(hash32(*(np.uint32(word) for word in w))) for w in words]
    assert actual == [2191892400, 600959502, 1170906395, 3002965121, 2294698300]


def test_the_permutation_is_frozen():
    assert permutation(10, 0).tolist() == [5, 9, 2, 4, 1, 3, 6, 0, 7, 8]
    assert permutation(500, 2**32 - 1)[:10].tolist() == [496, 328, 261, 29, 254, 359, 285, 324, 478, 214]


def test_the_fingerprint_is_frozen():
    tree = {"a": np.arange(5, dtype=np.float32), "b": np.array([True, False])}
    assert int(fingerprint(tree)) == 2262758379


DTYPES = [np.float32, np.int32, np.uint32, np.float16, jnp.bfloat16, np.int8, np.uint8]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_any_flipped_bit_changes_the_fingerprint(dtype):
    values = np.array([0, 1, 3], dtype)
    width = 8 * values.dtype.itemsize
    flips = [values]
    for bit in range(3 * width):
        raw = values.view(f"u{width // 8}").copy()
        raw[bit // width] ^= np.array(1 << (bit % width), raw.dtype)
        flips.append(raw.view(values.dtype))
    assert len({int(fingerprint({"x": flip})) for flip in flips}) == 3 * width + 1


@pytest.mark.parametrize("dtype", [*DTYPES, bool], ids=lambda dtype: np.dtype(dtype).name)
def test_host_and_devices_have_the_same_fingerprint(dtype, monkeypatch):
    values = np.random.default_rng(0).uniform(0, 100, (3, 5, 2)).astype(dtype)
    on_host = fingerprint([values, jnp.asarray(values)])
    monkeypatch.setattr(hashing, "SMALL", 0)
    assert int(fingerprint([values, jnp.asarray(values)])) == int(on_host)


def test_a_flipped_bool_changes_the_fingerprint():
    assert int(fingerprint(np.array([True, False]))) != int(fingerprint(np.array([True, True])))


def test_exchanged_elements_and_exchanged_arrays_change_the_fingerprint():
    a, b = np.array([1.0, 2.0], np.float32), np.array([2.0, 1.0], np.float32)
    assert len({int(fingerprint(tree)) for tree in ((a, b), (b, a), (a, a), (b, b))}) == 4


def test_minus_zero_is_not_zero():
    assert int(fingerprint(np.float32([0.0]))) != int(fingerprint(np.float32([-0.0])))


def test_scalars_and_empty_arrays_have_fingerprints():
    empty = np.zeros(0, np.float32)
    assert int(fingerprint((np.int32(1), empty))) != int(fingerprint((np.int32(2), empty)))


@pytest.mark.parametrize("spec", [("x", None), (None, "x"), ("x", "y")], ids=str)
def test_the_fingerprint_does_not_depend_on_sharding(spec, monkeypatch):
    values = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    shape = (4, 2) if "y" in spec else (8, 1)
    mesh = jax.make_mesh(shape, ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    spread = jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec)))
    assert len(spread.sharding.device_set) == 8
    expected = int(fingerprint([values]))
    assert int(fingerprint([spread])) == expected
    monkeypatch.setattr(hashing, "SMALL", 0)
    assert int(fingerprint([spread])) == expected
