"""Build the jitted functions of one stage of training. JAX compiles them at their first call.

A stage is data: a method, a sampler, augmentation, parameter groups with their rates, a batch-norm mode, a schedule.
`build` makes the functions of it:

    state = compiled.init(seeds, variables)
    state, metrics = compiled.run(state, source, num_steps)     # one dispatch: `num_steps` steps inside `lax.scan`

With several replicas, every array of seeds, variables, state and metrics has a leading axis of replicas, and one
dispatch trains them all. The compiled step draws its batch with `draw(source, seed, step, rng)` of
`ltjax.engine.feed`. `source` holds all training images if they are on the devices, otherwise the batches of this
dispatch.
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

from ltjax import optim
from ltjax.config import BATCH_NORM_MODES, RunConfig, StageConfig
from ltjax.runs.evaluated import EMA
from ltjax.system import parallel, registry, xla
from ltjax.system.hashing import hash32, is_local
from ltjax.types import Apply, Batch, Method, UserError, Variables


class TrainState(NamedTuple):
    """Everything that a step changes and a checkpoint stores."""

    step: jax.Array  # int32, steps done in this stage
    seed: jax.Array  # uint32, the run's; it and the stage's number determine all random numbers of the stage
    variables: Variables
    opt_state: optax.OptState


class CompiledStage(NamedTuple):
    """The jitted functions of a stage. `run` and `refresh` donate their state."""

    init: Any  # (seed, variables) -> state
    run: Any  # (state, source, num_steps) -> state, metrics {name: [num_steps]}
    refresh: Any  # (state, class means) -> state, before each epoch; None if the method has none
    layers: tuple[str, ...] | None  # layers whose class means `refresh` needs; (): those of the features; None: none
    attacks: bool  # whether each step attacks its images
    steps_per_epoch: int
    num_steps: int  # of the whole stage
    factors: np.ndarray  # [epochs], factors on the learning rate
    trained: dict[str, str]  # {path of a parameter with a rate above 0: its group}


def make_apply(nets: Mapping[str, nn.Module], stage_mode: str) -> Apply:
    """Make the `apply` that methods call: run a network, by default in the stage's batch-norm mode."""

    def apply(variables: Variables, images: jax.Array, net: str = "net", bn: str | None = None):
        mode = registry.choose("batch-norm mode", BATCH_NORM_MODES, bn or stage_mode)
        if net not in nets:
            raise UserError(
                f"the method needs a network {net!r}: give its settings in config.{net}, as in config.model"
            )
        collections = {"params": variables.params[net], "batch_stats": variables.stats[net]}
        if mode == "eval":
            return nets[net].apply(collections, images, False), variables
        outputs, new = nets[net].apply(collections, images, True, mutable=["batch_stats"])
        return outputs, variables._replace(stats={**variables.stats, net: new.get("batch_stats", {})})

    return apply


def random_variables(nets: Mapping[str, nn.Module], image_shape: tuple[int, ...], rng: jax.Array) -> Variables:
    """Initialise the variables of every network. image_shape: [H, W, channels]."""
    params, stats = {}, {}
    for number, (name, net) in enumerate(sorted(nets.items())):
        created = net.init(jax.random.fold_in(rng, number), jnp.zeros((1, *image_shape), jnp.float32))
        params[name], stats[name] = created["params"], created.get("batch_stats", {})
    return Variables(params, stats, {})


def all_finite(tree: Any) -> bool:
    """Return whether no array of a pytree holds an inf or nan."""
    # One array at a time: on a CPU, two programs on split arrays could wait for each other.
    arrays = (x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating))
    return all(np.isfinite(np.asarray(x)).all() if is_local(x) else _finite(x) for x in arrays)


_finite = xla.jit(lambda array: jnp.isfinite(array).all())


def stage_rng(seed: Any, number: Any) -> jax.Array:
    """Return the key from which stage `number` derives all its random numbers. seed: uint32, the run's."""
    return jax.random.fold_in(jax.random.key(seed), number)


