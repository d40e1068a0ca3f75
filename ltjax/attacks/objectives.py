"""What an attack maximises: functions of logits [B, C] and labels [B] -> [B], as an attack on an image sees them."""

import jax
import jax.numpy as jnp

TINY = 1e-12


def fooled(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether the label is not the prediction, bool [B]. Logits with a nan predict nothing, and so not the label."""
    return (logits.argmax(-1).astype(labels.dtype) != labels) | jnp.isnan(logits).any(-1)


def _split(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The label's logit [B], and all logits with the label's at -inf [B, C]."""
    own = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    minus = jnp.asarray(-jnp.inf, logits.dtype)
    return jnp.where(own, logits, minus).max(-1), jnp.where(own, minus, logits)


def log_odds(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """`log((1 - p_y) / p_y)`, [B]: rises and falls with cross-entropy, which is its softplus.

    So an attack that only asks for the gradient's direction and compares values climbs the same path with it as with
    cross-entropy; but where the model is so sure that float32 rounds `-log p_y` to 0, this one still has a gradient.
    """
    own, others = _split(logits, labels)
    return jax.nn.logsumexp(others, axis=-1) - own


def margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """`max_{c != y} z_c - z_y`, [B]: above 0 where the label is not the prediction.

    Source: Carlini & Wagner, "Towards Evaluating the Robustness of Neural Networks", S&P 2017.
    """
    own, others = _split(logits, labels)
    return others.max(-1) - own


def dlr(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Difference of logits ratio, `(max_{c != y} z_c - z_y) / (z_1st - z_3rd)` with the logits in order, [B].

    Does not change when logits are shifted or scaled. With two classes the ratio would be 1 or -1, so there it is the
    margin alone. Source: Croce & Hein, "Reliable evaluation of adversarial robustness ...", ICML 2020, equation 6.
    """
    if logits.shape[-1] < 3:
        return margin(logits, labels)
    top = jax.lax.top_k(logits, 3)[0]  # [B, 3]
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + TINY)


def dlr_targeted(logits: jax.Array, labels: jax.Array, targets: jax.Array) -> jax.Array:
    """`(z_t - z_y) / (z_1st - (z_3rd + z_4th) / 2)`, [B]; targets [B]. Croce & Hein, ICML 2020, equation 7.

    With three classes the denominator is `z_1st - z_3rd`, with two it is 1.
    """
    num_classes = logits.shape[-1]
    own, wanted = (jax.nn.one_hot(c, num_classes, dtype=bool) for c in (labels, targets))
    difference = jnp.where(wanted, logits, 0).sum(-1) - jnp.where(own, logits, 0).sum(-1)
    if num_classes < 3:
        return difference
    top = jax.lax.top_k(logits, min(num_classes, 4))[0]  # [B, 3 or 4]
    return difference / (top[:, 0] - top[:, 2:].mean(-1) + TINY)


def kl(logits: jax.Array, natural_logits: jax.Array) -> jax.Array:
    """`KL(natural || logits)`, [B]: how far a prediction has moved from the one on the clean image (TRADES, LBGAT)."""
    log_p, log_q = jax.nn.log_softmax(natural_logits), jax.nn.log_softmax(logits)
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
