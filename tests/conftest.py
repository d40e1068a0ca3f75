"""Every test runs on 8 virtual CPU devices, with strict dtype promotion and a shared compilation cache."""

import os
import pathlib

import jax
import numpy as np
import pytest

CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "jax"
GOLDEN = pathlib.Path(__file__).parent / "golden"

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(scope="session")
def golden():
    """`golden("mislas_stage1")`: the arrays of one golden file; its README says where they come from."""
    return lambda name: dict(np.load(GOLDEN / f"{name}.npz"))
