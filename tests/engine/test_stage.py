"""Compiled stages, with a toy method and network."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ltjax.data import augment, samplers
from ltjax.engine import class_means, feed, stage
from ltjax.system import parallel
from ltjax.types import Batch, Method, Outputs, UserError, Variables
from tests import stages

COUNTS = np.array([70, 40, 23])
ALL = {"all": {"match": ".*", "rate": 1.0}}


class Toy(nn.Module):
    """A linear layer on the channel means of the image."""

    @nn.compact
    def __call__(self, images, train=False):
        features = images.mean((1, 2))
        return Outputs(nn.Dense(3, name="classifier")(features), features)


@pytest.fixture
def source():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), COUNTS).astype(np.int32)
    images = rng.integers(0, 255, (len(labels), 4, 4, 2)).astype(np.uint8)
    return feed.Resident(jnp.asarray(images), jnp.asarray(labels))


def toy_method(refresh=None):
    def init(rng):
        return {"bias": jnp.zeros(3)}, {"centroids": jnp.zeros((3, 2))}

    def loss(apply, variables, batch, rng):
        outputs, variables = apply(variables, batch.images)
        logits = outputs.logits + variables.params["method"]["bias"]
        return -jax.nn.log_softmax(logits)[:, 0].mean(), (variables, {"noise": jax.random.normal(rng)})

    return Method(init, loss, refresh)


def random_draw(source, seed, step, rng):
    index = jax.random.randint(rng, (16,), 0, len(source.labels))
    return Batch(source.images[index].astype(jnp.float32) / 255, source.labels[index])


def build(method, *, devices=8, groups=None, factors=None, lr=0.1, draw=random_draw, seed=2, **settings):
    """Build (compiled stage, initial state, variables it starts from)."""
    mesh, net = parallel.make_mesh(jax.devices()[:devices]), {"net": Toy()}
    start = jax.device_put(stage.random_variables(net, (4, 4, 2), jax.random.key(0)), parallel.replicated(mesh))
    shapes = jax.eval_shape(lambda: stages.initial(net, (4, 4, 2), method))

    settings = dict(bn="train", lr=lr, steps_per_epoch=4, mesh=mesh, image_shape=(4, 4, 2), **settings)
    factors, groups = np.ones(2) if factors is None else factors, ALL if groups is None else groups
    compiled = stages.build(net, method, draw, shapes.params, groups=groups, factors=factors, **settings)
    return compiled, compiled.init(np.uint32(seed), start), start


@pytest.mark.parametrize("devices", [1, 8])
def test_refresh_gets_the_mean_feature_of_each_class(source, devices):
    compiled, state, _ = build(toy_method(lambda arrays, means: {"centroids": means}), devices=devices)
    mesh = parallel.make_mesh(jax.devices()[:devices])
    means = class_means.make(stage.make_apply({"net": Toy()}, "eval"), source, mesh, batch_size=40)
    state = compiled.refresh(state, means(state.variables))
    features = np.asarray(source.images, np.float64).mean((1, 2)) / 255
    expected = [features[np.asarray(source.labels) == c].mean(0) for c in range(3)]
    np.testing.assert_allclose(state.variables.arrays["centroids"], expected, rtol=1e-5)


def test_class_means_take_no_memory_for_each_batch():
    """Memory for sums of 200 batches is that for sums of 2 batches: [C, D] once."""
    mesh, width = parallel.make_mesh(jax.devices()[:1]), 3000

    def apply(variables, images, bn):
        features = jnp.repeat(images.mean((1, 2)), width, axis=-1)
        return Outputs(jnp.zeros((len(images), 3)), features), variables

    def temporaries(batches):
        size = 4 * batches
        images = jax.ShapeDtypeStruct((size, 4, 4, 2), jnp.uint8)
        resident = feed.Resident(images, jax.ShapeDtypeStruct((size,), jnp.int32))
        means = jax.jit(lambda source: class_means.of_resident(apply, None, source, mesh, (), 4))
        return means.lower(resident).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(200) < 1.5 * temporaries(2)


def test_a_method_without_refresh_has_none():
    assert build(toy_method())[0].refresh is None


def collectives(program):
    """List the collectives of a compiled program: {kind: largest number of elements}."""
    largest = {}
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
    for types, kind in re.findall(rf" = (.*?) ({kinds})(?:-start)?\(", program):
        sizes = [np.prod([int(n) for n in shape.split(",") if n]) for shape in re.findall(r"\[([\d,]*)\]", types)]
        largest[kind] = max(largest.get(kind, 0), *sizes)
    return largest


def test_devices_exchange_no_images(source):
    """A step with mixup on eight devices exchanges only sums over the batch."""
    mixing = partial(augment.augment, crop_padding=1, cutout_size=2, mixup_alpha=0.2)
    draw = feed.resident_draw(
        samplers.create("instance_balanced"), mixing, batch_size=64, class_counts=COUNTS, mesh=parallel.make_mesh()
    )
    compiled, state, _ = build(net_method(), draw=draw)
    largest = collectives(compiled.run.lower(state, source, 2).compile().as_text())
    assert set(largest) == {"all-reduce"} and largest["all-reduce"] <= 2 * 3, largest  # the classifier's gradient


def test_one_dispatch_of_many_steps_equals_many_dispatches_of_one(source):
    outcomes = []
    for lengths in ((8,), (3, 5), (1,) * 8):
        compiled, state, _ = build(toy_method())
        losses = []
        for length in lengths:
            state, metrics = compiled.run(state, source, length)
            losses += np.asarray(metrics["noise"]).tolist()
        outcomes.append((losses, jax.tree.map(np.asarray, state)))
    for noise, state in outcomes[1:]:
        assert noise == outcomes[0][0]  # the same random numbers
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state, outcomes[0][1])


@pytest.mark.parametrize("devices", [1, 4])
def test_a_batch_in_parts_has_the_mean_of_their_losses_and_gradients(source, devices):
    """Without batch norm and noise, these equal those of the whole batch."""
    outcomes = []
    for accumulate in (1, 4):
        compiled, state, _ = build(toy_method(), devices=devices, accumulate=accumulate)
        state, metrics = compiled.run(state, source, 5)
        outcomes.append((np.asarray(metrics["loss"]), jax.tree.map(np.asarray, state.variables.params)))
    np.testing.assert_allclose(outcomes[1][0], outcomes[0][0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), outcomes[1][1], outcomes[0][1])


def test_each_image_of_a_batch_is_in_one_part(source):
    labels = []

    def keeping(batch):
        labels.append(batch.labels.shape)
        return batch

    def draw(source, seed, step, rng):
        return Batch(jnp.zeros((16, 4, 4, 2)), jnp.arange(16), jnp.arange(16)[::-1], jnp.float32(0.3))

    def loss(apply, variables, batch, rng):
        keeping(batch)
        outputs, variables = apply(variables, batch.images)
        total = outputs.logits.sum() * 0 + batch.labels.sum().astype(jnp.float32) * batch.lam
        return total, (variables, {"partners": batch.partner_labels.sum() + batch.labels.sum()})

    method = Method(lambda rng: ({}, {}), loss)
    compiled, state, _ = build(method, draw=draw, accumulate=4)
    _, metrics = compiled.run(state, source, 1)
    assert set(labels) == {(4,)}
    np.testing.assert_allclose(metrics["loss"], [120 * 0.3 / 4], rtol=1e-6)
    np.testing.assert_allclose(metrics["partners"], [240 / 4])


def test_run_is_compiled_with_the_options_for_cuda_graphs(source, monkeypatch):
    monkeypatch.setattr(stage.xla, "graph_options", lambda kind: {"xla_no_such_option": kind == "default"})
    compiled, state, _ = build(toy_method())
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_no_such_option'"):
        compiled.run(state, source, 1)


def test_run_leaves_the_initial_variables_usable(source):
    """Check that `run` donates its state, but not the initial variables."""
    compiled, state, start = build(toy_method())
    compiled.run(state, source, 2)
    assert np.isfinite(np.asarray(start.params["net"]["classifier"]["kernel"])).all()


def test_frozen_groups_keep_their_values(source):
    groups = {"frozen": {"match": "net/.*", "rate": 0.0}, "method": {"match": "method/.*", "rate": 1.0}}
    compiled, state, start = build(toy_method(), groups=groups)
    assert list(compiled.trained) == ["method/bias"]
    state, _ = compiled.run(state, source, 4)
    jax.tree.map(np.testing.assert_array_equal, state.variables.params["net"], start.params["net"])
    assert np.abs(state.variables.params["method"]["bias"]).max() > 0


def test_the_learning_rate_follows_its_factors(source):
    """In the second epoch, with factor 0, nothing changes."""
    compiled, state, _ = build(toy_method(), factors=np.array([1.0, 0.0]))
    state, _ = compiled.run(state, source, 4)
    before = jax.tree.map(np.asarray, state.variables.params)
    state, _ = compiled.run(state, source, 4)
    jax.tree.map(np.testing.assert_array_equal, state.variables.params, before)


def test_a_stage_that_trains_nothing_is_refused():
    with pytest.raises(UserError, match="nothing would train"):
        build(toy_method(), groups={"all": {"match": ".*", "rate": 0.0}})


def test_a_stage_without_epochs_trains_nothing():
    compiled, state, start = build(toy_method(), factors=np.ones(0), groups={})
    assert compiled.trained == {} and compiled.num_steps == 0
    jax.tree.map(np.testing.assert_array_equal, state.variables.params["net"], start.params["net"])


def net_method():
    """Return a method without parameters and random numbers."""

    def loss(apply, variables, batch, rng):
        outputs, variables = apply(variables, batch.images)
        log_p = jax.nn.one_hot(batch.labels, 3) * jax.nn.log_softmax(outputs.logits)
        return -log_p.sum(-1).mean(), (variables, {})

    return Method(lambda rng: ({}, {}), loss)


def every_image(source, seed, step, rng):
    """Draw the same batch at every step."""
    return Batch(source.images[:128].astype(jnp.float32) / 255, source.labels[:128])


def second_stage(source, keep, *, factors=None):
    """Train a stage of 8 steps, then one of 4 -> parameters before and after the second."""
    settings = dict(method=net_method(), draw=every_image, factors=factors)
    first, before, _ = build(**settings)
    before, _ = first.run(before, source, 8)
    second, _, _ = build(**settings, number=1)
    state = second.init(np.uint32(2), before.variables)
    if keep:
        state = stage.kept_optimizer(state, before)
    start = jax.tree.map(np.array, state.variables.params)
    state, _ = second.run(state, source, 4)
    return start, jax.tree.map(np.asarray, state.variables.params)


@pytest.mark.parametrize("keep", [True, False])
def test_two_stages_equal_one_only_if_the_optimizer_is_kept(source, keep):
    compiled, state, _ = build(net_method(), draw=every_image)
    state, _ = compiled.run(state, source, 12)
    _, split = second_stage(source, keep)
    single = state.variables.params["net"]["classifier"]["kernel"]
    assert np.allclose(split["net"]["classifier"]["kernel"], single, rtol=1e-5, atol=1e-7) == keep


def test_the_schedule_restarts_if_the_optimizer_is_kept(source):
    """The first stage ends with factor 0; the second trains in its first epoch, with factor 1."""
    start, end = second_stage(source, True, factors=np.array([1.0, 0.0]))
    assert np.abs(end["net"]["classifier"]["kernel"] - start["net"]["classifier"]["kernel"]).max() > 1e-3


def test_keeping_the_optimizer_leaves_the_previous_state_usable(source):
    """Check that `run` donates its state, but not the copied optimizer state."""
    compiled, before, _ = build(net_method(), draw=every_image)
    state = stage.kept_optimizer(compiled.init(np.uint32(2), before.variables), before)
    compiled.run(state, source, 2)
    assert stage.all_finite(before.opt_state)


def random_method():
    """Return a method with a random initial parameter and a random metric."""

    def init(rng):
        return {"bias": jax.random.normal(rng, (3,))}, {}

    return toy_method()._replace(init=init)


def random_numbers(source, **settings):
    """Collect a stage's random numbers: the method's initial parameters and noise, batches, the sampler's seed."""

    def draw(source, seed, step, rng):
        return random_draw(source, seed, step, rng)._replace(lam=(seed % 4096).astype(jnp.float32))

    method = random_method()

    def loss(apply, variables, batch, rng):
        value, (variables, metrics) = method.loss(apply, variables, batch, rng)
        return value, (variables, {**metrics, "batch": batch.images.mean(), "seed": batch.lam})

    compiled, state, _ = build(method._replace(loss=loss), draw=draw, **settings)
    initial = np.array(state.variables.params["method"]["bias"])
    _, metrics = compiled.run(state, source, 3)
    return np.concatenate([initial, metrics["noise"], metrics["batch"], metrics["seed"]])


