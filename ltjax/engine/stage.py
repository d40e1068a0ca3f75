"""The engine: one stage of training as compiled functions.

A stage is data: a method, a sampler, augmentation, parameter groups with their rates, a batch-norm mode, a schedule.
`build` turns that into functions that share one training step:

    state = stage.init(seeds, variables)
    state, metrics = stage.run(state, source, num_steps)     # one dispatch: `num_steps` steps inside `lax.scan`

With several replicas, every array of seeds, variables, state and metrics has a leading axis of replicas, and one
dispatch trains them all. A batch comes from `draw(source, seed, step, rng)`, inside the compiled step. `source` holds
whatever it draws from: for data that fits, the images themselves, on the device; else the batches of this dispatch.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from ltjax import losses, optim
from ltjax.hashing import hash32
from ltjax.system import parallel, xla
from ltjax.types import Apply, Batch, Method, UserError, Variables

BATCH_NORM_MODES = ("train", "eval")


class State(NamedTuple):
    """All that a step changes; saved and restored whole."""

    step: jax.Array  # int32, steps done in this stage
    seed: jax.Array  # uint32, of the run: all random numbers of a stage follow from it and the stage's number
    variables: Variables
    opt_state: optax.OptState


class Stage(NamedTuple):
    """All functions are jitted; `run` and `refresh` take over the memory of the state they are given."""

    init: Any  # (seed, variables) -> state
    run: Any  # (state, source, num_steps) -> state, metrics {name: [num_steps]}
    refresh: Any  # (state, class means) -> state, before each epoch; None where the method has none
    layers: tuple[str, ...]  # whose class means `refresh` wants; none: the features'
    attacks: bool  # whether each step attacks its images
    steps_per_epoch: int
    num_steps: int  # in all
    factors: np.ndarray  # [epochs] on the learning rate
    assigned: dict[str, str]  # {path of a trained parameter: its group}

    @property
    def trained(self) -> tuple[str, ...]:
        """Paths of the parameters with a rate above 0."""
        return tuple(self.assigned)


class Resident(NamedTuple):
    """Training images on the device, sorted by class."""

    images: jax.Array  # uint8 [N, H, W, channels]
    labels: jax.Array  # int32 [N]


class Chunk(NamedTuple):
    """The batches of K steps, split over the devices."""

    first: jax.Array  # int32, the step of the first
    images: jax.Array  # uint8 [K, B, H, W, channels]
    labels: jax.Array  # int32 [K, B]


def make_apply(nets: Mapping[str, nn.Module], bn: str) -> Apply:
    """The `apply` that methods are handed: run a network, in the stage's batch-norm mode unless told otherwise."""
    stage_mode = bn

    def apply(variables: Variables, images: jax.Array, net: str = "net", bn: str | None = None):
        mode = bn or stage_mode
        if mode not in BATCH_NORM_MODES:
            raise UserError(f"unknown batch-norm mode {mode!r}; known: {', '.join(BATCH_NORM_MODES)}")
        if net not in nets:
            raise UserError(
                f"the method wants a network {net!r}: give its settings in config.{net}, as in config.model"
            )
        collections = {"params": variables.params[net], "batch_stats": variables.stats[net]}
        if mode == "eval":
            return nets[net].apply(collections, images, False), variables
        outputs, new = nets[net].apply(collections, images, True, mutable=["batch_stats"])
        return outputs, variables._replace(stats={**variables.stats, net: new["batch_stats"]})

    return apply


def init_variables(
    nets: Mapping[str, nn.Module], image_shape: tuple[int, ...], rng: jax.Array, method: Method | None = None
) -> Variables:
    """Fresh variables of every network, and of the method where given. image_shape: [H, W, channels]."""
    params, stats, arrays = {}, {}, {}
    for number, (name, net) in enumerate(sorted(nets.items())):
        created = net.init(jax.random.fold_in(rng, number), jnp.zeros((1, *image_shape), jnp.float32))
        params[name], stats[name] = created["params"], created.get("batch_stats", {})
    if method is not None:
        extra, arrays = method.init(jax.random.fold_in(rng, len(nets)))
        if extra:
            params["method"] = extra
    return Variables(params, stats, arrays)


