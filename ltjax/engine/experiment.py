"""Set up an experiment: load a run's data, make its networks, compile its stages, evaluate variables."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from ltjax import data, methods, metrics, models, optim, surgery
from ltjax.config import DataConfig, RunConfig, StageConfig
from ltjax.data import augment, identity, samplers, splits
from ltjax.data.source import Images, Stored, first_classes
from ltjax.engine import class_means, evaluate, feed, fixed_backbone
from ltjax.engine.stage import CompiledStage, TrainState, build, make_apply, random_variables, stage_rng
from ltjax.models import precomputed
from ltjax.runs.checkpoint import complete_steps
from ltjax.runs.evaluated import as_evaluated, with_ema
from ltjax.runs.trained import newest, variables_of
from ltjax.runs.weights import hash_weights, is_weights, load_weights, taken, with_weights, with_zeros
from ltjax.runs.workdir import check_same_images
from ltjax.system import parallel, processes, registry, xla
from ltjax.types import Batch, Method, Outputs, UserError, Variables


class Experiment(NamedTuple):
    """A run's config, data, networks and devices, which all its stages share."""

    config: RunConfig
    data: Images | Stored
    split: splits.Split
    description: dict[str, Any]  # content of split.json
    groups: dict[str, np.ndarray]  # {"many": bool [C], ...}
    nets: dict[str, nn.Module]  # of a fixed backbone, only what is applied to its features
    mesh: Mesh
    image_shape: tuple[int, ...]  # [H, W, channels] of what `nets` take
    shapes: Variables  # shapes of the networks' variables, without an axis of replicas
    outputs: Outputs  # shapes of the network's outputs for one image
    # (seed, number of a stage) -> random variables on the devices; 0 for those that weights will replace
    initialise: Callable[..., Variables]
    # feed.Resident, what training draws from; or evaluate.StoredSet, images on disk, for class means only
    train_data: Any
    test_set: evaluate.EvaluationSet | evaluate.StoredSet
    holdout_set: evaluate.EvaluationSet | evaluate.StoredSet | None
    evaluators: dict[str, Callable[..., dict[str, np.ndarray]]]  # {network: see `evaluate.evaluator`}
    class_means: Callable[..., Any]  # see `class_means.make`

    @property
    def streamed(self) -> bool:
        """Whether images stay on disk and are decoded during training."""
        return isinstance(self.train_data, evaluate.StoredSet)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.data.class_names

    @property
    def num_branches(self) -> int:
        """Number of branches whose logits the network sums; 0 if it has none."""
        branches = self.outputs.branches
        return 0 if branches is None else len(branches)


def set_up_with_stages(
    run: RunConfig, data_dir: str | Path | None, workdir: Path | None = None, features_as: str = "compute"
) -> tuple[Experiment, dict[str, CompiledStage]]:
    """Set up an experiment and build all its stages. UserError for any mistake that shows before the first step."""
    experiment = set_up(run, data_dir, workdir, features_as)
    compiled = {name: build_stage(experiment, stage) for name, stage in run.stages.items()}
    for name, stage in run.stages.items():
        trace(experiment, stage, compiled[name])
    for name, stage in run.stages.items():
        if stage.keep_optimizer and compiled[name].trained != compiled[stage.start_from].trained:
            raise UserError(
                f"config.{name}.keep_optimizer: stage {stage.start_from!r} does not train the same parameters "
                "in the same groups"
            )
    if run.weights and _starts_from_weights(run, workdir):
        weights = load_weights(run.weights, run.weights_sha256)
        with_weights(fresh_shapes(experiment), weights, run.weights_parts)  # raises if they do not fit
    return experiment, compiled


def _starts_from_weights(run: RunConfig, workdir: Path | None) -> bool:
    """Return whether a stage will start from `config.weights`: one from scratch that has no checkpoint yet."""
    from_scratch = [name for name, stage in run.stages.items() if stage.start_from == "scratch"]
    return workdir is None or any(not complete_steps(workdir / "checkpoints" / name) for name in from_scratch)


