"""DRO-LT's feature stage: classification plus a robust loss on features (Samuel & Chechik, ICCV 2021).

The rest of the method is the stage's settings: a frozen classifier, a class-aware sampler, AutoAugment and Cutout, and
a last stage that re-trains the classifier, with any loss.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np

from ltjax import losses
from ltjax.methods import criteria
from ltjax.types import Method, UserError

RADII = ("learned", "learned_unconstrained", "shared", "by_count")
_WEIGHTED = MappingProxyType({"name": "cross_entropy", "class_weights": MappingProxyType({"kind": "count"})})


def create(
    class_counts: np.ndarray,
    *,
    loss: Mapping[str, Any] = _WEIGHTED,
    robust_weight: float = 1.0,
    robust_class_weights: Mapping[str, Any] | None = None,
    radius: str = "learned",
    radius_size: float = 0.5,
    temperature: float = 1.0,
    layers: tuple[str, ...] = (),
) -> Method:
    """`loss + robust_weight * sum over layers of losses.dro_loss`.

    Args:
      loss: of the classifier's logits, see `ltjax.methods.criteria.create`. The authors weight cross-entropy by
        n_c / n_max here.
      robust_weight: the paper's mean `lambda * loss + (1 - lambda) * robust` is `(1 - lambda) / lambda` here, and lr
        times lambda; the authors' code adds both, 1:1.
      robust_class_weights: of the robust loss, see `ltjax.methods.criteria.class_weights`; None: every class alike.
      radius: of the ball around each class's centroid, whose double is the loss's margin: "shared", e = radius_size for
        all; "by_count", e_c = radius_size / sqrt(n_c); "learned", one for each class, from radius_size on, never below
        0; "learned_unconstrained", as in the authors' code, where a radius may become negative.
      temperature: T.
      layers: of the backbone, such as ("stage2", "stage3"); none: its pooled final map.
    The centroids are the training images' mean features in evaluation mode, recomputed before each epoch. Learned
    margins (2 e_c) are `method/margins` [layers, C]; the bound only ever pushes them down, so the floor at 0 is what a
    projection would give.
    """
    if radius not in RADII:
        raise UserError(f"method 'drolt': unknown radius {radius!r}; known: {', '.join(RADII)}")
    if not temperature > 0 or not radius_size >= 0:
        raise UserError(
            f"method 'drolt': temperature = {temperature}, radius_size = {radius_size}: above 0, and at least 0"
        )
    if isinstance(layers, str):
        raise UserError(f"method 'drolt': layers = {layers!r}: a tuple of names, such as ({layers!r},)")
    layers = tuple(layers)
    where = layers or ("features",)
    criterion = criteria.create(class_counts, loss)
    weights = criteria.class_weights(class_counts, robust_class_weights)
    fixed = jnp.full((len(where), len(class_counts)), 2 * radius_size, jnp.float32)  # [L, C]
    if radius == "by_count":
        fixed = fixed / jnp.sqrt(jnp.asarray(class_counts, jnp.float32))
    learned = radius.startswith("learned")

    def init(rng):
        del rng
        return ({"margins": fixed} if learned else {}), {}

    def margins_of(extra_params):  # [..., L, C]
        if not learned:
            return fixed
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
        del rng
        outputs, variables = apply(variables, batch.images)
        classification = criterion(outputs.logits, batch)
        robustness = jnp.zeros((), classification.dtype)
        for name, margins in zip(where, margins_of(variables.params.get("method")), strict=True):
            features = outputs.layers[name] if layers else outputs.features
            robustness += robust(features, variables.arrays[name], margins, batch)
        metrics = {"classification_loss": classification, "robust_loss": robustness}
        return classification + robust_weight * robustness, (variables, metrics)

    def refresh(arrays, class_means):
        del arrays
        return dict(class_means) if layers else {"features": class_means}

    return Method(init=init, loss=total, refresh=refresh, layers=layers, per_class=per_class)
