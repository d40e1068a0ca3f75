"""Runs on images on disk agree with runs on the same images on the devices."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ltjax import data, methods, train
from ltjax.config import parse
from ltjax.data.identity import digest
from ltjax.data.source import Images, Stored
from ltjax.engine import experiment as experiments
from ltjax.engine import feed, observe
from ltjax.system import parallel
from ltjax.system.signals import Interrupted
from ltjax.types import UserError
from tests.data.miniatures import photo

pytestmark = pytest.mark.usefixtures("no_reports")

COUNTS, SIZE = (22, 11, 5), 16


def png(image, orientation):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image = np.rot90(image) if orientation == 6 else image
    Image.fromarray(image).save(file, "PNG", exif=exif)
    return file.getvalue()


class Pngs:
    """Images as files in memory, stored with orientation 1 or 6."""

    def __init__(self, images, orientation=1):
        self.contents = [png(image, orientation) for image in images]

    def __len__(self):
        return len(self.contents)

    def __getitem__(self, index):
        return self.contents[index]

    def name(self, index):
        return f"image {index}"

    def identity(self, index):
        return digest(self.contents[index])


def both():
    """Return the same images, in memory and as files: (Images, Stored)."""
    rng = np.random.default_rng(0)

    def labelled(counts):
        labels = np.repeat(np.arange(3), counts).astype(np.int32)
        noise = rng.normal(0, 25, (len(labels), SIZE, SIZE, 3))
        pixels = np.clip(60 + 60 * labels[:, None, None, None] + noise, 0, 255)
        order = rng.permutation(len(labels))
        return pixels.astype(np.uint8)[order], labels[order]

    train_images, train_labels = labelled(COUNTS)
    test_images, test_labels = labelled((4, 3, 4))
    names = ("a", "b", "c")
    return (
        Images(train_images, train_labels, test_images, test_labels, names),
        Stored(Pngs(train_images), train_labels, Pngs(test_images), test_labels, names),
    )


def settings(**changes):
    group = dict(all=dict(match=".*", rate=1.0))
    method = dict(name="drolt", loss=dict(name="cross_entropy"), radius="learned", layers=())
    config = dict(
        name="streamed",
        data=dict(
            name="image_folder", profile="natural", size=SIZE, resize=SIZE, many_above=15, few_below=6, threads=2
        ),
        model=dict(name="resnet_cifar", depth=8, width=4),
        stages=("dro",),
        dro=dict(
            method=method,
            epochs=2,
            lr=0.02,
            groups=group,
            nearest_mean=True,
            sampler=dict(name="class_aware", in_a_row=2),
            augment=dict(crop_padding=0, color_jitter=0.4, rand_augment=(1, 5.0)),
        ),
        batch_size=8,
        eval_batch_size=8,
    )
    config.update(changes)
    return config


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    make_mesh = parallel.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "make_mesh", lambda devices=None, replicas=1: make_mesh(jax.devices()[:2], replicas))
        yield


@pytest.fixture(scope="module")
def pair(two_devices):
    """Return experiments on the same images: on the devices, and on disk."""

    def set_up(images):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "load", lambda *_: images)
            return experiments.set_up(parse(settings()), None)

    return [set_up(images) for images in both()]


def test_evaluation_equals_that_of_resident_images(pair):
    resident, streamed = pair
    assert streamed.streamed and not resident.streamed
    run = parse(settings())
    variables = experiments.fresh_variables(resident, run.stages["dro"])
    first, second = (experiment.evaluators["net"](variables, experiment.test_set) for experiment in pair)
    assert (resident.test_set.host_labels == streamed.test_set.host_labels).all()
    for name in first:
        np.testing.assert_allclose(second[name], first[name], rtol=1e-6, err_msg=name)


def test_the_report_equals_that_of_resident_images(pair):
    run = parse(settings())
    variables = experiments.fresh_variables(pair[0], run.stages["dro"])
    (first,), (second,) = (observe.Observer(experiment).observe(run.stages["dro"], variables) for experiment in pair)
    for name in first:
        np.testing.assert_allclose(second[name], first[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for index in (0, 5):
        pictures = [feed.picture(run, experiment.data, index) for experiment in pair]
        np.testing.assert_array_equal(*pictures)


def test_an_upright_run_gets_the_same_images_for_any_orientation(monkeypatch):
    images = both()[1]
    upright = settings()
    upright["data"]["upright"] = True
    on_their_side = images._replace(test_files=Pngs(both()[0].test_images, orientation=6))
    monkeypatch.setattr(data, "load", lambda *_: on_their_side)
    seen, ignoring = (experiments.set_up(parse(config), None) for config in (upright, settings()))
    for index in (0, 5):
        image = both()[0].test_images[index]
        np.testing.assert_array_equal(feed.picture(seen.config, seen.data, index), image)
        np.testing.assert_array_equal(feed.picture(ignoring.config, ignoring.data, index), np.rot90(image))
    variables = experiments.fresh_variables(seen, seen.config.stages["dro"])
    monkeypatch.setattr(data, "load", lambda *_: images)
    plain = experiments.set_up(parse(settings()), None)
    first, second = (each.evaluators["net"](variables, each.test_set) for each in (seen, plain))
    np.testing.assert_array_equal(first["confidences"], second["confidences"])


def test_an_image_of_a_folder_is_named_by_its_path_there(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / part / name / "more").mkdir(parents=True)
            for number in range(count):
                (tmp_path / part / name / "more" / f"{number}.jpg").write_bytes(photo(number, 0, 16))
    run = parse(settings(data={**settings()["data"], "root": str(tmp_path)}))
    files = data.load("image_folder", tmp_path)
    assert [feed.picture_name(run, files, i) for i in (0, 3)] == ["val/cat/more/0.jpg", "val/dog/more/1.jpg"]
    assert feed.picture_name(parse(settings()), both()[0], 3) == "test image 3"


def test_class_means_of_the_report_use_a_few_images_of_each_class(pair):
    run, streamed = parse(settings()), pair[1]
    some = feed.some_of_each_class(run, streamed.data, streamed.split, streamed.mesh, 6)
    assert np.bincount(some.host_labels).tolist() == [6, 6, 5]


@pytest.mark.parametrize("layers", [(), ("stage2", "stage3")])
def test_class_means_equal_those_of_resident_images(pair, layers):
    run = parse(settings())
    variables = experiments.fresh_variables(pair[0], run.stages["dro"])
    first, second = (experiment.class_means(variables, layers) for experiment in pair)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6), first, second)


def test_a_step_equals_that_of_resident_images(pair):
    """Both get the same batch of whole images, without random crops."""
    run = parse(settings())
    outcomes = []
    for experiment in pair:
        compiled = experiments.build_stage(experiment, run.stages["dro"])
        state = compiled.init(experiments.seeds(run), experiments.fresh_variables(experiment, run.stages["dro"]))
        state = compiled.refresh(state, experiment.class_means(state.variables, compiled.layers))
        if experiment.streamed:
            index = [pair[0].split.train[i] for i in drawn(run, pair[0])]
            images = np.stack([both()[0].train_images[i] for i in index])[None]
            labels = both()[0].train_labels[index][None]
            source = feed.Chunk(
                jnp.int32(0), *parallel.put((images, labels), parallel.split_batch(experiment.mesh, axis=1))
            )
        else:
            source = experiment.train_data
        state, metrics = compiled.run(state, source, 1)
        outcomes.append((jax.tree.map(np.asarray, state.variables.params), float(metrics["loss"][0])))
    np.testing.assert_allclose(outcomes[1][1], outcomes[0][1], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6), outcomes[0][0], outcomes[1][0])


def drawn(run, resident):
    """Return the images of step 0, by position in the sorted training set."""
    from ltjax.data import samplers
    from ltjax.system.hashing import hash32

    sampler = samplers.create(name="class_aware", in_a_row=2)
    seed = hash32(np.uint32(run.seed), np.uint32(0))
    return sampler(seed, np.uint32(0), batch_size=8, class_counts=resident.split.class_counts)


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["values"]["loss"]) for line in lines if line["split"] == "train"]


def test_a_run_stopped_within_an_epoch_resumes_to_the_same_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *_: both()[1])
    prepared = train.set_up_with_stages(parse(settings()), None)
    monkeypatch.setattr(train, "set_up_with_stages", lambda *_: prepared)  # compiled once
    whole = train.train(settings(), tmp_path / "whole")
    assert losses(tmp_path / "whole")[-1][0] == 10  # 38 images: 5 steps an epoch, in dispatches of 3 and 2

    write = train.logs.RunLog.write

    def stop_at_3(self, stage_name, epoch, step, split, values):
        write(self, stage_name, epoch, step, split, values)
        if step == 3:
            signals[0].requested = 15

    signals, stop_signals = [], train.StopSignals
    with monkeypatch.context() as patch:

        def watched():
            signals.append(stop_signals())
            return signals[-1]

        patch.setattr(train, "StopSignals", watched)
        patch.setattr(train.logs.RunLog, "write", stop_at_3)
        with pytest.raises(Interrupted):
            train.train(settings(), tmp_path / "stopped")
    assert losses(tmp_path / "stopped")[-1][0] == 3
    again = train.train(settings(), tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert again["accuracy"] == whole["accuracy"] and again["ece"] == whole["ece"]
    assert whole["data_wait_share"] is None or 0 <= whole["data_wait_share"] <= 1


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stage_is_traced_once(monkeypatch, streamed):
    """Training uses the trace by which the set-up looks for mistakes."""
    of_config, traces = methods.of_config, []

    def counted(*arguments):
        method = of_config(*arguments)
        return method._replace(loss=lambda *arguments: traces.append(0) or method.loss(*arguments))

    monkeypatch.setattr(data, "load", lambda *_: both()[streamed])
    monkeypatch.setattr(methods, "of_config", counted)
    experiment, compiled = train.set_up_with_stages(parse(settings()), None)
    before, stage, compiled = len(traces), experiment.config.stages["dro"], compiled["dro"]
    num_steps = experiments.longest_dispatch(experiment, compiled)
    zeros = lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)  # noqa: E731
    state = jax.tree.map(zeros, experiments.state_shapes(experiment, compiled))
    with experiments.open_feed(experiment, stage, compiled.num_steps) as images:
        compiled.run.lower(state, images.take(0, num_steps, 0), num_steps)
    assert len(traces) == before > 0


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(replicas=2), "config.replicas = 2: replicas share images on the device"),
        (dict(accumulate=8), "cannot be shared by 2 devices and 8 parts"),
    ],
)
def test_settings_that_images_on_disk_do_not_support_are_named(monkeypatch, changes, message):
    monkeypatch.setattr(data, "load", lambda *_: both()[1])
    with pytest.raises(UserError, match=message):
        experiments.set_up(parse(settings(**changes)), None)


def test_data_classes_keeps_only_the_first_classes(monkeypatch):
    for images in both():
        monkeypatch.setattr(data, "load", lambda *_, images=images: images)
        few = settings()
        few["data"]["classes"] = 2
        experiment = experiments.set_up(parse(few), None)
        assert experiment.class_names == ("a", "b") and experiment.split.class_counts.tolist() == [22, 11]
        assert np.bincount(experiment.test_set.host_labels).tolist() == [4, 3]
