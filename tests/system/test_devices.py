"""JAX's warnings about accelerators that it cannot use are shown."""

import logging
import os
import subprocess
import sys

import jax
import pytest

import ltjax
from ltjax.system.devices import start_devices
from ltjax.types import UserError
from tests.test_run import ROOT, start

WARNING = (
    "An NVIDIA GPU may be present on this machine, but a CUDA-enabled jaxlib is not installed. Falling back to cpu."
)


@pytest.fixture
def jax_is_silenced():
    """Silence JAX's loggers as run.py does."""
    logger = logging.getLogger("jax")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


def test_an_unused_gpu_is_named_with_what_to_install(jax_is_silenced, monkeypatch):
    logger = logging.getLogger("jax._src.xla_bridge")

    def devices():
        logger.warning(WARNING)
        logger.warning("something else")
        logger.info("nothing")

    monkeypatch.setattr(jax, "devices", devices)
    assert start_devices() == [f'{WARNING} To use it: pip install -e ".[cuda]"']
    assert logger.level == logging.NOTSET and not logger.handlers


def test_no_warning_if_all_devices_are_used(jax_is_silenced):
    assert start_devices() == []


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unknown backend: 'cuda' requested")])
def test_a_missing_platform_is_an_error(monkeypatch, error):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(UserError, match=r"JAX cannot use JAX_PLATFORMS=.*or leave the variable out"):
        start_devices()


COMMANDS = {
    "export": ("-m", "ltjax.interop.export", "w", "--format=safetensors", "--out=n.safetensors"),
    "archive": ("-m", "ltjax.runs.archive", "run", "archive"),
    "import": ("-m", "ltjax.interop.torch", "n.npz", "--model=resnet_cifar,depth=8,width=2", "--out=other"),
    "predict": ("run.py", "--workdir=run", "--mode=predict", "--images=photos", "--out=p.csv"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_reports_a_missing_platform(command):
    """Check it with other mistakes, too, because devices start first."""
    environment = {**os.environ, "JAX_PLATFORMS": "cuda"}
    process = subprocess.run(
        [sys.executable, *COMMANDS[command]], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 2
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
    if command != "predict":  # which reads the run's config before it starts
        assert "JAX cannot use JAX_PLATFORMS=cuda" in process.stderr


def test_a_model_is_not_loaded_onto_a_missing_platform(monkeypatch, tmp_path):
    def devices():
        raise RuntimeError("Unknown backend: 'cuda' requested")

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(UserError, match="JAX cannot use JAX_PLATFORMS="):
        ltjax.load(tmp_path)


def test_the_command_line_reports_a_missing_platform():
    process = start("--config=configs/quickstart.py", "--dry_run", platforms="cuda")
    out, error = process.communicate(timeout=120)
    assert process.returncode == 2, out
    assert error.startswith("error: JAX cannot use JAX_PLATFORMS=cuda") and error.count("\n") == 1
