"""TRADES: classify clean images, and keep the prediction on attacked ones (Zhang et al., ICML 2019)."""

from collections.abc import Sequence

import numpy as np

from ltjax import losses
from ltjax.methods import adversarial, criteria
from ltjax.types import Method, Settings


def create(
    class_counts: np.ndarray,
    *,
    beta: float = 6.0,
    loss: Settings = criteria.CROSS_ENTROPY,
    attack: Settings = adversarial.PAPERS_ATTACK,
    awp: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> Method:
    """Minimise `loss(f(x), y) + beta KL(f(x) || f(x_adv))`; attack the KL.

    As in the authors' code, f runs on clean images, on attacked ones, and on the clean ones again. So batch-norm
    statistics are updated with clean images twice and with attacked ones once. Other arguments: see
    `ltjax.methods.adversarial.create`.

    Args:
      beta: Weight of the KL divergence.
      loss: Classification loss, see `ltjax.methods.criteria.create`.
      class_weights: C factors on the classification losses of each class's images, not on the KL divergence.
    """
    if not beta >= 0:
        raise ValueError(f"beta = {beta}: from 0 up")
    criterion = criteria.create(class_counts, loss, class_weights)

    def loss_of(apply, variables, batch, images):
        clean, variables = apply(variables, batch.images)
        attacked, variables = apply(variables, images)
        _, variables = apply(variables, batch.images)
        natural = criterion(clean.logits, batch)
        robust = losses.kl_divergence(clean.logits, attacked.logits).mean()
        return natural + beta * robust, (variables, {"natural_loss": natural, "robust_loss": robust})

    return adversarial.create(loss_of, adversarial.divergence, criterion, class_counts, attack=attack, awp=awp)
