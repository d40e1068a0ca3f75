"""Classifiers without training, against NumPy and against their expected predictions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax import models, surgery
from ltjax.optim import flatten, unflatten
from ltjax.types import UserError, Variables

COUNTS = np.array([50, 20, 7, 1])


def linear(*leading, seed=0, bias=True, **more):
    """Return the parameters of a network of 3 features and 4 classes; leading: axes of replicas."""
    random = np.random.default_rng(seed)
    classifier = {"kernel": random.normal(size=(*leading, 3, 4)), "bias": random.normal(size=(*leading, 4))}
    params = {"backbone": {"conv": random.normal(size=(*leading, 2))}, "classifier": classifier, **more}
    if not bias:
        del classifier["bias"]
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def logits_of(params, features):
    classifier = jax.tree.map(np.float64, dict(params["classifier"]))
    return features @ classifier["kernel"] + classifier["bias"]


def assert_same_but(params, changed, *names):
    """Assert that exactly the named parts are other arrays than before."""
    before, after = flatten(params), flatten(changed)
    assert before.keys() == after.keys()
    for path in before:
        same = np.array_equal(before[path], after[path])
        assert same != path.startswith(names), path


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0, 2.0])
def test_tau_normalised_divides_each_class_by_a_power_of_its_length(tau):
    params = linear()
    kernel = np.float64(params["classifier"]["kernel"])
    changed = surgery.tau_normalised(params, tau=tau)
    np.testing.assert_allclose(
        changed["classifier"]["kernel"], kernel / np.linalg.norm(kernel, axis=0) ** tau, rtol=1e-5
    )


def test_tau_0_keeps_the_kernel():
    params = linear()
    np.testing.assert_array_equal(
        surgery.tau_normalised(params, tau=0.0)["classifier"]["kernel"], params["classifier"]["kernel"]
    )


def test_tau_1_gives_every_class_length_1():
    kernel = surgery.tau_normalised(linear(), tau=1.0)["classifier"]["kernel"]
    np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), np.ones(4), rtol=1e-6)


def test_a_class_without_weights_stays_finite():
    params = linear()
    params["classifier"]["kernel"] = params["classifier"]["kernel"].at[:, 2].set(0)
    assert np.isfinite(surgery.tau_normalised(params, tau=2.0)["classifier"]["kernel"]).all()


def test_tau_normalised_drops_the_bias():
    np.testing.assert_array_equal(surgery.tau_normalised(linear(), tau=0.5)["classifier"]["bias"], np.zeros(4))


def test_tau_normalised_keeps_the_bias_on_request():
    params = linear()
    changed = surgery.tau_normalised(params, tau=0.5, bias=True)
    np.testing.assert_array_equal(changed["classifier"]["bias"], params["classifier"]["bias"])


def test_a_logit_scale_is_a_part_of_the_vector_that_is_normalised():
    params = linear() | {"logit_scale": jnp.array([0.5, 1.0, 2.0, 4.0])}
    changed = surgery.tau_normalised(params, tau=1.0)
    np.testing.assert_array_equal(changed["logit_scale"], np.ones(4))
    lengths = np.linalg.norm(changed["classifier"]["kernel"], axis=0)
    np.testing.assert_allclose(lengths, np.ones(4), rtol=1e-6)
    same = surgery.tau_normalised(params, tau=0.0, bias=True)["classifier"]
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(same[name], params["classifier"][name] * params["logit_scale"], rtol=1e-6)


@pytest.mark.parametrize("tau", [0.7, np.float32([0.0, 0.5])], ids=["one tau", "a tau each"])
def test_tau_normalised_treats_replicas_apart(tau):
    params = linear(2)
    together = surgery.tau_normalised(params, tau=tau)
    for replica, own_tau in enumerate(np.broadcast_to(tau, 2)):
        alone = surgery.tau_normalised(jax.tree.map(lambda x, r=replica: x[r], params), tau=float(own_tau))
        jax.tree.map(lambda a, b, r=replica: np.testing.assert_allclose(a[r], b, rtol=1e-6, atol=1e-7), together, alone)


def nearest_by_search(features, means, metric):
    """Return the class of the nearest mean, feature by feature."""
    if metric == "euclidean":
        return np.array([np.argmin([np.linalg.norm(z - m) for m in means]) for z in features])
    cosines = [[z @ m / np.linalg.norm(z) / np.linalg.norm(m) for m in means] for z in features]
    return np.argmax(cosines, -1)


def features_and_means():
    """Return features [200, 3] and means [4, 3], away from the origin."""
    random = np.random.default_rng(0)
    return random.normal(0.5, 1, (200, 3)), random.normal(0.5, 1, (4, 3))


@pytest.mark.parametrize("metric", surgery.DISTANCES)
def test_nearest_mean_predicts_the_class_of_the_nearest_mean(metric):
    features, means = features_and_means()
    changed = surgery.nearest_mean(linear(), jnp.asarray(means, jnp.float32), metric=metric)
    expected = nearest_by_search(features, means, metric)
    assert len(set(expected)) == 4
    np.testing.assert_array_equal(logits_of(changed, features).argmax(-1), expected)


def test_the_two_metrics_of_nearest_mean_are_not_the_same():
    features, means = features_and_means()
    assert np.any(nearest_by_search(features, means, "cosine") != nearest_by_search(features, means, "euclidean"))


@pytest.mark.parametrize("metric", surgery.DISTANCES)
def test_nearest_mean_treats_replicas_apart(metric):
    params, means = linear(2), linear(2, seed=1)["classifier"]["kernel"].swapaxes(1, 2)
    together = surgery.nearest_mean(params, means, metric=metric)
    for replica in range(2):
        alone = surgery.nearest_mean(jax.tree.map(lambda x, r=replica: x[r], params), means[replica], metric=metric)
        jax.tree.map(lambda a, b, r=replica: np.testing.assert_allclose(a[r], b, rtol=1e-6), together, alone)


def test_nearest_mean_sets_the_logit_scale_to_1():
    params = linear(logit_scale=np.array([0.5, 1, 2, 3]))
    changed = surgery.nearest_mean(params, jnp.ones((4, 3)))
    np.testing.assert_array_equal(changed["logit_scale"], np.ones(4))


def test_nearest_mean_needs_no_bias():
    """As in a cosine classifier."""
    assert surgery.nearest_mean(linear(bias=False), jnp.ones((4, 3)))["classifier"].keys() == {"kernel"}


def some_variables(net, images):
    """Return arbitrary weights and statistics, variances above 0."""
    random = np.random.default_rng(1)
    like = flatten(jax.eval_shape(net.init, jax.random.key(0), images))
    drawn = {path: random.normal(0, 0.3, leaf.shape).astype(np.float32) for path, leaf in like.items()}
    return unflatten({path: np.abs(value) + 1 if path.endswith("/var") else value for path, value in drawn.items()})


@functools.partial(jax.jit, static_argnums=0)
def prediction(net, params, stats, images):
    return net.apply({"params": params, "batch_stats": stats}, images).logits


@pytest.mark.parametrize("tau", [0.5, 1.0])
@pytest.mark.parametrize("logit_scale", [False, True], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("branches", [0, 3])
def test_logit_shifted_takes_tau_log_prior_off_the_prediction(branches, logit_scale, tau):
    net = models.create("resnet_cifar", 4, depth=8, width=4, branches=branches, logit_scale=logit_scale)
    images = np.random.default_rng(0).uniform(size=(16, 8, 8, 3)).astype(np.float32)
    variables = some_variables(net, images)
    params, stats = variables["params"], variables["batch_stats"]
    if logit_scale:
        params = {**params, "logit_scale": jnp.linspace(0.5, 2, 4)}
    changed = surgery.logit_shifted(params, COUNTS, tau=tau, branches=branches)
    expected = prediction(net, params, stats, images) - tau * np.log(COUNTS / COUNTS.sum())
    np.testing.assert_allclose(prediction(net, changed, stats, images), expected, rtol=1e-5, atol=1e-5)
    assert_same_but(params, changed, "classifier/bias")


def test_logit_shifted_treats_replicas_apart():
    params = linear(2, logit_scale=np.linspace(0.5, 2, 8).reshape(2, 4))
    together = surgery.logit_shifted(params, COUNTS, tau=0.5)
    for replica in range(2):
        alone = surgery.logit_shifted(jax.tree.map(lambda x, r=replica: x[r], params), COUNTS, tau=0.5)
        jax.tree.map(lambda a, b, r=replica: np.testing.assert_allclose(a[r], b, rtol=1e-6), together, alone)


def variables_of(params):
    return Variables({"net": params, "method": {"margins": jnp.ones(4)}}, {"net": {"mean": jnp.ones(2)}}, {})


def no(*_):
    raise AssertionError("this surgery has no need of it")


def operate(settings, params, *, class_means=no, fresh=no, holdout_accuracy=None):
    """Apply a surgery like a stage; return the network's parameters and the note."""
    context = surgery.Context(COUNTS, 0, fresh, class_means, holdout_accuracy)
    function = surgery.create(settings, params, branches=0, holdout=holdout_accuracy is not None)
    before = variables_of(params)
    after, note = function(before, context)
    rest = (before._replace(params={**before.params, "net": {}}), after._replace(params={**after.params, "net": {}}))
    jax.tree.map(np.testing.assert_array_equal, *rest)  # all but the network's parameters stays
    return after.params["net"], note


