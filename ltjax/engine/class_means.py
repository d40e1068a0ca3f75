"""Compute class means: the mean features of each class's training images, in evaluation mode.

DRO-LT's and other methods' `refresh`, surgeries, the evaluation of the nearest mean and the report need them.
`Experiment.class_means` is the function that `make` returns for a run's training images.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ltjax import losses
from ltjax.data.augment import as_float
from ltjax.engine import evaluate
from ltjax.engine.feed import Resident
from ltjax.system import parallel, xla
from ltjax.types import Apply, Variables

# {layer: (sum of its features over each class [C, D_l], number of images [C])}
Sums = dict[str, tuple[jax.Array, jax.Array]]


def make(
    apply: Apply, images: Resident | evaluate.StoredSet, mesh: Mesh, *, replicas: int = 1, batch_size: int = 500
) -> Callable[..., Any]:
    """Make the function that computes class means of training images.

    Args:
      batch_size: Approximate images at a time, over all devices, if they are on the devices. See
        `evaluate.shared_batch`.

    Returns:
      `(variables, layers=(), check_stop=...) -> means`, see `from_sums`. `check_stop` is called before each dispatch,
      and may raise to stop.
    """
    if isinstance(images, Resident):
        size = evaluate.shared_batch(batch_size, images.labels.shape[0], mesh)

        def resident_means(layers: tuple[str, ...], variables: Variables, source: Resident) -> Any:
            def of_replica(variables: Variables, source: Resident) -> Any:
                return of_resident(apply, variables, source, mesh, layers, size)

            return parallel.over_replicas(of_replica, replicas=replicas, mesh=mesh)(variables, source)

        compiled = xla.jit(resident_means, static_argnums=0)

        def means(
            variables: Variables, layers: tuple[str, ...] = (), check_stop: Callable[[], None] = lambda: None
        ) -> Any:
            check_stop()
            return compiled(layers, variables, images)

        return means

    @partial(xla.jit, static_argnums=0, out_shardings=parallel.replicated(mesh))
    def sums(layers: tuple[str, ...], variables: Variables, pixels: jax.Array, labels: jax.Array) -> Sums:
        return sums_by_class(apply, variables, pixels[0], labels[0], layers)

    def streamed_means(
        variables: Variables, layers: tuple[str, ...] = (), check_stop: Callable[[], None] = lambda: None
    ) -> Any:
        variables, total = variables._replace(arrays={}), None
        for batch in images.parts():
            check_stop()
            of_batch = sums(layers, variables, *batch)
            total = of_batch if total is None else jax.tree.map(jnp.add, total, of_batch)
            jax.block_until_ready(total)
        return from_sums(total or {}, layers)

    return streamed_means


def of_resident(
    apply: Apply, variables: Variables, source: Resident, mesh: Mesh, layers: tuple[str, ...], batch_size: int
) -> jax.Array | dict[str, jax.Array]:
    """Compute class means of images on the devices, see `from_sums`. batch_size: at a time, over all devices."""
    size = source.labels.shape[0]

    def of_batch(start):
        index = parallel.split(start + jnp.arange(batch_size), mesh)
        clipped = jnp.minimum(index, size - 1)
        labels = jnp.where(index < size, source.labels[clipped], -1)
        return sums_by_class(apply, variables, source.images[clipped], labels, layers)

    def add(sums, start):
        return jax.tree.map(jnp.add, sums, of_batch(start)), None

    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_batch, 0))
    sums, _ = jax.lax.scan(add, zero, jnp.arange(0, size, batch_size))  # stacked sums would be [batches, C, D]
    return from_sums(sums, layers)


def sums_by_class(
    apply: Apply, variables: Variables, images: jax.Array, labels: jax.Array, layers: tuple[str, ...] = ()
) -> Sums:
    """Sum features over each class, in evaluation mode.

    Args:
      images: uint8 [B, H, W, channels].
      labels: [B]; images with -1 do not count.
    """
    outputs, _ = apply(variables, as_float(images), bn="eval")
    num_classes = outputs.logits.shape[-1]
    features_of = {name: outputs.layers[name] for name in layers} or {"features": outputs.features}
    class_means = {name: losses.class_means(features, labels, num_classes) for name, features in features_of.items()}
    return {name: (means * counts[:, None], counts) for name, (means, counts) in class_means.items()}


def from_sums(sums: Sums, layers: tuple[str, ...] = ()) -> jax.Array | dict[str, jax.Array]:
    """Divide sums by counts: class means [C, D] of `Outputs.features`, or {layer: [C, D_l]} of the named layers."""
    means = {name: total / jnp.maximum(counts, 1)[:, None] for name, (total, counts) in sums.items()}
    return means if layers else means["features"]