def all_finite(tree: Any) -> bool:
    """Whether no array of a pytree holds an inf or nan."""
    # One after the other: of arrays that are split, two programs at a time could wait for each other on a CPU.
    return all(bool(_finite(x)) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating))


_finite = xla.jit(lambda array: jnp.isfinite(array).all())  # for each shape, of which every tree has few


def stage_rng(seed: Any, number: Any) -> jax.Array:
    """The key that all randomness of stage `number` of a run comes from. seed: uint32, the run's."""
    return jax.random.fold_in(jax.random.key(seed), number)


def resident_draw(
    sampler: Callable, augment: Callable, *, batch_size: int, class_counts: np.ndarray, mesh: Mesh
) -> Callable[[Resident, Any, jax.Array, jax.Array], Batch]:
    """Batches from images that live on the device: `draw(source, seed, step, rng)`.

    sampler: see `ltjax.data.samplers`. augment: `(rng, uint8 images, labels) -> Batch`.
    """

    def draw(source, seed, step, rng):
        index = sampler(seed, step, batch_size=batch_size, class_counts=class_counts)
        index = parallel.split(index, mesh)  # each device gathers its own share
        return augment(rng, source.images[index], source.labels[index])

    return draw


def streamed_draw(augment: Callable, mesh: Mesh) -> Callable[[Chunk, Any, jax.Array, jax.Array], Batch]:
    """Batches that come with each dispatch: `draw(source, seed, step, rng)`. augment: as of `resident_draw`."""

    def draw(source, seed, step, rng):
        images, labels = (
            parallel.split(jax.lax.dynamic_index_in_dim(x, step - source.first, keepdims=False), mesh)
            for x in (source.images, source.labels)
        )
        return augment(rng, images, labels)

    return draw


# {layer: (sum of its features by class [C, D_l], number of images [C])}
FeatureSums = dict[str, tuple[jax.Array, jax.Array]]


def feature_sums(
    apply: Apply, variables: Variables, images: jax.Array, labels: jax.Array, layers: tuple[str, ...] = ()
) -> FeatureSums:
    """Sums over uint8 images [B, H, W, channels] as they are, in evaluation mode; labels [B], -1: not counted."""
    outputs, _ = apply(variables, images.astype(jnp.float32) / 255, bn="eval")
    num_classes = outputs.logits.shape[-1]
    wanted = {name: outputs.layers[name] for name in layers} or {"features": outputs.features}
    found = {name: losses.class_means(features, labels, num_classes) for name, features in wanted.items()}
    return {name: (means * counts[:, None], counts) for name, (means, counts) in found.items()}


def means_of(sums: FeatureSums, layers: tuple[str, ...] = ()) -> jax.Array | dict[str, jax.Array]:
    """Mean feature of each class: [C, D] of `Outputs.features`, or {layer: [C, D_l]} of the named layers."""
    means = {name: total / jnp.maximum(counts, 1)[:, None] for name, (total, counts) in sums.items()}
    return means if layers else means["features"]


def feature_means(
    apply: Apply, variables: Variables, source: Resident, mesh: Mesh, layers: tuple[str, ...], batch_size: int
) -> jax.Array | dict[str, jax.Array]:
    """`means_of` the training images, where they are on the device. batch_size: images at a time, over all devices."""
    size = source.labels.shape[0]

    def batch(start):
        index = parallel.split(start + jnp.arange(batch_size), mesh)
        there = jnp.minimum(index, size - 1)
        labels = jnp.where(index < size, source.labels[there], -1)
        return feature_sums(apply, variables, source.images[there], labels, layers)

    sums = jax.tree.map(lambda x: x.sum(0), jax.lax.map(batch, jnp.arange(0, size, batch_size)))
    return means_of(sums, layers)