def test_a_new_head_replaces_the_classifier_alone():
    params, other = linear(), linear(seed=1)
    changed, _ = operate({"name": "new_head"}, params, fresh=lambda: variables_of(other))
    assert_same_but(params, changed, "classifier")
    jax.tree.map(np.testing.assert_array_equal, changed["classifier"], other["classifier"])


def test_a_new_head_forgets_a_learned_logit_scale():
    params, other = linear() | {"logit_scale": jnp.full(4, 3.0)}, linear(seed=1) | {"logit_scale": jnp.ones(4)}
    changed, _ = operate({"name": "new_head"}, params, fresh=lambda: variables_of(other))
    np.testing.assert_array_equal(changed["logit_scale"], np.ones(4))


@pytest.mark.parametrize("metric", surgery.DISTANCES)
def test_nearest_mean_takes_the_means_of_the_network_that_it_changes(metric):
    params, means = linear(), linear(seed=1)["classifier"]["kernel"].T
    seen = []

    def class_means(variables):
        seen.append(variables.params["net"])
        return means

    changed, _ = operate({"name": "nearest_mean", "metric": metric}, params, class_means=class_means)
    jax.tree.map(np.testing.assert_array_equal, seen, [params])
    jax.tree.map(np.testing.assert_array_equal, changed, surgery.nearest_mean(params, means, metric=metric))


