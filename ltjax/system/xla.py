"""Compile functions: on a CPU with oneDNN if this jaxlib has it, on a GPU with JAX's defaults or CUDA graphs."""

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ltjax.system import registry

# Debug options of XLA. oneDNN computes convolutions and products, YNNPACK only sums: a float32 training step takes 1.5
# times as long with YNNPACK's convolutions as with oneDNN's.
ONEDNN = "xla_cpu_experimental_onednn_custom_call"
FASTEST = {
    ONEDNN: True,
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
}
CALL = "__onednn$convolution"  # the call in a compiled program
# Compiler options by `config.gpu_graphs`, which says what becomes a CUDA graph. By default XLA leaves convolutions out:
# ResNet-32's step on an H100 is 64 graphs of 5 to 7 kernels, with convolutions between them. "step" makes one graph of
# 464 kernels, "dispatch" one graph of all steps. Not yet timed: `benchmarks.device_step --flags`.
_COMMANDS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONDITIONAL,DYNAMIC_SLICE_FUSION,CONVOLUTION"
GPU_GRAPHS: dict[str, dict[str, Any]] = {
    "default": {},
    "step": {"xla_gpu_enable_command_buffer": _COMMANDS},
    "dispatch": {"xla_gpu_enable_command_buffer": f"{_COMMANDS},WHILE"},
}
STORED_AFTER = "jax_persistent_cache_min_compile_time_secs"
ONE_THREAD = "xla_cpu_multi_thread_eigen"  # False if each core is a device: devices would wait for each other's threads


@functools.cache
def cpu_options() -> dict[str, Any]:
    """Return compiler options for the CPUs of this process; {} on an accelerator, or if this jaxlib has no oneDNN.

    Options that the user has set in XLA_FLAGS are left out. With oneDNN, this process stores no more programs in JAX's
    compilation cache: to store one that calls oneDNN fails with a warning, or with a segmentation fault.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    options = {name: value for name, value in FASTEST.items() if name not in flags}
    if jax.local_device_count() > 1 and ONE_THREAD not in flags:
        options[ONE_THREAD] = False
    if jax.default_backend() != "cpu":
        return {}
    stored_after = jax.config.values[STORED_AFTER]
    jax.config.update(STORED_AFTER, float("inf"))
    if CALL in _compiled_convolution(options):
        return options
    jax.config.update(STORED_AFTER, stored_after)
    return {}


@functools.cache
def has_onednn() -> bool:
    """Return whether oneDNN computes bfloat16 convolutions, with sums in float32. XLA's CPU sums are in bfloat16."""
    return CALL in _compiled_convolution(cpu_options())


def graph_options(kind: str) -> dict[str, Any]:
    """Return the compiler options of `config.gpu_graphs`; {} if JAX does not run on a GPU. UserError if unknown."""
    options = registry.choose("config.gpu_graphs", GPU_GRAPHS, kind)
    return options if jax.default_backend() == "gpu" else {}


def float32_products(platform: str) -> AbstractContextManager[Any]:
    """Return a context in which float32 products and convolutions are traced with full float32 precision.

    By default a GPU uses TF32, and a TPU bfloat16. A `jax_default_matmul_precision` that the user has set stays.
    """
    if platform == "cpu" or jax.config.values["jax_default_matmul_precision"]:
        return nullcontext()
    return jax.default_matmul_precision("float32")


def arithmetic(dtype: Any) -> str:
    """Describe how this process computes a network of `dtype`."""
    kind = jnp.dtype(dtype).name
    if jax.default_backend() != "cpu":
        return kind
    if has_onednn():
        return f"{kind} by oneDNN"
    if kind == "bfloat16":
        return "bfloat16, summed in float32 and so no faster: this jaxlib has no oneDNN (that of jax 0.12 has)"
    return f"{kind} by XLA"


def _compiled_convolution(options: dict[str, Any]) -> str:
    """Return the compiled text of a small bfloat16 convolution; "" if XLA does not know an option."""

    def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((8, 8, 8, 16), (3, 3, 16, 16)))
    try:
        return jax.jit(convolution).lower(x, kernel).compile(compiler_options=options).as_text() or ""
    except jax.errors.JaxRuntimeError:
        return ""


def jit(function: Callable | None = None, **settings: Any) -> Any:
    """Compile a function as `jax.jit` does, with `cpu_options`. Inside another compiled function, trace it as usual.

    The options are looked up at the first call, so decorating a function does not start JAX.
    """
    if function is None:
        return functools.partial(jit, **settings)
    options = settings.pop("compiler_options", None) or {}

    @functools.cache
    def compiled() -> Any:
        return jax.jit(function, compiler_options={**cpu_options(), **options} or None, **settings)

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((arguments, named)))
        return function(*arguments, **named) if traced else compiled()(*arguments, **named)

    call.lower = lambda *arguments, **named: compiled().lower(*arguments, **named)  # type: ignore[attr-defined]
    call.jitted = compiled  # type: ignore[attr-defined]  # () -> what `jax.jit` made, for `jax.export`
    return call
