"""What a run works on, made ready: data on the devices, networks, and each stage as compiled functions."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from ltjax import config as config_module
from ltjax import data, methods, metrics, models, optim, registry, surgery
from ltjax.config import Run
from ltjax.data import augment, samplers, splits
from ltjax.data.source import Images, Stored, first_classes
from ltjax.engine import evaluate, feed, stage
from ltjax.interop.weights import into, load_weights
from ltjax.runs.checkpoint import Checkpoints
from ltjax.runs.trained import is_archive, read_archive
from ltjax.system import parallel, xla
from ltjax.system.cores import num_cores
from ltjax.types import Method, UserError, Variables, one_line


class Problem(NamedTuple):
    """What stays the same through all stages of a run."""

    data: Images | Stored
    split: splits.Split
    groups: dict[str, np.ndarray]  # {"many": bool [C], ...}
    nets: dict[str, nn.Module]
    mesh: Mesh
    image_shape: tuple[int, ...]  # [H, W, channels]
    shapes: Variables  # shapes of the networks' variables, of one replica
    initialise: Callable[..., Variables]  # (seed, number of a stage) -> newly initialised networks, on the devices
    train_data: Any  # stage.Resident, or evaluate.StoredSet where the images stay on disk
    test_set: evaluate.EvaluationSet | evaluate.StoredSet
    holdout_set: evaluate.EvaluationSet | evaluate.StoredSet | None
    evaluate: dict[str, Callable[..., dict[str, np.ndarray]]]  # of each network, see `ltjax.engine.evaluate.evaluator`
    class_means: Callable[..., Any]  # of the training images, see `ltjax.engine.feed.class_means`

    @property
    def streamed(self) -> bool:
        """Whether the images stay on disk, and are decoded when they are needed."""
        return isinstance(self.data, Stored)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.data.class_names

    @property
    def num_branches(self) -> int:
        """Branches of the network whose logits are summed; 0 where it has none."""
        image, apply = jnp.zeros((1, *self.image_shape)), stage.make_apply(self.nets, "eval")
        branches = jax.eval_shape(lambda variables: apply(variables, image)[0], self.shapes).branches
        return 0 if branches is None else len(branches)


def use_cpu_cores(batch_size: int) -> None:
    """On a machine without an accelerator, make its cores JAX devices; before JAX starts, and only if nobody chose.

    Two devices that share a batch run a step 1.4 times as fast as one device that has both cores. Each gets at least
    16 images of a batch, and their number divides it.
    """
    if os.environ.get("JAX_NUM_CPU_DEVICES") or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    most = max(1, min(num_cores(), batch_size // 16))
    try:
        jax.config.update("jax_num_cpu_devices", max(n for n in range(1, most + 1) if batch_size % n == 0))
    except RuntimeError:
        pass  # JAX runs already, with the devices that its caller wanted


INSTALL = {"NVIDIA GPU": 'pip install -e ".[cuda]"', "TPU": 'pip install -e ".[tpu]"'}


def start_devices() -> list[str]:
    """Have JAX look for its devices -> what it says of accelerators that it cannot use, and what to do.

    Raises: UserError where a platform that JAX_PLATFORMS asks for is not there.
    """
    said: list[str] = []
    hear = logging.Handler(logging.WARNING)
    hear.emit = lambda record: said.append(record.getMessage())  # pyrefly: ignore[bad-assignment]
    logger = logging.getLogger("jax._src.xla_bridge")
    level = logger.level
    logger.setLevel(logging.WARNING)  # the rest of JAX may have been silenced
    logger.addHandler(hear)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = jax.config.values["jax_platforms"]
        raise UserError(
            f"JAX cannot use JAX_PLATFORMS={asked} ({one_line(error) or 'it is not installed'}): install what it "
            f"needs, such as {' or '.join(INSTALL.values())}, or leave the variable out"
        ) from error
    finally:
        logger.removeHandler(hear)
        logger.setLevel(level)
    found = [sentence for sentence in said if any(name in sentence for name in INSTALL)]
    hints = [next(hint for name, hint in INSTALL.items() if name in sentence) for sentence in found]
    return [f"{sentence} To use it: {hint}" for sentence, hint in zip(found, hints, strict=True)]


def setup(run: Run, data_dir: str | Path | None) -> Problem:
    """Load the data, choose the long-tailed part, build the network, put on the devices what fits there."""
    found = data.load(run.data.name, run.data.root or data_dir)
    if run.data.classes:
        found = first_classes(found, run.data.classes)
    num_classes = len(found.class_names)
    split = splits.long_tailed_split(
        found.train_labels,
        num_classes,
        imbalance=run.data.imbalance,
        profile=run.data.profile,
        max_count=run.data.max_count or None,
        holdout=run.data.holdout,
        seed=run.data.seed,
        class_names=found.class_names,
    )
    mesh = parallel.make_mesh(replicas=run.replicas)
    sharing = mesh.shape[parallel.BATCH_AXIS] * run.accumulate
    if run.batch_size % sharing:
        parts = f" and {run.accumulate} parts (config.accumulate)" if run.accumulate > 1 else ""
        raise UserError(
            f"config.batch_size = {run.batch_size} cannot be shared by {sharing // run.accumulate} devices{parts}: "
            f"take a multiple of {sharing}"
        )
    nets: dict[str, nn.Module] = {}
    for name, settings in (("net", run.model), ("guide", run.guide)):
        if settings or name == "net":
            own = dict(settings)
            nets[name] = models.create(own.pop("name", ""), num_classes, **own)
    images = (
        feed.stored(run, found, split, mesh) if isinstance(found, Stored) else feed.resident(run, found, split, mesh)
    )
    return Problem(
        data=found,
        split=split,
        groups=_groups(run, split.class_counts),
        nets=nets,
        mesh=mesh,
        image_shape=images.shape,
        shapes=jax.eval_shape(lambda: stage.init_variables(nets, images.shape, jax.random.key(0))),
        initialise=_initialiser(nets, images.shape, mesh, run.replicas),
        train_data=images.train,
        test_set=images.test,
        holdout_set=images.holdout,
        evaluate={name: evaluate.evaluator(nets, mesh, replicas=run.replicas, net=name) for name in nets},
        class_means=feed.class_means(
            stage.make_apply(nets, "eval"), images.train, mesh, replicas=run.replicas, batch_size=run.eval_batch_size
        ),
    )


def prepare(
    run: Run, stages: Mapping[str, config_module.Stage], data_dir: str | Path | None
) -> tuple[Problem, dict[str, stage.Stage]]:
    """All that can go wrong before the first step goes wrong here."""
    problem = setup(run, data_dir)
    built = {name: build_stage(run, name, settings, problem) for name, settings in stages.items()}
    for name, settings in stages.items():
        if settings.keep_optimizer and built[name].assigned != built[settings.start_from].assigned:
            raise UserError(
                f"config.{name}.keep_optimizer: stage {settings.start_from!r} does not train the same parameters "
                "in the same groups"
            )
    if run.weights:
        into(fresh_shapes(run, problem), load_weights(run.weights), run.weights_parts)
    return problem, built


def _groups(run: Run, class_counts: np.ndarray) -> dict[str, np.ndarray]:
    own = run.data
    if own.groups == "ranges":
        return metrics.range_groups(len(class_counts), own.ranges)
    if own.groups == "ranks":
        return metrics.rank_groups(class_counts, own.ranges)
    return metrics.count_groups(class_counts, few_below=own.few_below, many_above=own.many_above)


def make_method(settings: config_module.Stage, problem: Problem) -> Method:
    hyper = dict(settings.method)
    return methods.create(hyper.pop("name", ""), problem.split.class_counts, **hyper)


def steps_per_epoch(settings: config_module.Stage, class_counts: np.ndarray, batch_size: int) -> int:
    """Steps in an epoch of a stage, 1 at least. class_counts: training images of each class [C]."""
    balanced = settings.epoch_size == "balanced"
    draws = int(class_counts.max() * len(class_counts) if balanced else class_counts.sum())
    return max(1, draws // batch_size) if settings.drop_last else -(-draws // batch_size)


def build_stage(run: Run, name: str, settings: config_module.Stage, problem: Problem) -> stage.Stage:
    """The compiled functions of one stage of a config. Raises: UserError for all that a config can get wrong there."""
    class_counts, number = problem.split.class_counts, run.stages.index(name)
    method = make_method(settings, problem)
    extra, _ = jax.eval_shape(lambda: method.init(jax.random.key(0)))
    sampler = samplers.create(**settings.sampler)
    augmented = registry.bind(f"config.{name}.augment", augment.augment, settings.augment)
    if problem.streamed:
        draw = stage.streamed_draw(augmented, problem.mesh)
    else:
        draw = stage.resident_draw(
            sampler, augmented, batch_size=run.batch_size, class_counts=class_counts, mesh=problem.mesh
        )
    built = stage.build(
        problem.nets,
        method,
        draw,
        {**problem.shapes.params, **({"method": extra} if extra else {})},
        groups=settings.groups,
        bn=settings.batch_norm,
        lr=settings.lr,
        factors=registry.bind(f"config.{name}.schedule", optim.schedule_table, settings.schedule)(settings.epochs),
        steps_per_epoch=steps_per_epoch(settings, class_counts, run.batch_size),
        **settings.optimizer,
        mesh=problem.mesh,
        image_shape=problem.image_shape,
        number=number,
        replicas=run.replicas,
        replicate=run.replicate,
        accumulate=run.accumulate,
        compiler_options=xla.graph_options(run.gpu_graphs),
    )
    # errors inside what is compiled, now and not hours later
    seed, step = np.uint32(0), jnp.zeros((), jnp.int32)
    batch = jax.eval_shape(draw, source_shapes(run, problem), seed, step, jax.random.key(0))
    variables = jax.eval_shape(built.init, seeds(run), fresh_shapes(run, problem)).variables
    apply = stage.make_apply(problem.nets, settings.batch_norm)
    jax.eval_shape(lambda v, b: method.loss(apply, v, b, jax.random.key(0)), _one(run, variables), batch)
    if settings.surgery:
        make_surgery(settings, problem)
    if settings.eval_classifier:
        registry.bind(f"config.{name}.eval_classifier", surgery.tau_normalised, settings.eval_classifier)
    return built


def source_shapes(run: Run, problem: Problem, num_steps: int = 1) -> Any:
    """What a dispatch of `num_steps` steps draws from, as arrays or their shapes."""
    if not problem.streamed:
        return problem.train_data
    shape, split = (num_steps, run.batch_size), parallel.split_batch(problem.mesh, axis=1)
    shapes: Any = stage.Chunk
    return shapes(
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct((*shape, *problem.image_shape), jnp.uint8, sharding=split),
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=split),
    )


def batches(run: Run, name: str, settings: config_module.Stage, problem: Problem, num_steps: int) -> feed.Feed:
    """Where the dispatches of a stage draw from; to be closed."""
    if isinstance(problem.data, Images):
        return feed.Feed(problem.train_data)
    return feed.streamed(
        run,
        problem.data,
        problem.split,
        problem.mesh,
        sampler=samplers.create(**settings.sampler),
        number=run.stages.index(name),
        num_steps=num_steps,
    )


def _one(run: Run, tree):
    """Shapes of one replica."""
    cut = slice(1, None) if run.replicas > 1 else slice(None)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[cut], x.dtype), tree)


def seeds(run: Run) -> np.ndarray:
    """The seed of the run, uint32 [], or of every replica, [replicas]."""
    each = np.asarray(run.seed + np.arange(run.replicas), np.uint32)
    return each if run.replicas > 1 else each[0, ...]


def _initialiser(
    nets: Mapping[str, nn.Module], image_shape: tuple[int, ...], mesh: Mesh, replicas: int
) -> Callable[..., Variables]:
    """`(seed, number of a stage) -> newly initialised networks`; of several replicas, of each seed."""

    def one(seed: jax.Array, number: jax.Array) -> Variables:
        return stage.init_variables(nets, image_shape, jax.random.fold_in(stage.stage_rng(seed, number), 1))

    on_cpu = mesh.devices.flat[0].platform == "cpu"
    # Run once, and its random numbers take XLA's CPU backend 20 s to optimise: 2 s at level 1.
    optimise = on_cpu and not jax.config.values["jax_disable_most_optimizations"]
    return xla.jit(
        jax.vmap(one, in_axes=(0, None)) if replicas > 1 else one,
        out_shardings=parallel.state_sharding(mesh, replicas),
        compiler_options={"xla_backend_optimization_level": 1} if optimise else None,
    )


def fresh_shapes(run: Run, problem: Problem) -> Variables:
    """Shapes of newly initialised networks, of every replica."""
    leading = (run.replicas,) if run.replicas > 1 else ()
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*leading, *x.shape), x.dtype), problem.shapes)


def fresh_variables(run: Run, name: str, problem: Problem) -> Variables:
    """Newly initialised networks, of every replica, on the devices."""
    return problem.initialise(seeds(run), np.uint32(run.stages.index(name)))


def initial_variables(run: Run, name: str, problem: Problem) -> Variables:
    """What a stage from scratch starts from: new networks, with `config.weights` in them where a run has some."""
    variables = fresh_variables(run, name, problem)
    return into(variables, load_weights(run.weights), run.weights_parts) if run.weights else variables


class Imported(NamedTuple):
    """`config.weights`, to be judged in a workdir that holds no run."""

    run: Run  # with the network that the weights are for
    problem: Problem
    settings: config_module.Stage  # of the last stage, which says how to judge
    variables: Variables


def imported(
    run: Run, stages: Mapping[str, config_module.Stage], workdir: Path, data_dir: str | Path | None
) -> Imported | None:
    """Weights that are all there is to judge; None where the workdir holds a run, or the config names no weights."""
    if (workdir / "config.json").exists() or not run.weights or run.weights_parts:
        return None
    weights, last = load_weights(run.weights), run.stages[-1]
    own = {key: run.model[key] for key in ("dtype", "platform", "remat") if key in run.model}
    run = run._replace(model={**weights.settings, **own})
    problem = setup(run, data_dir)
    settings = stages[last]._replace(title="Imported weights", epochs=0, surgery={}, evaluate_net="net")
    return Imported(run, problem, settings, into(fresh_variables(run, last, problem), weights))


def make_surgery(settings: config_module.Stage, problem: Problem) -> Callable:
    branches, holdout = problem.num_branches, problem.holdout_set is not None
    return surgery.create(settings.surgery, problem.shapes.params["net"], branches=branches, holdout=holdout)


def operate(
    run: Run, name: str, settings: config_module.Stage, problem: Problem, variables: Variables
) -> tuple[Variables, dict[str, Any]]:
    """The stage's surgery on variables -> new variables, and what is worth noting about it."""

    def holdout_accuracy(tried: Variables) -> np.ndarray:
        held = problem.holdout_set
        assert held is not None
        predictions = problem.evaluate["net"](tried, held)["predictions"]
        return (predictions == held.host_labels).mean(-1)

    context = surgery.Context(
        class_counts=problem.split.class_counts,
        branches=problem.num_branches,
        fresh=lambda: fresh_variables(run, name, problem),
        class_means=problem.class_means,
        holdout_accuracy=holdout_accuracy if problem.holdout_set is not None else None,
    )
    sharding = parallel.state_sharding(problem.mesh, run.replicas)
    changed, note = make_surgery(settings, problem)(variables, context)
    return jax.device_put(changed, sharding), note


