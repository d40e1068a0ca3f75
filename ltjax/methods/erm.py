"""Empirical risk minimisation: the mean of a classification loss. Most baselines are this with another loss."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from ltjax.methods import criteria
from ltjax.types import Method


def create(
    class_counts: np.ndarray,
    *,
    loss: Mapping[str, Any] = MappingProxyType({"name": "cross_entropy"}),
    net: str = "net",
) -> Method:
    """Cross-entropy, focal, LDAM, balanced softmax, ... with or without class weights and mixup.

    loss: see `ltjax.methods.criteria.create`. net: the network that trains, such as the `guide` of BGAT.
    """
    criterion = criteria.create(class_counts, loss)

    def mean_loss(apply, variables, batch, rng):
        del rng
        outputs, variables = apply(variables, batch.images, net=net)
        return criterion(outputs.logits, batch), (variables, {})

    return Method(init=lambda rng: ({}, {}), loss=mean_loss, per_class=lambda extra_params: criterion.per_class)
