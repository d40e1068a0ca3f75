"""How functions are compiled: on a CPU with oneDNN, if this jaxlib has it."""

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

ONEDNN = "xla_cpu_experimental_onednn_custom_call"  # one of XLA's debug options; others of its kind raise where unknown
YNNPACK = "xla_cpu_experimental_ynn_fusion_type"  # what goes to YNNPACK, which takes float32 away from oneDNN
UNCACHED = (
    "Error writing persistent compilation cache entry"  # which holds nothing that calls oneDNN, and says so each time
)


@functools.cache
def cpu_options() -> dict[str, Any]:
    """Compiler options for the CPUs of this process; {} on an accelerator, and where this jaxlib knows none of them.

    Options that the user has put into XLA_FLAGS stay as they are there.
    """
    if jax.default_backend() != "cpu" or ONEDNN in os.environ.get("XLA_FLAGS", ""):
        return {}
    options = {ONEDNN: True, YNNPACK: ""}
    if "onednn" not in _compiled_convolution(options):
        return {}
    warnings.filterwarnings("ignore", UNCACHED)
    return options


@functools.cache
def has_onednn() -> bool:
    """Whether convolutions of bfloat16 go to oneDNN, which sums in float32. XLA's own sum in bfloat16 on a CPU."""
    return "onednn" in _compiled_convolution(cpu_options())


def _compiled_convolution(options: dict[str, Any]) -> str:
    """What XLA makes of a small convolution of bfloat16; "" if it does not know an option."""

    def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((8, 8, 8, 16), (3, 3, 16, 16)))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", UNCACHED)
            return jax.jit(convolution).lower(x, kernel).compile(compiler_options=options).as_text() or ""
    except jax.errors.JaxRuntimeError:
        return ""


def jit(function: Callable | None = None, **settings: Any) -> Any:
    """`jax.jit` with `cpu_options`, for functions that no other compiled function calls.

    The options are looked up at the first call: a module may decorate with this and not start JAX.
    """
    if function is None:
        return functools.partial(jit, **settings)
    options = settings.pop("compiler_options", None) or {}

    @functools.cache
    def compiled() -> Any:
        return jax.jit(function, compiler_options={**cpu_options(), **options} or None, **settings)

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return compiled()(*arguments, **named)

    call.lower = lambda *arguments, **named: compiled().lower(*arguments, **named)  # type: ignore[attr-defined]
    return call
