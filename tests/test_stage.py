"""The engine, with a toy method and network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ltjax import parallel, stage
from ltjax.types import Batch, Method, Outputs, UserError, Variables

COUNTS = np.array([70, 40, 23])
ALL = {"all": {"match": ".*", "rate": 1.0}}


class Toy(nn.Module):
    """Features are the image's channel means; one linear layer."""

    @nn.compact
    def __call__(self, images, train=False):
        features = images.mean((1, 2))
        return Outputs(nn.Dense(3, name="classifier")(features), features)


@pytest.fixture
def source():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), COUNTS).astype(np.int32)
    images = rng.integers(0, 255, (len(labels), 4, 4, 2)).astype(np.uint8)
    return stage.Resident(jnp.asarray(images), jnp.asarray(labels))


def toy_method(refresh=None):
    def init(rng):
        return {"bias": jnp.zeros(3)}, {"centroids": jnp.zeros((3, 2))}

    def loss(apply, variables, batch, rng):
        outputs, variables = apply(variables, batch.images)
        logits = outputs.logits + variables.params["method"]["bias"]
        return -jax.nn.log_softmax(logits)[:, 0].mean(), (variables, {"noise": jax.random.normal(rng)})

    return Method(init, loss, refresh)


def build(method, *, devices=8, groups=None, factors=None, lr=0.1):
    mesh, net = parallel.make_mesh(jax.devices()[:devices]), {"net": Toy()}
    start = jax.device_put(stage.init_variables(net, (4, 4, 2), jax.random.key(0)), parallel.replicated(mesh))
    shapes = jax.eval_shape(lambda: stage.init_variables(net, (4, 4, 2), jax.random.key(0), method))

    def draw(source, seed, step, rng):
        index = jax.random.randint(rng, (16,), 0, len(source.labels))
        return Batch(source.images[index].astype(jnp.float32) / 255, source.labels[index])

    settings = dict(bn="train", lr=lr, steps_per_epoch=4, mesh=mesh, image_shape=(4, 4, 2))
    factors = np.ones(2) if factors is None else factors
    built = stage.build(net, method, draw, shapes.params, groups=groups or ALL, factors=factors, **settings)
    return built, built.init(np.uint32(2), start), start


@pytest.mark.parametrize("devices", [1, 8])
def test_refresh_is_given_the_mean_feature_of_each_class(source, devices):
    built, state, _ = build(toy_method(lambda arrays, means: {"centroids": means}), devices=devices)
    state = built.refresh(state, source)
    features = np.asarray(source.images, np.float64).mean((1, 2)) / 255
    expected = [features[np.asarray(source.labels) == c].mean(0) for c in range(3)]
    np.testing.assert_allclose(state.variables.arrays["centroids"], expected, rtol=1e-5)


def test_a_method_without_refresh_has_none():
    assert build(toy_method())[0].refresh is None


def test_one_dispatch_of_many_steps_equals_many_of_one(source):
    outcomes = []
    for lengths in ((8,), (3, 5), (1,) * 8):
        built, state, _ = build(toy_method())
        losses = []
        for length in lengths:
            state, metrics = built.run(state, source, length)
            losses += np.asarray(metrics["noise"]).tolist()
        outcomes.append((losses, jax.tree.map(np.asarray, state)))
    for noise, state in outcomes[1:]:
        assert noise == outcomes[0][0]  # the same random numbers, whatever the dispatch
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state, outcomes[0][1])


def test_the_start_survives_the_stage(source):
    """`run` takes over its state's memory, not that of the variables the stage started from."""
    built, state, start = build(toy_method())
    built.run(state, source, 2)
    assert np.isfinite(np.asarray(start.params["net"]["classifier"]["kernel"])).all()


def test_frozen_groups_keep_their_values(source):
    groups = {"frozen": {"match": "net/.*", "rate": 0.0}, "own": {"match": "method/.*", "rate": 1.0}}
    built, state, start = build(toy_method(), groups=groups)
    assert built.trained == ("method/bias",)
    state, _ = built.run(state, source, 4)
    jax.tree.map(np.testing.assert_array_equal, state.variables.params["net"], start.params["net"])
    assert np.abs(state.variables.params["method"]["bias"]).max() > 0


def test_the_learning_rate_follows_its_factors(source):
    """The second epoch's factor is 0: nothing moves there."""
    built, state, _ = build(toy_method(), factors=np.array([1.0, 0.0]))
    state, _ = built.run(state, source, 4)
    before = jax.tree.map(np.asarray, state.variables.params)
    state, _ = built.run(state, source, 4)
    jax.tree.map(np.testing.assert_array_equal, state.variables.params, before)


def test_a_stage_that_trains_nothing_is_refused():
    with pytest.raises(UserError, match="nothing would train"):
        build(toy_method(), groups={"all": {"match": ".*", "rate": 0.0}})


def test_all_finite_sees_a_single_nan():
    state = Variables({"a": jnp.ones(3), "step": jnp.zeros((), jnp.int32)}, {"b": jnp.zeros((2, 2))}, {})
    assert stage.all_finite(state)
    assert not stage.all_finite(state._replace(stats={"b": jnp.zeros((2, 2)).at[1, 0].set(jnp.nan)}))
