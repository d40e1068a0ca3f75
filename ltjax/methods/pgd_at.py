"""Adversarial training on attacked images alone (Madry et al., ICLR 2018)."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from ltjax.methods import adversarial, criteria
from ltjax.types import Method


def create(
    class_counts: np.ndarray,
    *,
    loss: Mapping[str, Any] = MappingProxyType({"name": "cross_entropy"}),
    attack: Mapping[str, Any] = MappingProxyType({}),
    awp: float = 0.0,
) -> Method:
    """`loss(f(x_adv), y)`; the attack climbs cross-entropy.

    loss: of the labels, see `ltjax.methods.criteria.create`: balanced softmax here is the long tail's robust baseline.
    attack, awp: see `ltjax.methods.adversarial.create`.
    """
    criterion = criteria.create(class_counts, loss)

    def given(apply, variables, batch, images):
        outputs, variables = apply(variables, images)
        return criterion(outputs.logits, batch), (variables, {})

    shared = dict(attack=attack, awp=awp, per_class=criterion.per_class)
    return adversarial.create(given, objective=adversarial.cross_entropy, **shared)
