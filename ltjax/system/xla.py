"""How functions are compiled: on a CPU with oneDNN, if this jaxlib has it; on a GPU as JAX has it, unless asked."""

import functools
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ltjax import registry

# Debug options of XLA. oneDNN computes convolutions and products. YNNPACK computes sums alone: a float32 training step
# takes half as long again with its convolutions as with oneDNN's.
FASTEST = {
    "xla_cpu_experimental_onednn_custom_call": True,
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
}
CALL = "__onednn$convolution"  # in a program that uses it
# What of a training step goes into CUDA graphs, by the name of `config.gpu_graphs`. By default XLA leaves convolutions
# out: of ResNet-32's step for an H100 it makes 64 graphs of 5 to 7 kernels, and convolutions between them. "step": one
# graph of 464 kernels. "dispatch": one graph of all steps. Not yet timed: `benchmarks.cifar_step --gpu_graphs=step`.
_COMMANDS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONDITIONAL,DYNAMIC_SLICE_FUSION,CONVOLUTION"
GPU_GRAPHS: dict[str, dict[str, Any]] = {
    "default": {},
    "step": {"xla_gpu_enable_command_buffer": _COMMANDS},
    "dispatch": {"xla_gpu_enable_command_buffer": f"{_COMMANDS},WHILE"},
}
ONE_THREAD = "xla_cpu_multi_thread_eigen"  # False if each core is a device: they would wait for each other's threads


@functools.cache
def cpu_options() -> dict[str, Any]:
    """Compiler options for the CPUs of this process; {} on an accelerator, and if this jaxlib has no oneDNN.

    Options that the user has put into XLA_FLAGS stay as they are there.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    options = {name: value for name, value in FASTEST.items() if name not in flags}
    if jax.local_device_count() > 1 and ONE_THREAD not in flags:
        options[ONE_THREAD] = False
    if jax.default_backend() != "cpu" or CALL not in _compiled_convolution(options):
        return {}
    return options


@functools.cache
def has_onednn() -> bool:
    """Whether convolutions of bfloat16 go to oneDNN, which sums in float32. XLA's own sum in bfloat16 on a CPU."""
    return CALL in _compiled_convolution(cpu_options())


def graph_options(kind: str) -> dict[str, Any]:
    """Compiler options for `config.gpu_graphs`; {} where JAX runs on something else. Raises: UserError."""
    options = registry.choose("config.gpu_graphs", GPU_GRAPHS, kind)
    return options if jax.default_backend() == "gpu" else {}


def float32_products(platform: str) -> AbstractContextManager[Any]:
    """Inside, products and convolutions of float32 that are traced for a platform are float32's. By default a GPU takes
    TF32, and a TPU bfloat16. `jax_default_matmul_precision` stays what a user has set."""
    if platform == "cpu" or jax.config.values["jax_default_matmul_precision"]:
        return nullcontext()
    return jax.default_matmul_precision("float32")


def arithmetic(dtype: Any) -> str:
    """How this process computes a network of `dtype`, in words for a plan."""
    kind = jnp.dtype(dtype).name
    if jax.default_backend() != "cpu":
        return kind
    if has_onednn():
        return f"{kind} by oneDNN"
    if kind == "bfloat16":
        return "bfloat16, summed in float32 and so no faster: this jaxlib has no oneDNN (that of jax 0.12 has)"
    return f"{kind} by XLA"


def _compiled_convolution(options: dict[str, Any]) -> str:
    """What XLA makes of a small convolution of bfloat16; "" if it does not know an option."""

    def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((8, 8, 8, 16), (3, 3, 16, 16)))
    try:
        with warnings.catch_warnings():  # JAX's compilation cache cannot hold what calls oneDNN, and says so
            warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry")
            return jax.jit(convolution).lower(x, kernel).compile(compiler_options=options).as_text() or ""
    except jax.errors.JaxRuntimeError:
        return ""


def jit(function: Callable | None = None, **settings: Any) -> Any:
    """`jax.jit` with `cpu_options`. Inside another compiled function, `function` is traced as a part of that.

    The options are looked up at the first call, so a module may decorate with this without starting JAX.
    """
    if function is None:
        return functools.partial(jit, **settings)
    own = settings.pop("compiler_options", None) or {}

    @functools.cache
    def compiled() -> Any:
        return jax.jit(function, compiler_options={**cpu_options(), **own} or None, **settings)

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((arguments, named)))
        return function(*arguments, **named) if traced else compiled()(*arguments, **named)

    call.lower = lambda *arguments, **named: compiled().lower(*arguments, **named)  # type: ignore[attr-defined]
    call.jitted = compiled  # type: ignore[attr-defined]  # () -> what `jax.jit` made, for `jax.export`
    return call
