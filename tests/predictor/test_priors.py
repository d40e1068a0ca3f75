"""Predictions for other frequencies of the classes than in training."""

import json

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ltjax
from ltjax import config
from ltjax.data import samplers
from ltjax.interop import export
from ltjax.methods import criteria
from ltjax.modes import predict as predict_mode
from ltjax.predictor import priors
from ltjax.runs.weights import save_weights
from ltjax.system.files import write_json
from ltjax.types import Batch, UserError
from tests.modes.test_predict import Brightness, write_levels
from tests.predictor.test_predictor import workdir
from tests.test_run import run as run_command
from tests.test_run import tiny_config

NAMES = ("cat", "dog", "owl")
COUNTS = np.array([80, 15, 5])


def of_run(method, sampler="instance_balanced", class_weights="", **stage):
    run = config.parse(tiny_config(stages=("ce",), class_weights=class_weights))
    last = run.stages["ce"]._replace(method=method, sampler={"name": sampler}, **stage)
    return priors.of_run(run, last, NAMES, COUNTS)


def erm(name, **settings):
    return {"name": "erm", "loss": {"name": name, **settings}}


UNIFORM = [1 / 3] * 3
TRAIN = [0.8, 0.15, 0.05]


def test_the_shift_is_computed_by_hand():
    """A model of equally frequent classes says 0.5, 0.3, 0.2; with frequencies 0.7, 0.2, 0.1: 0.35, 0.06, 0.02."""
    logits = np.log([0.5, 0.3, 0.2]) + 4.2
    shift = priors.shift([0.7, 0.2, 0.1], "uniform", None, NAMES)
    expected = np.array([0.35, 0.06, 0.02]) / 0.43
    np.testing.assert_allclose(jax.nn.softmax(logits + shift), expected, rtol=1e-6)


def test_both_priors_count():
    """p(cat) rises from 0.2 to 0.4 and p(dog) falls from 0.8 to 0.6: odds of 1 become 2 / 0.75."""
    shift = priors.shift({"cat": 40, "dog": 60}, [1, 4], None, ("cat", "dog"))
    np.testing.assert_allclose(np.exp(shift), [2, 0.75], rtol=1e-6)


def test_the_prior_of_the_model_itself_changes_nothing():
    np.testing.assert_allclose(priors.shift("train", None, COUNTS / 100, NAMES, COUNTS), 0, atol=1e-7)


@pytest.mark.parametrize(
    "method, sampler, weights, expected",
    [
        (erm("cross_entropy"), "instance_balanced", "", TRAIN),
        (erm("cross_entropy"), "class_balanced", "", UNIFORM),
        (erm("cross_entropy"), "class_aware", "", UNIFORM),
        (erm("balanced_softmax"), "instance_balanced", "", UNIFORM),
        (erm("logit_adjusted", tau=1.0), "instance_balanced", "", UNIFORM),
        (erm("logit_adjusted", tau=0.5), "instance_balanced", "", np.sqrt(COUNTS) / np.sqrt(COUNTS).sum()),
        (erm("balanced_softmax"), "class_balanced", "", (1 / COUNTS) / (1 / COUNTS).sum()),
        (erm("cross_entropy"), "instance_balanced", "auto", UNIFORM),
        (erm("cross_entropy"), "instance_balanced", "{'owl': 4}", np.array([80, 15, 20]) / 115),
        (erm("cross_entropy", class_weights={"kind": "count"}), "class_aware", "", TRAIN),
        ({"name": "mislas", "head": 0.4, "tail": 0.1}, "class_aware", "", UNIFORM),
        ({"name": "pgd_at"}, "instance_balanced", "", TRAIN),
        ({"name": "trades", "loss": {"name": "balanced_softmax"}}, "instance_balanced", "", UNIFORM),
        (erm("focal"), "instance_balanced", "", None),
        (erm("ldam"), "instance_balanced", "", None),
        ({"name": "distil"}, "instance_balanced", "", None),
        ({"name": "lbgat"}, "instance_balanced", "", None),
        ({"name": "reslt", "medium_start": 1, "beta": 0.9}, "instance_balanced", "", None),
        ({**erm("cross_entropy"), "net": "guide"}, "instance_balanced", "", None),
    ],
)
def test_the_prior_of_a_model_depends_on_sampler_loss_and_weights(method, sampler, weights, expected):
    actual = of_run(method, sampler, weights)
    if expected is None:
        assert actual is None
    else:
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_changes_of_the_classifier_without_a_known_prior_are_unknown():
    plain = erm("cross_entropy")
    assert of_run(plain, evaluate_net="guide") is None
    assert of_run(plain, eval_classifier={"tau": 0.5, "bias": True}) is None
    assert of_run(plain, epochs=0, surgery={"name": "nearest_mean"}, start_from="ce") is None
    assert of_run(plain, augment={"cutmix_alpha": 1.0, "cutmix_partner": "class_balanced"}) is None
    np.testing.assert_allclose(of_run(plain, eval_classifier={"tau": 0.0, "bias": True}), TRAIN)


