"""Each replica equals the single run of its seed: in a stage, on any number of devices, and in a whole run."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ltjax import compare, config, data, methods, train
from ltjax.data import augment, samplers
from ltjax.engine import class_means, evaluate, feed, stage
from ltjax.engine import experiment as experiments
from ltjax.models.layers import BatchNorm, Conv, pool
from ltjax.modes.evaluate import evaluate_workdir
from ltjax.system import parallel
from ltjax.system.signals import Interrupted
from ltjax.types import Method, Outputs, UserError
from tests import stages
from tests.test_conformance import before_dispatch, made_up_images, rewound, saved, steps_of, tiny_config

ROOT = Path(__file__).parents[2]
COUNTS = np.array([30, 20, 9])
SHAPE = (8, 8, 3)
SEEDS = np.arange(3, 8, dtype=np.uint32)
STEPS = 3
# (devices, replicas, replicate)
LAYOUTS = (
    (1, 4, "loop"),
    (2, 4, "loop"),
    (4, 4, "loop"),
    (8, 4, "loop"),
    (2, 5, "loop"),
    (1, 4, "vmap"),
    (8, 4, "vmap"),
)
every_layout = pytest.mark.parametrize(("devices", "replicas", "replicate"), LAYOUTS)


class Small(nn.Module):
    """A convolution, a batch norm, a linear layer."""

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.relu(BatchNorm(name="norm")(Conv(4, dtype=jnp.float32, name="conv")(images), train))
        features = pool(x)
        return Outputs(nn.Dense(len(COUNTS), name="classifier")(features), features)


NETS = {"net": Small()}
INITIAL = jax.jit(lambda seed: stage.random_variables(NETS, SHAPE, stage.stage_rng(seed, 1)))


def watched(method: Method) -> Method:
    """Add the random draws of each step to its metrics."""

    def loss(apply, variables, batch, rng):
        value, (variables, metrics) = method.loss(apply, variables, batch, rng)
        drawn = {"labels": batch.labels, "images": batch.images, "noise": jax.random.normal(rng)}
        return value, (variables, {**metrics, **drawn})

    return method._replace(loss=loss)


def made_up_source(mesh):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(COUNTS)), COUNTS).astype(np.int32)
    images = (rng.integers(0, 200, (len(labels), *SHAPE)) + 20 * labels[:, None, None, None]).astype(np.uint8)
    return feed.Resident(*(jax.device_put(x, parallel.replicated(mesh)) for x in (images, labels)))


def build(devices=1, replicas=1, replicate="loop", method="erm", sampler="instance_balanced", mixup=0.0):
    """Build (compiled stage, function of seeds that makes the initial state, images)."""
    mesh, method = parallel.make_mesh(jax.devices()[:devices], replicas), watched(methods.create(method, COUNTS))
    draw = feed.resident_draw(
        samplers.create(sampler),
        lambda rng, images, labels: augment.augment(rng, images, labels, crop_padding=1, mixup_alpha=mixup),
        batch_size=8,
        class_counts=COUNTS,
        mesh=mesh,
    )
    shapes = jax.eval_shape(lambda: stages.initial(NETS, SHAPE, method))
    compiled = stages.build(
        NETS,
        method,
        draw,
        shapes.params,
        groups={"all": {"match": ".*", "rate": 1.0}},
        bn="train",
        lr=0.05,
        factors=np.ones(2),
        steps_per_epoch=8,
        weight_decay=1e-3,
        mesh=mesh,
        image_shape=SHAPE,
        number=1,
        replicas=replicas,
        replicate=replicate,
    )

    def start(seed):
        variables = of_seed(seed) if replicas == 1 else jax.tree.map(lambda *x: np.stack(x), *map(of_seed, seed))
        return compiled.init(seed, jax.device_put(variables, parallel.state_sharding(mesh, replicas)))

    return compiled, start, made_up_source(mesh)


@functools.cache
def of_seed(seed):
    """Return the random variables of a seed."""
    return jax.device_get(INITIAL(seed))


def trained(compiled, state, source):
    if compiled.refresh is not None:
        apply, mesh = stage.make_apply(NETS, "eval"), source.images.sharding.mesh
        means = class_means.make(apply, source, mesh, replicas=state.step.size)
        state = compiled.refresh(state, means(state.variables, compiled.layers))
    return jax.tree.map(np.asarray, compiled.run(state, source, STEPS))


def of_replica(tree, replica):
    return jax.tree.map(lambda x: x[replica], tree)


def assert_close(actual, expected, rtol=2e-5, atol=1e-6):
    def check(a, b):
        if np.issubdtype(b.dtype, np.floating):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
        else:
            np.testing.assert_array_equal(a, b)

    jax.tree.map(check, actual, expected)


@pytest.fixture(scope="module")
def singles():
    """singles(...): (state, metrics) of each seed after `STEPS` steps, trained by itself on one device."""

    @functools.cache
    def singles(**settings):
        compiled, start, source = build(**settings)
        return [trained(compiled, start(seed), source) for seed in SEEDS]

    return singles


def test_seeds_differ(singles):
    """Otherwise the other tests would prove nothing."""
    (a, drawn_a), (b, drawn_b), *_ = singles()
    kernel_a, kernel_b = (state.variables.params["net"]["conv"]["kernel"] for state in (a, b))
    assert np.abs(kernel_a - kernel_b).max() > 0.01
    assert (drawn_a["labels"] != drawn_b["labels"]).any() and (drawn_a["noise"] != drawn_b["noise"]).all()


@every_layout
def test_each_replica_equals_the_single_run_of_its_seed(singles, devices, replicas, replicate):
    compiled, start, source = build(devices, replicas, replicate)
    state, metrics = trained(compiled, start(SEEDS[:replicas]), source)
    for replica in range(replicas):
        expected, drawn = singles()[replica]
        metrics_of_replica = of_replica(metrics, replica)
        for name in ("labels", "images", "noise"):
            np.testing.assert_array_equal(metrics_of_replica[name], drawn[name], err_msg=name)
        np.testing.assert_allclose(metrics_of_replica["loss"], drawn["loss"], rtol=1e-5)
        assert_close(of_replica(state, replica), expected)


def test_each_replica_draws_its_own_mixup(singles):
    compiled, start, source = build(2, 4, "vmap", mixup=0.2)
    state, _ = trained(compiled, start(SEEDS[:4]), source)
    for replica in range(4):
        assert_close(of_replica(state, replica), singles(mixup=0.2)[replica][0])


@pytest.mark.parametrize(("devices", "replicate"), [(8, "loop"), (2, "vmap")])
def test_each_replica_has_its_own_centroids(singles, devices, replicate):
    drolt = dict(method="drolt", sampler="class_aware")
    compiled, start, source = build(devices, 4, replicate, **drolt)
    state, _ = trained(compiled, start(SEEDS[:4]), source)
    for replica in range(4):
        assert_close(of_replica(state, replica), singles(**drolt)[replica][0], atol=1e-5)


@pytest.fixture(scope="module")
def on_one_device():
    """Return a function that evaluates a single run on one device."""
    alone = parallel.make_mesh(jax.devices()[:1])
    single = evaluate.evaluator(NETS, alone)

    def evaluated(variables, images, labels, means):
        placed = evaluate.place(images, labels, 8, alone)
        return single(*jax.device_put((variables,), jax.devices()[0]), placed, jnp.asarray(means))

    return evaluated


@pytest.mark.parametrize(("devices", "replicas"), [(1, 4), (2, 4), (8, 4), (2, 5)])
def test_each_replica_is_evaluated_like_a_single_run(singles, on_one_device, devices, replicas):
    rng = np.random.default_rng(1)
    images, labels = rng.integers(0, 256, (21, *SHAPE), dtype=np.uint8), rng.integers(0, len(COUNTS), 21)
    variables = [state.variables._replace(arrays={}) for state, _ in singles()[:replicas]]
    means = rng.normal(0.5, 0.5, (replicas, len(COUNTS), 4)).astype(np.float32)
    mesh = parallel.make_mesh(jax.devices()[:devices], replicas)
    stacked = jax.tree.map(lambda *x: np.stack(x), *variables)
    placed = jax.device_put((stacked, means), parallel.state_sharding(mesh, replicas))
    outcome = evaluate.evaluator(NETS, mesh, replicas=replicas)(
        placed[0], evaluate.place(images, labels, 8, mesh), placed[1]
    )
    for replica in range(replicas):
        expected = on_one_device(variables[replica], images, labels, means[replica])
        assert set(outcome) == {"predictions", "confidences", "losses", "nearest"}
        for name, values in expected.items():
            np.testing.assert_allclose(outcome[name][replica], values, rtol=1e-5, atol=1e-6, err_msg=name)


def test_an_unknown_replicate_is_refused_before_training():
    with pytest.raises(UserError, match="replicate = 'pmap'"):
        config.parse({**tiny_config(RUN), "replicate": "pmap"})


# A whole run: a stage that keeps the optimizer of the stage before, then surgery on a hold-out.

RUN = "cifar10_lt:recipe=ce+drw+tau_norm"
FIRST = 5  # seed


@contextlib.contextmanager
def devices(count):
    make_mesh = parallel.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda *_: made_up_images())
        patch.setattr(parallel, "make_mesh", lambda _=None, replicas=1: make_mesh(jax.devices()[:count], replicas))
        yield


def settings(seed=FIRST, **changes):
    return {**tiny_config(RUN), "seed": seed, **changes}


@contextlib.contextmanager
def prepared_once(cache):
    """Make all runs share the compiled functions of the first, kept in the list `cache`. They hold no seed."""
    set_up = train.set_up_with_stages

    def once(run, *places):
        if not cache:
            cache.append(set_up(run, *places))
        experiment, compiled = cache[0]
        return experiment._replace(config=run), compiled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "set_up_with_stages", once)
        yield


@pytest.fixture(scope="module")
def prepared():
    """Return the cache of `replicated`."""
    return []


@pytest.fixture(scope="module")
def replicated(tmp_path_factory, prepared):
    """Return the workdir of a run of two replicas, a device each."""
    workdir = tmp_path_factory.mktemp("replicated") / "run"
    with devices(2), prepared_once(prepared):
        train.train(settings(replicas=2), workdir)
    return workdir


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return the workdirs of the two single runs, on one device."""
    workdirs = [tmp_path_factory.mktemp("alone") / str(FIRST + number) for number in range(2)]
    with devices(1), prepared_once([]), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "write_report", lambda *_: None)  # tested elsewhere
        for number, workdir in enumerate(workdirs):
            train.train(settings(FIRST + number), workdir)
    return workdirs


