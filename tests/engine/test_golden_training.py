"""Stages repeat the authors' PyTorch training step by step (source: tests/golden/README.md)."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax import methods, models, optim
from ltjax.data import mixing
from ltjax.interop.torch import place
from ltjax.system import parallel
from ltjax.types import Batch
from tests import stages
from tests.conftest import optimised_programs

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
SOURCE = ("images", "labels", "permutations", "lams")
# One device uses float64: in float32, rounding decides about ReLU inputs near 0, and a single one can change the
# weights by more than 1e-3 of their distance.
each_layout = pytest.mark.parametrize("devices, dtype", [(1, "float64"), (8, "float32")])


@pytest.fixture(autouse=True)
def double_precision_for_float64(request):
    callspec = getattr(request.node, "callspec", None)
    if callspec is None or "float64" not in callspec.id:
        yield
        return
    with jax.enable_x64(True), optimised_programs():  # float64 convolutions are slow
        yield


def network(**settings):
    return models.create("resnet_cifar", 100, depth=8, mean=MEAN, std=STD, **settings)


def variables_of(numbers, prefix, net):
    stored = {k.removeprefix(prefix): v for k, v in numbers.items() if k.startswith(prefix)}
    return jax.tree.map(lambda x: x.astype(net.dtype), place(stored, net).variables)


def stored_batch(source, seed, step, rng):
    return Batch(source["images"][step].astype(jnp.float32) / 255, source["labels"][step].astype(jnp.int32))


def train(numbers, net, method, *, groups, devices, draw=stored_batch, arrays=None, lr=None):
    """Train the authors' steps -> the compiled stage, variables before, state after, metrics of each step.

    arrays: The method's arrays, instead of those of a refresh.
    """
    mesh, num_steps = parallel.make_mesh(jax.devices()[:devices]), len(numbers["losses"])
    variables = variables_of(numbers, "init/", net)
    extra, _ = jax.eval_shape(lambda: method.init(jax.random.key(0)))
    compiled = stages.build(
        {"net": net},
        method,
        draw,
        {**variables.params, "method": extra},
        groups=groups,
        bn="train",
        lr=float(numbers["lr"]) if lr is None else lr,
        factors=np.ones(1),
        steps_per_epoch=num_steps,
        momentum=float(numbers["momentum"]),
        nesterov=bool(numbers.get("nesterov", False)),
        weight_decay=float(numbers["weight_decay"]),
        mesh=mesh,
    )
    source = jax.device_put(
        {k: numbers[k] for k in SOURCE if k in numbers},
        parallel.split_batch(mesh, axis=1) if devices > 1 and "lams" not in numbers else None,
    )
    everywhere = parallel.replicated(mesh)
    state = compiled.init(np.uint32(0), jax.device_put(variables, everywhere))
    if arrays is not None:
        state = state._replace(variables=state.variables._replace(arrays=jax.device_put(arrays, everywhere)))
    start = jax.tree.map(np.array, state.variables)
    state, metrics = compiled.run(state, source, num_steps)
    return SimpleNamespace(compiled=compiled, start=start, state=state, metrics=metrics)


def distance(start, ours, theirs, paths):
    """Compute || ours - theirs || / || theirs - start || over all named arrays together."""
    start, ours, theirs = (
        np.concatenate([np.asarray(tree[p]).ravel() for p in paths]) for tree in (start, ours, theirs)
    )
    apart, moved = np.linalg.norm(ours - theirs), np.linalg.norm(theirs - start)
    assert moved > 0
    return apart / moved


def assert_repeats(numbers, net, done):
    """Check losses, and updates of trained parameters and statistics. Other parameters stay as they are."""
    np.testing.assert_allclose(done.metrics["loss"], numbers["losses"], rtol=1e-4)
    trees = (done.start, done.state.variables, variables_of(numbers, "final/", net))
    start, ours, theirs = (optim.flatten({"net": tree.params["net"]}) for tree in trees)
    trained = [path for path in start if path in done.compiled.trained]
    assert distance(start, ours, theirs, trained) < 1e-3
    for path in set(start) - set(trained):
        np.testing.assert_array_equal(start[path], ours[path])
    start, ours, theirs = (optim.flatten(tree.stats) for tree in trees)
    assert distance(start, ours, theirs, list(start)) < 1e-3


@each_layout
def test_mislas_stage1_repeats_the_authors_steps(golden, devices, dtype):
    numbers, net = golden("mislas_stage1"), network(dtype=dtype)

    def draw(source, seed, step, rng):
        mesh = parallel.make_mesh(jax.devices()[:devices])
        images, labels = (parallel.split(source[name][step], mesh) for name in ("images", "labels"))
        lam, permutation = source["lams"][step].astype(jnp.float32), source["permutations"][step]
        return mixing.mixup(images.astype(jnp.float32) / 255, labels, lam, permutation)

    method, groups = methods.create("erm", np.ones(100)), {"all": {"match": ".*", "rate": 1.0}}
    assert_repeats(numbers, net, train(numbers, net, method, groups=groups, devices=devices, draw=draw))


@each_layout
def test_mislas_stage2_repeats_the_authors_steps(golden, devices, dtype):
    """With shifted batch norm: the statistics of the frozen backbone change."""
    numbers, net = golden("mislas_stage2"), network(logit_scale=True, dtype=dtype)
    head, tail = float(numbers["smooth_head"]), float(numbers["smooth_tail"])
    lr, classifier_lr = float(numbers["lr_scale"]), float(numbers["lr_classifier"])
    groups = {
        "frozen": {"match": "net/backbone/.*", "rate": 0.0},
        "classifier": {"match": "net/classifier/.*", "rate": classifier_lr / lr},
        "scale": {"match": "net/logit_scale", "rate": 1.0},
    }
    method = methods.create("mislas", numbers["class_counts"], head=head, tail=tail)
    done = train(numbers, net, method, groups=groups, devices=devices, lr=lr)
    assert_repeats(numbers, net, done)
    ours = done.state.variables
    logits = jax.jit(net.apply)(
        {"params": ours.params["net"], "batch_stats": ours.stats["net"]},
        np.float32(numbers["eval_images"]) / 255,
    ).logits
    np.testing.assert_allclose(logits, numbers["eval_logits"], rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def dro_train(golden):
    """Return `dro_train(radius, devices=..)`: the numbers, the network, and the result of `train`, once for each."""
    numbers = golden("dro_train")
    class_counts = golden("class_counts")["cifar100_exp_if100"]
    groups = {
        "features": {"match": "net/backbone/.*|method/margins", "rate": 1.0},
        "frozen": {"match": "net/classifier/.*", "rate": 0.0},
    }

    @functools.cache
    def run(radius, *, devices, dtype):
        radius_size = float(numbers["init_epsilon"]) / 2  # a margin is two radii
        settings = dict(radius=radius, radius_size=radius_size, temperature=float(numbers["temperature"]))
        method, net = methods.create("drolt", class_counts, **settings), network(dtype=dtype)
        arrays = {"features": numbers["centroids"]}
        return numbers, net, train(numbers, net, method, groups=groups, devices=devices, arrays=arrays)

    return run


def test_drolt_weights_classes_as_the_authors(golden):
    class_counts = golden("class_counts")["cifar100_exp_if100"]
    np.testing.assert_allclose(golden("dro_train")["ce_class_weights"], class_counts / class_counts.max(), rtol=1e-6)


@each_layout
def test_drolt_repeats_the_authors_steps(dro_train, devices, dtype):
    numbers, net, done = dro_train("learned_unconstrained", devices=devices, dtype=dtype)
    assert_repeats(numbers, net, done)
    start, ours = (tree.params["method"] for tree in (done.start, done.state.variables))
    assert distance(start, ours, {"margins": numbers["final_epsilons"][None]}, ["margins"]) < 1e-3


def test_the_lower_bound_of_drolts_radius_changes_nothing_above_0(dro_train):
    radii, layout = ("learned", "learned_unconstrained"), dict(devices=8, dtype="float32")
    floored, free = (dro_train(radius, **layout)[2].state for radius in radii)
    assert free.variables.params["method"]["margins"].min() > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), floored, free)


@each_layout
def test_reslt_repeats_the_authors_steps(golden, devices, dtype):
    numbers, net = golden("reslt_train"), network(branches=3, dtype=dtype)
    starts = {name: int(numbers[name]) for name in ("medium_start", "tail_start")}
    class_counts = golden("class_counts")["cifar100_exp_if100"]
    method = methods.create("reslt", class_counts, beta=float(numbers["beta"]), **starts)
    groups = {"all": {"match": ".*", "rate": 1.0}}
    assert_repeats(numbers, net, train(numbers, net, method, groups=groups, devices=devices))


def test_evaluation_agrees_with_the_authors(golden):
    numbers = golden("mislas_stage1")
    net = network()
    start = variables_of(numbers, "init/", net)
    images = np.float32(numbers["eval_images"]) / 255
    outputs = jax.jit(net.apply)({"params": start.params["net"], "batch_stats": start.stats["net"]}, images)
    np.testing.assert_allclose(outputs.features, numbers["eval_features"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outputs.logits, numbers["eval_logits"], rtol=1e-4, atol=1e-4)
