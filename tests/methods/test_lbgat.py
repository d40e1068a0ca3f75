"""LBGAT against the authors' code: tests/golden/lbgat_step.npz, computed in float64; see the README there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax import attacks, losses, methods, models, optim
from ltjax.engine import stage
from ltjax.interop.torch import import_state_dict
from ltjax.methods import adversarial
from ltjax.types import Batch, Variables
from tests.conftest import optimised_programs

NETS = {"net": "model", "guide": "teacher"}  # ours and the authors' names


def of(numbers, prefix):
    return {key.removeprefix(prefix): value for key, value in numbers.items() if key.startswith(prefix)}


@pytest.fixture(scope="module", params=["float32", "float64"])
def pair(request, golden):
    """Return the authors' step: numbers, apply, variables of both networks, batch, in one precision."""
    dtype, numbers = request.param, golden("lbgat_step")
    with jax.enable_x64(dtype == "float64"), optimised_programs():
        net = models.create("wide_resnet", 100, depth=10, width=1, dtype=dtype)
        imported = {ours: import_state_dict(of(numbers, f"init/{theirs}."), net) for ours, theirs in NETS.items()}
        variables = Variables(
            {name: each.params["net"] for name, each in imported.items()},
            {name: each.stats["net"] for name, each in imported.items()},
            {},
        )
        variables = jax.tree.map(lambda x: jnp.asarray(x, dtype), variables)
        batch = Batch(jnp.asarray(numbers["images"] / 255, dtype), jnp.asarray(numbers["labels"], jnp.int32))
        yield numbers, stage.make_apply({"net": net, "guide": net}, "train"), variables, batch


def given_stored_images(monkeypatch, numbers, dtype):
    """Training steps take the authors' adversarial images instead of attacking."""
    stored = jnp.asarray(numbers["adversarial_images"], dtype)
    monkeypatch.setattr(adversarial.attacks, "pgd", lambda images, start, objective, **settings: stored)


def is_double(batch):
    return batch.images.dtype == jnp.float64


def test_the_attack_finds_the_authors_images(pair):
    """In float32 rounding flips signs of tiny gradients, so only the resulting KL is compared."""
    numbers, apply, variables, batch = pair

    @jax.jit
    def predict(images):
        return apply(variables, images, bn="eval")[0].logits

    natural = predict(batch.images)
    start = batch.images + float(numbers["noise_scale"]) * jnp.asarray(numbers["start_noise"], batch.images.dtype)
    settings = dict(epsilon=float(numbers["epsilon"]), step_size=float(numbers["step_size"]), num_steps=10)
    actual = attacks.pgd(batch.images, start, lambda x: losses.kl_divergence(natural, predict(x)), **settings)
    if is_double(batch):
        np.testing.assert_allclose(actual, numbers["adversarial_images"], atol=1e-6)
    reached = losses.kl_divergence(natural, predict(actual)).sum()
    np.testing.assert_allclose(reached, numbers["attack_objective"], rtol=1e-9 if is_double(batch) else 0.01)


@pytest.mark.parametrize("beta", [0, 6])
def test_loss_gradients_and_statistics_are_the_authors(pair, beta, monkeypatch):
    numbers, apply, variables, batch = pair
    given_stored_images(monkeypatch, numbers, batch.images.dtype)
    method = methods.create("lbgat", np.ones(100), beta=float(beta))

    @jax.jit
    def step(params):
        return jax.value_and_grad(
            lambda p: method.loss(apply, variables._replace(params=p), batch, jax.random.key(0)), has_aux=True
        )(params)

    (loss, (after, _)), gradients = step(variables.params)
    close = 1e-7 if is_double(batch) else 1e-5  # the gradients are stored in float32
    np.testing.assert_allclose(loss, numbers[f"loss_beta{beta}"], rtol=1e-12 if is_double(batch) else 1e-6)
    compared = 0
    for ours, theirs in NETS.items():
        stored = of(numbers, f"beta{beta}/grad/{theirs}."), of(numbers, f"beta{beta}/stats/{theirs}.")
        flat = optim.flatten(gradients[ours]), optim.flatten(after.stats[ours])
        for values, known in zip(flat, stored, strict=True):
            for name, wanted in known.items():
                value = np.asarray(values[path_of(name)])
                wanted = wanted.transpose(2, 3, 1, 0) if wanted.ndim == 4 else wanted.T
                np.testing.assert_allclose(value, wanted, atol=close * np.abs(wanted).max(), rtol=0, err_msg=name)
                compared += 1
    assert compared == 2 * (9 + 6)


def path_of(name):
    """Return our path of an authors' name."""
    *block, layer, leaf = name.split(".")
    where = f"stage{block[0][-1]}_block1/" if block else ""
    if layer == "fc":
        return "classifier/" + {"weight": "kernel", "bias": "bias"}[leaf]
    kind, number = layer[:-1], layer[-1] if block else ""
    leaves = {"conv": {"weight": "kernel"}, "bn": {"weight": "scale", "running_mean": "mean", "running_var": "var"}}
    return f"backbone/{where}{'norm' if kind == 'bn' else 'conv'}{number}/{leaves[kind][leaf]}"
