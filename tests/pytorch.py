"""PyTorch, for tests that compare with it."""

import os
from typing import Any

import pytest


def pytorch() -> Any:
    """Return the module `torch`; without it a test is skipped, or fails if LTJAX_REQUIRE_TORCH is set."""
    if os.environ.get("LTJAX_REQUIRE_TORCH"):
        import torch

        return torch
    return pytest.importorskip("torch")
