"""Every test runs on 8 virtual CPU devices, with strict dtype promotion and a shared compilation cache.

Tests mainly compile, so on a CPU they leave out XLA's optimisations, and take a quarter of the time.
LTJAX_TEST_OPTIMISED=1 compiles like users; tests of the optimised program use the fixture `optimised`.
"""

import contextlib
import gc
import itertools
import os
import pathlib
import time

import jax
import numpy as np
import pytest

# Shared by all clones, because compiling takes most of a suite's time. Delete it if it grows too large.
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ltjax" / "tests"
NO_EMITTERS = jax.__version_info__ < (0, 11)  # later versions have no flag for that
LONGEST = (
    "test_conformance.py",
    "test_run.py",
    "engine/test_replicas.py",
    "test_notebooks.py",
    "system/test_processes.py",
    "modes/test_attack.py",
    "attacks/test_autoattack.py",
    "engine/test_precision.py",
    "test_results.py",
    "engine/test_golden_training.py",
    "engine/test_views.py",
    "test_train.py",
    "methods/test_lbgat.py",
    "configs/test_files.py",
    "losses/test_kernels.py",
    "models/test_vit.py",
    "benchmarks/test_device_step.py",
    "gpu/test_device.py",
    "models/test_efficientnet_lite0.py",
    "models/test_resnet.py",
)
MOST_MAPS = 30_000
LONG_TEST = 1.0  # seconds
_test_number = itertools.count()
GOLDEN = pathlib.Path(__file__).parent / "golden"

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
if jax.config.values["jax_platforms"] == "cpu" and not os.environ.get("LTJAX_TEST_OPTIMISED"):
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of programs that tests start, too
    jax.config.update("jax_disable_most_optimizations", True)
    # Programs are not compiled in up to 32 parts side by side, for each of which LLVM is set up, and a device computes
    # in one thread: other cores have other tests.
    flags = "--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_multi_thread_eigen=false"
    flags += " --xla_cpu_use_fusion_emitters=false" * NO_EMITTERS
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
# Where in the sources each operation of a program stands is left out, too: to find and to write it takes time.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
jax.config.update("jax_traceback_in_locations_limit", 0)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
# To store and to read a smaller program takes as long as to compile it.
for name, value in (("compilation_cache_dir", str(CACHE)), ("persistent_cache_min_compile_time_secs", 0.05)):
    os.environ[f"JAX_{name.upper()}"] = str(value)
    jax.config.update(f"jax_{name}", value)


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, help="random inputs of each property in tests/fuzz (25 without this option)")


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # by numbers of tests, of which the longest have few


def pytest_xdist_auto_num_workers():
    """Let `-n auto` start one process more than there are cores, because tests also wait for programs they start."""
    return None if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ else os.cpu_count() + 1


def pytest_collection_modifyitems(items):
    """Run the slowest files first, so that at the end no process waits long for another one."""

    def place(item):
        name = item.nodeid.partition("::")[0].removeprefix("tests/")
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


def pytest_collection_finish():
    """Look for garbage more rarely, and not among what was imported: while JAX traces, that took 8% of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@pytest.fixture(autouse=True)
def few_memory_maps():
    """Free compiled programs before they exhaust the memory maps that Linux allows a process (65,530).

    XLA maps each program several times, and crashes while compiling if it gets no more. They are counted after every
    20th test and after each long one, which compiles the most.
    """
    began = time.monotonic()
    yield
    maps, long = pathlib.Path("/proc/self/maps"), time.monotonic() - began > LONG_TEST
    if (next(_test_number) % 20 == 0 or long) and maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()  # programs in reference cycles


@pytest.fixture(scope="module")
def no_reports():
    """Let runs write no `report/`, which takes seconds, in modules that do not need it."""
    from ltjax import train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "write_report", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def one_device():
    """Let runs use one of the 8 devices, in modules whose subject is not how a run is split over them."""
    from ltjax.system import parallel

    make_mesh = parallel.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "make_mesh", lambda devices=None, replicas=1: make_mesh(jax.devices()[:1], replicas))
        yield


@pytest.fixture(scope="session")
def golden():
    """Return `golden("mislas_stage1")`: the arrays of one golden file, see its README."""
    return lambda name: dict(np.load(GOLDEN / f"{name}.npz"))


@contextlib.contextmanager
def optimised_programs():
    """Compile almost like users; for all optimisations, pass the yielded options to `jax.jit`.

    It is for long-running programs, and for tests of rounding or of XLA's optimisations.
    """
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield {"xla_cpu_use_fusion_emitters": True} if NO_EMITTERS and jax.default_backend() == "cpu" else {}
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def optimised():
    """Apply `optimised_programs` to one test."""
    with optimised_programs() as options:
        yield options


def random_variables(model, channels=3, seed=0):
    """Variables of a network, every array of different numbers; nothing is compiled."""
    from ltjax import models
    from ltjax.types import Variables

    shapes = jax.eval_shape(model.init, jax.random.key(0), models.example(model, channels))
    rng = np.random.default_rng(seed)
    collections = jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), shapes)
    return Variables({"net": collections["params"]}, {"net": collections.get("batch_stats", {})}, {})


@pytest.fixture(scope="session")
def variables_of():
    return random_variables


@pytest.fixture
def same():
    """Assert that two pytrees have the same structure and are bitwise equal."""
    return lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
