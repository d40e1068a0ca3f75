"""A model as a function of images: accepted and refused inputs, and outputs equal to its network's."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ltjax
from ltjax import data, models
from ltjax.data.decode import View
from ltjax.engine.stage import TrainState
from ltjax.predictor import FITTED, TEMPERATURE, Model, _temperature, imported_key, load_as_configured
from ltjax.runs.checkpoint import Checkpoints
from ltjax.runs.weights import Weights, save_weights
from ltjax.system.files import write_json
from ltjax.types import UserError, Variables
from tests.test_run import tiny_config

SETTINGS = {"name": "resnet_cifar", "depth": 8, "width": 2, "mean": [0.3], "std": [0.4]}
CLASSES = 4


def variables(seed=0, classes=CLASSES):
    """Make a network and random variables, by NumPy because XLA takes seconds to compile an initialisation."""
    settings = {**SETTINGS, "mean": (0.3,), "std": (0.4,)}
    net, rng = models.create(settings.pop("name"), classes, **settings), np.random.default_rng(seed)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    collections = jax.tree.map(lambda x: rng.uniform(0.1, 0.5, x.shape).astype(x.dtype), shapes)
    collections["params"] = jax.tree.map(lambda x: x - np.float32(0.3), collections["params"])
    return net, Variables({"net": collections["params"]}, {"net": collections["batch_stats"]}, {})


@pytest.fixture(scope="module")
def net():
    return variables()


@pytest.fixture(scope="module")
def model(net):
    return Model(Weights(net[1], SETTINGS, CLASSES), view=View(8, 8), batch_size=16, temperature=2.0)


def pixels(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (size, 8, 8, 1), np.uint8)


def expected_logits(net, images):
    module, own = net
    apply = jax.jit(lambda x: module.apply({"params": own.params["net"], "batch_stats": own.stats["net"]}, x).logits)
    return apply(images.astype(np.float32) / 255)


@pytest.mark.parametrize("size", [0, 1, 16, 37])
def test_any_number_of_images_has_the_logits_of_the_network(model, net, size):
    actual = model.logits(pixels(size))
    assert actual.shape == (size, CLASSES)
    if size:
        np.testing.assert_allclose(actual, expected_logits(net, pixels(size)), rtol=1e-5, atol=1e-5)


def test_a_call_gives_probabilities_at_the_temperature(model):
    expected = jax.nn.softmax(model.logits(pixels(5)) / 2, axis=-1)
    np.testing.assert_allclose(model(pixels(5)), expected, rtol=1e-6)
    np.testing.assert_allclose(model(pixels(5)).sum(1), 1, rtol=1e-6)


def test_floats_in_the_unit_interval_are_the_same_images(model):
    np.testing.assert_allclose(model(pixels(3) / 255), model(pixels(3)), rtol=1e-5)


def test_its_network_has_gradients(model):
    images = jnp.asarray(pixels(2), jnp.float32) / 255
    slope = jax.jit(jax.grad(lambda x, f: f(x).sum()))(images, model.network)
    assert slope.shape == images.shape and jnp.abs(slope).max() > 0


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((8, 8, 1), np.uint8), r"uint8 \[8, 8, 1\]: one image is a batch of one, images\[None\]"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"\[2, 8, 8, 3\]: the network takes \[N, H, W, 1\]"),
        (np.zeros((2, 8, 8), np.uint8), r"the network takes \[N, H, W, 1\]"),
        (np.zeros((2, 9, 8, 1), np.uint8), r"trained on 8 x 8 pixels; resize them"),
        (np.zeros((2, 8, 8, 1), np.int64), r"int64 .*give uint8 from 0 to 255, or floats in \[0, 1\]"),
        (np.full((2, 8, 8, 1), 255.0), r"float64 .*from 255 to 255: give floats in \[0, 1\]"),
        (np.full((2, 8, 8, 1), -1.0, np.float32), r"from -1 to -1"),
        (np.full((2, 8, 8, 1), np.nan, np.float32), r"from nan to nan"),
    ],
)
def test_invalid_images_are_described(model, images, message):
    with pytest.raises(UserError, match=message):
        model(images)


def test_classes_without_names_have_numbers(model):
    assert model.class_names == ("class 0", "class 1", "class 2", "class 3")


def test_a_folder_of_weights_is_loaded_in_our_order_of_classes(net, tmp_path):
    save_weights(tmp_path, net[1], SETTINGS, num_classes=CLASSES, class_order=(2, 0, 3, 1))
    actual = ltjax.load(tmp_path).logits(pixels(3))
    np.testing.assert_allclose(actual[:, [2, 0, 3, 1]], expected_logits(net, pixels(3)), rtol=1e-5, atol=1e-5)


def workdir(folder, *, replicas=1, step=7, **changes):
    """Write a run's folder with random weights, and return its variables."""
    own = [variables(seed, classes=10)[1] for seed in range(replicas)]
    all_variables = jax.tree.map(lambda *leaves: np.stack(leaves), *own) if replicas > 1 else own[0]
    with Checkpoints(folder / "checkpoints" / "ce") as checkpoints:
        checkpoints.save(step, TrainState(jnp.int32(step), jnp.uint32(0), all_variables, {}), {})
    model = {"model.logit_scale": False, "model.mean": (0.3,), "model.std": (0.4,), "model.width": 2}
    write_json(folder / "config.json", tiny_config(**{"stages": ("ce",), "replicas": replicas, **model, **changes}))
    return own


