"""Adversarial logit pairing (Kannan, Kurakin & Goodfellow, 2018)."""

from collections.abc import Sequence

import numpy as np

from ltjax import losses
from ltjax.methods import adversarial, criteria
from ltjax.types import Method, Settings


def create(
    class_counts: np.ndarray,
    *,
    pairing_weight: float = 0.5,
    loss: Settings = criteria.CROSS_ENTROPY,
    attack: Settings = adversarial.PAPERS_ATTACK,
    awp: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> Method:
    """Minimise `loss(f(x), y) + loss(f(x_adv), y) + pairing_weight |f(x) - f(x_adv)|^2`; attack cross-entropy.

    Other arguments: see `ltjax.methods.adversarial.create`.

    Args:
      pairing_weight: Weight of the square, which is summed over classes and averaged over the batch.
      loss: Classification loss, see `ltjax.methods.criteria.create`.
      class_weights: C factors on the classification losses of each class's images, not on the pairing.
    """
    if not pairing_weight >= 0:
        raise ValueError(f"pairing_weight = {pairing_weight}: from 0 up")
    criterion = criteria.create(class_counts, loss, class_weights)

    def loss_of(apply, variables, batch, images):
        clean, variables = apply(variables, batch.images)
        attacked, variables = apply(variables, images)
        labels_loss = criterion(clean.logits, batch) + criterion(attacked.logits, batch)
        pairing = clean.logits.shape[-1] * losses.logit_pairing(attacked.logits, clean.logits).mean()
        metrics = {"labels_loss": labels_loss, "pairing_loss": pairing}
        return labels_loss + pairing_weight * pairing, (variables, metrics)

    return adversarial.create(loss_of, adversarial.cross_entropy, criterion, class_counts, attack=attack, awp=awp)