def test_a_logit_shift_after_training_changes_the_prior():
    actual = of_run({"name": "erm"}, epochs=0, surgery={"name": "logit_shift", "tau": 1.0}, start_from="ce")
    np.testing.assert_allclose(actual, UNIFORM)


def test_a_network_learns_the_prior_that_is_named():
    """Logits that do not depend on images learn the prior."""
    for name, settings in (("cross_entropy", {}), ("balanced_softmax", {}), ("logit_adjusted", {"tau": 0.5})):
        for factors in (None, (1.0, 2.0, 5.0)):
            criterion = criteria.create(COUNTS, {"name": name, **settings}, factors)
            batch = Batch(jnp.zeros((100, 1, 1, 1)), jnp.repeat(jnp.arange(3), COUNTS))

            def descend(_, logits, criterion=criterion, batch=batch):
                return logits - 0.5 * jax.grad(lambda z: criterion(jnp.broadcast_to(z, (100, 3)), batch))(logits)

            logits = jax.jit(lambda z, descend=descend: jax.lax.fori_loop(0, 5000, descend, z))(jnp.zeros(3))
            expected = samplers.frequencies("instance_balanced", COUNTS) * criterion.prior
            np.testing.assert_allclose(jax.nn.softmax(logits), expected / expected.sum(), rtol=1e-3)


def table(tmp_path, text):
    (tmp_path / "prior.csv").write_text(text)
    return tmp_path / "prior.csv"


@pytest.mark.parametrize(
    "text",
    [
        "class,probability\ncat,0.1\ndog,0.2\nowl,0.7\n",
        "probability;class\n0.7;owl\n0.1;cat\n0.2;dog\n",
        "class,count,remark\nowl,70,x\ncat,10,\ndog,20,\n",
    ],
)
def test_a_file_has_probabilities_or_counts_in_any_order(tmp_path, text):
    shift = priors.shift(str(table(tmp_path, text)), "uniform", None, NAMES)
    np.testing.assert_allclose(np.exp(shift), [0.3, 0.6, 2.1], rtol=1e-6)


def test_names_in_a_file_may_have_another_unicode_form(tmp_path):
    text = "class,count\ncafe\u0301,3\nred  fox,1\n"
    shift = priors.shift(table(tmp_path, text), "uniform", None, ("caf\u00e9", "red fox"))
    np.testing.assert_allclose(np.exp(shift), [1.5, 0.5], rtol=1e-6)


@pytest.mark.parametrize(
    "text, message",
    [
        ("class,probability\ncat,0.1\ndog,0.2\n", r"sum to 0\.3, not to 1: correct them, or name the column count"),
        ("class,count\ncat,1\ndog,2\n", r"target_prior lacks 1 class\(es\), 0 if they do not occur: owl"),
        ("class,count\ncat,1\ndgo,2\nowl,3\n", "target_prior names 'dgo', none of the classes: the nearest are dog"),
        ("class,count\ncat,1\ndog,-2\nowl,3\n", r"line 3: count = '-2': a number from 0 up"),
        ("class,count\ncat,1\ndog,many\nowl,3\n", r"line 3: count = 'many': a number from 0 up"),
        ("class,count\ncat,1\ncat,2\nowl,3\n", r"line 3: class 'cat' has a row already"),
        ("class,count\ncat,0\ndog,0\nowl,0\n", "target_prior: 3 numbers from 0 up"),
        ("class,count,probability\ncat,1,1\n", "has count and probability: needed: one column"),
        ("class,share\ncat,1\n", "has no numbers: needed: one column, probability or count"),
        (
            "name,count\ncat,1\n",
            "names the columns 'name', 'count'; needed: class, and optionally probability or count",
        ),
    ],
)
def test_an_invalid_prior_is_explained(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as raised:
        priors.shift(table(tmp_path, text), "uniform", None, NAMES)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "target, model, message",
    [
        ("uniform", None, "unknown which prior the model was trained for, so --model_prior is needed: uniform, train"),
        ("train", "uniform", "target_prior = train: the numbers of training images are unknown"),
        ("Train", "uniform", r"target_prior: no file Train; give uniform, train .*, or a CSV file"),
        ([1, 2], "uniform", "target_prior: 3 numbers from 0 up, one for each class"),
        (["a", "b", "c"], "uniform", "target_prior: 3 numbers from 0 up, one for each class"),
        ({"cat": "much", "dog": 1, "owl": 1}, "uniform", "target_prior: 3 numbers from 0 up, one for each class"),
        ("uniform", [1, 0, 1], "model_prior: no probability for dog: above 0 for each class"),
    ],
)
def test_a_wrong_prior_is_explained(target, model, message):
    with pytest.raises(UserError, match=message):
        priors.shift(target, model, None, NAMES)


