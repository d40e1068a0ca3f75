"""Weights of classes by name, `config.class_weights`, in all methods."""

import inspect
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax import losses, methods
from ltjax.methods import criteria
from ltjax.types import Batch, Outputs, UserError, Variables
from tests.methods.test_criteria import COUNTS, KERNELS, LABELS, LOGITS, PARTNERS, batch, create

FACTORS = (0.5, 2.0, 1.0, 7.0)


@pytest.mark.parametrize("name", criteria.CRITERIA)
def test_each_images_loss_is_multiplied_by_the_weight_of_its_class(name):
    settings, kernel = KERNELS[name]
    criterion = criteria.create(COUNTS, {"name": name, **settings}, FACTORS)
    by_image = np.asarray(FACTORS)[np.asarray(LABELS)] * np.asarray(kernel(LOGITS, LABELS))
    np.testing.assert_allclose(criterion(LOGITS, batch()), by_image.mean(), rtol=1e-5)
    np.testing.assert_array_equal(criterion.per_class["Class weight"], np.float32(FACTORS))


def test_a_mixed_image_has_the_weights_of_both_classes():
    mixed = batch(partner_labels=PARTNERS, lam=jnp.float32(0.3))
    parts = [
        share * np.asarray(FACTORS)[np.asarray(labels)] * np.asarray(losses.cross_entropy(LOGITS, labels))
        for share, labels in ((0.3, LABELS), (0.7, PARTNERS))
    ]
    criterion = criteria.create(COUNTS, {"name": "cross_entropy"}, FACTORS)
    np.testing.assert_allclose(criterion(LOGITS, mixed), sum(parts).mean(), rtol=1e-5)


def test_weights_of_the_loss_are_multiplied():
    criterion = criteria.create(COUNTS, {"name": "cross_entropy", "class_weights": {"kind": "count"}}, FACTORS)
    own, labels = COUNTS / COUNTS.max(), np.asarray(LABELS)
    values = own[labels] * np.asarray(FACTORS)[labels] * np.asarray(losses.cross_entropy(LOGITS, LABELS))
    np.testing.assert_allclose(criterion(LOGITS, batch()), values.sum() / own[labels].sum(), rtol=1e-5)
    np.testing.assert_allclose(criterion.per_class["Class weight"], own * FACTORS, rtol=1e-6)


@pytest.mark.parametrize("name", criteria.CRITERIA)
def test_without_weights_the_program_is_that_of_the_plain_mean(name):
    settings, _ = KERNELS[name]
    kernel, _ = criteria.CRITERIA[name](COUNTS, **settings)
    plain = jax.jit(lambda logits, batch: kernel(logits, batch.labels).mean()).lower(LOGITS, batch()).as_text()
    ours = create(name, **settings)
    assert jax.jit(lambda logits, batch: ours(logits, batch)).lower(LOGITS, batch()).as_text() == plain


def test_automatic_weights_are_inverse_to_the_counts_with_mean_1():
    weights = np.array(criteria.weights_by_name("auto", "abcd", COUNTS))
    np.testing.assert_allclose(weights, 155 / (4 * COUNTS), rtol=1e-12)  # scikit-learn's "balanced"
    assert (COUNTS * weights).sum() / COUNTS.sum() == pytest.approx(1)


def test_classes_that_are_not_named_have_weight_1():
    assert criteria.weights_by_name({"owl": 3.0}, ("cat", "owl", "rat"), COUNTS[:3]) == (1.0, 3.0, 1.0)


def test_names_are_compared_in_one_unicode_form_with_single_spaces():
    weights = criteria.weights_by_name({"cafe\u0301": 3.0, "red  fox": 2.0}, ("caf\u00e9", "red fox"), COUNTS[:2])
    assert weights == (3.0, 2.0)


@pytest.mark.parametrize("nothing", ["", {}])
def test_empty_class_weights_are_none(nothing):
    assert criteria.weights_by_name(nothing, ("cat", "owl"), COUNTS[:2]) is None


@pytest.mark.parametrize(
    "name, message",
    [
        ("cats", "names 'cats', none of the classes: the nearest are cat"),
        ("7", "'7', none of the classes: they are cat, owl, rat"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_ones(name, message):
    with pytest.raises(UserError, match=message):
        criteria.weights_by_name({name: 2.0}, ("cat", "owl", "rat"), COUNTS[:3])


# The term of each method that has weights: the whole loss (None), or a metric.
TERMS = {"erm": None, "mislas": None, "pgd_at": None, "drolt": "classification_loss", "distil": "label_loss"}
TERMS |= {"trades": "natural_loss", "alp": "labels_loss", "gkl_at": "natural_loss"}
TERMS |= {"proco": "classification_loss", "bcl": "classification_loss"}
NEEDED = {"mislas": dict(head=0.4, tail=0.1), "reslt": dict(medium_start=1, tail_start=2, beta=0.9)}
random = np.random.default_rng(0)
WEIGHTS = {
    net: {"classifier": {"kernel": jnp.asarray(random.normal(size=(12, 3)), jnp.float32)}} for net in ("net", "guide")
}


def toy(variables, images, net="net", bn=None):
    rows = images.reshape(len(images), -1)
    return Outputs(rows @ variables.params[net]["classifier"]["kernel"], rows), variables


def terms(name, method):
    """Return (the term that has weights, all others together) of the loss of a batch."""
    extra, arrays = method.init(jax.random.key(0))
    centroids = jnp.asarray(np.random.default_rng(1).normal(size=(3, 12)), jnp.float32)
    variables = Variables({**WEIGHTS, "method": extra}, {}, {**arrays, "features": centroids})
    images = jnp.asarray(np.random.default_rng(2).uniform(size=(6, 2, 2, 3)), jnp.float32)
    some = Batch(images, jnp.asarray([0, 1, 2, 0, 0, 1]), views=jnp.stack([images, images[::-1]], 1))
    value, (_, metrics) = method.loss(toy, variables, some, jax.random.key(3))
    term = value if TERMS[name] is None else metrics[TERMS[name]]
    return term, value - term * (0.5 if name == "distil" else 1)


@pytest.mark.parametrize("name", TERMS)
def test_only_the_classification_loss_of_a_method_is_weighted(name):
    weighted = [{}, *({"class_weights": tuple(np.eye(3)[c] * 2 + 1)} for c in range(3))]
    settings = NEEDED.get(name, {})
    made = [methods.create(name, np.array([50, 10, 2]), 12, **settings, **weights) for weights in weighted]
    in_one_program = jax.jit(lambda: [terms(name, method) for method in made])
    (plain, rest), *changed = jax.tree.map(float, in_one_program())
    assert all(each[0] > plain * 1.01 for each in changed)
    assert sum(each[0] for each in changed) == pytest.approx(5 * plain, rel=1e-4)  # each class has 3 once and 1 twice
    assert [each[1] for each in changed] == pytest.approx([rest] * 3, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_takes_weights_or_has_a_reason(name):
    takes = "class_weights" in inspect.signature(import_module(methods.METHODS[name]).create).parameters
    assert takes == (name in TERMS) == (name not in methods.UNWEIGHTED)
    if not takes:
        with pytest.raises(
            UserError, match=f"method '{name}' takes no class weights: .*; these take them: erm, mislas"
        ):
            methods.create(name, np.array([5, 2]), class_weights=(1.0, 2.0))


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, float("inf")), (1.0, -1.0)])
def test_a_stage_with_wrong_weights_is_refused(weights):
    with pytest.raises(UserError, match="2 numbers above 0, one for each class"):
        methods.create("erm", np.array([5, 2]), class_weights=weights)