def set_up(
    run: RunConfig, data_dir: str | Path | None, workdir: Path | None = None, features_as: str = "compute"
) -> Experiment:
    """Load the data, choose the long-tailed training set, make the networks, and put resident images on the devices.

    Args:
      data_dir: Folder of prepared data sets.
      workdir: Folder of the run, if its images have to be those that it began with.
      features_as: If the backbone is fixed (`ltjax.engine.fixed_backbone`): "compute" the features of all images.
        "shapes": put ones in their place. "images": compute features in every step.

    Raises:
      UserError: The config does not fit the data or the devices, or the run in the workdir began with other images.
    """
    images = data.load(run.data.name, run.data.root or data_dir, run.data.labels)
    if run.data.classes:
        images = first_classes(images, run.data.classes)
    num_classes = len(images.class_names)
    split = splits.long_tailed_split(
        images.train_labels,
        num_classes,
        imbalance=run.data.imbalance,
        profile=run.data.profile,
        max_count=run.data.max_count or None,
        holdout=run.data.holdout,
        seed=run.data.seed,
        class_names=images.class_names,
    )
    groups = _groups(run.data, split.class_counts)
    description = _describe_images(run, images, split, groups)
    processes.agree({"the images": identity.digest(json.dumps(description["images"]).encode()).hex()})
    if workdir is not None:
        processes.on_first(lambda: check_same_images(workdir, description))
    mesh = parallel.make_mesh(replicas=run.replicas)
    _check_batch_size(run, mesh)
    networks = {"net": run.model, **({"guide": run.guide} if run.guide else {})}
    nets = {name: _network(settings, num_classes) for name, settings in networks.items()}
    image_shape = feed.image_shape(run, images)
    shapes = jax.eval_shape(lambda: random_variables(nets, image_shape, jax.random.key(0)))
    initialise = _initialiser(nets, image_shape, mesh, run.replicas)
    inputs: Images | Stored = images
    if isinstance(images, Stored) and features_as != "images" and fixed_backbone.is_fixed(run, shapes.params):
        weights = None if features_as == "shapes" else _fixed_weights(run, shapes, workdir)
        inputs = fixed_backbone.features(run, images, split, nets["net"], weights, mesh)
        nets = {"net": fixed_backbone.without_backbone(nets["net"])}
    if isinstance(inputs, Stored):
        image_sets = feed.stored(run, inputs, split, mesh)
    else:
        image_sets = feed.resident(run, inputs, split, mesh)
    apply, image = make_apply(nets, "eval"), jnp.zeros((1, *image_sets.shape))
    return Experiment(
        config=run,
        data=images,
        split=split,
        description=description,
        groups=groups,
        nets=nets,
        mesh=mesh,
        image_shape=image_sets.shape,
        shapes=shapes,
        outputs=jax.eval_shape(lambda variables: apply(variables, image)[0], shapes),
        initialise=initialise,
        train_data=image_sets.train,
        test_set=image_sets.test,
        holdout_set=image_sets.holdout,
        evaluators={name: evaluate.evaluator(nets, mesh, replicas=run.replicas, net=name) for name in nets},
        class_means=class_means.make(
            apply, image_sets.train, mesh, replicas=run.replicas, batch_size=run.eval_batch_size
        ),
    )


def _fixed_weights(run: RunConfig, shapes: Variables, workdir: Path | None) -> Variables:
    """Return a network's variables with `config.weights`, or those of a run that has them already."""
    if workdir is not None and not is_weights(run.weights) and (workdir / "config.json").is_file():
        trained = variables_of(workdir, newest(workdir))
        return jax.tree.map(lambda x: np.asarray(x)[0], trained) if run.replicas > 1 else trained
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    return with_weights(zeros, load_weights(run.weights, run.weights_sha256), run.weights_parts)


