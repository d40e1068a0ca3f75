"""DRO-LT's feature stage: classification plus a robust loss on features (Samuel & Chechik, ICCV 2021).

The rest of the method is in the stage's settings: a frozen classifier, a class-aware sampler, AutoAugment and Cutout,
and a last stage that retrains the classifier with any loss.
"""

from collections.abc import Sequence
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np

from ltjax import losses
from ltjax.losses.arrays import positive_counts
from ltjax.methods import criteria
from ltjax.types import Method, Settings, UserError

RADII = ("learned", "learned_unconstrained", "shared", "by_count")
WEIGHTED: Settings = MappingProxyType({"name": "cross_entropy", "class_weights": MappingProxyType({"kind": "count"})})


def create(
    class_counts: np.ndarray,
    *,
    loss: Settings = WEIGHTED,
    robust_weight: float = 1.0,
    robust_class_weights: Settings | None = None,
    radius: str = "learned",
    radius_size: float = 0.5,
    temperature: float = 1.0,
    layers: tuple[str, ...] = (),
    class_weights: Sequence[float] | None = None,
) -> Method:
    """Minimise `loss + robust_weight * sum over layers of losses.dro_loss`.

    The centroids are the training images' mean features in evaluation mode, recomputed before each epoch. Learned
    margins are the parameters `method/margins` [layers, C].

    Args:
      loss: Classification loss, see `ltjax.methods.criteria.create`. The authors weight cross-entropy by n_c / n_max.
      robust_weight: The authors' code adds both losses, 1:1. The paper's `lambda * loss + (1 - lambda) * robust` is
        `(1 - lambda) / lambda` here, with lr times lambda.
      robust_class_weights: Of the robust loss, see `ltjax.methods.criteria.class_weights`. None: equal weights.
      radius: Radius e_c of the ball around each class's centroid; the loss's margin is 2 e_c. "shared": radius_size.
        "by_count": radius_size / sqrt(n_c). "learned": learned for each class, at least 0, initially radius_size.
        "learned_unconstrained": may become negative, as in the authors' code.
      radius_size: See `radius`.
      temperature: T.
      layers: Backbone stages, such as ("stage2", "stage3"). Empty: the pooled final map.
      class_weights: C factors on the classification losses of each class's images. The robust loss has its own.
    """
    if radius not in RADII:
        raise UserError(f"method 'drolt': unknown radius {radius!r}; known: {', '.join(RADII)}")
    if not temperature > 0 or not radius_size >= 0:
        raise UserError(
            f"method 'drolt': temperature = {temperature}, radius_size = {radius_size}: above 0, and at least 0"
        )
    layers = tuple(layers)
    centroids_of = layers or ("features",)  # keys of the method's arrays
    criterion = criteria.create(class_counts, loss, class_weights)
    weights = criteria.class_weights(class_counts, robust_class_weights)
    initial = jnp.full((len(centroids_of), len(class_counts)), 2 * radius_size, jnp.float32)  # [L, C]
    if radius == "by_count":
        initial = initial / jnp.sqrt(positive_counts(class_counts))
    learned = radius.startswith("learned")

    def init(rng):
        return ({"margins": initial} if learned else {}), {}

    def margins_of(extra_params):  # [..., L, C]
        if not learned:
            return initial
        margins = extra_params["margins"]
        return jnp.maximum(margins, 0) if radius == "learned" else margins

    def per_class(extra_params):
        margins = margins_of(extra_params)
        titles = [f"DRO-LT's margin, {layer}" for layer in layers] or ["DRO-LT's margin"]
        return {**criterion.per_class, **{title: margins[..., n, :] for n, title in enumerate(titles)}}

    def robust(features, centroids, margins, batch):
        def bound(labels):
            settings = dict(margins=margins, temperature=temperature, class_weights=weights)
            return losses.dro_loss(features, labels, centroids, **settings)

        return losses.mixed(bound, batch.labels, batch.partner_labels, batch.lam)

    def total(apply, variables, batch, rng):
        outputs, variables = apply(variables, batch.images)
        classification = criterion(outputs.logits, batch)
        robustness = jnp.zeros((), classification.dtype)
        for name, margins in zip(centroids_of, margins_of(variables.params.get("method")), strict=True):
            features = outputs.layers[name] if layers else outputs.features
            robustness += robust(features, variables.arrays[name], margins, batch)
        metrics = {"classification_loss": classification, "robust_loss": robustness}
        return classification + robust_weight * robustness, (variables, metrics)

    def refresh(arrays, class_means):
        return dict(class_means) if layers else {"features": class_means}

    return Method(init=init, loss=total, refresh=refresh, layers=layers, per_class=per_class, prior=criterion.prior)
