"""GKL-AT: adversarial training with the generalised KL loss (Cui et al., 2025, arXiv 2503.08038; IKL, NeurIPS 2024)."""

from collections.abc import Sequence

import jax
import numpy as np

from ltjax import losses
from ltjax.methods import adversarial, class_softmax, criteria
from ltjax.types import Method, Settings


def create(
    class_counts: np.ndarray,
    *,
    loss: Settings = criteria.CROSS_ENTROPY,
    alpha: float = 4.0,
    beta: float = 20.0,
    gamma: float = 1.0,
    weights_temperature: float = 4.0,
    attack_beta: float = 1.0,
    attack: Settings = adversarial.PAPERS_ATTACK,
    awp: float = 0.0,
    awp_start: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> Method:
    """Minimise `loss(f(x), y) + GKL(f(x_adv), f(x))`; attack the GKL with alpha = gamma = 1.

    GKL is `losses.gkl` with the mean softmax of the image's class over the last epoch as its weights, and a gradient to
    both logits. The means come from f(x), at the weights that AWP has moved if it does. As in the authors' code, f runs
    on attacked images first, then on clean ones. Other arguments: see `ltjax.methods.adversarial.create`.

    Args:
      loss: Classification loss, see `ltjax.methods.criteria.create`.
      alpha: Weight of GKL's cross-entropy.
      beta: Weight of its squared differences.
      gamma: Exponent of the weights.
      weights_temperature: Of the softmax in the weights.
      attack_beta: beta of the attack. 0 leaves a cross-entropy, whose gradient is the KL's.
      class_weights: C factors on the classification losses of each class's images, not on GKL.
    """
    if not min(alpha, beta, gamma, attack_beta) >= 0 or not weights_temperature > 0:
        raise ValueError(
            f"alpha = {alpha}, beta = {beta}, gamma = {gamma}, attack_beta = {attack_beta}: from 0 up, and "
            f"weights_temperature = {weights_temperature}: above 0"
        )
    criterion = criteria.create(class_counts, loss, class_weights)

    def objective(natural, logits, batch, variables):
        weights = class_softmax.weights(variables.arrays, batch.labels)
        return losses.gkl(logits, natural, weights=weights, alpha=1.0, beta=attack_beta)

    def loss_of(apply, variables, batch, images):
        attacked, variables = apply(variables, images)
        clean, variables = apply(variables, batch.images)
        natural = criterion(clean.logits, batch)
        weights = class_softmax.weights(variables.arrays, batch.labels)
        robust = losses.gkl(attacked.logits, clean.logits, weights=weights, alpha=alpha, beta=beta, gamma=gamma)
        softmax = jax.lax.stop_gradient(jax.nn.softmax(clean.logits / weights_temperature))
        variables = variables._replace(arrays=class_softmax.add(variables.arrays, softmax, batch.labels))
        return natural + robust, (variables, {"natural_loss": natural, "robust_loss": robust})

    method = adversarial.create(
        loss_of, objective, criterion, class_counts, attack=attack, awp=awp, awp_start=awp_start
    )
    arrays = class_softmax.init(len(class_counts))
    return method._replace(init=lambda rng: ({}, arrays), refresh=class_softmax.refresh, layers=None)
