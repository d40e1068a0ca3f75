"""BGAT: LBGAT with a natural model that was trained beforehand and is frozen (Cui et al., ICCV 2021, section 3.2)."""

import numpy as np

from ltjax.methods import adversarial, lbgat
from ltjax.types import Method, Settings


def create(
    class_counts: np.ndarray, *, beta: float = 0.0, attack: Settings = adversarial.PAPERS_ATTACK, awp: float = 0.0
) -> Method:
    """Minimise `mean (f(x_adv) - g(x))^2 + beta KL(f(x) || f(x_adv))`, with g in evaluation mode.

    Arguments: see `ltjax.methods.lbgat.create`.
    """
    return lbgat.create(class_counts, beta=beta, guide_trains=False, attack=attack, awp=awp)