def _describe_images(
    run: RunConfig, images: Images | Stored, split: splits.Split, groups: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Describe the images of a run: the content of `split.json`."""
    hashes = identity.hash_images(images, split)
    train = hashes.pop("train")
    return {
        **splits.describe(split, seed=run.data.seed, groups=groups, class_names=images.class_names),
        "num_test": len(images.test_labels),
        **({"weights_sha256": hash_weights(run.weights)} if is_weights(run.weights) else {}),
        "images": {name: part.of_classes for name, part in {"train": train, **hashes}.items()},
        "also_trained_on": {name: int(np.isin(part.images, train.images).sum()) for name, part in hashes.items()},
    }


def _check_batch_size(run: RunConfig, mesh: Mesh) -> None:
    sharing = mesh.shape[parallel.BATCH_AXIS] * run.accumulate
    if run.batch_size % sharing:
        parts = f" and {run.accumulate} parts (config.accumulate)" if run.accumulate > 1 else ""
        raise UserError(
            f"config.batch_size = {run.batch_size} cannot be shared by {sharing // run.accumulate} devices{parts}: "
            f"take a multiple of {sharing}"
        )


def _network(settings: Any, num_classes: int) -> nn.Module:
    settings = dict(settings)
    return models.create(settings.pop("name", ""), num_classes, **settings)


def _groups(config: DataConfig, class_counts: np.ndarray) -> dict[str, np.ndarray]:
    if config.groups == "ranges":
        return metrics.range_groups(len(class_counts), config.ranges)
    if config.groups == "ranks":
        return metrics.rank_groups(class_counts, config.ranges)
    return metrics.count_groups(class_counts, few_below=config.few_below, many_above=config.many_above)


def _initialiser(nets: dict[str, nn.Module], image_shape: tuple[int, ...], mesh: Mesh, replicas: int) -> Callable:
    """Return a function of (seeds, number of a stage, names of arrays of "net" that will be replaced: they are 0)."""

    @functools.cache
    def program(replaced: frozenset[str]) -> Callable:
        def initialise(seed: jax.Array, number: jax.Array) -> Variables:
            variables = random_variables(nets, image_shape, jax.random.fold_in(stage_rng(seed, number), 1))
            return with_zeros(variables, replaced) if replaced else variables

        # This program runs once. XLA's CPU backend compiles its random numbers in 20 s, or in 2 s at level 1.
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        fast_to_compile = on_cpu and not jax.config.values["jax_disable_most_optimizations"]
        return xla.jit(
            jax.vmap(initialise, in_axes=(0, None)) if replicas > 1 else initialise,
            out_shardings=parallel.state_sharding(mesh, replicas),
            compiler_options={"xla_backend_optimization_level": 1} if fast_to_compile else None,
        )

    return lambda seed, number, replaced=frozenset(): program(replaced)(seed, number)


# Stages.


def make_method(experiment: Experiment, stage: StageConfig) -> Method:
    asked, class_counts = experiment.config.class_weights, experiment.split.class_counts
    num_features = experiment.outputs.features.shape[-1]
    return methods.of_config(stage.method, asked, experiment.class_names, class_counts, num_features)


def make_augmentation(stage: StageConfig) -> Callable[..., Batch]:
    """Return the function that augments the batches of a stage, with its views."""
    where, views = f"config.{stage.name}", []
    for name, settings in sorted(stage.views.items()):
        if settings.get("mixup_alpha") or settings.get("cutmix_alpha"):
            raise UserError(f"{where}.views.{name}: views are not mixed; turn mixup_alpha and cutmix_alpha off")
        views.append(registry.bind(f"{where}.views.{name}", augment.augment, settings))
    first = registry.bind(f"{where}.augment", augment.augment, stage.augment)
    return augment.with_views(first, views) if views else first


def steps_per_epoch(stage: StageConfig, class_counts: np.ndarray, batch_size: int) -> int:
    """Compute the number of steps in an epoch, at least 1. class_counts: training images of each class [C]."""
    balanced = stage.epoch_size == "balanced"
    images = int(class_counts.max() * len(class_counts) if balanced else class_counts.sum())
    return max(1, images // batch_size) if stage.drop_last else -(-images // batch_size)


def build_stage(experiment: Experiment, stage: StageConfig) -> CompiledStage:
    """Build the jitted functions of a stage. UserError if its config is wrong; `trace` finds further mistakes."""
    run, class_counts, where = experiment.config, experiment.split.class_counts, f"config.{stage.name}"
    method = make_method(experiment, stage)
    extra, _ = jax.eval_shape(lambda: method.init(jax.random.key(0)))
    augmentation = make_augmentation(stage)
    if experiment.streamed:
        if stage.views:
            raise UserError(f"{where}.views: for images in memory; those of {run.data.name!r} stay on disk")
        draw = feed.streamed_draw(augmentation, experiment.mesh)
    else:
        draw = feed.resident_draw(
            samplers.create(**stage.sampler),
            augmentation,
            batch_size=run.batch_size,
            class_counts=class_counts,
            mesh=experiment.mesh,
            others=_others(stage),
        )
    return build(
        experiment.nets,
        method,
        draw,
        {**experiment.shapes.params, **({"method": extra} if extra else {})},
        stage,
        run,
        factors=registry.bind(f"{where}.schedule", optim.schedule_table, stage.schedule)(stage.epochs),
        steps_per_epoch=steps_per_epoch(stage, class_counts, run.batch_size),
        mesh=experiment.mesh,
        image_shape=experiment.image_shape,
    )


def _others(stage: StageConfig) -> Callable | None:
    """Return the sampler of the images that CutMix takes boxes from, if it has one of its own."""
    partner = stage.augment.get("cutmix_partner", "batch")
    return samplers.create(partner) if stage.augment.get("cutmix_alpha") and partner != "batch" else None


def trace(experiment: Experiment, stage: StageConfig, compiled: CompiledStage) -> None:
    """Trace a stage's functions, so that their errors appear before any training.

    JAX keeps the trace of the first dispatch, which then only has to be compiled.
    """
    if stage.epochs:
        num_steps = longest_dispatch(experiment, compiled)
        source = source_shapes(experiment, num_steps)
        compiled.run.jitted().eval_shape(state_shapes(experiment, compiled), source, num_steps)
    if stage.surgery:
        make_surgery(experiment, stage)
    if stage.eval_classifier:
        registry.bind(f"config.{stage.name}.eval_classifier", surgery.tau_normalised, stage.eval_classifier)


def longest_dispatch(experiment: Experiment, compiled: CompiledStage) -> int:
    """Return the most steps in a dispatch of a stage, which are those in its first one."""
    run = experiment.config
    return feed.dispatch_length(
        compiled.steps_per_epoch,
        run.dispatch_steps,
        run.replicas,
        streamed=experiment.streamed,
        attacks=compiled.attacks,
    )


def state_shapes(experiment: Experiment, compiled: CompiledStage) -> TrainState:
    """Return the shapes and shardings of a stage's state, the target of `Checkpoints.restore`."""
    sharding = parallel.state_sharding(experiment.mesh, experiment.config.replicas)
    shapes = jax.eval_shape(compiled.init, seeds(experiment.config), fresh_shapes(experiment))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def source_shapes(experiment: Experiment, num_steps: int = 1) -> Any:
    """Return the source of a dispatch of `num_steps` steps, as arrays or their shapes."""
    if not experiment.streamed:
        return experiment.train_data
    shape = (num_steps, experiment.config.batch_size)
    split: Any = parallel.split_batch(experiment.mesh, axis=1)
    chunk: Any = feed.Chunk
    return chunk(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=parallel.replicated(experiment.mesh)),
        jax.ShapeDtypeStruct((*shape, *experiment.image_shape), jnp.uint8, sharding=split),
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=split),
    )