def results_of(workdir, name="results"):
    return json.loads((workdir / f"{name}.json").read_text())


def test_the_figures_of_replicas_equal_those_of_single_runs(replicated, alone):
    results, singles = results_of(replicated), [results_of(workdir) for workdir in alone]
    for name, summary in results["stages"].items():
        assert [replica["seed"] for replica in summary["replicas"]] == [FIRST, FIRST + 1]
        losses = [single["stages"][name]["loss"] for single in singles]
        assert abs(losses[0] - losses[1]) > 0.01 * losses[0]  # so that the seeds differ clearly
        np.testing.assert_allclose([replica["loss"] for replica in summary["replicas"]], losses, rtol=1e-3)
        for replica, single in zip(summary["replicas"], singles, strict=True):
            expected = single["stages"][name]
            assert replica["accuracy"] == pytest.approx(expected["accuracy"], abs=2 / 18)  # two images of a group
            assert replica["ece"] == pytest.approx(expected["ece"], abs=0.02)
            assert replica["best_on_test"]["accuracy"] == pytest.approx(expected["best_on_test"]["accuracy"], abs=0.04)
            assert replica["num_images"] == 60


def test_each_replica_chooses_its_own_tau(replicated, alone):
    surgery = results_of(replicated)["stages"]["tau_norm"]["surgery"]
    expected = [results_of(workdir)["stages"]["tau_norm"]["surgery"] for workdir in alone]
    assert surgery["tau"] == [note["tau"] for note in expected]
    for tau, accuracy in surgery["holdout_accuracy"].items():
        np.testing.assert_allclose(accuracy, [note["holdout_accuracy"][tau] for note in expected], atol=0.051)


