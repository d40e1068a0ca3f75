"""Streams of stored images."""

import functools
import io
import itertools
import signal
import threading

import cv2
import jax
import numpy as np
import pytest
from PIL import Image

from ltjax.config import parse
from ltjax.data import decode, pipeline, samplers
from ltjax.data.decode import View
from ltjax.data.source import Stored, Subset
from ltjax.engine import feed
from ltjax.predictor import files
from ltjax.system import parallel
from ltjax.system.hashing import hash32
from ltjax.types import UserError
from tests.test_run import tiny_config

COUNTS = np.array([30, 12, 5])
VIEW = View(size=12, resize=14)


class Encoded:
    """PNGs in memory: image i has the value 5 i everywhere except in one bright corner."""

    def __init__(self, damaged=()):
        self.damaged = damaged

    def __len__(self):
        return int(COUNTS.sum())

    def __getitem__(self, index):
        if index in self.damaged:
            return b"no image"
        pixels = np.full((20, 30, 3), 5 * index, np.uint8)
        pixels[:4, :4] = 255
        return cv2.imencode(".png", pixels)[1].tobytes()

    def name(self, index):
        return f"image {index}"

    def identity(self, index):
        return b"%16d" % index


class Counted(Encoded):
    """Counts the reads; read number `at`, counted from 0, calls `act` first."""

    def __init__(self, at=None, act=lambda: None):
        super().__init__()
        self.at, self.act, self.numbers, self.read = at, act, itertools.count(), 0

    def __getitem__(self, index):
        number = next(self.numbers)
        self.read = number + 1
        if number == self.at:
            self.act()
        return super().__getitem__(index)


def threads_of_streams():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("decode", "send"))]


def stored(files=None):
    labels = np.repeat(np.arange(3), COUNTS).astype(np.int32)
    return Stored(files or Encoded(), labels, Encoded(), labels, ("a", "b", "c"))


def training(data, *, seed=0, num_steps=10):
    sampler = functools.partial(samplers.class_aware, in_a_row=2)
    order = np.arange(len(data.train_labels))
    settings = dict(batch_size=8, num_steps=num_steps, view=VIEW)
    return pipeline.training(data, order, COUNTS, sampler, np.uint32(seed), **settings)


@pytest.fixture(scope="module")
def sharding():
    return parallel.split_batch(parallel.make_mesh(jax.devices()[:4]), axis=1)


def drawn(plan, sharding, *takes, threads=2):
    with pipeline.Stream(plan, sharding, threads) as stream:
        return [tuple(np.asarray(x) for x in stream.take(*take)) for take in takes]


def test_a_stream_draws_what_its_sampler_says(sharding):
    plan = training(stored())
    [(images, labels)] = drawn(plan, sharding, (0, 3, 0))
    assert images.shape == (3, 8, 12, 12, 3) and images.dtype == np.uint8
    for step in range(3):
        positions = samplers.class_aware(np.uint32(0), np.uint32(step), batch_size=8, class_counts=COUNTS, in_a_row=2)
        assert (labels[step] == np.repeat(np.arange(3), COUNTS)[positions]).all()
        assert (images[step, :, -1, -1, 0] == 5 * positions).all()


def test_batches_do_not_depend_on_the_first_step_or_the_threads(sharding):
    plan = training(stored())
    whole = drawn(plan, sharding, (0, 2, 3), (2, 3, 3), (5, 3, 0))
    [later] = drawn(plan, sharding, (5, 3, 0), threads=1)
    assert (whole[2][0] == later[0]).all() and (whole[2][1] == later[1]).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_seed_step_and_row_determine_every_row(sharding, monkeypatch, threads):
    """Also if the rows are not a multiple of a task's."""
    monkeypatch.setattr(pipeline, "TASK_ROWS", 3)
    files, plan = Encoded(), training(stored(), seed=4)
    [(images, labels)] = drawn(plan, sharding, (2, 2, 0), threads=threads)
    for step in (2, 3):
        for row, index in enumerate(plan.positions(step)):
            key = hash32(np.uint32(4), np.uint32(step), np.uint32(row))
            expected = decode.random_resized_crop(decode.decode(files[index]), key, VIEW)
            np.testing.assert_array_equal(images[step - 2, row], expected)
            assert labels[step - 2, row] == plan.labels[index]


