"""Empirical risk minimisation: the mean of a classification loss. Most baselines are this with different losses."""

from collections.abc import Sequence

import numpy as np

from ltjax.methods import criteria
from ltjax.types import Method, Settings


def create(
    class_counts: np.ndarray,
    *,
    loss: Settings = criteria.CROSS_ENTROPY,
    net: str = "net",
    class_weights: Sequence[float] | None = None,
) -> Method:
    """Minimise cross-entropy, focal, LDAM, balanced softmax, ..., with or without class weights and mixup.

    Args:
      loss: See `ltjax.methods.criteria.create`.
      net: Network to train, such as the `guide` of BGAT.
      class_weights: C factors on the losses of each class's images.
    """
    criterion = criteria.create(class_counts, loss, class_weights)

    def mean_loss(apply, variables, batch, rng):
        outputs, variables = apply(variables, batch.images, net=net)
        return criterion(outputs.logits, batch), (variables, {})

    return Method(
        init=lambda rng: ({}, {}),
        loss=mean_loss,
        per_class=lambda extra_params: criterion.per_class,
        prior=criterion.prior if net == "net" else None,
    )
