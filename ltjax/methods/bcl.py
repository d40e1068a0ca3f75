"""BCL: contrast of the views with each other and with a learned centre of each class (Zhu et al., CVPR 2022).

The stage has `views`: the classifier learns from the batch's own images, the contrast from the views.
"""

from collections.abc import Sequence

import jax
import numpy as np

from ltjax import losses
from ltjax.methods import criteria
from ltjax.methods.views import by_view, create_head, forward
from ltjax.types import Method, Settings


def create(
    class_counts: np.ndarray,
    num_features: int,
    *,
    loss: Settings = criteria.LOGIT_ADJUSTED,
    alpha: float = 1.0,
    beta: float = 0.35,
    temperature: float = 0.1,
    projection: tuple[int, ...] = (512, 128),
    class_weights: Sequence[float] | None = None,
) -> Method:
    """Minimise `alpha loss(z, y) + beta losses.balanced_contrast(views, centres)`.

    The centre of a class is a projection of its weights in the classifier, by layers of its own.

    Args:
      loss: Of the classifier's logits z, see `ltjax.methods.criteria.create`.
      alpha: Weight of `loss`, 0 or more; the authors' code has 1 for large images.
      beta: Weight of the contrast, 0 or more; theirs 0.35.
      temperature: Of the contrast, above 0.
      projection: Widths of the layers of both projections, parameters `method/projection` and `method/centres`.
      class_weights: C factors on the classification losses of each class's images, not on the contrast.
    """
    if not alpha >= 0 or not beta >= 0 or not temperature > 0:
        raise ValueError(f"alpha = {alpha}, beta = {beta}, temperature = {temperature}: from 0 up, and above 0")
    criterion, head = criteria.create(class_counts, loss, class_weights), create_head(projection, num_features)

    def init(rng):
        heads = zip(("projection", "centres"), jax.random.split(rng), strict=True)
        return {name: head.init(key) for name, key in heads}, {}

    def total(apply, variables, batch, rng):
        outputs, variables = forward(apply, variables, batch)
        params = variables.params["method"]
        projected = by_view(head(params["projection"], outputs.features), batch)
        centres = head(params["centres"], variables.params["net"]["classifier"]["kernel"].T)
        metrics = {
            "classification_loss": criterion(by_view(outputs.logits, batch)[0], batch),
            "contrast_loss": losses.balanced_contrast(projected[1:], batch.labels, centres, temperature=temperature),
        }
        loss = alpha * metrics["classification_loss"] + beta * metrics["contrast_loss"]
        return loss, (variables, metrics)

    return Method(init, total, per_class=lambda extra_params: criterion.per_class, prior=criterion.prior)