def restored(
    run: Run, name: str, settings: config_module.Stage, problem: Problem, workdir: Path
) -> tuple[stage.Stage, stage.State, dict[str, Any]] | None:
    """A stage, its newest checkpoint and the record beside it; None where there is no checkpoint.

    Of an archived run (`ltjax.archive`), its last stage, with the weights there.
    """
    built = build_stage(run, name, settings, problem)
    if is_archive(workdir):
        kept = read_archive(workdir)
        if name != kept.stage:
            return None
        state = built.init(seeds(run), fresh_variables(run, name, problem))
        variables = into(state.variables, kept.weights)
        own = kept.weights.variables.params.get("method")
        variables = variables._replace(params={**variables.params, **({"method": own} if own else {})})
        return built, state._replace(step=jnp.full_like(state.step, kept.step), variables=variables), kept.record
    sharding = parallel.state_sharding(problem.mesh, run.replicas)
    state = jax.eval_shape(built.init, seeds(run), fresh_shapes(run, problem))
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)
    with Checkpoints(workdir / "checkpoints" / name) as checkpoints:
        found = checkpoints.restore(state, move_damaged=False)
    return None if found is None else (built, *found)


def class_means_for(settings: config_module.Stage, problem: Problem, variables: Variables) -> jax.Array | None:
    """What the evaluation of this stage needs to report the nearest class mean, where it does."""
    return problem.class_means(variables) if settings.nearest_mean else None


