"""Adversarial training on attacked images only (Madry et al., ICLR 2018)."""

from collections.abc import Sequence

import numpy as np

from ltjax.methods import adversarial, criteria
from ltjax.types import Method, Settings


def create(
    class_counts: np.ndarray,
    *,
    loss: Settings = criteria.CROSS_ENTROPY,
    attack: Settings = adversarial.PAPERS_ATTACK,
    awp: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> Method:
    """Minimise `loss(f(x_adv), y)`; attack cross-entropy.

    Other arguments: see `ltjax.methods.adversarial.create`.

    Args:
      loss: Classification loss, see `ltjax.methods.criteria.create`. Balanced softmax gives the usual robust baseline
        for long-tailed data.
      class_weights: C factors on the classification losses of each class's images.
    """
    criterion = criteria.create(class_counts, loss, class_weights)

    def loss_of(apply, variables, batch, images):
        outputs, variables = apply(variables, images)
        return criterion(outputs.logits, batch), (variables, {})

    return adversarial.create(loss_of, adversarial.cross_entropy, criterion, class_counts, attack=attack, awp=awp)