def test_filling_some_rows_equals_filling_the_whole_batch():
    plan, whole = training(stored()), (np.empty((8, 12, 12, 3), np.uint8), np.empty(8, np.int32))
    rows = np.array([1, 4, 5, 6])
    some = np.empty((4, 12, 12, 3), np.uint8), np.empty(4, np.int32)
    for which, into in ((np.arange(8), whole), (rows, some)):
        pipeline.fill(plan, 3, which, plan.positions(3)[which], *into)
    for part, all_rows in zip(some, whole, strict=True):
        np.testing.assert_array_equal(part, all_rows[rows])


class Halves(Encoded):
    """Images with a bright upper half, of a camera that was held upright or on its side."""

    def __init__(self, *, on_its_side):
        super().__init__()
        self.on_its_side = on_its_side

    def __getitem__(self, index):
        exif, file, pixels = Image.Exif(), io.BytesIO(), np.full((20, 30, 3), 5 * index, np.uint8)
        pixels[:10] = 255
        exif[0x0112] = 6 if self.on_its_side else 1
        Image.fromarray(np.rot90(pixels) if self.on_its_side else pixels).save(file, "PNG", exif=exif)
        return file.getvalue()


@pytest.mark.parametrize("kind", ["training", "once"])
def test_images_are_turned_upright_if_the_view_says_so(sharding, kind):
    def images(view, *, on_its_side):
        files = Halves(on_its_side=on_its_side)
        data, order = stored(files), np.arange(16)
        sampler = functools.partial(samplers.class_aware, in_a_row=2)
        plan = pipeline.once(files, data.train_labels, order, 8, view)
        if kind == "training":
            order = np.arange(len(files))
            settings = dict(batch_size=8, num_steps=1, view=view)
            plan = pipeline.training(data, order, COUNTS, sampler, np.uint32(0), **settings)
        with pipeline.Stream(plan, sharding) as stream:
            return np.asarray(stream.take(0, 1, 0)[0])

    plain = images(VIEW, on_its_side=False)
    np.testing.assert_array_equal(images(VIEW._replace(upright=True), on_its_side=True), plain)
    assert (images(VIEW, on_its_side=True) != plain).any()


def test_no_more_than_the_next_chunk_is_decoded_ahead(sharding):
    files = Counted()
    with pipeline.Stream(training(stored(files)), sharding, 2) as stream:
        stream.take(0, 2, 3)
        stream.take(2, 3, 0)
        assert files.read == 8 * 5
        stream.take(5, 1, 4)
    assert files.read <= 8 * 10


def test_an_unannounced_chunk_is_read(sharding):
    plan = training(stored())
    announced = drawn(plan, sharding, (0, 2, 2), (2, 2, 0))
    other = drawn(plan, sharding, (0, 2, 5), (2, 2, 0))
    assert (announced[1][0] == other[1][0]).all()


def test_seeds_draw_different_windows(sharding):
    first, second = (drawn(training(stored(), seed=seed), sharding, (0, 4, 0))[0][0] for seed in (0, 1))
    assert (first != second).any()


def test_batches_are_sharded_over_the_devices(sharding):
    with pipeline.Stream(training(stored()), sharding, 1) as stream:
        images, labels = stream.take(0, 2, 0)
    assert images.sharding == sharding and {shard.data.shape for shard in labels.addressable_shards} == {(2, 2)}


