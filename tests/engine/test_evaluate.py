"""Evaluation counts every image once, for any batches and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ltjax import metrics
from ltjax.engine import evaluate, stage
from ltjax.system import parallel
from ltjax.types import Outputs

NUM_CLASSES = 4


class Brightest(nn.Module):
    """A network whose logits are the mean colours of four quadrants."""

    @nn.compact
    def __call__(self, images, train=False):
        scale = self.param("scale", lambda _: 5 + 0.1 * jnp.arange(NUM_CLASSES, dtype=jnp.float32))
        quadrants = images.reshape(images.shape[0], 2, 2, 2, 2, -1).mean((2, 4, 5)).reshape(-1, NUM_CLASSES)
        return Outputs(scale * quadrants, quadrants)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(("num_images", "batch_size"), [(1, 500), (7, 3), (24, 8), (25, 8), (30, 1000)])
def test_batches_and_padding_do_not_change_the_figures(devices, num_images, batch_size):
    rng = np.random.default_rng(num_images)
    images = rng.integers(0, 256, (num_images, 4, 4, 3), dtype=np.uint8)
    labels = rng.integers(0, NUM_CLASSES, num_images)
    mesh, nets = parallel.make_mesh(jax.devices()[:devices]), {"net": Brightest()}
    variables = stage.random_variables(nets, (4, 4, 3), jax.random.key(0))
    placed = evaluate.place(images, labels, batch_size, mesh)
    outcome = evaluate.evaluator(nets, mesh)(jax.device_put(variables, parallel.replicated(mesh)), placed)

    whole = {"params": variables.params["net"]}
    logits = np.asarray(nets["net"].apply(whole, jnp.asarray(images, jnp.float32) / 255).logits)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert {len(values) for values in outcome.values()} == {num_images}
    np.testing.assert_array_equal(outcome["predictions"], logits.argmax(-1))
    np.testing.assert_allclose(outcome["confidences"], np.exp(log_p).max(-1), rtol=1e-5)
    np.testing.assert_allclose(outcome["losses"], -log_p[np.arange(num_images), labels], rtol=1e-4)


def test_the_network_is_applied_with_float32_products(monkeypatch):
    """Check it on a CPU, because accelerators multiply less precisely by default."""
    precisions = []

    class Watched(Brightest):
        @nn.compact
        def __call__(self, images, train=False):
            precisions.append(jax.config.values["jax_default_matmul_precision"])
            return super().__call__(images, train)

    monkeypatch.setattr(evaluate.xla, "float32_products", lambda platform: jax.default_matmul_precision("float32"))
    mesh, nets = parallel.make_mesh(jax.devices()[:1]), {"net": Watched()}
    variables = stage.random_variables(nets, (4, 4, 3), jax.random.key(0))
    precisions.clear()
    images = evaluate.place(np.zeros((3, 4, 4, 3), np.uint8), np.zeros(3, np.int32), 3, mesh)
    evaluate.evaluator(nets, mesh)(jax.device_put(variables, parallel.replicated(mesh)), images)
    assert precisions and set(precisions) == {"float32"}


def test_a_summary_says_what_is_absent():
    labels = np.array([0, 0, 2])
    outcome = {"predictions": np.array([0, 1, 2]), "confidences": np.array([0.9, 0.8, 0.7]), "losses": np.ones(3)}
    groups = {"many": np.array([True, False, False]), "medium": np.array([False, True, False])}
    summary = evaluate.figures_of(outcome, labels, groups, 3)
    assert summary["accuracy"] == {"many": 0.5, "all": pytest.approx(2 / 3)}  # no image of the medium class
    assert summary["per_class_accuracy"] == [0.5, None, 1.0]
    assert summary["num_images"] == 3


def test_the_nearest_mean_is_that_of_the_features():
    """Means of unequal length, so that a plain product of feature and mean would choose others."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (25, 4, 4, 3), dtype=np.uint8), np.zeros(25, np.int32)
    means = rng.normal(0.5, 0.2, (NUM_CLASSES, NUM_CLASSES)).astype(np.float32)
    mesh, nets = parallel.make_mesh(), {"net": Brightest()}
    variables = jax.device_put(stage.random_variables(nets, (4, 4, 3), jax.random.key(0)), parallel.replicated(mesh))
    placed = evaluate.place(images, labels, 8, mesh)
    outcome = evaluate.evaluator(nets, mesh)(variables, placed, jnp.asarray(means))

    features = images.reshape(25, 2, 2, 2, 2, 3).mean((2, 4, 5)).reshape(25, NUM_CLASSES) / 255
    expected = np.square(features[:, None] - means).sum(-1).argmin(-1)
    np.testing.assert_array_equal(outcome["nearest"], expected)
    assert (expected != (features @ means.T).argmax(-1)).any() and len(set(expected)) > 1
    np.testing.assert_array_equal(
        outcome["predictions"], evaluate.evaluator(nets, mesh)(variables, placed)["predictions"]
    )


