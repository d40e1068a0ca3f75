"""TRADES: right on clean images, and the same on attacked ones (Zhang et al., ICML 2019)."""

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
    beta: float = 6.0,
    loss: Mapping[str, Any] = MappingProxyType({"name": "cross_entropy"}),
    attack: Mapping[str, Any] = MappingProxyType({}),
    awp: float = 0.0,
) -> Method:
    """`loss(f(x), y) + beta KL(f(x) || f(x_adv))`; the attack climbs the KL.

    loss: of the labels, see `ltjax.methods.criteria.create`. attack, awp: see `ltjax.methods.adversarial.create`.
    As in the authors' code f runs on clean images, on attacked ones, and on the clean ones again, whose value is the
    same: so batch-norm statistics see clean images twice and attacked ones once.
    """
    if not beta >= 0:
        raise ValueError(f"beta = {beta}: from 0 up")
    criterion = criteria.create(class_counts, loss)

    def given(apply, variables, batch, images):
        clean, variables = apply(variables, batch.images)
        attacked, variables = apply(variables, images)
        _, variables = apply(variables, batch.images)
        natural = criterion(clean.logits, batch)
        robust = losses.kl_divergence(clean.logits, attacked.logits).mean()
        return natural + beta * robust, (variables, {"natural_loss": natural, "robust_loss": robust})

    shared = dict(attack=attack, awp=awp, per_class=criterion.per_class)
    return adversarial.create(given, objective=adversarial.divergence, **shared)