def test_one_pass_yields_every_image_and_fills_the_last_batch(sharding):
    data, order = stored(), np.array([40, 3, 17, 8, 9, 10])
    plan = pipeline.once(data.train_files, data.train_labels, order, 4, VIEW)
    with pipeline.Stream(plan, sharding, 2) as stream:
        parts = [(np.asarray(images), np.asarray(labels)) for images, labels in stream.each()]
    labels = np.concatenate([labels[0] for _, labels in parts])
    assert labels.tolist() == [*data.train_labels[order], -1, -1]
    corners = np.concatenate([images[0, :, -1, -1, 0] for images, _ in parts])
    assert corners.tolist() == [*(5 * order), 0, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("upright", [False, True])
def test_evaluation_reports_and_prediction_decode_alike(sharding, kind, upright, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 50, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / f"a.{kind.lower()}", kind, exif=exif)
    content = (tmp_path / f"a.{kind.lower()}").read_bytes()
    view, labels = View(16, 20, upright=upright), np.zeros(4, np.int32)
    data = stored([content] * 4)._replace(test_files=[content] * 4)
    with pipeline.Stream(pipeline.once(data.test_files, labels, np.arange(4), 4, view), sharding, 2) as stream:
        ((images, _),) = stream.each()
    settings = {**tiny_config(), "data": {"name": "image_folder", "size": 16, "resize": 20, "upright": upright}}
    np.testing.assert_array_equal(np.asarray(images)[0, 0], feed.picture(parse(settings), data, 0))
    predicted = files.read_image(str(tmp_path / f"a.{kind.lower()}"), view, 3)
    np.testing.assert_array_equal(np.asarray(images)[0, 0], predicted[0])


def test_an_image_that_cannot_be_read_is_named(sharding):
    data = stored(Encoded(damaged=(7,)))
    plan = pipeline.once(data.train_files, data.train_labels, np.arange(8), 8, VIEW)
    with (
        pytest.raises(UserError, match=r"image 7 cannot be read .*replace or remove it"),
        pipeline.Stream(plan, sharding, 2) as stream,
    ):
        stream.take(0, 1, 0)


def test_any_other_error_gets_a_note_with_the_image(sharding):
    def fail():
        raise KeyError("no such thing")

    data = stored(Counted(0, fail))
    with pytest.raises(KeyError) as error, pipeline.Stream(training(data), sharding, 1) as stream:
        stream.take(0, 1, 0)
    assert error.value.__notes__ == [f"while image {training(data).positions(0)[0]} was decoded"]


def test_an_error_in_the_next_chunk_is_raised_when_it_is_taken(sharding):
    plan = training(stored())
    index = plan.positions(2)[0]
    damaged = plan._replace(files=Encoded(damaged=(index,)), positions=lambda step: np.full(8, index * (step == 2)))
    with pipeline.Stream(damaged, sharding, 2) as stream:
        stream.take(0, 2, 1)
        with pytest.raises(UserError, match=f"image {index} cannot be read"):
            stream.take(2, 1, 0)


@pytest.fixture
def gate(monkeypatch):
    """Return an event that is set after a stream has cancelled its pending tasks."""
    event, shutdown = threading.Event(), pipeline.ThreadPoolExecutor.shutdown

    def watched(executor, **settings):
        shutdown(executor, **{**settings, "wait": False})
        event.set()
        shutdown(executor, **settings)

    monkeypatch.setattr(pipeline.ThreadPoolExecutor, "shutdown", watched)
    return event


def test_threads_stop_after_an_unreadable_image(sharding, gate):
    class Gone(Counted):
        def __getitem__(self, index):
            if self.read == 4:
                gate.wait(20)
            return super().__getitem__(index)

    def fail():
        raise OSError("gone")

    files = Gone(3, fail)
    with pytest.raises(UserError, match="gone"), pipeline.Stream(training(stored(files)), sharding, 1) as stream:
        stream.take(0, 4, 4)
    assert not threads_of_streams()
    assert files.read <= 4 + 8  # of 64; a task has the 8 of a step


def test_ctrl_c_stops_the_threads(sharding, gate, request):
    # A shell's background jobs ignore Ctrl-C, and Python then installs no handler of its own.
    request.addfinalizer(functools.partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    waiting = threading.Event()

    def press():
        assert waiting.wait(20)  # before that, Python would not join a thread that is just starting
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        gate.wait(20)

    files = Counted(3, press)
    with pytest.raises(KeyboardInterrupt), pipeline.Stream(training(stored(files)), sharding, 1) as stream:
        stream.take(0, 4, 4, busy=waiting.set)
    assert not threads_of_streams()
    assert files.read == 8  # of 64


def test_a_subset_has_the_names_of_its_images():
    subset = Subset(Encoded(), np.array([4, 9]))
    assert len(subset) == 2 and subset.name(1) == "image 9" and subset[0] == Encoded()[4]


def test_waiting_is_counted(sharding):
    with pipeline.Stream(training(stored()), sharding, 1) as stream:
        stream.take(0, 1, 0)
        assert stream.waited > 0