def test_a_summary_has_the_nearest_means_accuracy_on_demand():
    outcome = {"predictions": np.array([0, 1]), "confidences": np.full(2, 0.9), "losses": np.ones(2)}
    groups, labels = {"many": np.array([True, False]), "few": np.array([False, True])}, np.array([0, 1])
    assert "nearest_mean" not in evaluate.figures_of(outcome, labels, groups, 2)
    summary = evaluate.figures_of({**outcome, "nearest": np.array([1, 1])}, labels, groups, 2)
    assert summary["nearest_mean"] == {"accuracy": {"many": 0.0, "few": 1.0, "all": 0.5}}
    assert summary["accuracy"] == {"many": 1.0, "few": 1.0, "all": 1.0}


@pytest.fixture
def summaries():
    """Return summaries of three replicas on 40 images of 3 classes, the last without images."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 40)
    groups = {"many": np.array([True, False, False]), "few": np.array([False, True, True])}
    outcomes = [
        {
            "predictions": rng.integers(0, 3, 40),
            "confidences": rng.uniform(0.3, 1, 40).astype(np.float32),
            "losses": rng.uniform(0, 3, 40),
            "nearest": rng.integers(0, 3, 40),
        }
        for _ in range(3)
    ]
    return [evaluate.figures_of(outcome, labels, groups, 3) for outcome in outcomes], outcomes, labels


def test_replicas_are_summed_up_by_mean_and_sample_deviation(summaries):
    each, _, _ = summaries
    summary = evaluate.over_seeds(each, [7, 8, 9])
    figures = {
        "ece": lambda s: s["ece"],
        "mce": lambda s: s["mce"],
        **{name: lambda s, name=name: s[name] for name in evaluate.METRICS},
        **{f"accuracy {g}": lambda s, g=g: s["accuracy"][g] for g in ("all", "many", "few")},
    }
    for name, figure in figures.items():
        values = [figure(s) for s in each]
        np.testing.assert_allclose(figure(summary), np.mean(values), rtol=1e-12, err_msg=name)
        np.testing.assert_allclose(figure(summary["std"]), np.std(values, ddof=1), rtol=1e-12, err_msg=name)
    nearest = [s["nearest_mean"]["accuracy"]["few"] for s in each]
    np.testing.assert_allclose(summary["nearest_mean"]["accuracy"]["few"], np.mean(nearest), rtol=1e-12)
    first = [s["per_class_accuracy"][0] for s in each]
    assert summary["per_class_accuracy"][0] == pytest.approx(np.mean(first))
    assert summary["per_class_accuracy"][2] is None  # no test image
    assert summary["num_images"] == 40


def test_each_replicas_own_summary_is_kept_with_its_seed(summaries):
    each, _, _ = summaries
    assert evaluate.over_seeds(each, [7, 8, 9])["replicas"] == [{"seed": 7 + n, **s} for n, s in enumerate(each)]


def test_the_bins_of_replicas_are_those_of_all_their_predictions(summaries):
    each, outcomes, labels = summaries
    bins = evaluate.over_seeds(each, [7, 8, 9])["calibration_bins"]
    correct = np.concatenate([outcome["predictions"] == labels for outcome in outcomes])
    pooled = metrics.calibration(np.concatenate([outcome["confidences"] for outcome in outcomes]), correct)
    assert bins["counts"] == np.asarray(pooled.counts).tolist()
    np.testing.assert_allclose(bins["accuracies"], pooled.accuracies, rtol=1e-5)
    np.testing.assert_allclose(bins["confidences"], pooled.confidences, rtol=1e-5)
