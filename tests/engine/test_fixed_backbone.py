"""Features of a fixed backbone: computed once, and equivalent to training on images."""

import shutil

import jax
import numpy as np
import pytest

from ltjax import data, train
from ltjax.config import parse
from ltjax.engine import experiment as experiments
from ltjax.engine import fixed_backbone, restore
from ltjax.modes import attack, dry_run
from ltjax.modes.evaluate import evaluate_workdir
from ltjax.runs.weights import save_weights
from ltjax.types import UserError
from tests.engine.test_streamed import both, settings

pytestmark = pytest.mark.usefixtures("no_reports")
MODEL = dict(name="resnet_cifar", depth=8, width=4)
FROZEN = dict(backbone=dict(match="net/backbone/.*", rate=0.0), classifier=dict(match="net/classifier/.*", rate=1.0))


def frozen(weights, **changes):
    """Return a run of cross-entropy on a fixed backbone."""
    stage = dict(
        method=dict(name="erm"),
        epochs=2,
        lr=0.1,
        groups=FROZEN,
        batch_norm="eval",
        augment=dict(crop_padding=0, flip=False),
    )
    stage.update(changes)
    made = settings(stages=("ce",), ce=stage, model=MODEL, weights=str(weights), weights_parts=("backbone",))
    made["data"]["min_area"] = 1.0
    return made


@pytest.fixture(autouse=True)
def images(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stored = both()[1]
    monkeypatch.setattr(data, "load", lambda *_: stored)
    return stored


def random_weights(**changes):
    run = parse(settings(model=MODEL, **changes))
    variables = experiments.fresh_variables(experiments.set_up(run, None), run.stages["dro"])
    return jax.tree.map(np.asarray, variables)


@pytest.fixture(scope="module")
def made():
    """Return random variables of the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda *_: both()[1])
        return random_weights()


@pytest.fixture
def weights(made, tmp_path):
    """Return a folder of random weights of the network."""
    save_weights(tmp_path / "weights", made, MODEL, num_classes=3)
    return tmp_path / "weights"


def classifier(experiment, workdir):
    state = restore.restore(experiment, experiment.config.stages["ce"], workdir).state
    return np.asarray(state.variables.params["net"]["classifier"]["kernel"])


def test_training_on_features_is_training_on_images(weights, tmp_path, monkeypatch):
    once = train.train(frozen(weights), tmp_path / "once")
    experiment = experiments.set_up(parse(frozen(weights)), None)
    assert not experiment.streamed
    assert experiment.image_shape == (1, 1, 16)
    monkeypatch.setattr(fixed_backbone, "is_fixed", lambda *_: False)
    each_step = train.train(frozen(weights), tmp_path / "each")
    kernels = [classifier(experiment, tmp_path / name) for name in ("once", "each")]
    np.testing.assert_allclose(*kernels, rtol=0.01, atol=0.003)
    assert once["loss"] == pytest.approx(each_step["loss"], rel=0.01)


def test_features_equal_those_of_the_network(weights, images):
    experiment = experiments.set_up(parse(frozen(weights)), None)
    whole = experiments.set_up(parse(frozen(weights)), None, features_as="images")
    variables = experiments.starting_variables(whole, whole.config.stages["ce"])
    of_images = whole.evaluators["net"](variables, whole.test_set)
    of_features = experiment.evaluators["net"](variables, experiment.test_set)
    np.testing.assert_allclose(of_features["losses"], of_images["losses"], rtol=5e-3)


def test_another_run_reads_the_cache(weights, monkeypatch):
    first = experiments.set_up(parse(frozen(weights)), None)
    monkeypatch.setattr(fixed_backbone, "_forward", lambda *_: pytest.fail("computed again"))
    again = experiments.set_up(parse(frozen(weights, lr=0.2)), None)
    np.testing.assert_array_equal(first.train_data.images, again.train_data.images)


def cache_file(tmp_path):
    (file,) = (tmp_path / "cache" / "ltjax").glob("features-*.bin")
    return file


@pytest.mark.parametrize("damage", ["cut", "bit", "gone"])
def test_a_damaged_cache_is_completed(weights, tmp_path, damage):
    first = experiments.set_up(parse(frozen(weights)), None)
    file = cache_file(tmp_path)
    content = bytearray(file.read_bytes())
    if damage == "bit":
        content[-1] ^= 1
    file.write_bytes({"cut": content[:-7], "bit": content, "gone": b""}[damage])
    again = experiments.set_up(parse(frozen(weights)), None)
    np.testing.assert_array_equal(first.train_data.images, again.train_data.images)
    np.testing.assert_array_equal(first.test_set.images, again.test_set.images)


def test_other_weights_have_other_features(weights, tmp_path):
    experiments.set_up(parse(frozen(weights)), None)
    save_weights(tmp_path / "others", random_weights(seed=5), MODEL, num_classes=3)
    experiments.set_up(parse(frozen(tmp_path / "others")), None)
    assert len(list((tmp_path / "cache" / "ltjax").glob("features-*.bin"))) == 2


@pytest.mark.parametrize(
    "change",
    [
        dict(batch_norm="train"),
        dict(augment=dict(crop_padding=0, flip=True)),
        dict(groups=dict(all=dict(match=".*", rate=1.0))),
    ],
    ids=["batch norm", "flips", "a trained backbone"],
)
def test_changing_features_are_not_cached(weights, change):
    assert experiments.set_up(parse(frozen(weights, **change)), None).streamed


def test_random_crops_have_other_features_each_time(weights):
    config = frozen(weights)
    config["data"]["min_area"] = 0.5
    assert experiments.set_up(parse(config), None).streamed


def test_a_dry_run_computes_nothing(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fixed_backbone, "_forward", lambda *_: pytest.fail("computed"))
    dry_run.dry_run(frozen(weights), tmp_path / "run")
    assert "51 of" in capsys.readouterr().out  # 16 x 3 weights and 3 biases train


def test_a_finished_run_does_not_need_its_weights(weights, tmp_path):
    figures = train.train(frozen(weights), tmp_path / "run")
    shutil.rmtree(weights)
    shutil.rmtree(tmp_path / "cache")
    again = evaluate_workdir(frozen(weights), tmp_path / "run")
    assert again["loss"] == pytest.approx(figures["loss"], rel=1e-5)


def test_a_stopped_run_resumes_without_its_weights(weights, tmp_path):
    figures = train.train(frozen(weights), tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    shutil.rmtree(weights)
    again = train.train(frozen(weights), tmp_path / "run")
    assert again["accuracy"] == figures["accuracy"]


def test_an_attack_changes_the_images(weights, tmp_path):
    config = frozen(weights)
    config["attack"] = dict(epsilon=0.0, tests=("pgd-20",), batch_size=8)
    figures = train.train(config, tmp_path / "run")
    attacked = attack.attack_workdir(config, tmp_path / "run")
    assert attacked["tests"]["clean"]["accuracy"]["all"] == pytest.approx(figures["accuracy"]["all"])


def test_features_that_are_not_finite_are_refused(weights):
    variables = jax.tree.map(lambda x: x * 1e9, experiments.load_weights(weights).variables)
    save_weights(weights, variables, MODEL, num_classes=3)
    with pytest.raises(UserError, match=r"features are not finite in float16: config.weights do not fit"):
        experiments.set_up(parse(frozen(weights)), None)
