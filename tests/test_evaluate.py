"""Evaluation counts every image once, whatever the batches and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ltjax import evaluate, parallel, stage
from ltjax.types import Outputs

NUM_CLASSES = 4


class Brightest(nn.Module):
    """No parameters to speak of: the logits are the mean colours of four quadrants."""

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
    variables = stage.init_variables(nets, (4, 4, 3), jax.random.key(0))
    placed = evaluate.place(images, labels, batch_size, mesh)
    outcome = evaluate.evaluator(nets, mesh)(jax.device_put(variables, parallel.replicated(mesh)), placed)

    whole = {"params": variables.params["net"]}
    logits = np.asarray(nets["net"].apply(whole, jnp.asarray(images, jnp.float32) / 255).logits)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert {len(values) for values in outcome.values()} == {num_images}
    np.testing.assert_array_equal(outcome["predictions"], logits.argmax(-1))
    np.testing.assert_allclose(outcome["confidences"], np.exp(log_p).max(-1), rtol=1e-5)
    np.testing.assert_allclose(outcome["losses"], -log_p[np.arange(num_images), labels], rtol=1e-4)


def test_a_summary_says_what_is_absent():
    labels = np.array([0, 0, 2])
    outcome = {"predictions": np.array([0, 1, 2]), "confidences": np.array([0.9, 0.8, 0.7]), "losses": np.ones(3)}
    groups = {"many": np.array([True, False, False]), "medium": np.array([False, True, False])}
    summary = evaluate.summarise(outcome, labels, groups, 3)
    assert summary["accuracy"] == {"many": 0.5, "all": pytest.approx(2 / 3)}  # no image of the medium class
    assert summary["per_class_accuracy"] == [0.5, None, 1.0]
    assert summary["num_images"] == 3
