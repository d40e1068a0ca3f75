"""Rematerialisation: the same parameters, numbers and gradients, with less memory for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax import models
from ltjax.models.blocks import BasicBlock, Bottleneck, rematerialised
from ltjax.models.preact_resnet import PreActBlock
from ltjax.optim import flatten

IMAGES = np.random.default_rng(0).uniform(size=(4, 16, 16, 3)).astype(np.float32)
FAMILIES = {
    "resnet_cifar": dict(depth=20, width=4),
    "resnet": dict(depth=18, width=4),
    "resnext": dict(depth=50, blocks=(2, 2, 2, 2), width=8, stem="large", groups=2, group_width=32),
    "preact_resnet": dict(depth=18, width=4),
    "wide_resnet": dict(depth=16, width=1),
    "efficientnet_lite0": {},
    "vit": dict(depth=4, width=16, heads=2, patch=8, grid=8),
}


def both(family, **settings):
    """Return the network without and with rematerialisation."""
    name = "resnet" if family == "resnext" else family
    return [models.create(name, 10, remat=remat, **{**FAMILIES[family], **settings}) for remat in (False, True)]


def backward(net, variables, images):
    """Return the function from the logits' gradient to the parameters', and the new statistics."""

    def forward(params):
        outputs, new = net.apply({**variables, "params": params}, images, True, mutable=["batch_stats"])
        return outputs.logits, new

    _, pull_back, new = jax.vjp(forward, variables["params"], has_aux=True)
    return pull_back, new


@pytest.mark.parametrize("family", FAMILIES)
def test_the_backward_pass_keeps_less(family):
    """Leaves of the VJP function are its stored arrays. Parameters among them are not counted."""
    images, stored = jax.ShapeDtypeStruct((8, 64, 64, 3), jnp.float32), []
    deeper = (
        {"blocks": (3, 4, 6, 3)} if family == "resnext" else {}
    )  # with two blocks a stage, its shortcuts count much
    plain, remat = both(family, **deeper)
    variables = jax.eval_shape(plain.init, jax.random.key(0), images)  # of both, see the next test
    for net in (plain, remat):
        leaves = jax.tree.leaves(jax.eval_shape(lambda v, x, net=net: backward(net, v, x)[0], variables, images))
        stored.append(sum(leaf.size for leaf in leaves if leaf.ndim >= 3 and leaf.shape[0] == 8))
    assert stored[1] < 0.4 * stored[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_have_the_same_paths_and_shapes(family):
    more = dict(extra_block=family != "vit")
    plain, remat = (jax.eval_shape(net.init, jax.random.key(0), IMAGES) for net in both(family, **more))
    assert flatten(plain) == flatten(remat)


def test_initial_values_are_the_same():
    key = jax.random.key(0, impl="unsafe_rbg")  # quick to compile
    plain, remat = (jax.jit(net.init)(key, IMAGES) for net in both("resnet_cifar", depth=8))
    jax.tree.map(np.testing.assert_array_equal, plain, remat)


def draw(like):
    """Return arbitrary values of those shapes, above 0, as variances must be."""
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: random.uniform(0.1, 1, leaf.shape), like)


@pytest.mark.parametrize(
    "block, settings",
    [
        (BasicBlock, dict(features=6, strides=2)),
        (Bottleneck, dict(features=8, groups=2, inner=4)),
        (PreActBlock, dict(features=6, strides=2, platform=None)),
    ],
)
def test_gradients_and_new_statistics_are_those_of_the_plain_block(block, settings):
    outcomes, x = [], np.random.default_rng(0).normal(size=(3, 5, 5, 4))
    with jax.enable_x64(True):
        for kind in (block, rematerialised(block, True)):
            module = kind(**settings, dtype=jnp.float64)
            variables = draw(jax.eval_shape(lambda rng, m=module: m.init(rng, x, True), jax.random.key(0)))

            def loss(params, x, module=module, stats=variables["batch_stats"]):
                out, new = module.apply({"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"])
                return jnp.square(out).sum(), (out, new)

            outcomes.append(jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), *outcomes)


def test_gradients_of_a_network_are_the_same():
    outcomes = []
    with jax.enable_x64(True):
        for net in both("resnet_cifar", depth=8, dtype="float64", extra_block=True):
            variables = draw(jax.eval_shape(net.init, jax.random.key(0), IMAGES))

            def gradients(variables, net=net):
                pull_back, new = backward(net, variables, IMAGES)
                return pull_back(jnp.ones((4, 10))), new

            outcomes.append(jax.jit(gradients)(variables))
    assert np.any(outcomes[0][0][0]["block"]["conv2"]["kernel"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8), *outcomes)