def test_a_run_is_loaded_without_its_data(tmp_path):
    workdir(tmp_path, **{"data.name": "image_folder", "data.root": "/nowhere", "data.profile": "natural"})
    write_json(tmp_path / "split.json", {"class_names": list("abcdefghij")})
    model = ltjax.load(str(tmp_path))
    assert model.class_names == tuple("abcdefghij")
    assert (model.view.size, model.view.resize, model.temperature) == (224, 256, 1.0)
    assert model.about == "Cross-entropy, step 7 of stage ce"


def test_another_image_size_keeps_the_share_of_the_crop(tmp_path):
    workdir(tmp_path, **{"data.name": "image_folder", "data.root": "/nowhere", "data.profile": "natural"})
    view = ltjax.load(tmp_path, image_size=448).view
    assert (view.size, view.resize) == (448, 512)


@pytest.mark.parametrize("heeded", [False, True])
def test_prediction_turns_images_if_training_did(tmp_path, heeded):
    workdir(tmp_path, **{"data.name": "image_folder", "data.root": "/nowhere", "data.upright": heeded})
    assert ltjax.load(tmp_path).view.upright is heeded
    assert ltjax.load(tmp_path, image_size=448).view.upright is heeded


def test_a_run_of_an_older_version_ignores_orientations(tmp_path):
    workdir(tmp_path, **{"data.name": "image_folder", "data.root": "/nowhere", "data.profile": "natural"})
    config = json.loads((tmp_path / "config.json").read_text())
    del config["data"]["upright"]
    write_json(tmp_path / "config.json", config)
    assert ltjax.load(tmp_path).view.upright is False


def test_each_replica_has_its_weights_and_its_temperature(tmp_path):
    all_variables = workdir(tmp_path, replicas=2)
    fitted = {"stage": "ce", "step": 7, "replicas": [{"temperature": 1.5}, {"temperature": 2.5}]}
    write_json(tmp_path / TEMPERATURE, fitted)
    images = np.zeros((1, 28, 28, 1), np.uint8)
    for replica, own in enumerate(all_variables):
        model = ltjax.load(tmp_path, replica=replica)
        net = variables(classes=10)[0]
        np.testing.assert_allclose(model.logits(images), expected_logits((net, own), images), rtol=1e-4, atol=1e-5)
        assert model.temperature == 1.5 + replica


def test_a_temperature_of_another_checkpoint_is_refused(tmp_path):
    workdir(tmp_path)
    write_json(tmp_path / TEMPERATURE, {"stage": "ce", "step": 5, "replicas": [{"temperature": 1.5}]})
    with pytest.raises(UserError, match=r"belongs to step 5 of stage ce, not to .*step 7 .*--calibrate, delete it"):
        ltjax.load(tmp_path)
    assert ltjax.load(tmp_path, temperature=1.0).temperature == 1.0


@pytest.mark.parametrize(
    ("replicas", "message"),
    [([], "IndexError")]
    + [([{"temperature": t}], f"ValueError: temperature {t}") for t in (0.0, -1.0, math.nan, math.inf)],
)
def test_a_damaged_temperature_is_named(tmp_path, replicas, message):
    (tmp_path / TEMPERATURE).write_text(json.dumps({"stage": "ce", "step": 7, "replicas": replicas}))
    with pytest.raises(UserError, match=rf"cannot read .*temperature\.json \({message}"):
        _temperature(tmp_path, {"stage": "ce", "step": 7}, 0, FITTED)


@pytest.mark.parametrize("temperature", [0, -1.0, "cold", math.nan, math.inf])
def test_a_temperature_is_a_number_above_0(tmp_path, net, temperature):
    save_weights(tmp_path, net[1], SETTINGS, num_classes=CLASSES)
    with pytest.raises(UserError, match="'fitted', or a finite number above 0"):
        ltjax.load(tmp_path, temperature=temperature)


def test_imported_weights_are_loaded_as_they_are_evaluated(tmp_path):
    net, own = variables(classes=10)
    save_weights(tmp_path / "w", own, SETTINGS, num_classes=10)
    config, empty = tiny_config(weights=str(tmp_path / "w")), tmp_path / "run"
    empty.mkdir()
    write_json(empty / "eval.json", {"class_names": list("abcdefghij")})
    fitted = {**imported_key(str(tmp_path / "w")), "replicas": [{"temperature": 1.5}]}
    write_json(empty / TEMPERATURE, fitted)
    model = load_as_configured(config, empty)
    assert (model.class_names, model.temperature, model.image_size) == (tuple("abcdefghij"), 1.5, 28)
    images = np.zeros((1, 28, 28, 1), np.uint8)
    np.testing.assert_allclose(model.logits(images), expected_logits((net, own), images), rtol=1e-4, atol=1e-5)
    save_weights(tmp_path / "w", variables(1, classes=10)[1], SETTINGS, num_classes=10)
    with pytest.raises(UserError, match="belongs to step 0 of stage imported, not to this checkpoint"):
        load_as_configured(config, empty)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match="neither a run's workdir"):
        ltjax.load(tmp_path)


def test_the_known_side_is_the_images_side():
    images = data.load("fashion_mnist_lt").test_images
    assert images.shape[1:3] == (data.SIDES["fashion_mnist_lt"],) * 2
    assert set(data.SIDES) <= set(data.SOURCES)
