"""ResLT (Cui et al., TPAMI 2022): branches share backbone and classifier, and each next one covers only rarer classes.

The network has the branches (`models.create(..., branches=3)`), and its prediction is the sum of their logits.
"""

import numpy as np

from ltjax import losses
from ltjax.types import Method, UserError


def create(class_counts: np.ndarray, *, medium_start: float, tail_start: float | None = None, beta: float) -> Method:
    """Minimise the residual fusion of branches, see `ltjax.losses.residual_fusion`.

    Args:
      medium_start: First class of the second branch, as a rank by count, or as a share of the classes if below 1.
      tail_start: First class of the third branch, if the network has one.
      beta: Weight of the branches' losses against the loss of their sum, in [0, 1].
    """
    if not 0 <= beta <= 1:
        raise UserError(f"method 'reslt': beta = {beta}: from 0 to 1")
    starts = (medium_start, len(class_counts) if tail_start is None else tail_start)
    ranks = tuple(max(1, round(start * len(class_counts))) if 0 < start < 1 else int(start) for start in starts)
    whole = all(0 < start < 1 or start == rank for start, rank in zip(starts, ranks, strict=True))
    if not whole or not 0 < ranks[0] <= ranks[1] <= len(class_counts):
        raise UserError(
            f"method 'reslt': medium_start = {medium_start}, tail_start = {tail_start}: whole ranks from 1 to "
            f"{len(class_counts)}, the number of classes, or shares of them below 1, in this order"
        )
    masks = losses.branch_masks(class_counts, medium_start=ranks[0], tail_start=ranks[1])  # [3, C]

    def loss(apply, variables, batch, rng):
        outputs, variables = apply(variables, batch.images)
        branches = 0 if outputs.branches is None else len(outputs.branches)
        if branches not in (2, 3) or (branches == 3 and tail_start is None):
            allowed = "2, or a tail_start" if branches == 3 else "2 or 3"
            raise UserError(f"method 'reslt' needs model.branches = {allowed}; it is {branches}")

        def fused(labels):
            return losses.residual_fusion(outputs.branches, labels, masks=masks[:branches], beta=beta)

        return losses.mixed(fused, batch.labels, batch.partner_labels, batch.lam), (variables, {})

    return Method(init=lambda rng: ({}, {}), loss=loss)