def open_feed(experiment: Experiment, stage: StageConfig, num_steps: int) -> feed.Feed:
    """Open a stage's batches: all images if the devices hold them, else a stream. The caller closes it."""
    if not experiment.streamed or isinstance(experiment.data, Images):  # `Images` are never streamed
        return feed.Feed(experiment.train_data)
    return feed.training_stream(experiment.config, experiment.data, experiment.split, experiment.mesh, stage, num_steps)


# Variables.


def seeds(run: RunConfig) -> np.ndarray:
    """Return the seed of the run, uint32 []; with several replicas, their seeds [replicas]."""
    of_replicas = np.asarray(run.seed + np.arange(run.replicas), np.uint32)
    return of_replicas if run.replicas > 1 else of_replicas[0, ...]


def fresh_shapes(experiment: Experiment) -> Variables:
    """Return the shapes of `fresh_variables`."""
    replicas = experiment.config.replicas
    leading = (replicas,) if replicas > 1 else ()
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*leading, *x.shape), x.dtype), experiment.shapes)


def fresh_variables(experiment: Experiment, stage: StageConfig, replaced: frozenset[str] = frozenset()) -> Variables:
    """Initialise the networks of every replica randomly, on the devices; arrays that will be `replaced` are 0."""
    return experiment.initialise(seeds(experiment.config), np.uint32(stage.number), replaced)