def test_logit_shift_takes_the_counts_of_the_training_images():
    params = linear()
    changed, _ = operate({"name": "logit_shift", "tau": 0.5}, params)
    jax.tree.map(np.testing.assert_array_equal, changed, surgery.logit_shifted(params, COUNTS, tau=0.5))


def test_one_tau_is_taken_without_a_hold_out():
    params = linear()
    changed, note = operate({"name": "tau_norm", "taus": (0.3,)}, params)
    jax.tree.map(np.testing.assert_array_equal, changed, surgery.tau_normalised(params, tau=0.3))
    assert note == {"tau": 0.3}


def best_at(wanted, params):
    """Make a hold-out accuracy that is highest at one tau, or at one for each replica."""
    length = np.linalg.norm(params["classifier"]["kernel"], axis=-2)[..., 0]

    def accuracy(tried):
        now = np.linalg.norm(tried.params["net"]["classifier"]["kernel"], axis=-2)[..., 0]
        tau = 1 - np.log(now) / np.log(length)  # now = length ** (1 - tau)
        return 1 - np.abs(tau - wanted)

    return accuracy


TAUS = (0.0, 0.3, 1.0)


@pytest.mark.parametrize("wanted", TAUS)
def test_the_tau_that_is_best_on_the_hold_out_is_taken(wanted):
    params = linear()
    changed, note = operate(
        {"name": "tau_norm", "taus": TAUS, "bias": True}, params, holdout_accuracy=best_at(wanted, params)
    )
    expected = surgery.tau_normalised(params, tau=wanted, bias=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), changed, expected)
    assert note["tau"] == wanted