def test_the_seed_decides_all_random_numbers(source):
    np.testing.assert_allclose(random_numbers(source, seed=5), random_numbers(source, seed=5), rtol=1e-6)
    assert not np.any(np.isclose(random_numbers(source, seed=5), random_numbers(source, seed=6), rtol=1e-6))


def test_another_stage_of_a_run_has_other_random_numbers(source):
    assert not np.any(np.isclose(random_numbers(source, number=0), random_numbers(source, number=1), rtol=1e-6))


@pytest.mark.parametrize("second", [net_method(), random_method()], ids=["without parameters", "with parameters"])
def test_a_methods_parameters_end_with_its_stage(second):
    _, first, _ = build(toy_method())
    assert "method" in first.variables.params
    compiled, fresh, _ = build(second, number=1)
    state = compiled.init(np.uint32(2), first.variables)
    jax.tree.map(np.testing.assert_array_equal, state.variables.params, fresh.variables.params)


def test_all_finite_sees_a_single_nan():
    state = Variables({"a": jnp.ones(3), "step": jnp.zeros((), jnp.int32)}, {"b": jnp.zeros((2, 2))}, {})
    assert stage.all_finite(state)
    assert not stage.all_finite(state._replace(stats={"b": jnp.zeros((2, 2)).at[1, 0].set(jnp.nan)}))