def sampler_seed(seed: Any, number: int) -> Any:
    """Return the seed of the sampler of stage `number`, uint32. seed: uint32, the run's."""
    return hash32(seed, np.uint32(number))


def build(
    nets: Mapping[str, nn.Module],
    method: Method,
    draw: Callable[[Any, Any, jax.Array, jax.Array], Batch],
    params: Mapping[str, Any],
    stage: StageConfig,
    run: RunConfig,
    *,
    factors: np.ndarray,
    steps_per_epoch: int,
    mesh: Mesh,
    image_shape: tuple[int, ...] = (32, 32, 3),
) -> CompiledStage:
    """Make the compiled functions of one stage.

    Tests and other trainers call this without data sets; therefore it has more than 8 parameters.

    Args:
      draw: Makes the batches, see `resident_draw` and `streamed_draw` of `ltjax.engine.feed`.
      params: All parameters, arrays or their shapes; only their paths matter.
      stage: The stage's groups, batch_norm, lr, optimizer, ema, sam, evaluate_net, number and name are used. A frozen
        group (rate 0) has no backward pass. batch_norm "train" with a frozen backbone is shifted batch norm.
      run: The run's replicas, replicate, accumulate and gpu_graphs are used. With `accumulate`, loss and gradient are
        means over the parts of a batch, and batch norm normalises each part by its own statistics.
      factors: Factors on the learning rate in each epoch, [epochs]. Nothing trains if there are no epochs.
      mesh: The devices, see `parallel.make_mesh`.
      image_shape: [H, W, channels].

    Raises:
      UserError: The groups do not cover the parameters exactly, or all have rate 0.
    """
    trained = _trained(stage, params) if len(factors) else {}
    optimizer = optim.optimizer(
        trained, stage.groups, lr=stage.lr, factors=factors, steps_per_epoch=steps_per_epoch, **stage.optimizer
    )
    apply = make_apply(nets, stage.batch_norm)
    ema, climb = _ema(stage), _climb(stage, method)
    num_steps = steps_per_epoch * len(factors)
    step = _Step(
        apply, method, draw, optimizer, tuple(trained), stage.number, run.accumulate, mesh, num_steps, ema, climb
    )
    over_replicas = partial(parallel.over_replicas, replicas=run.replicas, mesh=mesh, replicate=run.replicate)
    sharding = parallel.state_sharding(mesh, run.replicas)

    def init(seed: jax.Array, variables: Variables) -> TrainState:
        return step.init(seed, variables, image_shape)

    def dispatch(state: TrainState, source: Any, num_steps: int) -> tuple[TrainState, dict[str, jax.Array]]:
        def steps(state: TrainState, source: Any):
            return jax.lax.scan(lambda state, _: step(state, source), state, length=num_steps)

        return over_replicas(steps)(state, source)

    def refresh(state: TrainState, means: Any) -> TrainState:
        return over_replicas(lambda both, _: step.refresh(*both))((state, means), None)

    return CompiledStage(
        init=xla.jit(jax.vmap(init) if run.replicas > 1 else init, out_shardings=sharding),
        run=xla.jit(
            dispatch,
            donate_argnums=0,
            static_argnums=2,
            # The metrics are replicated, so that every process can read those of all replicas.
            out_shardings=(sharding, parallel.replicated(mesh)),
            compiler_options=xla.graph_options(run.gpu_graphs),
        ),
        refresh=xla.jit(refresh, donate_argnums=0, out_shardings=sharding) if method.refresh else None,
        layers=method.layers,
        attacks=method.attacks,
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        factors=factors,
        trained=trained,
    )


def _trained(stage: StageConfig, params: Mapping[str, Any]) -> dict[str, str]:
    """Return {path: group} of the parameters that a stage trains."""
    assigned = optim.assign_groups(list(optim.flatten(params)), stage.groups)
    trained = {path: group for path, group in assigned.items() if stage.groups[group]["rate"] > 0}
    if not trained:
        raise UserError(f"every parameter group of {sorted(stage.groups)} has rate 0: nothing would train")
    return trained


