"""Compiler options for CPUs and GPUs."""

import jax
import jax.numpy as jnp
import pytest

from ltjax.models import convolution
from ltjax.system import xla
from ltjax.types import UserError


@pytest.fixture
def uncached():
    """Clear the cached options before and after the test."""
    functions = (xla.cpu_options, xla.has_onednn)
    for function in functions:
        function.cache_clear()
    yield
    for function in functions:
        function.cache_clear()


def knows_onednn(options):
    return xla.CALL if options.get("xla_cpu_experimental_onednn_custom_call") else ""


def test_a_jaxlib_without_onednn_gets_no_options(monkeypatch, uncached):
    monkeypatch.setattr(xla, "_compiled_convolution", lambda options: "convolution")
    assert xla.cpu_options() == {}
    assert not xla.has_onednn()


def test_an_unknown_option_counts_as_no_onednn():
    assert xla._compiled_convolution({"xla_cpu_no_such_option": True}) == ""


def test_a_jaxlib_with_onednn_gets_all_options(monkeypatch, uncached):
    monkeypatch.setattr(xla, "_compiled_convolution", knows_onednn)
    monkeypatch.setenv("XLA_FLAGS", "")
    assert xla.cpu_options() == {**xla.FASTEST, xla.ONE_THREAD: False}  # tests have eight devices
    assert xla.has_onednn()


def test_one_device_keeps_its_threads(monkeypatch, uncached):
    monkeypatch.setattr(xla, "_compiled_convolution", knows_onednn)
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    monkeypatch.setenv("XLA_FLAGS", "")
    assert xla.cpu_options() == xla.FASTEST


@pytest.mark.parametrize("flag", [*xla.FASTEST, xla.ONE_THREAD])
def test_flags_of_the_user_have_priority(monkeypatch, uncached, flag):
    monkeypatch.setattr(xla, "_compiled_convolution", lambda options: xla.CALL)
    monkeypatch.setenv("XLA_FLAGS", f"--{flag}=false")
    assert flag not in xla.cpu_options()


@pytest.mark.parametrize("kind", xla.GPU_GRAPHS)
def test_xla_knows_the_options_for_graphs(monkeypatch, kind):
    """They are parsed for every platform."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    options = xla.graph_options(kind)
    assert jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options=options or None)(2.0) == 3.0
    for commands in options.values():
        with pytest.raises(jax.errors.JaxRuntimeError, match="GRAPHS' is not a valid enum value"):
            jax.jit(lambda x: x + 2).lower(1.0).compile(compiler_options=dict.fromkeys(options, f"{commands},GRAPHS"))


def test_graph_options_are_only_for_gpus():
    assert xla.graph_options("step") == {}
    with pytest.raises(UserError, match=r"unknown config.gpu_graphs 'all'; known: default, step, dispatch"):
        xla.graph_options("all")


def test_an_accelerator_gets_no_options(monkeypatch, uncached):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert xla.cpu_options() == {}
    assert xla.arithmetic("bfloat16") == "bfloat16"


@pytest.mark.parametrize(
    "platform, precision, expected", [("gpu", None, "float32"), ("tpu", "bfloat16", "bfloat16"), ("cpu", None, None)]
)
def test_float32_products_on_accelerators(platform, precision, expected):
    with jax.default_matmul_precision(precision), xla.float32_products(platform):
        assert jax.config.values["jax_default_matmul_precision"] == expected


@pytest.mark.parametrize(
    "onednn, dtype, words",
    [
        (True, jnp.bfloat16, "bfloat16 by oneDNN"),
        (False, jnp.float32, "float32 by XLA"),
        (False, "bfloat16", "bfloat16, summed in float32 and so no faster"),
    ],
)
def test_arithmetic_describes_the_computation(monkeypatch, onednn, dtype, words):
    monkeypatch.setattr(xla, "has_onednn", lambda: onednn)
    assert xla.arithmetic(dtype).startswith(words)


def test_jit_uses_onednn_if_this_jaxlib_has_it():
    x, kernel = jnp.zeros((8, 8, 8, 16), jnp.bfloat16), jnp.zeros((3, 3, 16, 16), jnp.bfloat16)
    function = xla.jit(lambda x, kernel: convolution.cpu_convolution(x, kernel, (1, 1), ((1, 1), (1, 1)), None))
    assert (xla.CALL in function.lower(x, kernel).compile().as_text()) == xla.has_onednn()


@pytest.mark.parametrize("onednn", [True, False])
def test_bfloat16_convolutions_sum_in_float32_without_onednn(monkeypatch, onednn):
    monkeypatch.setattr(xla, "has_onednn", lambda: onednn)
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((8, 8, 8, 16), (3, 3, 16, 16)))

    def gradients(x, kernel):
        convolve = lambda *pair: convolution.cpu_convolution(*pair, (1, 1), ((1, 1), (1, 1)), None)  # noqa: E731
        y, pull_back = jax.vjp(convolve, x, kernel)
        return pull_back(y)

    text = jax.jit(gradients).lower(x, kernel).as_text()
    sums = [line.rpartition("->")[2] for line in text.splitlines() if "stablehlo.convolution" in line]
    assert len(sums) == 3
    assert all(("bf16" if onednn else "f32") in line for line in sums)


def test_a_function_inside_another_is_traced():
    inner = xla.jit(lambda x, times: x * times, static_argnames="times")
    assert jax.jit(lambda x: inner(x, times=3) + 1)(jnp.float32(2)) == 7
    assert jax.eval_shape(lambda x: inner(x, times=3), jnp.zeros(2)).shape == (2,)
    assert inner(jnp.float32(2), times=4) == 8
