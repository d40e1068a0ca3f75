"""Averages of weights and sharpness-aware minimisation, as settings of any stage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ltjax import losses, optim, train
from ltjax.config import parse
from ltjax.engine import stage
from ltjax.engine.experiment import set_up
from ltjax.engine.restore import restore
from ltjax.modes import dry_run
from ltjax.modes.evaluate import evaluate_workdir
from ltjax.predictor import load
from ltjax.runs.evaluated import EMA, as_evaluated
from ltjax.runs.trained import newest, weights_of
from ltjax.system import parallel
from ltjax.types import Batch, Method, Outputs, UserError, Variables
from tests import stages
from tests.test_run import tiny_config

pytestmark = pytest.mark.usefixtures("one_device", "no_reports")

ALL = {"all": {"match": ".*", "rate": 1.0}}


@pytest.mark.parametrize(
    "tag, settings",
    [
        ("v3_decay0.9", dict(decay=0.9, warmup=False)),
        ("v3_warmup", dict(decay=0.999)),
    ],
)
def test_averages_are_timms(golden, tag, settings):
    numbers = golden("ema")
    average = numbers["weights"][0]
    for step in range(6):
        average = optim.ema(average, numbers["weights"][step + 1], jnp.int32(step), **settings)
        np.testing.assert_allclose(average, numbers[f"{tag}_weights"][step], rtol=1e-5, atol=1e-6)


class Perceptron(nn.Module):
    """6 -> 8 -> tanh -> 4, on "images" [B, 1, 1, 6]."""

    @nn.compact
    def __call__(self, images, train=False):
        hidden = jnp.tanh(nn.Dense(8, name="fc1")(images[:, 0, 0]))
        return Outputs(nn.Dense(4, name="fc2")(hidden), hidden)


def weights_in(numbers, prefix):
    return {
        layer: {
            "kernel": jnp.asarray(numbers[f"{prefix}/{layer}.weight"].T),
            "bias": jnp.asarray(numbers[f"{prefix}/{layer}.bias"]),
        }
        for layer in ("fc1", "fc2")
    }


def cross_entropy():
    def loss(apply, variables, batch, rng):
        outputs, variables = apply(variables, batch.images)
        return losses.cross_entropy(outputs.logits, batch.labels).mean(), (variables, {})

    return Method(lambda rng: ({}, {}), loss)


def trained(numbers, steps, **settings):
    """Return the parameters after some of the authors' steps, with SGD of rate 0.1."""
    start = Variables({"net": weights_in(numbers, "init")}, {"net": {}}, {})

    def draw(source, seed, step, rng):
        return Batch(source["inputs"][step][:, None, None], source["labels"][step])

    compiled = stages.build(
        {"net": Perceptron()},
        cross_entropy(),
        draw,
        start.params,
        groups=ALL,
        lr=0.1,
        factors=np.ones(1),
        steps_per_epoch=3,
        mesh=parallel.make_mesh(jax.devices()[:1]),
        image_shape=(1, 1, 6),
        momentum=0.9,
        weight_decay=2e-4,
        **settings,
    )
    source = {key: jnp.asarray(numbers[key]) for key in ("inputs",)}
    source["labels"] = jnp.asarray(numbers["labels"], jnp.int32)
    return compiled.run(compiled.init(np.uint32(0), start), source, steps)


@pytest.mark.parametrize(
    "tag, settings",
    [("rho0.05", dict(rho=0.05)), ("rho0.8", dict(rho=0.8)), ("asam_rho0.5", dict(rho=0.5, adaptive=True))],
)
def test_sam_takes_the_authors_steps(golden, tag, settings):
    numbers = golden("sam_step")
    for steps in (1, 3):
        state, metrics = trained(numbers, steps, sam=settings)
        expected = weights_in(numbers, f"{tag}/after_step{steps}")
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), state.variables.params["net"], expected
        )
    np.testing.assert_allclose(metrics["loss"], numbers[f"{tag}/losses"], rtol=1e-5)


