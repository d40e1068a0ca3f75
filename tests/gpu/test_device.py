"""Properties on any device: a CPU, unless JAX_PLATFORMS is set.

For CUDA, with full float32 and deterministic operations, as in `benchmarks/accelerator.py`:

    export JAX_PLATFORMS=cuda,cpu JAX_DEFAULT_MATMUL_PRECISION=highest XLA_FLAGS=--xla_gpu_deterministic_ops=true
    python -m pytest tests/gpu tests/engine/test_golden_training.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.autoattack import golden
from ltjax import attacks, config, losses, methods, models, optim
from ltjax.data import augment, samplers
from ltjax.engine import feed, stage
from ltjax.runs.checkpoint import Checkpoints
from ltjax.system import parallel
from ltjax.types import Variables
from tests import stages

COUNTS = np.full(10, 16)
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def network(**settings):
    return models.create("resnet_cifar", len(COUNTS), depth=8, width=8, mean=MEAN, std=STD, **settings)


def stage_and_source(net, **replicated):
    """Return a stage of cross-entropy with mixup, batches of 16, on the first device, and its images."""
    mesh = parallel.make_mesh(jax.devices()[:1])
    draw = feed.resident_draw(
        samplers.create("instance_balanced"),
        lambda rng, images, labels: augment.augment(rng, images, labels, crop_padding=4, flip=True, mixup_alpha=1.0),
        batch_size=16,
        class_counts=COUNTS,
        mesh=mesh,
    )
    compiled = stages.build(
        {"net": net},
        methods.create("erm", COUNTS),
        draw,
        fresh().params,
        groups={"all": {"match": ".*", "rate": 1.0}},
        bn="train",
        lr=0.05,
        factors=np.ones(1),
        steps_per_epoch=8,
        momentum=0.9,
        weight_decay=2e-4,
        mesh=mesh,
        **replicated,
    )
    images = np.random.default_rng(0).integers(256, size=(COUNTS.sum(), 32, 32, 3), dtype=np.uint8)
    source = feed.Resident(jnp.asarray(images), jnp.asarray(np.repeat(np.arange(10), 16), jnp.int32))
    return compiled, jax.device_put(source, parallel.replicated(mesh))


@functools.cache
def fresh() -> Variables:
    return jax.jit(lambda key: stage.random_variables({"net": network()}, (32, 32, 3), key))(jax.random.key(1))


@functools.cache
def single_run():
    """Return the stage of a single run in float32, and its images."""
    return stage_and_source(network())


def updates(run, num_steps, chunks):
    """Return the flat change of parameters and statistics, and the losses, of `num_steps` steps in some dispatches."""
    compiled, source = run
    start = fresh()
    state, values = compiled.init(np.uint32(2), start), []
    for _ in range(chunks):
        state, metrics = compiled.run(state, source, num_steps // chunks)
        values.extend(np.asarray(metrics["loss"]).tolist())
    old, new = ({**optim.flatten(v.params), **optim.flatten(v.stats)} for v in jax.device_get((start, state.variables)))
    return np.concatenate([np.ravel(new[path] - old[path]) for path in sorted(old)]).astype(np.float64), values


def relative(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def test_a_scan_is_repeated_single_steps():
    scanned, scanned_losses = updates(single_run(), num_steps=3, chunks=1)
    single, single_losses = updates(single_run(), num_steps=3, chunks=3)
    np.testing.assert_allclose(scanned_losses, single_losses, rtol=1e-4)
    assert relative(scanned, single) < 1e-3


def test_a_bfloat16_step_is_close_to_a_float32_step():
    exact, (exact_loss,) = updates(single_run(), num_steps=1, chunks=1)
    rounded, (rounded_loss,) = updates(stage_and_source(network(dtype="bfloat16")), num_steps=1, chunks=1)
    assert rounded_loss == pytest.approx(exact_loss, rel=0.02)
    assert relative(rounded, exact) < 0.1


def test_a_resumed_stage_repeats_itself_bit_for_bit(tmp_path):
    compiled, source = single_run()
    halfway, _ = compiled.run(compiled.init(np.uint32(2), fresh()), source, 3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, halfway, {})
        checkpoints.wait()
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), halfway)
        expected, _ = compiled.run(halfway, source, 3)
        again, source = stage_and_source(network())  # compiled again, as in a new process
        restored, _ = checkpoints.restore(like)
        actual, _ = again.run(restored, source, 3)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        np.testing.assert_array_equal(a, b)


def test_logits_agree_with_the_cpu():
    cpu = jax.devices("cpu")[0]
    images = np.random.default_rng(1).random((16, 32, 32, 3), np.float32)
    there, here = network(platform="gpu"), network(platform="cpu")  # the plain convolution, and the one for CPUs
    collections = {"params": fresh().params["net"], "batch_stats": fresh().stats["net"]}
    logits = {}
    for net, device in ((there, jax.devices()[0]), (here, cpu)):
        with jax.default_matmul_precision("highest"):
            run = jax.jit(lambda collections, images, net=net: net.apply(collections, images).logits)
            logits[net.backbone.platform] = np.asarray(run(*jax.device_put((collections, images), device)))
    np.testing.assert_allclose(logits["gpu"], logits["cpu"], rtol=1e-4, atol=1e-4)


@functools.cache
def alone(seed):
    """Return the variables of a single run after two steps, each a dispatch."""
    single, source = single_run()
    state = single.init(seed, fresh())
    for _ in range(2):
        state, _ = single.run(state, source, 1)
    return state.variables


@pytest.mark.parametrize("replicate", config.REPLICATE)
def test_replicas_are_the_single_runs(replicate):
    compiled, source = stage_and_source(network(), replicas=2, replicate=replicate)
    seeds = np.array([0, 2], np.uint32)  # with seed 1 a ReLU's input is 0 up to rounding in step 2, and flips
    both, _ = compiled.run(compiled.init(seeds, jax.tree.map(lambda x: jnp.stack([x, x]), fresh())), source, 2)
    for number, seed in enumerate(seeds):
        trained = jax.device_get((fresh(), both.variables, alone(seed)))
        start, ours, theirs = (optim.flatten(variables.params) for variables in trained)
        moved = np.concatenate([np.ravel(ours[path][number] - start[path]) for path in sorted(start)])
        expected = np.concatenate([np.ravel(theirs[path] - start[path]) for path in sorted(start)])
        assert relative(moved, expected) < 1e-3


def test_dro_loss_agrees_with_the_cpu():
    rng = np.random.default_rng(2)
    features, centroids = rng.standard_normal((64, 128), np.float32), rng.standard_normal((20, 128), np.float32)
    labels = rng.integers(20, size=64).astype(np.int32)
    both = jax.jit(jax.value_and_grad(lambda z, y, m: losses.dro_loss(z, y, m, margins=1.0)))
    (value, gradient), (expected, expected_gradient) = (
        both(*jax.device_put((features, labels, centroids), device))
        for device in (jax.devices()[0], jax.devices("cpu")[0])
    )
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert relative(np.asarray(gradient), np.asarray(expected_gradient)) < 1e-4


def test_pgd_reaches_the_same_loss_on_the_device_and_the_cpu():
    """Compare the divergence that the attack reaches, because rounding flips the signs of tiny gradients."""
    images = np.random.default_rng(3).random((16, 32, 32, 3), np.float32)
    reached = {}
    for platform, device in (("gpu", jax.devices()[0]), ("cpu", jax.devices("cpu")[0])):
        apply = stage.make_apply({"net": network(platform=platform)}, "eval")
        variables, x = jax.device_put((fresh(), images), device)

        @jax.jit
        def divergence(x, of=x, variables=variables, apply=apply):
            return losses.kl_divergence(*(apply(variables, images)[0].logits for images in (of, x)))

        start = attacks.random_start(jax.random.key(0), x)
        found = attacks.pgd(x, start, divergence, epsilon=0.031, step_size=0.007, num_steps=5)
        reached[platform] = np.asarray(divergence(found))
    assert reached["gpu"].mean() == pytest.approx(reached["cpu"].mean(), rel=0.01)


def test_apgd_on_the_device_has_the_references_robust_images(optimised):
    predict, images, labels, theirs, epsilon = golden(64)
    settings = dict(epsilon=epsilon, attacks=("apgd-ce",), devices=jax.devices()[:1], progress=None)
    actual = attacks.autoattack(predict, images, labels, jax.random.key(0), **settings)
    assert (actual.robust != theirs["apgd-ce"]).sum() <= 2
    assert 0 < actual.robust.sum() < 64
