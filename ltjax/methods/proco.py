"""ProCo: contrast of each view with a model of each class (Du et al., TPAMI 2024).

The stage has `views`: the classifier learns from the batch's own images, the contrast from the views.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ltjax import losses
from ltjax.methods import criteria
from ltjax.methods.views import by_view, create_head, forward
from ltjax.models.layers import unit
from ltjax.types import Method, Settings


def create(
    class_counts: np.ndarray,
    num_features: int,
    *,
    loss: Settings = criteria.LOGIT_ADJUSTED,
    weight: float = 1.0,
    temperature: float = 0.1,
    projection: tuple[int, ...] = (512, 128),
    class_weights: Sequence[float] | None = None,
) -> Method:
    """Minimise `loss(z, y) + weight * mean over the views of logit_adjusted(l, y)`, l from `losses.vmf_contrast`.

    A class is modelled by the running mean of its projected views. It counts from the start of the last epoch on, and
    with the view that it is compared with: at the start of each epoch the mean that counts from the start of the last
    one takes over, and another begins. A class that an epoch does not show keeps its mean, with a count of 0; the
    authors draw a random one.

    Args:
      loss: Of the classifier's logits z, see `ltjax.methods.criteria.create`.
      weight: Of the contrast, 0 or more.
      temperature: Of the contrast, above 0.
      projection: Widths of the projection's layers, parameters `method/projection`.
      class_weights: C factors on the classification losses of each class's images, not on the contrast.
    """
    if not weight >= 0 or not temperature > 0:
        raise ValueError(f"weight = {weight}, temperature = {temperature}: from 0 up, and above 0")
    criterion, head = criteria.create(class_counts, loss, class_weights), create_head(projection, num_features)

    def init(rng):
        head_rng, *rngs = jax.random.split(rng, 3)
        shape = len(class_counts), projection[-1]
        means, next_means = (0.9 * unit(jax.random.normal(key, shape), axis=-1) for key in rngs)
        none = jnp.zeros(shape[0])
        arrays = {"means": means, "counts": none, "next_means": next_means, "next_counts": none}
        return {"projection": head.init(head_rng)}, arrays

    def refresh(arrays, _):
        means, counts = arrays["next_means"], arrays["next_counts"]
        return {"means": means, "counts": counts, "next_means": means, "next_counts": jnp.zeros_like(counts)}

    def contrast(arrays, view, labels):
        """Add a view [B, P] to the means, then compare it with them."""
        added = jax.lax.stop_gradient(view), labels
        means, counts = losses.running_class_means(arrays["means"], arrays["counts"], *added)
        next_means, next_counts = losses.running_class_means(arrays["next_means"], arrays["next_counts"], *added)
        logits = losses.vmf_contrast(view, means, losses.vmf_kappas(means), temperature=temperature)
        arrays = {"means": means, "counts": counts, "next_means": next_means, "next_counts": next_counts}
        return losses.logit_adjusted(logits, labels, class_counts=class_counts).mean(), arrays

    def total(apply, variables, batch, rng):
        outputs, variables = forward(apply, variables, batch)
        projected = by_view(head(variables.params["method"]["projection"], outputs.features), batch)
        arrays, contrasts = variables.arrays, []
        for view in projected[1:]:
            value, arrays = contrast(arrays, view, batch.labels)
            contrasts.append(value)
        metrics = {
            "classification_loss": criterion(by_view(outputs.logits, batch)[0], batch),
            "contrast_loss": jnp.stack(contrasts).mean(),
        }
        loss = metrics["classification_loss"] + weight * metrics["contrast_loss"]
        return loss, (variables._replace(arrays=arrays), metrics)

    return Method(
        init, total, refresh, layers=None, per_class=lambda extra_params: criterion.per_class, prior=criterion.prior
    )
