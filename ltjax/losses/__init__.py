"""Loss functions as pure functions of arrays, for any JAX project. This package needs only jax.

Per-example losses return [B]; the caller reduces. Arrays are positional, hyper-parameters keyword-only. Labels become
one-hot rows, not indices, so the functions work under automatic and explicit sharding. An example has loss 0 if its
label is outside 0..C-1.
"""

from ltjax.losses.contrast import balanced_contrast, vmf_contrast, vmf_kappas
from ltjax.losses.divergences import distillation, gkl, kl_divergence, logit_pairing
from ltjax.losses.features import class_means, dro_bound, dro_loss, running_class_means
from ltjax.losses.labels import (
    SMOOTHING_SHAPES,
    balanced_softmax,
    branch_masks,
    cross_entropy,
    effective_number_weights,
    focal,
    label_aware_smoothing,
    ldam,
    ldam_margins,
    log_prior,
    logit_adjusted,
    mixed,
    residual_fusion,
    smoothing_by_count,
)

__all__ = [
    "SMOOTHING_SHAPES",
    "balanced_contrast",
    "balanced_softmax",
    "branch_masks",
    "class_means",
    "cross_entropy",
    "distillation",
    "dro_bound",
    "dro_loss",
    "effective_number_weights",
    "focal",
    "gkl",
    "kl_divergence",
    "label_aware_smoothing",
    "ldam",
    "ldam_margins",
    "log_prior",
    "logit_adjusted",
    "logit_pairing",
    "mixed",
    "residual_fusion",
    "running_class_means",
    "smoothing_by_count",
    "vmf_contrast",
    "vmf_kappas",
]
