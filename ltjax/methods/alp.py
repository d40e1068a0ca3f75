"""Adversarial logit pairing (Kannan, Kurakin & Goodfellow, 2018)."""

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
    pairing_weight: float = 0.5,
    loss: Mapping[str, Any] = MappingProxyType({"name": "cross_entropy"}),
    attack: Mapping[str, Any] = MappingProxyType({}),
    awp: float = 0.0,
) -> Method:
    """`loss(f(x), y) + loss(f(x_adv), y) + pairing_weight |f(x) - f(x_adv)|^2`; the attack climbs cross-entropy.

    The square is summed over classes and averaged over the batch.
    loss: of the labels, see `ltjax.methods.criteria.create`. attack, awp: see `ltjax.methods.adversarial.create`.
    """
    if not pairing_weight >= 0:
        raise ValueError(f"pairing_weight = {pairing_weight}: from 0 up")
    criterion = criteria.create(class_counts, loss)

    def given(apply, variables, batch, images):
        clean, variables = apply(variables, batch.images)
        attacked, variables = apply(variables, images)
        labels_loss = criterion(clean.logits, batch) + criterion(attacked.logits, batch)
        pairing = clean.logits.shape[-1] * losses.logit_pairing(attacked.logits, clean.logits).mean()
        metrics = {"labels_loss": labels_loss, "pairing_loss": pairing}
        return labels_loss + pairing_weight * pairing, (variables, metrics)

    shared = dict(attack=attack, awp=awp, per_class=criterion.per_class)
    return adversarial.create(given, objective=adversarial.cross_entropy, **shared)