def test_a_stage_averages_its_weights_over_the_steps(golden):
    numbers = golden("sam_step")
    average, state = weights_in(numbers, "init"), None
    for step in range(3):
        state, _ = trained(numbers, step + 1, ema=dict(decay=0.9))
        average = optim.ema(average, state.variables.params["net"], jnp.int32(step), decay=0.9)
        actual = state.variables.params[EMA]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), actual, average)
    evaluated = as_evaluated(state.variables, {})
    assert set(evaluated.params) == {"net"}
    np.testing.assert_array_equal(evaluated.params["net"]["fc1"]["kernel"], actual["fc1"]["kernel"])


def test_the_trained_weights_do_not_depend_on_the_average(golden):
    numbers = golden("sam_step")
    with_average, without = (trained(numbers, 3, **settings)[0] for settings in (dict(ema=dict(decay=0.5)), {}))
    jax.tree.map(np.testing.assert_array_equal, with_average.variables.params["net"], without.variables.params["net"])


def config(**changes):
    made = tiny_config(stages=("ce",), epochs=2)
    made["ce"] = {**made["ce"], "ema": dict(decay=0.9), **changes}
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    return workdir, train.train(config(), workdir)


def average_in(workdir):
    experiment = set_up(parse(config()), None)
    variables = restore(experiment, experiment.config.stages["ce"], workdir).state.variables
    assert EMA in variables.params
    return variables


def test_every_use_of_a_run_takes_its_average(run):
    workdir, figures = run
    variables = average_in(workdir)
    kernel = np.asarray(variables.params[EMA]["classifier"]["kernel"])
    assert not np.array_equal(kernel, variables.params["net"]["classifier"]["kernel"])
    weights = weights_of(workdir, newest(workdir))
    np.testing.assert_array_equal(weights.variables.params["net"]["classifier"]["kernel"], kernel)
    assert evaluate_workdir(config(), workdir)["loss"] == pytest.approx(figures["loss"], rel=1e-6)
    model = load(workdir)
    np.testing.assert_array_equal(model.network.args[0]["params"]["classifier"]["kernel"], kernel)


def test_statistics_of_batch_norm_are_averaged(run):
    variables = average_in(run[0])
    means = [variables.stats[net]["backbone"]["norm"]["mean"] for net in ("net", EMA)]
    assert not np.array_equal(*means)


def test_the_next_stage_begins_with_the_average(run, tmp_path):
    made = config()
    made["stages"] = ("ce", "later")
    made["later"] = {**made["ce"], "start_from": "ce", "epochs": 0, "surgery": dict(name="new_head"), "ema": {}}
    train.train(made, tmp_path / "run")
    experiment = set_up(parse(made), None)
    before, after = (
        restore(experiment, experiment.config.stages[name], tmp_path / "run").state.variables for name in made["stages"]
    )
    kernels = [v["backbone"]["conv"]["kernel"] for v in (before.params[EMA], after.params["net"])]
    np.testing.assert_array_equal(*kernels)
    assert set(after.params) == {"net"}


def test_a_dry_run_shows_ema_and_sam(tmp_path, capsys):
    dry_run.dry_run(config(sam=dict(rho=0.1)), tmp_path / "run")
    shown = " ".join(capsys.readouterr().out.split())
    assert "ema decay 0.9; sam rho 0.1" in shown


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(ema=dict(decay=1.5)), r"ema decay = 1.5"),
        (dict(ema=dict(rate=0.5)), r"config.ce.ema has no setting 'rate'; allowed: decay, warmup, power"),
        (dict(sam=dict(rho=0.0)), r"sam rho = 0.0: above 0"),
        (dict(sam=dict(adaptive=True)), r"config.ce.sam needs the setting 'rho'"),
    ],
)
def test_impossible_settings_are_explained(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train.train(config(**changes), tmp_path / "run")


def test_sam_is_not_for_adversarial_training():
    method = cross_entropy()._replace(attacks=True)
    with pytest.raises(UserError, match=r"sam: not with adversarial training"):
        stage._climb(parse(config()).stages["ce"]._replace(sam=dict(rho=0.1)), method)
