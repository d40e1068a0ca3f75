"""LBGAT: a robust model that learns from the logits of a natural one (Cui, Liu, Wang & Jia, ICCV 2021)."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from ltjax import losses
from ltjax.methods import adversarial, criteria
from ltjax.types import Method


def create(
    class_counts: np.ndarray,
    *,
    beta: float = 0.0,
    guide_loss: Mapping[str, Any] = MappingProxyType({"name": "cross_entropy"}),
    guide_trains: bool = True,
    attack: Mapping[str, Any] = MappingProxyType({}),
    awp: float = 0.0,
) -> Method:
    """`mean (f(x_adv) - g(x))^2 + guide_loss(g(x), y) + beta KL(f(x) || f(x_adv))`; the attack climbs the KL.

    f, the network `net`, never sees a label; g, the network `guide`, sees clean images only. Both train together, and
    the square pulls at g as well.

    Args:
      beta: 0 or 6 in the paper.
      guide_loss: of g's logits, see `ltjax.methods.criteria.create`. Balanced softmax or logit adjustment gives a guide
        for the long tail, whose logits f learns without knowing of the tail.
      guide_trains: False is BGAT: g was trained before, its statistics stay, and it has no loss.
      attack, awp: see `ltjax.methods.adversarial.create`.
    As in the authors' code f runs on clean images even at beta = 0, in the stage's batch-norm mode: its statistics see
    the attacked images first, then the clean ones.
    """
    if not beta >= 0:
        raise ValueError(f"beta = {beta}: from 0 up")
    criterion = criteria.create(class_counts, guide_loss)

    def given(apply, variables, batch, images):
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

    shared = dict(attack=attack, awp=awp, per_class=criterion.per_class)
    return adversarial.create(given, objective=adversarial.divergence, **shared)