def test_the_weights_of_replicas_equal_those_of_single_runs(replicated, alone):
    for name in ("ce", "drw"):
        state = saved(replicated, name)["variables"]["params"]
        for number, workdir in enumerate(alone):
            assert_close(of_replica(state, number), saved(workdir, name)["variables"]["params"], rtol=1e-3, atol=1e-4)


def test_the_summary_has_mean_and_sample_deviation(replicated):
    results = results_of(replicated)
    assert (results["seed"], results["seeds"]) == (FIRST, [FIRST, FIRST + 1])
    for summary in results["stages"].values():
        for key in ("accuracy", "ece", "loss"):
            values = [replica[key] for replica in summary["replicas"]]
            if key != "accuracy":
                np.testing.assert_allclose(
                    (summary[key], summary["std"][key]), (np.mean(values), np.std(values, ddof=1))
                )
                continue
            for group in ("all", "many", "medium", "few"):
                accuracies = [value[group] for value in values]
                np.testing.assert_allclose(summary[key][group], np.mean(accuracies))
                np.testing.assert_allclose(summary["std"][key][group], np.std(accuracies, ddof=1))
    assert (replicated / "report" / "summary.png").exists()


def test_replicas_stopped_within_an_epoch_end_with_the_same_bits(replicated, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "write_report", lambda *_: None)  # tested elsewhere
    stages = ["ce", "drw", "tau_norm"]
    workdir = rewound(replicated, tmp_path, "ce", stages)

    def stop_here(state, stop):
        stop.requested = signal.SIGTERM

    with devices(2):
        with pytest.MonkeyPatch.context() as patch, prepared_once(prepared):  # the resumed run compiles its own
            before_dispatch(patch, "ce", 1, stop_here)
            with pytest.raises(Interrupted):
                train.train(settings(replicas=2), workdir)
        assert steps_of(workdir, "ce") == [20]
        train.train(settings(replicas=2), workdir)
    for name in stages:
        jax.tree.map(np.testing.assert_array_equal, saved(workdir, name), saved(replicated, name))
    assert (workdir / "metrics.jsonl").read_text() == (replicated / "metrics.jsonl").read_text()