def _ema(stage: StageConfig) -> Callable | None:
    """Return the function that updates the moving average of the weights, None if the stage keeps none."""
    if not stage.ema:
        return None
    registry.bind(f"config.{stage.name}.ema", optim.check_ema, stage.ema)()
    if stage.evaluate_net != "net":
        raise UserError(f"config.{stage.name}.ema: the stage evaluates the guide, and only the net is averaged")
    return partial(optim.ema, **stage.ema)


def _climb(stage: StageConfig, method: Method) -> Callable | None:
    """Return the function that climbs to SAM's weights, None if there is none."""
    if not stage.sam:
        return None
    registry.bind(f"config.{stage.name}.sam", optim.check_sam, stage.sam)()
    if method.attacks:
        raise UserError(f"config.{stage.name}.sam: not with adversarial training, which has `awp` instead")
    return partial(optim.climbed, **stage.sam)


class _Step(NamedTuple):
    """The training step of one replica, `(state, source) -> (state, metrics)`, and its initial state."""

    apply: Apply
    method: Method
    draw: Callable
    optimizer: optax.GradientTransformation
    trained: tuple[str, ...]  # paths of the parameters with a rate above 0
    number: int  # of the stage
    accumulate: int
    mesh: Mesh
    num_steps: int  # of the stage
    ema: Callable | None  # see `optim.ema`
    climb: Callable | None  # see `optim.climbed`

    def init(self, seed: jax.Array, variables: Variables, image_shape: tuple[int, ...]) -> TrainState:
        extra, arrays = self.method.init(jax.random.fold_in(stage_rng(seed, self.number), 2))
        before, stats = variables.params, {name: v for name, v in variables.stats.items() if name != EMA}
        params = {name: value for name, value in before.items() if name not in ("method", EMA)}
        if self.ema:
            params[EMA], stats[EMA] = (part.get(EMA, part["net"]) for part in (before, variables.stats))
        variables = variables._replace(params={**params, "method": extra} if extra else params, stats=stats)
        # Only for the shapes: `refresh` fills the arrays before the first epoch.
        if self.method.refresh and self.method.layers is not None:
            arrays = self.method.refresh(arrays, self._zero_means(variables, image_shape))
        # Copies, because `run` takes over the memory of its state, and the caller may need the variables again.
        variables = jax.tree.map(jnp.copy, variables._replace(arrays=arrays))
        flat = optim.flatten(variables.params)
        opt_state = self.optimizer.init({path: flat[path] for path in self.trained})
        return TrainState(jnp.zeros((), jnp.int32), seed, variables, opt_state)

    def _zero_means(self, variables: Variables, image_shape: tuple[int, ...]) -> jax.Array | dict[str, jax.Array]:
        image, layers = jnp.zeros((1, *image_shape), jnp.float32), self.method.layers or ()
        outputs = jax.eval_shape(lambda: self.apply(variables, image, bn="eval")[0])
        if missing := [name for name in layers if name not in (outputs.layers or {})]:
            known = ", ".join(outputs.layers or {}) or "none"
            raise UserError(f"the method needs the features of layer {missing[0]!r}; the model's layers: {known}")
        zeros = lambda features: jnp.zeros((outputs.logits.shape[-1], features.shape[-1]), jnp.float32)  # noqa: E731
        return {name: zeros(outputs.layers[name]) for name in layers} if layers else zeros(outputs.features)

    def refresh(self, state: TrainState, means: Any) -> TrainState:
        assert self.method.refresh is not None
        arrays = self.method.refresh(state.variables.arrays, means)
        return state._replace(variables=state.variables._replace(arrays=arrays))

    def __call__(self, state: TrainState, source: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(stage_rng(state.seed, self.number), state.step)
        draw_rng, loss_rng = jax.random.split(rng)
        batch = self.draw(source, sampler_seed(state.seed, self.number), state.step, draw_rng)
        if self.method.progress:
            batch = batch._replace(progress=state.step.astype(jnp.float32) / self.num_steps)
        flat = optim.flatten(state.variables.params)
        trained = {path: flat[path] for path in self.trained}

        # Only trained parameters are an argument of the loss, so that the backward pass ends at the last of them.
        def loss_of(trained: dict[str, jax.Array], variables: Variables, batch: Batch, rng: jax.Array):
            variables = variables._replace(params=optim.unflatten({**flat, **trained}))
            loss, (variables, metrics) = self.method.loss(self.apply, variables, batch, rng)
            return loss, (variables._replace(params={}), metrics)

        gradient_of = jax.value_and_grad(loss_of, has_aux=True)
        if self.accumulate > 1:
            gradient_of = self._accumulated(gradient_of)
        before = state.variables._replace(params={})
        (loss, (variables, metrics)), gradients = gradient_of(trained, before, batch, loss_rng)
        if self.climb:  # batch-norm statistics and metrics are those of the first pass
            _, gradients = gradient_of(self.climb(trained, gradients), before, batch, loss_rng)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, trained)
        params = optim.unflatten({**flat, **jax.tree.map(jnp.add, trained, updates)})
        variables = variables._replace(params=params)
        if self.ema:
            variables = variables._replace(
                **{
                    part: {**values, EMA: self.ema(values[EMA], values["net"], state.step)}
                    for part, values in (("params", variables.params), ("stats", variables.stats))
                }
            )
        state = TrainState(state.step + 1, state.seed, variables, opt_state)
        return state, {"loss": loss, **metrics}

    def _accumulated(self, gradient_of: Callable) -> Callable:
        """Split the batch into parts, one after the other, and average their losses, metrics and gradients."""

        def gradient_of_parts(trained: dict[str, jax.Array], variables: Variables, batch: Batch, rng: jax.Array):
            def part(carry, numbered):
                (variables, total), (number, batch) = carry, numbered
                value, gradients = gradient_of(trained, variables, batch, jax.random.fold_in(rng, number))
                loss, (variables, metrics) = value
                return (variables, jax.tree.map(jnp.add, total, gradients)), {"loss": loss, **metrics}

            start = variables, jax.tree.map(jnp.zeros_like, trained)
            numbered = jnp.arange(self.accumulate), _parts(batch, self.accumulate, self.mesh)
            (variables, total), metrics_of_parts = jax.lax.scan(part, start, numbered)
            metrics = jax.tree.map(lambda x: x.mean(0), metrics_of_parts)
            gradients = jax.tree.map(lambda x: x / self.accumulate, total)
            return (metrics.pop("loss"), (variables, metrics)), gradients

        return gradient_of_parts


def _parts(batch: Batch, count: int, mesh: Mesh) -> Batch:
    """Reshape arrays [B, ...] to [count, B / count, ...]. A part has every count-th image, so no image moves."""

    def parts(x: jax.Array) -> jax.Array:
        if not x.ndim:
            return jnp.broadcast_to(x, count)
        x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        return parallel.split(x, mesh, axis=1)

    return jax.tree.map(parts, batch)


def steps_done(state: TrainState) -> int:
    """Return the number of steps that a state has trained. It is the same in every replica."""
    return int(np.asarray(state.step.addressable_data(0)).reshape(-1)[0])


def kept_optimizer(state: TrainState, before: TrainState) -> TrainState:
    """Copy the momentum of `before`, the end of a stage with the same parameter groups. The schedule starts at 0."""

    def keep(new, old):  # integers are the step counts of the schedule
        return new if jnp.issubdtype(new.dtype, jnp.integer) else jnp.copy(old)

    return state._replace(opt_state=jax.tree.map(keep, state.opt_state, before.opt_state))
