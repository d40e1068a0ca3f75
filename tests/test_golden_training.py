"""The stage engine repeats the authors' PyTorch training step by step. The numbers' source: tests/golden/README.md."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax import methods, models, optim, parallel, stage
from ltjax.data import augment
from ltjax.interop.torch import import_state_dict
from ltjax.types import Batch

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def network(**settings):
    return models.create("resnet_cifar", 100, depth=8, mean=MEAN, std=STD, **settings)


def variables_of(numbers, prefix, net):
    return import_state_dict({k.removeprefix(prefix): v for k, v in numbers.items() if k.startswith(prefix)}, net)


def train(numbers, net, method, draw, *, groups, lr, num_steps, devices):
    mesh = parallel.make_mesh(jax.devices()[:devices])
    start = variables_of(numbers, "init/", net)
    built = stage.build(
        {"net": net},
        method,
        draw,
        start.params,
        groups=groups,
        bn="train",
        lr=lr,
        factors=np.ones(1),
        steps_per_epoch=num_steps,
        momentum=float(numbers["momentum"]),
        weight_decay=float(numbers["weight_decay"]),
        mesh=mesh,
    )
    source = {k: jnp.asarray(numbers[k]) for k in ("images", "labels", "permutations", "lams") if k in numbers}
    source = jax.device_put(
        source, parallel.split_batch(mesh, axis=1) if devices > 1 and "lams" not in source else None
    )
    state = built.init(np.uint32(0), jax.device_put(start, parallel.replicated(mesh)))
    state, metrics = built.run(state, source, num_steps)
    return start, state, metrics


def assert_same_updates(start, ours, theirs, paths):
    """|| ours - theirs || / || theirs - start || over all the named arrays together."""
    distance = sum(float(jnp.sum(jnp.square(ours[p] - theirs[p]))) for p in paths) ** 0.5
    moved = sum(float(jnp.sum(jnp.square(theirs[p] - start[p]))) for p in paths) ** 0.5
    assert moved > 0
    assert distance / moved < 1e-3


@pytest.mark.parametrize("devices", [1, 8])
def test_stage1_repeats_the_authors_steps(golden, devices):
    numbers = golden("mislas_stage1")
    net = network()

    def draw(source, seed, step, rng):
        images = source["images"][step].astype(jnp.float32) / 255
        lam, permutation = source["lams"][step].astype(jnp.float32), source["permutations"][step]
        return augment.mixup(images, source["labels"][step], lam, permutation)

    start, state, metrics = train(
        numbers,
        net,
        methods.create("erm", np.ones(100)),
        draw,
        groups={"all": {"match": ".*", "rate": 1.0}},
        lr=float(numbers["lr"]),
        num_steps=4,
        devices=devices,
    )
    np.testing.assert_allclose(metrics["loss"], numbers["losses"], rtol=1e-4)
    theirs, ours = variables_of(numbers, "final/", net), state.variables
    flat = [optim.flatten(v.params) for v in (start, ours, theirs)]
    assert_same_updates(*flat, paths=list(flat[0]))
    flat = [optim.flatten(v.stats) for v in (start, ours, theirs)]
    assert_same_updates(*flat, paths=list(flat[0]))


@pytest.mark.parametrize("devices", [1, 8])
def test_stage2_repeats_the_authors_steps(golden, devices):
    numbers = golden("mislas_stage2")
    net = network(logit_scale=True)

    def draw(source, seed, step, rng):
        return Batch(source["images"][step].astype(jnp.float32) / 255, source["labels"][step])

    head, tail = float(numbers["smooth_head"]), float(numbers["smooth_tail"])
    start, state, metrics = train(
        numbers,
        net,
        methods.create("mislas", numbers["class_counts"], head=head, tail=tail),
        draw,
        groups={
            "frozen": {"match": "net/backbone/.*", "rate": 0.0},
            "classifier": {"match": "net/classifier/.*", "rate": float(numbers["lr_classifier"] / numbers["lr_scale"])},
            "scale": {"match": "net/logit_scale", "rate": 1.0},
        },
        lr=float(numbers["lr_scale"]),
        num_steps=4,
        devices=devices,
    )
    np.testing.assert_allclose(metrics["loss"], numbers["losses"], rtol=1e-4)
    theirs, ours = variables_of(numbers, "final/", net), state.variables
    flat = [optim.flatten(v.params) for v in (start, ours, theirs)]
    trained = [p for p in flat[0] if "backbone" not in p]
    assert_same_updates(*flat, paths=trained)
    for path in set(flat[0]) - set(trained):
        np.testing.assert_array_equal(flat[0][path], flat[1][path])
    flat = [optim.flatten(v.stats) for v in (start, ours, theirs)]
    assert_same_updates(*flat, paths=list(flat[0]))  # shifted batch norm
    logits = net.apply(
        {"params": ours.params["net"], "batch_stats": ours.stats["net"]},
        jnp.asarray(numbers["eval_images"], jnp.float32) / 255,
    ).logits
    np.testing.assert_allclose(logits, numbers["eval_logits"], rtol=1e-3, atol=1e-3)


def test_evaluation_agrees_with_the_authors(golden):
    numbers = golden("mislas_stage1")
    net = network()
    start = variables_of(numbers, "init/", net)
    images = jnp.asarray(numbers["eval_images"], jnp.float32) / 255
    outputs = net.apply({"params": start.params["net"], "batch_stats": start.stats["net"]}, images)
    np.testing.assert_allclose(outputs.features, numbers["eval_features"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outputs.logits, numbers["eval_logits"], rtol=1e-4, atol=1e-4)
