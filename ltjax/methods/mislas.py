"""MiSLAS's second stage: label-aware smoothing of the classifier (Zhong et al., CVPR 2021).

The rest of the method is in the stage's settings: a frozen backbone whose batch-norm statistics are updated on
class-balanced batches (shifted batch norm), a class-aware sampler, and the network's `logit_scale` as learnable weight
scaling.
"""

from collections.abc import Sequence

import numpy as np

from ltjax.methods import erm
from ltjax.types import Method


def create(
    class_counts: np.ndarray,
    *,
    head: float,
    tail: float,
    shape: str = "concave",
    power: float = 1.0,
    class_weights: Sequence[float] | None = None,
) -> Method:
    """Minimise `ltjax.losses.label_aware_smoothing`. Other settings: see `ltjax.losses.smoothing_by_count`.

    Args:
      class_weights: C factors on the losses of each class's images.
    """
    smoothing = dict(name="label_aware_smoothing", head=head, tail=tail, shape=shape, power=power)
    return erm.create(class_counts, loss=smoothing, class_weights=class_weights)