def starting_variables(experiment: Experiment, stage: StageConfig) -> Variables:
    """Make the variables of a stage from scratch: random, with `config.weights` loaded into them if given.

    If `model.normalise` is "standardise", the statistics of features are those of the training images.
    """
    run = experiment.config
    weights = load_weights(run.weights, run.weights_sha256) if run.weights else None
    variables = fresh_variables(experiment, stage, taken(weights, run.weights_parts) if weights else frozenset())
    if run.model.get("normalise") == "standardise" and not experiment.streamed:
        fitted = xla.jit(precomputed.fitted)(experiment.train_data.images)
        place = lambda leaf, value: jax.device_put(jnp.broadcast_to(value, leaf.shape), leaf.sharding)  # noqa: E731
        of_net = {"backbone": jax.tree.map(place, variables.stats["net"]["backbone"], fitted)}
        variables = variables._replace(stats={**variables.stats, "net": of_net})
    return with_weights(variables, weights, run.weights_parts) if weights else variables


def make_surgery(experiment: Experiment, stage: StageConfig) -> Callable:
    branches, holdout = experiment.num_branches, experiment.holdout_set is not None
    return surgery.create(stage.surgery, experiment.shapes.params["net"], branches=branches, holdout=holdout)


def apply_surgery(
    experiment: Experiment, stage: StageConfig, variables: Variables, check_stop: Callable[[], None] = lambda: None
) -> tuple[Variables, dict[str, Any]]:
    """Apply the stage's surgery. Return the new variables, and the surgery's entry in the stage's record.

    Args:
      check_stop: Called before each dispatch; may raise to stop.
    """

    def holdout_accuracy(variables: Variables) -> np.ndarray:
        holdout = experiment.holdout_set
        assert holdout is not None
        predictions = experiment.evaluators["net"](variables, holdout, None, check_stop)["predictions"]
        return (predictions == holdout.host_labels).mean(-1)

    context = surgery.Context(
        class_counts=experiment.split.class_counts,
        branches=experiment.num_branches,
        fresh=lambda: fresh_variables(experiment, stage),
        class_means=lambda variables: experiment.class_means(variables, (), check_stop),
        holdout_accuracy=holdout_accuracy if experiment.holdout_set is not None else None,
    )
    changed, note = make_surgery(experiment, stage)(variables, context)
    return jax.device_put(changed, parallel.state_sharding(experiment.mesh, experiment.config.replicas)), note


# Evaluation.


def class_means_for(
    experiment: Experiment, stage: StageConfig, variables: Variables, check_stop: Callable[[], None] = lambda: None
) -> jax.Array | None:
    """Compute the class means that a stage's evaluation needs; None if it needs none.

    Args:
      check_stop: Called before each dispatch; may raise to stop.
    """
    return experiment.class_means(with_ema(variables), (), check_stop) if stage.nearest_mean else None


def evaluate_set(
    experiment: Experiment,
    stage: StageConfig,
    variables: Variables,
    images: evaluate.EvaluationSet | evaluate.StoredSet,
    means: jax.Array | None,
    check_stop: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Evaluate a stage's variables on a set of images.

    Return the figures of `evaluate.figures_of`; with several replicas, of `evaluate.over_seeds`.

    Args:
      means: From `class_means_for`.
      check_stop: Called before each dispatch; may raise to stop.
    """
    run, labels, num_classes = experiment.config, images.host_labels, len(experiment.class_names)
    variables = as_evaluated(variables, stage.eval_classifier)
    outcome = experiment.evaluators[stage.evaluate_net](variables, images, means, check_stop)
    if run.replicas == 1:
        return evaluate.figures_of(outcome, labels, experiment.groups, num_classes)
    outcomes = [{name: values[replica] for name, values in outcome.items()} for replica in range(run.replicas)]
    summaries = [evaluate.figures_of(outcome, labels, experiment.groups, num_classes) for outcome in outcomes]
    return evaluate.over_seeds(summaries, seeds(run).tolist())
