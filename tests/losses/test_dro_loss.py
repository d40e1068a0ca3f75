"""DRO-LT's bound against the authors' numbers (source: tests/golden/README.md), float64 loops, and hard cases."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from ltjax import losses
from tests.jaxprs import equations

VARIANTS = ("plain", "eps", "eps_weighted", "eps_t")
dro_loss = jax.jit(losses.dro_loss)
loss_and_gradients = jax.jit(
    lambda features, labels, centroids, margins: jax.value_and_grad(
        lambda z, m, e: losses.dro_loss(z, labels, m, margins=e), argnums=(0, 1, 2)
    )(features, centroids, margins)
)


def random_batch(seed, batch=16, classes=10, size=5, spread=1.0, offset=0.0):
    """Return features [B, D], labels [B], centroids [C, D], margins [C], in no order of classes."""
    random = np.random.default_rng(seed)
    features = random.normal(offset, spread, (batch, size)).astype(np.float32)
    centroids = random.normal(offset, spread, (classes, size)).astype(np.float32)
    labels = random.integers(0, classes, batch)
    return features, labels, centroids, random.uniform(0, 2, classes).astype(np.float32)


def bound_by_loops(features, labels, centroids, margins, temperature=1.0):
    """Equation 10, class by class and example by example, float64; 0 for classes that the batch lacks."""
    features, centroids = features.astype(np.float64), centroids.astype(np.float64)
    distance = np.sqrt(((features[:, None] - centroids[None]) ** 2).sum(-1))  # [B, C] of [B, C, D]
    bound = np.zeros(len(centroids))
    for c in range(len(centroids)):
        similarity = -(distance[:, c] + margins[c].astype(np.float64) * (labels == c)) / temperature
        total = similarity.max() + np.log(np.exp(similarity - similarity.max()).sum())
        members = np.flatnonzero(labels == c)
        for example in members:
            bound[c] += (total - similarity[example]) / len(members)
    return bound


@jax.jit
def bound(features, labels, centroids, margins, temperature=1.0):
    return losses.dro_bound(features, labels, centroids, margins=margins, temperature=temperature)[0]


gradients_of_bound = jax.jit(
    jax.grad(lambda z, m, e, labels, temperature: bound(z, labels, m, e, temperature).sum(), argnums=(0, 1, 2))
)


def hard_batch(case):
    """Return the arrays of a batch, and a temperature."""
    features, labels, centroids, margins = random_batch(0)
    match case:
        case "on its centroid":
            features[3] = centroids[labels[3]]
        case "all on their centroids":
            features = centroids[labels]
        case "duplicates":
            features, labels = features[[0, 0, 0, 1, 1, 2]], labels[[0, 0, 0, 1, 1, 2]]
        case "duplicates on the centroid of an only class":
            labels = np.full_like(labels, 2)
            features = centroids[labels]
        case "one class":
            labels = np.full_like(labels, 2)
        case "one example":
            features, labels = features[:1], labels[:1]
        case "most classes absent":
            features, labels, centroids, margins = random_batch(1, batch=4, classes=300)
        case "far and cold":
            features, labels, centroids, margins = random_batch(2, spread=300.0)
            return (features, labels, centroids, margins), 0.01
    return (features, labels, centroids, margins), 1.0


CASES = (
    "on its centroid",
    "all on their centroids",
    "duplicates",
    "duplicates on the centroid of an only class",
    "one class",
    "one example",
    "most classes absent",
    "far and cold",
)


@pytest.fixture(scope="module")
def numbers(golden):
    """Return the golden file, and variant -> (loss, (its gradient to the features, to the margins)) by our kernel."""
    z = golden("dro_loss")

    @functools.cache
    def ours(variant):
        loss = lambda features, epsilons: losses.dro_loss(  # noqa: E731
            features,
            z["labels"],
            z["centroids"],
            margins=0.0 if variant == "plain" else epsilons,
            temperature=float(z["temperature_eps_t"]) if variant == "eps_t" else 1.0,
            class_weights=z["class_weights"] if variant == "eps_weighted" else None,
        )
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(z["features"], z["epsilons"])

    return z, ours


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_equals_the_authors(numbers, variant):
    z, ours = numbers
    np.testing.assert_allclose(ours(variant)[0], z[f"loss_{variant}"], rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_to_features_equals_the_authors(numbers, variant):
    z, ours = numbers
    theirs = z[f"dfeatures_{variant}"]
    np.testing.assert_allclose(ours(variant)[1][0], theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_gradient_to_margins_equals_the_authors(numbers, variant):
    z, ours = numbers
    theirs = z[f"depsilons_{variant}"]
    np.testing.assert_allclose(ours(variant)[1][1], theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("batch, classes, size", [(16, 10, 5), (7, 2, 1), (24, 1, 40)])
def test_bound_is_the_papers_in_loops(batch, classes, size, temperature):
    arrays = random_batch(batch, batch, classes, size)
    np.testing.assert_allclose(bound(*arrays, temperature), bound_by_loops(*arrays, temperature), rtol=2e-5, atol=1e-6)


def test_present_classes_are_those_of_the_batch():
    features, labels, centroids, margins = random_batch(3)
    _, present = jax.jit(losses.dro_bound)(features, labels, centroids, margins=margins)
    np.testing.assert_array_equal(present, np.isin(np.arange(10), labels))


def test_loss_is_the_mean_over_the_classes_present():
    features, labels, centroids, margins = random_batch(4)
    expected = bound_by_loops(features, labels, centroids, margins)[np.unique(labels)].mean()
    assert len(np.unique(labels)) < 10
    np.testing.assert_allclose(dro_loss(features, labels, centroids, margins=margins), expected, rtol=1e-5)


def test_class_weights_are_summed_over_all_classes():
    features, labels, centroids, margins = random_batch(4)
    weights = np.linspace(0.1, 3, 10).astype(np.float32)
    expected = (weights * bound_by_loops(features, labels, centroids, margins)).sum() / weights.sum()
    ours = dro_loss(features, labels, centroids, margins=margins, class_weights=weights)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_a_shared_margin_equals_equal_margins():
    features, labels, centroids, _ = random_batch(5)
    each = bound(features, labels, centroids, np.full(10, 0.7, np.float32))
    np.testing.assert_allclose(bound(features, labels, centroids, 0.7), each, rtol=1e-6)


@pytest.mark.parametrize("argument", ["features", "centroids", "margins"])
def test_gradient_is_that_of_central_differences(argument):
    features, labels, centroids, margins = random_batch(6, batch=8, classes=4)
    with jax.enable_x64(True):
        given = {"features": features, "centroids": centroids, "margins": margins}
        given = {name: jnp.asarray(array, jnp.float64) for name, array in given.items()}

        def loss(array):
            return losses.dro_loss(labels=labels, temperature=0.7, **{**given, argument: array})

        check_grads(jax.jit(loss), (given[argument],), order=1, modes=("rev",), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_a_hard_batch_has_the_papers_bound(case):
    arrays, temperature = hard_batch(case)
    expected = bound_by_loops(*arrays, temperature)
    # A pair that meets exactly keeps, off the diagonal, the rounding of a matrix product: 1e-3 of the features' size.
    np.testing.assert_allclose(bound(*arrays, temperature), expected, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("case", CASES)
def test_a_hard_batch_has_finite_gradients(case):
    (features, labels, centroids, margins), temperature = hard_batch(case)
    gradients = gradients_of_bound(features, centroids, margins, labels, temperature)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_a_feature_on_its_centroid_is_not_pulled_by_it():
    _, labels, centroids, margins = random_batch(0, batch=1)
    _, (gradient, *_) = loss_and_gradients(centroids[labels], labels, centroids, margins)
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.parametrize("outside", [-1, 10, 1000])
def test_examples_of_no_class_are_left_out(outside):
    features, labels, centroids, margins = random_batch(7)
    labels[::3] = outside
    inside = labels != outside
    value, gradients = jax.tree.map(np.asarray, loss_and_gradients(features, labels, centroids, margins))
    alone, expected = loss_and_gradients(features[inside], labels[inside], centroids, margins)
    np.testing.assert_allclose(value, alone, rtol=1e-5)
    np.testing.assert_array_equal(gradients[0][~inside], 0)
    gradients = (gradients[0][inside], *gradients[1:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradients, expected)


def test_a_batch_of_no_class_has_loss_and_gradients_0():
    features, labels, centroids, margins = random_batch(7)
    value, gradients = loss_and_gradients(features, labels + 10, centroids, margins)
    assert value == 0 and not any(np.any(gradient) for gradient in gradients)


def test_the_order_of_the_batch_does_not_matter():
    features, labels, centroids, margins = random_batch(8, batch=40)
    order = np.argsort(labels)
    assert np.any(order != np.arange(40))
    sorted_bound = bound(features[order], labels[order], centroids, margins)
    np.testing.assert_allclose(bound(features, labels, centroids, margins), sorted_bound, rtol=1e-5)


def test_renaming_the_classes_renames_the_bound():
    features, labels, centroids, margins = random_batch(9)
    new_name = np.random.default_rng(9).permutation(10)
    old_name = np.argsort(new_name)
    renamed = bound(features, new_name[labels], centroids[old_name], margins[old_name])
    np.testing.assert_allclose(renamed, bound(features, labels, centroids, margins)[old_name], rtol=1e-5)


def test_moving_features_and_centroids_together_changes_nothing():
    features, labels, centroids, margins = random_batch(10)
    moved = bound(features + np.float32(64), labels, centroids + np.float32(64), margins)
    np.testing.assert_allclose(moved, bound(features, labels, centroids, margins), rtol=1e-4)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_float32_far_from_the_origin_is_float64_to_1e_4(offset):
    arrays = random_batch(11, size=64, offset=offset)
    np.testing.assert_allclose(bound(*arrays), bound_by_loops(*arrays), rtol=1e-4)


def test_a_small_distance_to_the_centroid_keeps_its_digits():
    _, _, centroids, _ = random_batch(15, size=64)
    labels, margins = np.arange(10), np.full(10, 11, np.float32)  # about as far as the other classes
    features = centroids + np.float32(1e-3) * random_batch(16, batch=10, size=64)[0]
    expected = bound_by_loops(features, labels, centroids, margins)
    np.testing.assert_allclose(bound(features, labels, centroids, margins), expected, rtol=1e-5)


def test_float32_gradient_far_from_the_origin_is_float64_to_1e_4():
    features, labels, centroids, margins = random_batch(11, size=64, offset=1e3)
    _, (ours, *_) = loss_and_gradients(features, labels, centroids, margins)
    with jax.enable_x64(True):
        features, centroids, margins = (jnp.asarray(array, jnp.float64) for array in (features, centroids, margins))
        _, (expected, *_) = loss_and_gradients(features, labels, centroids, margins)
    assert expected.dtype == np.float64
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())


def test_bfloat16_features_give_a_bfloat16_bound_near_float64s():
    features, labels, centroids, margins = random_batch(12)
    ours = bound(jnp.asarray(features, jnp.bfloat16), labels, centroids, margins)
    assert ours.dtype == jnp.bfloat16
    expected = bound_by_loops(features, labels, centroids, margins)
    np.testing.assert_allclose(ours.astype(jnp.float32), expected, rtol=0.05, atol=0.1)


def test_jit_and_vmap_give_what_a_loop_gives():
    batches = [random_batch(seed) for seed in range(3)]
    together = jax.vmap(loss_and_gradients)(*(np.stack(parts) for parts in zip(*batches, strict=True)))
    alone = jax.tree.map(lambda *parts: np.stack(parts), *(loss_and_gradients(*arrays) for arrays in batches))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), together, alone)


@pytest.mark.parametrize("axis_type", [None, AxisType.Auto], ids=["explicit", "auto"])
def test_a_sharded_batch_has_the_same_loss_and_gradients(axis_type):
    arrays = random_batch(13)
    expected = loss_and_gradients(*arrays)
    with mesh_of_8(axis_type) as mesh:
        actual = loss_and_gradients(*split(arrays, mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), actual, expected)


@pytest.mark.parametrize("axis_type", [None, AxisType.Auto], ids=["explicit", "auto"])
def test_a_sharded_batch_has_the_same_bound_without_jit(axis_type):
    features, labels, centroids, margins = random_batch(13)
    expected = bound(features, labels, centroids, margins)
    with mesh_of_8(axis_type) as mesh:
        features, labels, centroids, margins = split((features, labels, centroids, margins), mesh)
        actual, _ = losses.dro_bound(features, labels, centroids, margins=margins)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


@contextlib.contextmanager
def mesh_of_8(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=axis_type and (axis_type,))
    assert mesh.axis_types == ((axis_type or AxisType.Explicit),)
    with jax.set_mesh(mesh):
        yield mesh


def split(arrays, mesh):
    """Return features and labels over the devices, centroids and margins on each."""
    return [
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip(arrays, [PartitionSpec("data")] * 2 + [PartitionSpec()] * 2, strict=True)
    ]


def test_no_array_has_a_vector_for_each_example_and_class():
    batch, classes, size = 8, 50, 30
    features, labels, centroids, margins = random_batch(14, batch, classes, size)
    jaxpr = jax.make_jaxpr(jax.value_and_grad(losses.dro_loss, argnums=(0, 2)))(
        features, labels, centroids, margins=margins, temperature=0.5
    )
    largest = max(variable.aval.size for equation in equations(jaxpr.jaxpr) for variable in equation.outvars)
    assert classes * size <= largest < batch * classes * size  # the least is the centroids' gradient
