"""PyTorch, for tests that compare with it."""

import os
from typing import Any

import pytest


def pytorch() -> Any:
    """The module `torch`; without it a test is skipped, or fails where LTJAX_REQUIRE_TORCH says that it has to run."""
    if os.environ.get("LTJAX_REQUIRE_TORCH"):
        import torch

        return torch
    return pytest.importorskip("torch")
