"""How a run is laid out over devices: batches split, replicas (the same run with several seeds) side by side."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

REPLICA_AXIS, BATCH_AXIS = "replica", "data"
REPLICATE = ("loop", "vmap")


def make_mesh(devices: list[jax.Device] | None = None, replicas: int = 1) -> Mesh:
    """Devices in gcd(replicas, devices) groups: each has a share of the replicas, and splits their batches."""
    devices = jax.devices() if devices is None else devices
    groups = math.gcd(replicas, len(devices))
    shape, axes = (groups, len(devices) // groups), (REPLICA_AXIS, BATCH_AXIS)
    return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(mesh: Mesh, replicas: int) -> NamedSharding:
    """Of a training state: the same on every device, or a leading axis of replicas over the groups of devices."""
    return NamedSharding(mesh, PartitionSpec(REPLICA_AXIS) if replicas > 1 else PartitionSpec())


def split_batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Axis number `axis` is the batch's."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXIS))


def split(x: jax.Array, mesh: Mesh, axis: int = 0) -> jax.Array:
    """Inside `jit`: axis number `axis` of x is split over the devices that share a batch."""
    current: Any = jax.sharding.get_abstract_mesh()  # inside `over_replicas` the replicas' axis is taken
    mesh = current if REPLICA_AXIS in current.axis_names else mesh
    return jax.lax.with_sharding_constraint(x, split_batch(mesh, axis))


def put(tree: Any, sharding: NamedSharding) -> Any:
    """A pytree of host arrays, the same in every process, on the devices."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def one(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree)


def over_replicas(function: Callable, *, replicas: int, mesh: Mesh, replicate: str = "loop") -> Callable:
    """`function(own, shared)` for all replicas at once: arrays in `own` and the answer get a leading axis [replicas].

    With one replica, `function` itself. The groups of devices work side by side. replicate: what a group does with
    several replicas, "loop" (one after the other, inside the program) or "vmap" (together, every convolution a grouped
    one).
    """
    if replicas == 1:
        return function

    def several(own: Any, shared: Any) -> Any:
        def one(own: Any) -> Any:
            return function(own, shared)

        if jax.tree.leaves(own)[0].shape[0] == 1:  # a group of devices for each replica: neither loop nor batching
            return jax.tree.map(lambda x: x[None], one(jax.tree.map(lambda x: x[0], own)))
        return jax.vmap(one)(own) if replicate == "vmap" else jax.lax.map(one, own)

    if mesh.shape[REPLICA_AXIS] == 1:
        return several
    mine, everywhere = PartitionSpec(REPLICA_AXIS), PartitionSpec()
    specs: dict[str, Any] = dict(in_specs=(mine, everywhere), out_specs=mine, axis_names={REPLICA_AXIS})
    return jax.shard_map(several, mesh=mesh, check_vma=False, **specs)