def evaluate_split(
    run: Run,
    settings: config_module.Stage,
    problem: Problem,
    variables: Variables,
    held: evaluate.EvaluationSet | evaluate.StoredSet,
    means: jax.Array | None,
    go_on: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The figures of a table, see `ltjax.engine.evaluate.summarise` and, of several replicas, `over_seeds`.

    means: mean training features of each class, see `class_means_for`. go_on: called now and then; may raise to stop.
    """
    outcome = problem.evaluate[settings.evaluate_net](
        surgery.as_evaluated(variables, settings.eval_classifier), held, means, go_on
    )
    labels, num_classes = held.host_labels, len(problem.class_names)
    if run.replicas == 1:
        return evaluate.summarise(outcome, labels, problem.groups, num_classes)
    each = [{name: values[r] for name, values in outcome.items()} for r in range(run.replicas)]
    summaries = [evaluate.summarise(one, labels, problem.groups, num_classes) for one in each]
    return evaluate.over_seeds(summaries, seeds(run).tolist())


def evaluate_restored(
    run: Run, settings: config_module.Stage, problem: Problem, built: stage.Stage, state: stage.State
) -> dict[str, Any]:
    """What a checkpoint, see `restored`, makes of the test images: {"epoch": as begun, "step", "test"}."""
    step = stage.steps_done(state)
    means = class_means_for(settings, problem, state.variables)
    test = evaluate_split(run, settings, problem, state.variables, problem.test_set, means)
    return {"epoch": -(-step // built.steps_per_epoch), "step": step, "test": test}
