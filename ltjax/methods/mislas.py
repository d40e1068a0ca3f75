"""MiSLAS's second stage: label-aware smoothing of the classifier (Zhong et al., CVPR 2021).

The rest of the method is the stage's settings: a frozen backbone whose batch norm goes on seeing class-balanced
batches (shifted batch norm), a class-aware sampler, and the network's `logit_scale` as learnable weight scaling.
"""

import numpy as np

from ltjax import losses
from ltjax.types import Method


def create(class_counts: np.ndarray, *, head: float, tail: float, shape: str = "concave", power: float = 1.0) -> Method:
    """head, tail, shape, power: as in `ltjax.losses.smoothing_by_count`."""
    smoothing = losses.smoothing_by_count(class_counts, head=head, tail=tail, shape=shape, power=power)  # [C]

    def loss(apply, variables, batch, rng):
        del rng
        outputs, variables = apply(variables, batch.images)
        per_image = losses.mixed(
            lambda labels: losses.label_aware_smoothing(outputs.logits, labels, smoothing=smoothing),
            batch.labels,
            batch.partner_labels,
            batch.lam,
        )
        return per_image.mean(), (variables, {})

    return Method(init=lambda rng: ({}, {}), loss=loss)
