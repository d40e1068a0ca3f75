"""DRO-LT's feature stage: radii and their margins, layers and their centroids, and mistakes in its settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax import losses, methods, models
from ltjax.engine import class_means, feed, stage
from ltjax.system import parallel
from ltjax.types import Batch, Outputs, UserError, Variables
from tests import stages

COUNTS = np.array([9, 4, 1])
LAYERS = ("stage2", "stage3")
random = np.random.default_rng(0)
WEIGHTS = {
    "early": jnp.asarray(random.normal(size=(3, 5)), jnp.float32),
    "late": jnp.asarray(random.normal(size=(5, 4)), jnp.float32),
    "head": jnp.asarray(random.normal(size=(4, 3)), jnp.float32),
}
CENTROIDS = {
    "stage2": jnp.asarray(random.normal(size=(3, 5)), jnp.float32),
    "stage3": jnp.asarray(random.normal(size=(3, 4)), jnp.float32),
}
BATCH = Batch(
    jnp.asarray(random.uniform(size=(8, 2, 2, 3)), jnp.float32), jnp.asarray([0, 1, 0, 2, 1, 0, 0, 1], jnp.int32)
)


def apply(variables, images):
    """Return a toy network: the features are those of the last of two layers."""
    weights = variables.params["net"]
    early = jnp.tanh(images.mean((1, 2)) @ weights["early"])
    late = early @ weights["late"]
    return Outputs(late @ weights["head"], late, None, {"stage2": early, "stage3": late}), variables


def create(**settings):
    return methods.create("drolt", COUNTS, **settings)


def loss_of(method, *, margins=None, weights=WEIGHTS, batch=BATCH):
    """Compute the method's loss and metrics. margins: replace the initial ones if they are parameters."""
    extra, _ = method.init(jax.random.key(0))
    if margins is not None:
        assert extra["margins"].shape == margins.shape
        extra = {"margins": margins}
    arrays = {**CENTROIDS, "features": CENTROIDS["stage3"]}

    @jax.jit
    def loss_and_metrics(params, batch):
        loss, (_, metrics) = method.loss(apply, Variables(params, {}, arrays), batch, jax.random.key(0))
        return loss, metrics

    return loss_and_metrics({"net": weights, "method": extra}, batch)


@functools.partial(jax.jit, static_argnums=0)
def bound(name, margins, *, weights=WEIGHTS, labels=BATCH.labels, temperature=1.0):
    features = apply(Variables({"net": weights}, {}, {}), BATCH.images)[0].layers[name]
    return losses.dro_loss(features, labels, CENTROIDS[name], margins=margins, temperature=temperature)


RADII = [
    ("shared", [1.4, 1.4, 1.4]),
    ("by_count", [1.4 / 3, 1.4 / 2, 1.4]),
    ("learned", [1.4, 1.4, 1.4]),
    ("learned_unconstrained", [1.4, 1.4, 1.4]),
]


@pytest.mark.parametrize("radius, margins", RADII)
def test_the_margin_is_twice_the_radius(radius, margins):
    _, metrics = loss_of(create(radius=radius, radius_size=0.7))
    np.testing.assert_allclose(metrics["robust_loss"], bound("stage3", np.array(margins, np.float32)), rtol=1e-6)


@pytest.mark.parametrize("layers", [(), ("stage2",), LAYERS])
@pytest.mark.parametrize("radius", ["learned", "learned_unconstrained"])
def test_learned_margins_are_parameters_of_each_layer_and_class(radius, layers):
    extra, _ = create(radius=radius, radius_size=0.7, layers=layers).init(jax.random.key(0))
    np.testing.assert_allclose(extra["margins"], np.full((max(1, len(layers)), 3), 1.4), rtol=1e-6)


@pytest.mark.parametrize("radius", ["shared", "by_count"])
def test_fixed_margins_are_not_parameters(radius):
    assert create(radius=radius).init(jax.random.key(0)) == ({}, {})


MIXED_SIGNS = jnp.asarray([[0.3, -0.2, -1.0]], jnp.float32)