def test_a_class_that_does_not_occur_is_never_predicted(tmp_path):
    write_levels(tmp_path, [1])
    model = Brightness(classes=3)  # the logits of level 1: -1, 0, -1
    model.shift = priors.shift([0.5, 0, 0.5], "uniform", None, NAMES)
    (only,) = model.predict(str(tmp_path), top_k=3)
    assert only.classes[2] == "b" and only.confidences == (0.5, 0.5, 0.0)


def test_files_are_ranked_by_logits_over_temperature_plus_shift(tmp_path):
    write_levels(tmp_path, [1])
    model = Brightness(classes=3)
    model.temperature, model.shift = 2.0, np.float32([1.0, 0.0, 0.25])
    (only,) = model.predict(str(tmp_path))
    scores = np.array([-0.5 + 1.0, 0.0, -0.5 + 0.25])
    assert only.classes == ("a", "b", "c")
    np.testing.assert_allclose(only.confidences, np.exp(scores) / np.exp(scores).sum(), rtol=1e-6)


@pytest.fixture
def trained(tmp_path):
    """Return the workdir of a run with cross-entropy on 10 classes, with random weights."""
    workdir(tmp_path / "run")
    names = [f"c{c}" for c in range(10)]
    counts = list(range(100, 0, -10))
    write_json(tmp_path / "run" / "split.json", {"class_names": names, "class_counts": counts})
    return tmp_path / "run", np.array(counts) / sum(counts)


def test_a_run_has_the_prior_of_its_training(trained):
    folder, frequencies = trained
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), np.uint8)
    plain, uniform = ltjax.load(folder), ltjax.load(folder, target_prior="uniform", temperature=2.0)
    expected = jax.nn.softmax(plain.logits(images) / 2 - np.log(frequencies))
    np.testing.assert_allclose(uniform(images), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ltjax.load(folder, target_prior="train")(images), plain(images), rtol=1e-5)
    loaded = ltjax.load(folder, target_prior="train", model_prior="uniform")
    np.testing.assert_allclose(loaded.shift, np.log(frequencies) - np.log(0.1), rtol=1e-5)


@pytest.mark.parametrize("counts", [["many"] * 10, [1, 2], [-1] * 10, None])
def test_a_changed_split_is_refused_in_one_line(trained, counts):
    write_json(trained[0] / "split.json", {"class_names": [f"c{c}" for c in range(10)], "class_counts": counts})
    with pytest.raises(UserError, match=r"split.json does not hold what ltjax writes there") as raised:
        ltjax.load(trained[0], target_prior="uniform")
    assert "\n" not in str(raised.value)


def test_without_a_target_nothing_is_added(trained):
    assert ltjax.load(trained[0]).shift is None
    with pytest.raises(UserError, match="model_prior goes with target_prior"):
        ltjax.load(trained[0], model_prior="uniform")


def test_weights_without_a_run_need_a_given_prior(trained, tmp_path):
    weights = export.read(trained[0])
    save_weights(tmp_path / "weights", weights.variables, weights.settings, num_classes=weights.num_classes)
    with pytest.raises(UserError, match="--model_prior is needed"):
        ltjax.load(tmp_path / "weights", target_prior="uniform")
    model = ltjax.load(tmp_path / "weights", target_prior=[0.55, *[0.05] * 9], model_prior="uniform")
    np.testing.assert_allclose(np.exp(model.shift), [5.5, *[0.5] * 9], rtol=1e-5)


def test_predictions_are_made_for_the_prior(trained, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    assert cv2.imwrite(str(tmp_path / "photos" / "0.png"), np.zeros((28, 28), np.uint8))
    probabilities = {}
    for name, asked in (("plain", {}), ("even", {"target_prior": "uniform"})):
        out = tmp_path / f"{name}.jsonl"
        predict_mode.predict_workdir(None, trained[0], images=str(tmp_path / "photos"), out=str(out), top_k=10, **asked)
        classes = json.loads(out.read_text())["classes"]
        probabilities[name] = np.array([c["confidence"] for c in sorted(classes, key=lambda c: c["class"])])
    assert "for classes as frequent as in uniform" in capsys.readouterr().err
    expected = probabilities["plain"] / trained[1]
    np.testing.assert_allclose(probabilities["even"], expected / expected.sum(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ("--mode=eval", "--target_prior=uniform"),
            "--target_prior and --model_prior are for --mode=predict, not eval",
        ),
        (("--mode=predict", "--model_prior=train"), "--model_prior goes with --target_prior"),
    ],
)
def test_exclusive_flags_are_refused(trained, flags, message):
    code, _, error = run_command(f"--workdir={trained[0]}", *flags)
    assert code == 2 and message in error