def build(
    nets: Mapping[str, nn.Module],
    method: Method,
    draw: Callable[[Any, Any, jax.Array, jax.Array], Batch],
    params: Mapping[str, Any],
    *,
    groups: Mapping[str, Mapping[str, Any]],
    bn: str,
    lr: float,
    factors: np.ndarray,
    steps_per_epoch: int,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    mesh: Mesh,
    image_shape: tuple[int, ...] = (32, 32, 3),
    number: int = 0,
    replicas: int = 1,
    replicate: str = "loop",
    accumulate: int = 1,
    compiler_options: Mapping[str, Any] | None = None,
) -> Stage:
    """Compile-ready functions of one stage.

    Args:
      nets: {name: network}. method: what to minimise. draw: where batches come from.
      params: the parameters to come (arrays or their shapes), for their paths.
      groups: {name: {"match": regex of whole paths, "rate": factor on lr, perhaps "weight_decay", "optional"}}; rate 0
        freezes, and the backward pass of frozen parameters is never computed.
      bn: "train" updates and uses batch statistics ("train" with a frozen backbone is shifted batch norm), "eval" the
        running ones.
      lr, factors: learning rate and its factor in each epoch [epochs]; with no epochs, nothing trains.
      image_shape: [H, W, channels]. number: of the stage in its run, which makes its random numbers its own.
      replicas, replicate: see `ltjax.system.parallel.over_replicas`.
      accumulate: parts of a batch that go through the network one after the other, to save memory. Loss and gradient
        are the means of the parts', each normalised by its own batch statistics.
      compiler_options: of XLA, for `run` alone.
    Raises: UserError for groups that do not cover the parameters exactly, or an unknown batch-norm mode.
    """
    if bn not in BATCH_NORM_MODES:
        raise UserError(f"unknown batch-norm mode {bn!r}; known: {', '.join(BATCH_NORM_MODES)}")
    assigned = optim.assign_groups(list(optim.flatten(params)), groups) if len(factors) else {}
    trained = tuple(path for path, group in assigned.items() if groups[group]["rate"] > 0)
    if not trained and len(factors):
        raise UserError(f"every parameter group of {sorted(groups)} has rate 0: nothing would train")
    apply = make_apply(nets, bn)
    optimizer = optim.optimizer(
        {path: assigned[path] for path in trained},
        groups,
        lr=lr,
        factors=factors,
        steps_per_epoch=steps_per_epoch,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
    )

    def init(seed: jax.Array, variables: Variables) -> State:
        extra, arrays = method.init(jax.random.fold_in(stage_rng(seed, number), 2))
        params = {name: value for name, value in variables.params.items() if name != "method"}
        variables = variables._replace(params={**params, "method": extra} if extra else params)
        if method.refresh:  # its arrays in their shapes; `refresh` fills them before the first epoch
            arrays = method.refresh(arrays, zero_means(variables))
        # copies: `run` takes over the memory of its state, and the caller may keep the variables it started from
        variables = jax.tree.map(jnp.copy, variables._replace(arrays=arrays))
        flat = optim.flatten(variables.params)
        opt_state = optimizer.init({path: flat[path] for path in trained})
        return State(jnp.zeros((), jnp.int32), seed, variables, opt_state)

    def zero_means(variables: Variables):
        image = jnp.zeros((1, *image_shape), jnp.float32)
        outputs = jax.eval_shape(lambda: apply(variables, image, bn="eval")[0])
        num_classes = outputs.logits.shape[-1]
        if missing := [name for name in method.layers if name not in (outputs.layers or {})]:
            known = ", ".join(outputs.layers or {}) or "none"
            raise UserError(f"the method wants the features of layer {missing[0]!r}; the model's layers: {known}")
        wanted = {name: outputs.layers[name] for name in method.layers} or {"features": outputs.features}
        zeros = {name: jnp.zeros((num_classes, x.shape[-1]), jnp.float32) for name, x in wanted.items()}
        return zeros if method.layers else zeros["features"]

    def step(state: State, source: Any) -> tuple[State, dict[str, jax.Array]]:
        rng = jax.random.fold_in(stage_rng(state.seed, number), state.step)
        draw_rng, loss_rng = jax.random.split(rng)
        batch = draw(source, hash32(state.seed, np.uint32(number)), state.step, draw_rng)
        flat = optim.flatten(state.variables.params)

        # Only what trains is an argument of the loss: the backward pass ends where the last trained parameter does.
        def loss_of(own: dict[str, jax.Array], variables: Variables, batch: Batch, rng: jax.Array):
            variables = variables._replace(params=optim.unflatten({**flat, **own}))
            loss, (variables, metrics) = method.loss(apply, variables, batch, rng)
            return loss, (variables._replace(params={}), metrics)

        own, variables = {path: flat[path] for path in trained}, state.variables._replace(params={})
        gradient_of = jax.value_and_grad(loss_of, has_aux=True)
        if accumulate == 1:
            (loss, (variables, metrics)), gradients = gradient_of(own, variables, batch, loss_rng)
        else:

            def part(carry, numbered):
                variables, total = carry
                number, batch = numbered
                found = gradient_of(own, variables, batch, jax.random.fold_in(loss_rng, number))
                (loss, (variables, metrics)), gradients = found
                return (variables, jax.tree.map(jnp.add, total, gradients)), {"loss": loss, **metrics}

            start = variables, jax.tree.map(jnp.zeros_like, own)
            numbered = jnp.arange(accumulate), _parts(batch, accumulate, mesh)
            (variables, total), each = jax.lax.scan(part, start, numbered)
            gradients = jax.tree.map(lambda x: x / accumulate, total)
            metrics = jax.tree.map(lambda x: x.mean(0), each)
            loss = metrics.pop("loss")
        updates, opt_state = optimizer.update(gradients, state.opt_state, own)
        params = optim.unflatten({**flat, **jax.tree.map(jnp.add, own, updates)})
        state = State(state.step + 1, state.seed, variables._replace(params=params), opt_state)
        return state, {"loss": loss, **metrics}

    over_replicas = partial(parallel.over_replicas, replicas=replicas, mesh=mesh, replicate=replicate)

    def run(state: State, source: Any, num_steps: int) -> tuple[State, dict[str, jax.Array]]:
        def one(state: State, source: Any):
            return jax.lax.scan(lambda state, _: step(state, source), state, length=num_steps)

        return over_replicas(one)(state, source)

    def refresh(refresh_arrays: Callable, state: State, means: Any) -> State:
        def one(own: tuple[State, Any], _: None) -> State:
            state, means = own
            arrays = refresh_arrays(state.variables.arrays, means)
            return state._replace(variables=state.variables._replace(arrays=arrays))

        return over_replicas(one)((state, means), None)

    sharding = parallel.state_sharding(mesh, replicas)
    compiled = partial(xla.jit, donate_argnums=0)

    return Stage(
        init=xla.jit(jax.vmap(init) if replicas > 1 else init, out_shardings=sharding),
        # metrics on every device, so that every process can read those of all replicas
        run=compiled(
            run,
            static_argnums=2,
            out_shardings=(sharding, parallel.replicated(mesh)),
            compiler_options=compiler_options,
        ),
        refresh=compiled(partial(refresh, method.refresh), out_shardings=sharding) if method.refresh else None,
        layers=method.layers,
        attacks=method.attacks,
        steps_per_epoch=steps_per_epoch,
        num_steps=steps_per_epoch * len(factors),
        factors=factors,
        assigned={path: assigned[path] for path in trained},
    )


def _parts(batch: Batch, count: int, mesh: Mesh) -> Batch:
    """Arrays [B, ...] -> [count, B / count, ...]: every count-th image, so that no image changes its device."""

    def parts(x: jax.Array) -> jax.Array:
        if not x.ndim:
            return jnp.broadcast_to(x, count)
        x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        return parallel.split(x, mesh, axis=1)

    return jax.tree.map(parts, batch)


def steps_done(state: State) -> int:
    """Steps that a state has behind it, the same in every replica."""
    return int(np.asarray(state.step.addressable_data(0)).reshape(-1)[0])


def kept_optimizer(state: State, before: State) -> State:
    """`state` with the momentum of `before`, a stage with the same groups of parameters; its schedule starts anew."""

    def keep(new, old):  # whole numbers count steps
        return new if jnp.issubdtype(new.dtype, jnp.integer) else jnp.copy(old)

    return state._replace(opt_state=jax.tree.map(keep, state.opt_state, before.opt_state))
