"""Several views of an image as a setting of a stage: drawn independently, on any number of devices, and resumed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax import models, train
from ltjax.config import parse
from ltjax.data import augment, samplers
from ltjax.engine import experiment as experiments
from ltjax.engine import feed, restore, stage
from ltjax.methods import erm
from ltjax.runs.trained import newest, weights_of
from ltjax.system import parallel
from ltjax.types import Batch, Method, UserError
from tests import stages
from tests.test_run import tiny_config

pytestmark = pytest.mark.usefixtures("no_reports")
COUNTS = np.array([30, 20, 9])
SHAPE = (8, 8, 3)
WEAK = dict(crop_padding=1)
STRONG = dict(crop_padding=0, crop_area=0.2, color_jitter=0.4, hue=0.1, jitter_probability=0.8, grey=0.2, blur=0.5)
CROPPED = dict(crop_padding=0, crop_area=0.2)
PLAIN = dict(crop_padding=0, flip=False)
VIEWS = (PLAIN, STRONG, CROPPED, CROPPED, WEAK)


def draw_with(views, devices=1):
    first = lambda *arguments: augment.augment(*arguments, **WEAK)  # noqa: E731
    more = [lambda *arguments, settings=settings: augment.augment(*arguments, **settings) for settings in views]
    return feed.resident_draw(
        samplers.create("instance_balanced"),
        augment.with_views(first, more) if more else first,
        batch_size=8,
        class_counts=COUNTS,
        mesh=parallel.make_mesh(jax.devices()[:devices]),
    )


def made_up_source():
    labels = np.repeat(np.arange(3), COUNTS).astype(np.int32)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), *SHAPE)).astype(np.uint8)
    return feed.Resident(jnp.asarray(images), jnp.asarray(labels))


@functools.cache
def drawn(devices=1):
    """Draw a batch with `VIEWS`."""
    draw = jax.jit(draw_with(VIEWS, devices))
    return jax.device_get(draw(made_up_source(), np.uint32(5), jnp.int32(3), jax.random.key(7)))


@jax.jit
def without_views(source):
    """Draw the same batch without views, and its images before their augmentation."""
    index = samplers.create("instance_balanced")(np.uint32(5), jnp.int32(3), batch_size=8, class_counts=COUNTS)
    batch = draw_with(())(source, np.uint32(5), jnp.int32(3), jax.random.key(7))
    return batch, source.images[index].astype(jnp.float32) / 255


def test_views_leave_the_batch_as_it_is_and_are_of_the_same_images():
    """Without augmentation, a view is the image."""
    batch, (without, images) = drawn(), jax.device_get(without_views(made_up_source()))
    for name in ("images", "labels"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(without, name))
    assert batch.views.shape == (8, len(VIEWS), *SHAPE)
    np.testing.assert_array_equal(batch.views[:, 0], images)
    assert not np.allclose(batch.views[:, 1], batch.views[:, 0], atol=0.05)


def test_views_of_the_same_settings_have_random_numbers_of_their_own():
    same = [np.allclose(a, b) for a, b in zip(drawn().views[:, 2], drawn().views[:, 3], strict=True)]
    assert not any(same)


def test_views_do_not_depend_on_the_number_of_devices():
    np.testing.assert_allclose(drawn(1).views, drawn(2).views, atol=1e-6)


NET = models.create("vit", 3, depth=1, width=2, heads=1, patch=4, grid=2)  # little to trace


def lowered(draw, method=None):
    """Return the StableHLO text of two steps of a stage, by default of classification."""
    mesh, nets, method = parallel.make_mesh(jax.devices()[:1]), {"net": NET}, method or erm.create(COUNTS)
    variables = jax.eval_shape(lambda: stage.random_variables(nets, SHAPE, jax.random.key(0)))
    settings = dict(groups={"all": {"match": ".*", "rate": 1.0}}, lr=0.1, factors=np.ones(1), steps_per_epoch=2)
    compiled = stages.build(nets, method, draw, variables.params, mesh=mesh, image_shape=SHAPE, **settings)
    state = jax.eval_shape(compiled.init, np.uint32(0), variables)
    return compiled.run.lower(state, made_up_source(), 2).as_text()


def test_a_stage_without_views_has_an_unchanged_program():
    """Its text equals that of a draw written out, of images and labels alone. A loss that reads views changes it."""

    def written_out(source, seed, step, rng):
        index = samplers.create("instance_balanced")(seed, step, batch_size=8, class_counts=COUNTS)
        index = parallel.split(index, parallel.make_mesh(jax.devices()[:1]))
        images, labels = source.images[index], source.labels[index]
        crop_rng, *_ = jax.random.split(rng, 4)
        return Batch(augment.crop_flip(crop_rng, images, padding=1).astype(jnp.float32) / 255, labels)

    text = lowered(draw_with(()))
    assert lowered(written_out) == text
    assert lowered(draw_with((WEAK,))) == text  # a view that no loss reads is not drawn

    def reads(apply, variables, batch, rng):
        outputs, variables = apply(variables, batch.images)
        return outputs.logits.mean() + batch.views.mean(), (variables, {})

    reading = [lowered(draw_with(views), Method(lambda rng: ({}, {}), reads)) for views in ((WEAK,), (WEAK, WEAK))]
    assert len({text, *reading}) == 3


def config(**changes):
    made = tiny_config(stages=("ce",), epochs=2)
    made["model"] = dict(name="vit", depth=1, width=8, heads=2, patch=7, grid=4, logit_scale=True)  # little to trace
    method = dict(name="proco", projection=(8, 8))
    groups = {**made["ce"]["groups"], "method": dict(match="method/.*", rate=1.0)}
    views = dict(first=CROPPED, second=WEAK)
    made["ce"] = {**made["ce"], "method": method, "groups": groups, "views": views, **changes}
    return made


def test_a_config_gives_the_views_in_the_order_of_their_names():
    run = parse(config(views=dict(second=dict(crop_padding=0, flip=False), first=dict(crop_padding=0, cutout_size=64))))
    made = experiments.make_augmentation(run.stages["ce"])
    batch = jax.jit(made)(jax.random.key(0), jnp.full((2, 8, 8, 3), 255, jnp.uint8), jnp.zeros(2, jnp.int32))
    assert batch.views.shape[:2] == (2, 2) and batch.views[:, 0].max() == 0 and batch.views[:, 1].min() == 1


def test_the_projection_is_in_no_weights_and_in_no_later_stage(tmp_path, monkeypatch):
    make_mesh = parallel.make_mesh
    monkeypatch.setattr(parallel, "make_mesh", lambda *_, **__: make_mesh(jax.devices()[:1]))
    made = config()
    made["stages"] = ("ce", "later")
    made["later"] = {**tiny_config()["classifier"], "start_from": "ce", "epochs": 1}
    made["later"]["method"] = dict(name="erm")
    train.train(made, tmp_path / "run")
    experiment = experiments.set_up(parse(made), None)
    first, later = (
        restore.restore(experiment, experiment.config.stages[name], tmp_path / "run").state.variables
        for name in made["stages"]
    )
    assert set(first.params["method"]) == {"projection"} and set(later.params) == {"net"}
    weights = weights_of(tmp_path / "run", newest(tmp_path / "run"))
    assert set(weights.variables.params["net"]) == {"backbone", "classifier", "logit_scale"}


def test_replicas_and_parts_of_a_batch_train_on_views(tmp_path, monkeypatch):
    make_mesh = parallel.make_mesh
    monkeypatch.setattr(parallel, "make_mesh", lambda devices=None, replicas=1: make_mesh(jax.devices()[:4], replicas))
    made = {**config(), "replicas": 2, "accumulate": 2}
    results = train.train(made, tmp_path / "run")
    assert np.isfinite(results["stages"]["ce"]["accuracy"]["all"])
    experiment = experiments.set_up(parse(made), None)
    state = restore.restore(experiment, experiment.config.stages["ce"], tmp_path / "run").state
    shown = np.asarray(state.variables.arrays["next_counts"]).sum(-1)  # of each replica, in the last epoch
    np.testing.assert_array_equal(shown, 2 * 7 * made["batch_size"])  # both views, 7 steps


@pytest.mark.parametrize(
    "views, message",
    [
        (dict(first=dict(mixup_alpha=1.0)), r"config.ce.views.first: views are not mixed"),
        (dict(first=dict(rotate=1)), r"config.ce.views.first has no setting 'rotate'"),
        (dict(first=3), r"config.ce.views.first = 3: needs settings, as config.ce.augment"),
        (dict(first=dict(crop_area=0.5)), r"augment has crop_area and crop_padding: turn one of them off"),
        ({}, r"give the stage `views`"),
    ],
)
def test_impossible_views_are_explained(tmp_path, views, message):
    with pytest.raises(UserError, match=message):
        train.train(config(views=views), tmp_path / "run")
