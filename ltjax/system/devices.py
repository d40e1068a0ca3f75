"""Start JAX's devices, and report accelerators that JAX cannot use."""

import logging
import os

import jax

from ltjax.system.cores import num_cores
from ltjax.system.wording import one_line
from ltjax.types import UserError

INSTALL = {"NVIDIA GPU": 'pip install -e ".[cuda]"', "TPU": 'pip install -e ".[tpu]"'}


def use_cpu_cores(batch_size: int) -> None:
    """Make each core a JAX device if there is no accelerator. Call this before JAX starts. A user's choice stays.

    Two devices that share a batch run a step 1.4 times as fast as one device with both cores. Each device gets at least
    16 images of a batch, and the number of devices divides the batch.
    """
    if os.environ.get("JAX_NUM_CPU_DEVICES") or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    most = max(1, min(num_cores(), batch_size // 16))
    try:
        jax.config.update("jax_num_cpu_devices", max(n for n in range(1, most + 1) if batch_size % n == 0))
    except RuntimeError:
        pass  # JAX has started already, with the devices that its caller chose


def start_devices() -> list[str]:
    """Start JAX's devices.

    Returns:
      JAX's warnings about accelerators that it cannot use, each with a remedy.

    Raises:
      UserError: JAX_PLATFORMS names a platform that this machine does not have.
    """
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # pyrefly: ignore[bad-assignment]
    logger = logging.getLogger("jax")
    level = logger.level
    logger.setLevel(logging.WARNING)  # run.py silences the rest of JAX
    logger.addHandler(handler)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = jax.config.values["jax_platforms"]
        raise UserError(
            f"JAX cannot use JAX_PLATFORMS={platforms} ({one_line(error) or 'it is not installed'}): install what it "
            f"needs, such as {' or '.join(INSTALL.values())}, or leave the variable out"
        ) from error
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    hints = [(warning, INSTALL[name]) for warning in warnings for name in INSTALL if name in warning]
    return [f"{warning} To use it: {hint}" for warning, hint in hints]
