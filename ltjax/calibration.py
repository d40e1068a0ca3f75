"""Temperature scaling: one number that calibrates confidences. This module needs only jax."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

LOWEST, HIGHEST = 0.01, 1000.0  # range of temperatures
HALVINGS = 32  # of the range's logarithm: exact to the last bit of float32


@jax.jit
def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Fit the T that minimises the mean negative log-likelihood of the labels under `softmax(logits / T)`.

    The loss is convex in b = 1/T, with derivative `mean(E_p[z] - z_label)`, p = softmax(b z). The sign of the
    derivative is bisected in log b. T does not change accuracy.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017. The authors' code takes 50 steps of
    L-BFGS in T from 1.5.

    Args:
      logits: [N, C], finite, of images that the network was not trained on.
      labels: [N] int.

    Returns:
      T, scalar in [`LOWEST`, `HIGHEST`]. If every image is right, there is no minimum, and T is the lowest at which the
        loss still falls in float32. If the logits do not depend on the labels, T is `HIGHEST`. See `has_minimum`.

    Examples:
      >>> logits, labels = jnp.array([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [0.0, 4.0]]), jnp.array([0, 0, 1, 1])
      >>> calibration.fit_temperature(logits, labels)  # 3 of 4 are right, so confidence becomes 3/4
      Array(3.641, dtype=float32)
    """
    z, z_label = _centred(logits, labels)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        p = jax.nn.softmax(jnp.exp(middle) * z)  # [N, C]
        falls = ((p * z).sum(-1) - z_label).mean() < 0
        return jnp.where(falls, middle, low), jnp.where(falls, high, middle)

    bounds = -jnp.log(jnp.asarray([HIGHEST, LOWEST], z.dtype))  # of log b
    low, high = jax.lax.fori_loop(0, HALVINGS, halve, (bounds[0], bounds[1]))
    return jnp.exp(-(low + high) / 2)


@jax.jit
def has_minimum(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Return whether a best temperature exists: logits [N, C], labels [N] -> scalar bool.

    It exists if some image is wrong (otherwise a lower T is always better) and the labels' logits are above average
    (otherwise a higher T is always better).

    Examples:
      >>> calibration.has_minimum(jnp.array([[4.0, 0.0], [4.0, 0.0]]), jnp.array([0, 0]))  # all are right
      Array(False, dtype=bool)
    """
    z, z_label = _centred(logits, labels)
    return (z_label < 0).any() & (z_label.mean() > z.mean())


def _centred(logits: ArrayLike, labels: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Shift logits [N, C] so that each image's largest is 0, and take those of the labels, [N]. At least float32."""
    z = jnp.asarray(logits)
    z = z.astype(jnp.float64 if z.dtype == jnp.float64 else jnp.float32)
    z = z - z.max(-1, keepdims=True)
    return z, jnp.take_along_axis(z, jnp.asarray(labels)[:, None], -1)[:, 0]
