"""The mean softmax of the images of each class over the last epoch: weights of GKL, as a method's arrays."""

import jax
import jax.numpy as jnp

Arrays = dict[str, jax.Array]  # class_means [C, C], row c the mean of class c; sums [C, C] of the current epoch


def init(num_classes: int) -> Arrays:
    """Begin with uniform means."""
    uniform = jnp.full((num_classes, num_classes), 1 / num_classes, jnp.float32)
    return {"class_means": uniform, "sums": jnp.zeros_like(uniform)}


def refresh(arrays: Arrays, _: None = None) -> Arrays:
    """Take the means of the last epoch. A class that it did not show keeps its row."""
    totals = arrays["sums"].sum(1, keepdims=True)
    seen = totals > 0
    means = jnp.where(seen, arrays["sums"] / jnp.where(seen, totals, 1), arrays["class_means"])
    return {"class_means": means, "sums": jnp.zeros_like(means)}


def add(arrays: Arrays, softmax: jax.Array, labels: jax.Array) -> Arrays:
    """Add a batch, softmax [B, C] and labels [B], to the sums."""
    is_label = jax.nn.one_hot(labels, softmax.shape[-1], dtype=softmax.dtype)  # [B, C]
    return {**arrays, "sums": arrays["sums"] + jnp.matmul(is_label.T, softmax, precision="highest")}


def weights(arrays: Arrays, labels: jax.Array) -> jax.Array:
    """Return the mean of each image's class: labels [B] -> [B, C]."""
    means = arrays["class_means"]
    return jnp.matmul(jax.nn.one_hot(labels, len(means), dtype=means.dtype), means, precision="highest")
