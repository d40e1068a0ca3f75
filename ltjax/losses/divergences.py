"""How far two sets of logits are apart: of a student and a teacher, of an image and its adversarial copy."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ltjax.losses.arrays import at_least_float32, check_temperature


def kl_divergence(p_logits: jax.Array, q_logits: jax.Array) -> jax.Array:
    """Compute `KL(p || q) = sum_c p_c (log p_c - log q_c)` of two softmaxes, [B]. Differentiable in both.

    A class adds 0 if its probability in p is 0, also with a logit of -inf in both, and the gradients stay finite.

    Source: Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy" (TRADES), ICML 2019.

    Args:
      p_logits: [B, C], of the reference.
      q_logits: [B, C].

    Examples:
      >>> losses.kl_divergence(jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 0.0]]))
      Array([0.328], dtype=float32)
    """
    log_p, log_q = jax.nn.log_softmax(p_logits), jax.nn.log_softmax(q_logits)
    absent = jnp.exp(log_p) == 0  # 0 log 0 = 0
    log_p = jnp.where(absent, 0, log_p)
    return jnp.where(absent, 0, jnp.exp(log_p) * (log_p - jnp.where(absent, 0, log_q))).sum(-1)


def logit_pairing(logits: jax.Array, target_logits: jax.Array) -> jax.Array:
    """Compute the mean over classes of the squared difference of logits, `|z - t|^2 / C`, [B]. Differentiable in both.

    LBGAT pairs the robust model on adversarial images with the natural model on clean ones. ALP pairs one model on
    adversarial images with itself on clean ones.

    Source: Cui et al., "Learnable Boundary Guided Adversarial Training", ICCV 2021, equation 2; Kannan et al.,
    "Adversarial Logit Pairing", 2018.

    Args:
      logits: z [B, C].
      target_logits: t [B, C].

    Examples:
      >>> losses.logit_pairing(jnp.array([[3.0, 0.0]]), jnp.array([[1.0, 0.0]]))
      Array([2.], dtype=float32)
    """
    return jnp.square(logits - target_logits).mean(-1)


def distillation(
    student: jax.Array, teacher: jax.Array, *, temperature: float | jax.Array, power: ArrayLike = 1.0
) -> jax.Array:
    """Compute `KL(q || softmax(s / T))`, [B], with `q = softmax(power t / T)`: the teacher's softmax to a power.

    The factor T^2, which keeps the gradient's size if T changes, is the caller's. Differentiable in both: put
    `jax.lax.stop_gradient` around a teacher that is trained as well. Logits of -inf: see `kl_divergence`.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; with the power, He et al., "Distilling
    Virtual Examples for Long-Tailed Recognition" (DiVE), ICCV 2021.

    Args:
      student: s [B, C] logits.
      teacher: t [B, C] logits.
      temperature: T, above 0.
      power: Below 1 it makes the teacher's distribution flatter, which helps rare classes.

    Raises:
      ValueError: The temperature is not above 0.

    Examples:
      >>> student, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[2.0, 0.0]])
      >>> losses.distillation(student, teacher, temperature=2.0)
      Array([0.111], dtype=float32)
      >>> losses.distillation(student, teacher, temperature=2.0, power=0.5)
      Array([0.03], dtype=float32)
    """
    check_temperature(temperature)
    return kl_divergence(teacher * power / temperature, student / temperature)


def gkl(
    student: jax.Array,
    teacher: jax.Array,
    *,
    weights: ArrayLike,
    alpha: float | jax.Array,
    beta: float | jax.Array,
    gamma: float = 1.0,
    temperature: float | jax.Array = 1.0,
) -> jax.Array:
    """Compute the generalised KL loss of a batch, scalar: KL, taken apart into a square and a cross-entropy.

    With logits a of the student and t of the teacher, `d = t - a` and weights `v = w^gamma`:

        square         1/4 sum_i sum_jk v_ij v_ik (d_ij - d_ik)^2 / sum_i sum_jk v_ij v_ik
        cross-entropy  1/B sum_i sum_j -softmax(t_i / T)_j log softmax(a_i / T)_j
        loss           beta * square + alpha * cross-entropy

    The square's inner sum is twice `(sum_j v_ij)^2` times the variance of d_i with weights v_i, so no array is larger
    than [B, C]; the authors build [B, C, C]. Neither weights nor, in the cross-entropy, the teacher have a gradient.
    The square has one to both. With `alpha = beta = gamma = 1`, T = 1 and `w = softmax(t)`, the gradient to t is that
    of the mean KL(t || a), but the gradient to a is not.

    The result has the student's type; bfloat16 and float16 are computed in float32. The square grows with the square
    of the logits: float16 ends at 65,504, and logits that a cosine classifier scales by 30 need a smaller beta.
    A logit of -inf in both takes its class out of the loss.

    Source: Cui et al., "Decoupled Kullback-Leibler Divergence Loss", NeurIPS 2024 (IKL: gamma = 1), and "Generalized
    Kullback-Leibler Divergence Loss", 2025 (arXiv 2503.08038).

    Args:
      student: a [B, C] logits; in adversarial training those of the adversarial images.
      teacher: t [B, C] logits; in adversarial training those of the clean images.
      weights: w [B, C], 0 or more, of the teacher's softmax: of the image, or the mean over the images of its class
        (see `running_class_means`). An example whose weights are all 0 is left out of the square.
      alpha: Factor of the cross-entropy.
      beta: Factor of the square.
      gamma: Exponent of the weights, 0 or more. Below 1 it raises the weight of classes with a small probability.
      temperature: T of the cross-entropy, above 0.

    Raises:
      ValueError: gamma is below 0, or the temperature is not above 0.

    Examples:
      >>> clean, attacked = jnp.array([[3.0, 0.0, 0.0]]), jnp.array([[1.0, 1.0, 0.0]])
      >>> losses.gkl(attacked, clean, weights=jax.nn.softmax(clean), alpha=1.0, beta=1.0)
      Array(1.176, dtype=float32)
    """
    check_temperature(temperature)
    if isinstance(gamma, (int, float)) and not gamma >= 0:
        raise ValueError(f"gkl gamma = {gamma}: 0 or more")
    a, t = at_least_float32(student), at_least_float32(teacher)  # [B, C]
    target = jax.lax.stop_gradient(jax.nn.softmax(t / temperature))
    log_p = jax.nn.log_softmax(a / temperature)
    cross_entropy = jnp.where(target == 0, 0, -target * log_p).sum(-1).mean()  # 0 log 0 = 0

    masked = (a == -jnp.inf) | (t == -jnp.inf)
    v = jnp.where(masked, 0, jax.lax.stop_gradient(jnp.asarray(weights).astype(a.dtype)) ** gamma)
    total = v.sum(-1, keepdims=True)  # [B, 1]
    share = v / jnp.where(total > 0, total, 1)
    d = jnp.where(masked, 0, t) - jnp.where(masked, 0, a)
    variance = (share * jnp.square(d - (share * d).sum(-1, keepdims=True))).sum(-1)  # [B]
    of_example = jnp.square(total[:, 0])
    square = (of_example * variance).sum() / (2 * jnp.where(of_example.sum() > 0, of_example.sum(), 1))
    return (beta * square + alpha * cross_entropy).astype(student.dtype)