def test_a_learned_radius_below_0_counts_as_0():
    _, metrics = loss_of(create(radius="learned"), margins=MIXED_SIGNS)
    np.testing.assert_allclose(metrics["robust_loss"], bound("stage3", np.float32([0.3, 0, 0])), rtol=1e-6)


def test_an_unconstrained_radius_may_be_below_0():
    _, metrics = loss_of(create(radius="learned_unconstrained"), margins=MIXED_SIGNS)
    np.testing.assert_allclose(metrics["robust_loss"], bound("stage3", MIXED_SIGNS[0]), rtol=1e-6)


def test_the_temperature_reaches_the_bound():
    _, metrics = loss_of(create(radius="shared", temperature=0.5))
    np.testing.assert_allclose(metrics["robust_loss"], bound("stage3", 1.0, temperature=0.5), rtol=1e-6)


def test_the_default_loss_is_cross_entropy_weighted_by_count():
    _, metrics = loss_of(create())
    logits = apply(Variables({"net": WEIGHTS}, {}, {}), BATCH.images)[0].logits
    weights = COUNTS[np.asarray(BATCH.labels)] / 9
    expected = (weights * losses.cross_entropy(logits, BATCH.labels)).sum() / weights.sum()
    np.testing.assert_allclose(metrics["classification_loss"], expected, rtol=1e-5)


def test_every_layer_and_the_classification_have_a_gradient():
    method = create(radius="shared", robust_weight=0.3, layers=LAYERS, loss={"name": "cross_entropy"})

    def expected(weights):
        logits = apply(Variables({"net": weights}, {}, {}), BATCH.images)[0].logits
        robust = sum(bound(name, 1.0, weights=weights) for name in LAYERS)
        return losses.cross_entropy(logits, BATCH.labels).mean() + 0.3 * robust

    ours = jax.jit(jax.grad(lambda weights: loss_of(method, weights=weights)[0]))(WEIGHTS)
    gradient = jax.jit(jax.grad(expected))(WEIGHTS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, gradient)


def test_each_layer_has_its_own_margins():
    margins = jnp.asarray([[0.1, 0.2, 0.3], [0.6, 0.5, 0.4]], jnp.float32)
    _, metrics = loss_of(create(layers=LAYERS), margins=margins)
    expected = bound("stage2", margins[0]) + bound("stage3", margins[1])
    np.testing.assert_allclose(metrics["robust_loss"], expected, rtol=1e-6)


def test_mixup_combines_the_bounds_of_both_labels():
    partners = BATCH.labels[::-1]
    mixed = BATCH._replace(partner_labels=partners, lam=jnp.float32(0.3))
    _, metrics = loss_of(create(radius="shared"), batch=mixed)
    expected = 0.3 * bound("stage3", 1.0) + 0.7 * bound("stage3", 1.0, labels=partners)
    np.testing.assert_allclose(metrics["robust_loss"], expected, rtol=1e-5)


@pytest.fixture(scope="module")
def trained():
    """Return a real network after two steps and a refresh, the state, the images and labels, and the metrics."""
    net = models.create("resnet_cifar", 3, depth=8, width=4)
    method, mesh = create(layers=LAYERS, radius_size=0.25), parallel.make_mesh(jax.devices()[:2])
    images = random.integers(0, 255, (COUNTS.sum(), 8, 8, 3)).astype(np.uint8)
    source = feed.Resident(jnp.asarray(images), jnp.asarray(np.repeat(np.arange(3), COUNTS), jnp.int32))
    source = jax.device_put(source, parallel.replicated(mesh))
    variables = stages.initial({"net": net}, (8, 8, 3), method)

    def draw(source, seed, step, rng):
        return Batch(source.images.astype(jnp.float32) / 255, source.labels)

    compiled = stages.build(
        {"net": net},
        method,
        draw,
        variables.params,
        groups={
            "features": {"match": "net/backbone/.*|method/margins", "rate": 1.0},
            "frozen": {"match": "net/classifier/.*", "rate": 0.0},
        },
        bn="train",
        lr=0.1,
        factors=np.ones(1),
        steps_per_epoch=2,
        mesh=mesh,
        image_shape=(8, 8, 3),
    )
    state = compiled.init(np.uint32(0), jax.device_put(variables, parallel.replicated(mesh)))
    means = class_means.make(stage.make_apply({"net": net}, "eval"), source, mesh)

    def refreshed(state):
        return compiled.refresh(state, means(state.variables, compiled.layers))

    state, metrics = compiled.run(refreshed(state), source, 2)
    return net, compiled, refreshed(state), source, metrics


