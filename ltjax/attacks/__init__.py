"""Attacks on any JAX model `predict(images) -> logits`: PGD, and AutoAttack's suite. This package needs only jax.

    adversarial = attacks.pgd_attack(predict, images, labels, rng, epsilon="8/255", step_size="2/255", num_steps=20)
    robust = attacks.autoattack(predict, images, labels, rng, epsilon="8/255").robust

Images are floats [N, H, W, channels] in [0, 1]; the model normalises them itself.
"""

from ltjax.attacks.autoattack import ATTACKS, STANDARD, AutoAttackResult, autoattack
from ltjax.attacks.ball import NORMS, radius, radius_by_count
from ltjax.attacks.pgd import STARTS, pgd, pgd_attack, random_start
from ltjax.attacks.progress import Progress, show_progress

__all__ = [
    "ATTACKS",
    "NORMS",
    "STANDARD",
    "STARTS",
    "AutoAttackResult",
    "Progress",
    "autoattack",
    "pgd",
    "pgd_attack",
    "radius",
    "radius_by_count",
    "random_start",
    "show_progress",
]
