"""Temperature scaling: one number that makes confidences honest. This module needs jax alone."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

LOWEST, HIGHEST = 0.01, 1000.0  # temperatures looked at
HALVINGS = 32  # of that range's logarithm: to the last bit of float32


@jax.jit
def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """The T for which `softmax(logits / T)` has the lowest mean negative log-likelihood of the labels.

    That loss is convex in b = 1/T, with derivative `mean(E_p[z] - z_label)`, p = softmax(b z): its sign is bisected in
    log b. Dividing by T moves no argmax, so that accuracy stays as it is.

    Args:
      logits: [N, C], finite, of images that the network was not trained on. labels: [N] int.
    Returns: T, scalar in [`LOWEST`, `HIGHEST`]. Where every image is right there is no minimum, and T is as low as
      float32 sees the loss fall; where the logits tell nothing of the labels, it is `HIGHEST`. See `has_minimum`.
    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017. The authors' code takes 50 steps of
      L-BFGS in T from 1.5.

    Examples:
      >>> logits, labels = jnp.array([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [0.0, 4.0]]), jnp.array([0, 0, 1, 1])
      >>> calibration.fit_temperature(logits, labels)  # three of four are right, so that confidence becomes 3/4
      Array(3.641, dtype=float32)
    """
    z, own = _centred(logits, labels)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        p = jax.nn.softmax(jnp.exp(middle) * z)  # [N, C]
        falls = ((p * z).sum(-1) - own).mean() < 0
        return jnp.where(falls, middle, low), jnp.where(falls, high, middle)

    bounds = -jnp.log(jnp.asarray([HIGHEST, LOWEST], z.dtype))  # of log b
    low, high = jax.lax.fori_loop(0, HALVINGS, halve, (bounds[0], bounds[1]))
    return jnp.exp(-(low + high) / 2)


@jax.jit
def has_minimum(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Whether some temperature is the best: scalar bool. logits: [N, C]. labels: [N].

    It takes images that are wrong, or sharper would always be better, and labels whose logits are above their image's
    average, or flatter would.

    Examples:
      >>> calibration.has_minimum(jnp.array([[4.0, 0.0], [4.0, 0.0]]), jnp.array([0, 0]))  # all right
      Array(False, dtype=bool)
    """
    z, own = _centred(logits, labels)
    return (own < 0).any() & (own.mean() > z.mean())


def _centred(logits: ArrayLike, labels: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Logits [N, C], the largest of each image 0, in float32 at least; and those of the labels [N]."""
    z = jnp.asarray(logits)
    z = z.astype(jnp.float64 if z.dtype == jnp.float64 else jnp.float32)
    z = z - z.max(-1, keepdims=True)
    return z, jnp.take_along_axis(z, jnp.asarray(labels)[:, None], -1)[:, 0]
