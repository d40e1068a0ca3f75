"""How far two sets of logits are apart: of a student and a teacher, of an image and its adversarial copy."""

import jax
import jax.numpy as jnp


def kl_divergence(p_logits: jax.Array, q_logits: jax.Array) -> jax.Array:
    """Compute `KL(p || q) = sum_c p_c (log p_c - log q_c)` of two softmaxes, [B]. Differentiable in both.

    A class adds 0 if its logit is -inf in both, and the gradients stay finite.

    Source: Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy" (TRADES), ICML 2019.

    Args:
      p_logits: [B, C], of the reference.
      q_logits: [B, C].

    Examples:
      >>> losses.kl_divergence(jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 0.0]]))
      Array([0.328], dtype=float32)
    """
    log_p, log_q = jax.nn.log_softmax(p_logits), jax.nn.log_softmax(q_logits)
    present = jnp.isfinite(log_p)  # 0 log 0 = 0
    log_p = jnp.where(present, log_p, 0)
    return jnp.where(present, jnp.exp(log_p) * (log_p - jnp.where(present, log_q, 0)), 0).sum(-1)


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
