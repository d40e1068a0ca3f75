"""Objectives that attacks maximise: functions of logits [B, C] and labels [B] -> [B]."""

import jax
import jax.numpy as jnp

TINY = 1e-12


def fooled(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return whether the prediction is not the label, bool [B]. Logits with a nan are always wrong."""
    return (logits.argmax(-1).astype(labels.dtype) != labels) | jnp.isnan(logits).any(-1)


def _split(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the label's logit [B], and the logits [B, C] with the label's set to -inf."""
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    minus_inf = jnp.asarray(-jnp.inf, logits.dtype)
    return jnp.where(is_label, logits, minus_inf).max(-1), jnp.where(is_label, minus_inf, logits)


def log_odds(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the log-odds `log((1 - p_y) / p_y)`, [B].

    Cross-entropy is their softplus, so attacks that use only the gradient's direction and compare values take the same
    path. But the log-odds have a gradient even if float32 rounds `-log p_y` to 0.
    """
    at_label, others = _split(logits, labels)
    return jax.nn.logsumexp(others, axis=-1) - at_label


def margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute `max_{c != y} z_c - z_y`, [B]. It is above 0 if the prediction is not the label.

    Source: Carlini & Wagner, "Towards Evaluating the Robustness of Neural Networks", S&P 2017.
    """
    at_label, others = _split(logits, labels)
    return others.max(-1) - at_label


def dlr(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the difference of logits ratio, `(max_{c != y} z_c - z_y) / (z_1st - z_3rd)` with sorted logits, [B].

    It is invariant to shifting and scaling the logits. With two classes it is the margin.

    Source: Croce & Hein, "Reliable evaluation of adversarial robustness ...", ICML 2020, equation 6.
    """
    if logits.shape[-1] < 3:
        return margin(logits, labels)
    top = jax.lax.top_k(logits, 3)[0]  # [B, 3]
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + TINY)


def dlr_targeted(logits: jax.Array, labels: jax.Array, targets: jax.Array) -> jax.Array:
    """Compute the targeted ratio `(z_t - z_y) / (z_1st - (z_3rd + z_4th) / 2)`, [B], for targets t [B].

    With three classes the denominator is `z_1st - z_3rd`, with two it is 1.

    Source: Croce & Hein, ICML 2020, equation 7.
    """
    num_classes = logits.shape[-1]
    is_label, is_target = (jax.nn.one_hot(c, num_classes, dtype=bool) for c in (labels, targets))
    difference = jnp.where(is_target, logits, 0).sum(-1) - jnp.where(is_label, logits, 0).sum(-1)
    if num_classes < 3:
        return difference
    top = jax.lax.top_k(logits, min(num_classes, 4))[0]  # [B, 3 or 4]
    return difference / (top[:, 0] - top[:, 2:].mean(-1) + TINY)


def kl(logits: jax.Array, natural_logits: jax.Array) -> jax.Array:
    """Compute `KL(natural || logits)`, [B], from the prediction on the clean image (TRADES, LBGAT)."""
    log_p, log_q = jax.nn.log_softmax(natural_logits), jax.nn.log_softmax(logits)
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
