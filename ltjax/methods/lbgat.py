"""LBGAT: a robust model learns from the logits of a natural one (Cui, Liu, Wang & Jia, ICCV 2021)."""

import numpy as np

from ltjax import losses
from ltjax.methods import adversarial, criteria
from ltjax.types import Method, Settings


def create(
    class_counts: np.ndarray,
    *,
    beta: float = 0.0,
    guide_loss: Settings = criteria.CROSS_ENTROPY,
    guide_trains: bool = True,
    attack: Settings = adversarial.PAPERS_ATTACK,
    awp: float = 0.0,
) -> Method:
    """Minimise `mean (f(x_adv) - g(x))^2 + guide_loss(g(x), y) + beta KL(f(x) || f(x_adv))`; attack the KL.

    f, the network `net`, uses no labels. g, the network `guide`, sees only clean images. Both train together, and the
    square has a gradient to both. As in the authors' code, f runs on clean images even if beta = 0, so its batch-norm
    statistics are updated with the attacked images first, then the clean ones. Other arguments: see
    `ltjax.methods.adversarial.create`.

    Args:
      beta: 0 or 6 in the paper.
      guide_loss: Loss of g's logits, see `ltjax.methods.criteria.create`. Balanced softmax or logit adjustment gives a
        guide for long-tailed data.
      guide_trains: False is BGAT: g was trained before, and its parameters and statistics stay fixed.
    """
    if not beta >= 0:
        raise ValueError(f"beta = {beta}: from 0 up")
    criterion = criteria.create(class_counts, guide_loss)

    def loss_of(apply, variables, batch, images):
        attacked, variables = apply(variables, images)
        clean, variables = apply(variables, batch.images)
        guide, variables = apply(variables, batch.images, net="guide", bn=None if guide_trains else "eval")
        metrics = {"pairing_loss": losses.logit_pairing(attacked.logits, guide.logits).mean()}
        total = metrics["pairing_loss"]
        if guide_trains:
            metrics["guide_loss"] = criterion(guide.logits, batch)
            total += metrics["guide_loss"]
        if beta:
            metrics["robust_loss"] = losses.kl_divergence(clean.logits, attacked.logits).mean()
            total += beta * metrics["robust_loss"]
        return total, (variables, metrics)

    criterion = criterion._replace(prior=None)  # which is the guide's, not the network's
    return adversarial.create(loss_of, adversarial.divergence, criterion, class_counts, attack=attack, awp=awp)
