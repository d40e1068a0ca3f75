"""Empirical risk minimisation: softmax cross-entropy, with mixup where the batch was mixed."""

import numpy as np

from ltjax import losses
from ltjax.types import Method


def create(class_counts: np.ndarray) -> Method:
    """Cross-entropy, the baseline of every table and, with mixup, the first stage of MiSLAS."""
    del class_counts

    def loss(apply, variables, batch, rng):
        del rng
        outputs, variables = apply(variables, batch.images)
        per_image = losses.mixed(
            lambda labels: losses.cross_entropy(outputs.logits, labels), batch.labels, batch.partner_labels, batch.lam
        )
        return per_image.mean(), (variables, {})

    return Method(init=lambda rng: ({}, {}), loss=loss)