def test_every_replica_takes_its_own_best_tau():
    params, wanted = linear(3), np.array([1.0, 0.0, 0.3])
    changed, note = operate({"name": "tau_norm", "taus": TAUS}, params, holdout_accuracy=best_at(wanted, params))
    expected = surgery.tau_normalised(params, tau=np.float32(wanted))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), changed, expected)
    assert note["tau"] == wanted.tolist()


def test_the_note_has_the_hold_out_accuracy_of_every_tau():
    params = linear(2)
    _, note = operate({"name": "tau_norm", "taus": TAUS}, params, holdout_accuracy=best_at(np.array([1.0, 0]), params))
    accuracies = note["holdout_accuracy"]
    assert list(accuracies) == ["0", "0.3", "1"]
    np.testing.assert_allclose(list(accuracies.values()), [[0, 1], [0.3, 0.7], [1, 0]], atol=1e-5)


LINEAR, COSINE = linear(), linear(bias=False)
MISTAKES = [
    (
        {"name": "graft"},
        LINEAR,
        "unknown surgery 'graft'; known: new_head, tau_norm, nearest_mean, class_means, teacher, logit_shift",
    ),
    ({}, LINEAR, "unknown surgery ''; known: new_head, tau_norm, nearest_mean, class_means, teacher, logit_shift"),
    ({"name": "new_head", "tau": 1}, LINEAR, "surgery 'new_head' has no setting 'tau'; allowed: none"),
    ({"name": "tau_norm", "tau": 1}, LINEAR, "surgery 'tau_norm' has no setting 'tau'; allowed: taus, bias"),
    (
        {"name": "tau_norm", "taus": 0.5},
        LINEAR,
        "surgery 'tau_norm': taus = 0.5: a tuple of float expected",
    ),
    (
        {"name": "tau_norm", "taus": ()},
        LINEAR,
        "surgery 'tau_norm': taus = (): a tuple of numbers, such as (0.5, 1.0)",
    ),
    (
        {"name": "tau_norm", "taus": (0.5, 1.0)},
        LINEAR,
        "surgery 'tau_norm' chooses among taus on a hold-out: set config.data.holdout, or give one tau",
    ),
    *(
        (
            {"name": name},
            COSINE,
            f"surgery '{name}' is for a linear classifier: model.classifier = 'cosine' has no such weights",
        )
        for name in ("tau_norm", "logit_shift")
    ),
    (
        {"name": "nearest_mean", "metric": "manhattan"},
        LINEAR,
        "unknown metric of surgery 'nearest_mean' 'manhattan'; known: cosine, euclidean",
    ),
    (
        {"name": "nearest_mean", "metric": "euclidean"},
        COSINE,
        "surgery 'nearest_mean' (euclidean) is for one linear classifier; the model has a cosine classifier",
    ),
]


@pytest.mark.parametrize("settings, params, message", MISTAKES, ids=[str(settings) for settings, _, _ in MISTAKES])
def test_a_mistake_is_one_line_with_the_allowed_values(settings, params, message):
    with pytest.raises(UserError) as raised:
        surgery.create(settings, params, branches=0, holdout=False)
    assert str(raised.value) == message


def test_nearest_mean_is_not_for_branches():
    with pytest.raises(UserError, match=r"\(cosine\) is for one linear classifier; the model has branches"):
        surgery.create({"name": "nearest_mean"}, LINEAR, branches=3, holdout=False)
