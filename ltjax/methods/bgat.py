"""BGAT: LBGAT with a natural model that was trained beforehand and is frozen (Cui et al., ICCV 2021, section 3.2)."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from ltjax.methods import lbgat
from ltjax.types import Method


def create(
    class_counts: np.ndarray,
    *,
    beta: float = 0.0,
    attack: Mapping[str, Any] = MappingProxyType({}),
    awp: float = 0.0,
) -> Method:
    """`mean (f(x_adv) - g(x))^2 + beta KL(f(x) || f(x_adv))`, g in evaluation mode. See `lbgat.create`."""
    return lbgat.create(class_counts, beta=beta, guide_trains=False, attack=attack, awp=awp)
