"""Lay a run out over devices: batches are split; replicas, the same run with other seeds, train side by side."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

REPLICA_AXIS, BATCH_AXIS = "replica", "data"


def make_mesh(devices: list[jax.Device] | None = None, replicas: int = 1) -> Mesh:
    """Make a mesh (replica, data) whose replica axis has gcd(replicas, devices) devices."""
    devices = jax.devices() if devices is None else devices
    groups = math.gcd(replicas, len(devices))
    shape, axes = (groups, len(devices) // groups), (REPLICA_AXIS, BATCH_AXIS)
    return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(mesh: Mesh, replicas: int) -> NamedSharding:
    """Make the sharding of a training state: replicated, or its leading axis of replicas split over the groups."""
    return NamedSharding(mesh, PartitionSpec(REPLICA_AXIS) if replicas > 1 else PartitionSpec())


def split_batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Make the sharding of arrays whose axis number `axis` is the batch."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXIS))


def split(x: jax.Array, mesh: Mesh, axis: int = 0) -> jax.Array:
    """Split axis number `axis` of x over the devices that share a batch. Call this inside `jit`."""
    current: Any = jax.sharding.get_abstract_mesh()  # inside `over_replicas` the axis of replicas is manual
    mesh = current if REPLICA_AXIS in current.axis_names else mesh
    return jax.lax.with_sharding_constraint(x, split_batch(mesh, axis))


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Put a pytree of host arrays, the same in every process, on the devices."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def put_array(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put_array, tree)


def over_replicas(function: Callable, *, replicas: int, mesh: Mesh, replicate: str = "loop") -> Callable:
    """Make `function(per_replica, shared)` work on all replicas at once.

    Arrays in `per_replica` and in the result get a leading axis [replicas]. With one replica, return `function` as it
    is. The groups of devices work side by side.

    Args:
      replicate: How a group computes several replicas: "loop" (one after the other, inside the program) or "vmap" (in
        one batch, with grouped convolutions).
    """
    if replicas == 1:
        return function

    def of_group(per_replica: Any, shared: Any) -> Any:
        def of_replica(variables: Any) -> Any:
            return function(variables, shared)

        if jax.tree.leaves(per_replica)[0].shape[0] == 1:  # one replica in the group: neither loop nor batching
            return jax.tree.map(lambda x: x[None], of_replica(jax.tree.map(lambda x: x[0], per_replica)))
        return jax.vmap(of_replica)(per_replica) if replicate == "vmap" else jax.lax.map(of_replica, per_replica)

    if mesh.shape[REPLICA_AXIS] == 1:
        return of_group
    split_replicas, everywhere = PartitionSpec(REPLICA_AXIS), PartitionSpec()
    specs: dict[str, Any] = dict(in_specs=(split_replicas, everywhere), out_specs=split_replicas)
    return jax.shard_map(of_group, mesh=mesh, axis_names={REPLICA_AXIS}, check_vma=False, **specs)
