"""Learn from a teacher's logits as well as from labels: knowledge distillation, DiVE and GKL.

The teacher is the network `guide`, with fixed weights and batch-norm statistics. After the surgery "teacher" it is an
earlier run of the same network: self-distillation.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ltjax import losses
from ltjax.methods import class_softmax, criteria
from ltjax.types import Method, Settings, UserError

KINDS = ("kl", "gkl")
WEIGHTS = ("class", "image")


def create(
    class_counts: np.ndarray,
    *,
    loss: Settings = criteria.CROSS_ENTROPY,
    kind: str = "kl",
    temperature: float = 2.0,
    share: float = 0.5,
    power: float = 1.0,
    alpha: float = 1.0,
    beta: float = 4.0,
    gamma: float = 0.1,
    weights: str = "class",
    weights_temperature: float = 4.0,
    warmup: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> Method:
    """Minimise a classification loss and the distance to the teacher.

    The many parameters are the settings of two losses.

    - "kl": `(1 - share) loss + share T^2 mean KL(q || softmax(s / T))`, q the teacher's softmax at T to a power (DiVE,
      He et al., ICCV 2021).
    - "gkl": `loss + ramp GKL(s, t)`, see `ltjax.losses.gkl` (Cui et al., 2025, arXiv 2503.08038). ramp rises from 0 to
      1 over a share `warmup` of the stage.

    Args:
      loss: See `ltjax.methods.criteria.create`. A batch of mixup or CutMix counts both labels; the teacher sees the
        mixed images.
      kind: "kl" or "gkl".
      temperature: T of both.
      share: Of "kl".
      power: Of "kl"; below 1 it flattens the teacher.
      alpha: Of "gkl", weight of its cross-entropy.
      beta: Of "gkl", weight of its squared differences.
      gamma: Of "gkl", exponent of the weights.
      weights: Of "gkl". "class": the teacher's mean softmax over the images of the label's class in the last epoch;
        "image": its softmax of each image.
      weights_temperature: Of these softmaxes.
      warmup: Share of the stage, from 0 to 1.
      class_weights: C factors on the classification losses of each class's images, not on the distance to the teacher.
    """
    for name, value, known in (("kind", kind, KINDS), ("weights", weights, WEIGHTS)):
        if value not in known:
            raise UserError(f"method distil: {name} = {value!r}; allowed: {', '.join(known)}")
    if not 0 <= share <= 1 or not 0 <= warmup <= 1:
        raise UserError(f"method distil: share = {share}, warmup = {warmup}: from 0 to 1")
    criterion, num_classes = criteria.create(class_counts, loss, class_weights), len(class_counts)
    by_class = kind == "gkl" and weights == "class"

    def init(rng):
        return {}, class_softmax.init(num_classes) if by_class else {}

    def distance(variables, student, teacher, labels):
        """Return the distance to the teacher, and the variables with another sum."""
        if kind == "kl":
            apart = losses.distillation(student, teacher, temperature=temperature, power=power)
            return temperature**2 * apart.mean(), variables
        softmax = jax.nn.softmax(teacher / weights_temperature)
        if by_class:
            weights_of_class = class_softmax.weights(variables.arrays, labels)
            variables = variables._replace(arrays=class_softmax.add(variables.arrays, softmax, labels))
            softmax = weights_of_class
        settings = dict(alpha=alpha, beta=beta, gamma=gamma, temperature=temperature)
        return losses.gkl(student, teacher, weights=softmax, **settings), variables

    def mean_loss(apply, variables, batch, rng):
        outputs, variables = apply(variables, batch.images)
        guide, _ = apply(variables, batch.images, net="guide", bn="eval")
        teacher = jax.lax.stop_gradient(guide.logits)
        apart, variables = distance(variables, outputs.logits, teacher, batch.labels)
        labelled = criterion(outputs.logits, batch)
        metrics = {"label_loss": labelled, "teacher_loss": apart}
        if kind == "kl":
            return (1 - share) * labelled + share * apart, (variables, metrics)
        ramp = jnp.minimum(batch.progress / warmup, 1) if warmup else 1.0
        return labelled + ramp * apart, (variables, metrics)

    return Method(
        init=init,
        loss=mean_loss,
        refresh=class_softmax.refresh if by_class else None,
        layers=None,
        per_class=lambda extra_params: criterion.per_class,
        progress=bool(warmup) and kind == "gkl",
    )