def test_eval_mode_repeats_the_figures_of_the_replicas(replicated):
    with devices(2):
        evaluated = evaluate_workdir(settings(replicas=2), replicated)
    for name, expected in results_of(replicated)["stages"].items():
        for again, replica in zip(evaluated["stages"][name]["replicas"], expected["replicas"], strict=True):
            assert again["seed"] == replica["seed"]
            assert again["accuracy"] == pytest.approx(replica["accuracy"])
            assert again["loss"] == pytest.approx(replica["loss"])


def test_a_comparison_counts_each_seed_once(replicated, alone, capsys):
    assert compare.main([str(path) for path in (replicated, *alone)]) == 0
    out, error = capsys.readouterr()
    assert error.count("counted once") == 2
    (row,) = compare.compare([replicated, *alone]).rows
    assert row.seeds == (FIRST, FIRST + 1)
    assert row.figures["ece"].std == pytest.approx(results_of(replicated)["std"]["ece"])
    assert "±" in out


def test_each_device_holds_the_images_once():
    run = config.parse(settings(replicas=4))
    with devices(8):
        experiment = experiments.set_up(run, None)
    assert dict(experiment.mesh.shape) == {parallel.REPLICA_AXIS: 4, parallel.BATCH_AXIS: 2}
    shape = (len(experiment.split.train), *SHAPE)
    assert experiment.train_data.images.shape == shape
    assert [shard.data.shape for shard in experiment.train_data.images.addressable_shards] == [shape] * 8
    batches, together = experiment.test_set.images.shape[:2]
    assert batches * together == 60
    shares = {shard.data.shape[:2] for shard in experiment.test_set.images.addressable_shards}
    assert shares == {(batches, together // 2)}


def test_the_default_workdir_names_all_seeds(tmp_path):
    taken = tmp_path / "runs" / "quickstart-seeds5-7"
    taken.mkdir(parents=True)
    (taken / "results.json").write_text("{}")  # without a config.json: an error that names the folder
    command = [sys.executable, str(ROOT / "run.py"), f"--config={ROOT}/configs/quickstart.py"]
    command += ["--config.replicas=3", "--config.seed=5"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True)
    assert done.returncode == 2, done.stderr
    assert b"runs/quickstart-seeds5-7 holds results" in done.stderr