def test_centroids_are_the_class_means_of_each_layer_in_evaluation_mode(trained):
    net, _, state, source, _ = trained
    variables = {"params": state.variables.params["net"], "batch_stats": state.variables.stats["net"]}
    images = np.asarray(source.images, np.float32) / 255
    layers = jax.jit(lambda variables, images: net.apply(variables, images, False).layers)(variables, images)
    labels = np.asarray(source.labels)
    assert set(state.variables.arrays) == set(LAYERS)
    for name in LAYERS:
        expected = [np.asarray(layers[name], np.float64)[labels == c].mean(0) for c in range(3)]
        np.testing.assert_allclose(state.variables.arrays[name], expected, rtol=1e-4, atol=1e-5)


def test_margins_are_a_trained_parameter_of_the_stage(trained):
    _, compiled, state, _, _ = trained
    assert compiled.trained["method/margins"] == "features"
    assert state.variables.params["method"]["margins"].shape == (2, 3)
    assert np.all(state.variables.params["method"]["margins"] != 0.5)


def test_the_loss_is_the_sum_of_the_two_that_are_logged(trained):
    metrics = trained[-1]
    assert np.all(np.asarray(metrics["robust_loss"]) > 0) and np.all(np.asarray(metrics["classification_loss"]) > 0)
    np.testing.assert_allclose(metrics["loss"], metrics["classification_loss"] + metrics["robust_loss"], rtol=1e-6)


MISTAKES = [
    (
        {"radius": "fixed"},
        "method 'drolt': unknown radius 'fixed'; known: learned, learned_unconstrained, shared, by_count",
    ),
    ({"temperature": 0}, "method 'drolt': temperature = 0, radius_size = 0.5: above 0, and at least 0"),
    ({"radius_size": -1.0}, "method 'drolt': temperature = 1.0, radius_size = -1.0: above 0, and at least 0"),
    ({"layers": "stage3"}, "method 'drolt': layers = 'stage3': a tuple of str expected"),
    (
        {"margin": 1.0},
        "method 'drolt' has no setting 'margin'; "
        "allowed: loss, robust_weight, robust_class_weights, radius, radius_size, temperature, layers, class_weights",
    ),
]


@pytest.mark.parametrize("settings, message", MISTAKES, ids=lambda value: str(value)[:30])
def test_a_mistake_is_one_line_with_the_allowed_values(settings, message):
    with pytest.raises(UserError) as raised:
        create(**settings)
    assert str(raised.value) == message


def test_an_unknown_layer_is_named_with_the_known_ones():
    net = models.create("resnet_cifar", 3, depth=8, width=4)
    method, mesh = create(layers=("stage3", "stage4")), parallel.make_mesh(jax.devices()[:1])
    variables = jax.eval_shape(lambda: stages.initial({"net": net}, (8, 8, 3), method))
    settings = dict(bn="train", lr=0.1, factors=np.ones(1), steps_per_epoch=1, mesh=mesh, image_shape=(8, 8, 3))
    groups = {"all": {"match": ".*", "rate": 1.0}}
    compiled = stages.build({"net": net}, method, lambda *_: BATCH, variables.params, groups=groups, **settings)
    with pytest.raises(UserError) as raised:
        jax.eval_shape(compiled.init, jax.ShapeDtypeStruct((), jnp.uint32), variables)
    expected = "the method needs the features of layer 'stage4'; the model's layers: stage1, stage2, stage3"
    assert str(raised.value) == expected


def test_radii_by_count_need_an_image_of_every_class():
    with pytest.raises(ValueError, match="class_counts = 0 for class 1: every class needs 1 training image or more"):
        methods.create("drolt", np.array([5, 0, 7]), radius="by_count")
