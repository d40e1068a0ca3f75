"""Rematerialisation: the same parameters, numbers and gradients, from less that the backward pass keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax import models
from ltjax.optim import flatten

IMAGES = np.random.default_rng(0).uniform(size=(4, 16, 16, 3)).astype(np.float32)
FAMILIES = {
    "resnet_cifar": dict(depth=20, width=4),
    "resnet": dict(depth=18, width=4),
    "resnext": dict(depth=50, width=8, stem="large", groups=2, group_width=32),
    "preact_resnet": dict(depth=18, width=4),
    "wide_resnet": dict(depth=16, width=1),
}


def both(family, **settings):
    """The network without and with rematerialisation."""
    name = "resnet" if family == "resnext" else family
    return [models.create(name, 10, remat=remat, **{**FAMILIES[family], **settings}) for remat in (False, True)]


def backward(net, variables, images):
    """The function from the logits' gradient to the parameters', and the new statistics."""

    def forward(params):
        outputs, new = net.apply({**variables, "params": params}, images, True, mutable=["batch_stats"])
        return outputs.logits, new

    _, pull_back, new = jax.vjp(forward, variables["params"], has_aux=True)
    return pull_back, new


@pytest.mark.parametrize("family", FAMILIES)
def test_the_backward_pass_keeps_less(family):
    """Leaves of the function that goes back are what it keeps; parameters are among them, and are not counted."""
    images, kept = jax.ShapeDtypeStruct((8, 64, 64, 3), jnp.float32), []
    for net in both(family):
        variables = jax.eval_shape(net.init, jax.random.key(0), images)
        leaves = jax.tree.leaves(jax.eval_shape(lambda v, x, net=net: backward(net, v, x)[0], variables, images))
        kept.append(sum(leaf.size for leaf in leaves if leaf.ndim == 4 and leaf.shape[0] == 8))
    assert kept[1] < 0.4 * kept[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_have_the_same_paths_and_shapes(family):
    plain, remat = (jax.eval_shape(net.init, jax.random.key(0), IMAGES) for net in both(family, extra_block=True))
    assert flatten(plain) == flatten(remat)


SMALLEST = {  # one block a stage
    "resnet_cifar": dict(depth=8),
    "resnext": dict(blocks=(1, 1, 1, 1)),
    "preact_resnet": dict(blocks=(1, 1, 1, 1)),
}


@pytest.mark.parametrize("family", SMALLEST)
def test_initial_values_are_the_same(family):
    plain, remat = (jax.jit(net.init)(jax.random.key(0), IMAGES) for net in both(family, **SMALLEST[family]))
    jax.tree.map(np.testing.assert_array_equal, plain, remat)


@pytest.mark.parametrize("family", SMALLEST)
def test_gradients_and_new_statistics_are_the_same(family):
    outcomes = []
    with jax.enable_x64(True):
        nets = both(family, **SMALLEST[family], dtype="float64")
        variables = jax.jit(nets[0].init)(jax.random.key(0), IMAGES)
        weights = np.random.default_rng(1).normal(size=(4, 10))
        for net in nets:

            def gradients(variables, net=net):
                pull_back, new = backward(net, variables, IMAGES)
                return pull_back(jnp.asarray(weights)), new

            outcomes.append(jax.jit(gradients)(variables))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *outcomes)
