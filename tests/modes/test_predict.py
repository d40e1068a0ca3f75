"""`--mode=predict`: its files, their order, and agreement with the evaluation."""

import csv
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

import ltjax
from ltjax import data, metrics, train
from ltjax.data.decode import View
from ltjax.modes import calibrate
from ltjax.modes import predict as predict_mode
from ltjax.modes.evaluate import evaluate_workdir
from ltjax.predictor import Model, files
from ltjax.predictor.files import Prediction
from ltjax.types import UserError
from tests.test_run import ROOT, environment, tiny_config

pytestmark = pytest.mark.usefixtures("no_reports")


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def find(folder, pattern=""):
    return [os.path.relpath(file, folder) for file in files.find(str(folder / pattern))]


def test_a_folder_is_searched_recursively_in_natural_order(tmp_path):
    touch(tmp_path, "img10.jpg", "img9.JPG", "img9/b.png", "img9/a2.webp", "img9/a10.tif", "1.jpeg", "notes.txt")
    touch(tmp_path, ".hidden.jpg", ".cache/x.jpg")
    assert find(tmp_path) == ["1.jpeg", "img9/a2.webp", "img9/a10.tif", "img9/b.png", "img9.JPG", "img10.jpg"]


def test_images_of_other_endings_are_found_and_other_files_counted(tmp_path, capsys):
    touch(tmp_path, "a.jpg", "notes.txt", "b/more.txt", "c.raw", "hidden/.DS_Store")
    Image.new("RGB", (4, 4)).save(tmp_path / "b" / "x.JPG2", "JPEG")
    os.mkfifo(tmp_path / "pipe")
    assert find(tmp_path) == ["a.jpg", "b/x.JPG2"]
    assert capsys.readouterr().err == (
        f"note: {tmp_path}: 4 file(s) are no images that can be decoded and are left out: "
        ".txt (2), without an ending (1), .raw (1)\n"
        f"note: {tmp_path}: 1 hidden file(s) or folder(s) are left out: .DS_Store\n"
    )


def test_a_pattern_matches_files_in_natural_order(tmp_path):
    touch(tmp_path, "b/img10.jpg", "b/img9.jpg", "a/1.jpg", "a/deep/2.jpg", "a/1.txt")
    assert find(tmp_path, "*/*.jpg") == ["a/1.jpg", "b/img9.jpg", "b/img10.jpg"]
    assert find(tmp_path, "**/*.jpg") == ["a/1.jpg", "a/deep/2.jpg", "b/img9.jpg", "b/img10.jpg"]
    assert find(tmp_path, "a/*") == ["a/1.jpg", "a/1.txt"]


def test_brackets_in_a_folder_name_are_not_a_pattern(tmp_path):
    touch(tmp_path, "photos [2020]/1.jpg")
    assert find(tmp_path, "photos [2020]") == ["photos [2020]/1.jpg"]


def test_a_cycle_of_links_ends(tmp_path):
    touch(tmp_path, "a/1.jpg")
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    assert find(tmp_path) == ["a/1.jpg"]  # a folder counts once


def test_hidden_files_and_folders_are_left_out_and_counted(tmp_path, capsys):
    touch(tmp_path, "a.jpg", ".x.png", ".sub/y.png", "b/__MACOSX/._z.jpg")
    assert find(tmp_path) == ["a.jpg"]
    assert capsys.readouterr().err == (
        f"note: {tmp_path}: 3 hidden file(s) or folder(s) are left out: .sub, .x.png, __MACOSX\n"
    )


def test_folders_may_lie_very_deep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    (tmp_path / "a.jpg").touch()
    try:
        assert [os.path.basename(file) for file in files.find(str(tmp_path))] == ["a.jpg"]
    finally:  # pytest could not remove them
        for _ in range(1200):
            os.chdir("..")
            os.rmdir("d")


def test_a_link_to_itself_is_an_unreadable_image(tmp_path):
    touch(tmp_path, "a.jpg")
    for name in ("loop", "loop.jpg"):
        (tmp_path / name).symlink_to(tmp_path / name)
    assert find(tmp_path) == ["a.jpg", "loop.jpg"]
    assert "symbolic links" in files.read_image(str(tmp_path / "loop.jpg"), View(8, 8), 3)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("", "no images that can be decoded in .* or below it"), ("*.jpg", "nothing matches .*\\*.jpg")],
)
def test_a_folder_or_pattern_without_images_is_named(tmp_path, pattern, message):
    touch(tmp_path, "notes.txt")
    with pytest.raises(UserError, match=message):
        files.find(str(tmp_path / pattern))


def random_image(mode, size=(20, 16)):
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], channels), np.uint8)
    return Image.fromarray(pixels.squeeze(), mode)


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "png"), ("L", "jpeg"), ("RGBA", "png"), ("CMYK", "jpeg"), ("RGB", "webp")]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_get_the_channels_of_the_network(tmp_path, mode, kind, channels):
    random_image(mode).save(tmp_path / f"image.{kind}")
    read, _ = files.read_image(str(tmp_path / f"image.{kind}"), View(12, 16), channels)
    assert read.shape == (12, 12, channels) and read.dtype == np.uint8


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
def test_grey_pixels_do_not_change(tmp_path):
    image = random_image("L", (16, 16))
    image.save(tmp_path / "image.png")
    read, _ = files.read_image(str(tmp_path / "image.png"), View(16, 16), 1)
    np.testing.assert_array_equal(read[..., 0], np.asarray(image))


def test_a_photograph_is_turned_as_the_training_images_were(tmp_path):
    exif, image = Image.Exif(), random_image("RGB", (16, 16))
    exif[0x0112] = 6
    image.save(tmp_path / "image.png", exif=exif)
    for upright, expected in ((False, np.asarray(image)), (True, np.rot90(np.asarray(image), -1))):
        read, _ = files.read_image(str(tmp_path / "image.png"), View(16, 16, upright=upright), 3)
        np.testing.assert_array_equal(read, expected)


def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "image.jpg")
    assert files.read_image(str(tmp_path / "image.jpg"), View(8, 8), 3) == "not a regular file"


class Brightness(Model):
    """A stand-in for a network: the logit of class c is minus the distance of c to the image's first pixel."""

    def __init__(self, classes=4, batch_size=4):
        self.class_names = tuple("abcdefgh"[:classes])
        self.view, self.channels, self.temperature, self.about = View(2, 2), 1, 1.0, "brightness"
        self.shift = None
        self.batch_size, self.sizes = batch_size, []

    def start(self, images):
        self.sizes.append(len(images))
        return -np.abs(images[:, 0, 0].astype(np.float32) - np.arange(len(self.class_names), dtype=np.float32))


def write_levels(folder, levels):
    """Write images 0.png, 1.png, ..., each of one grey level."""
    for number, level in enumerate(levels):
        assert cv2.imwrite(str(folder / f"{number}.png"), np.full((2, 2), level, np.uint8))


@pytest.mark.parametrize(("batch_size", "threads"), [(4, 1), (4, 8), (50, 2)])  # files in a task: 4, 1, 16
def test_predictions_keep_the_order_of_the_files(tmp_path, batch_size, threads):
    levels = np.random.default_rng(0).integers(0, 4, 2 * batch_size + 2)
    write_levels(tmp_path, levels)
    model = Brightness(batch_size=batch_size)
    batches = files.predictions(model, files.find(str(tmp_path)), top_k=2, threads=threads)
    predictions = list(itertools.chain(*batches))
    assert [int(os.path.basename(each.file)[:-4]) for each in predictions] == list(range(len(levels)))
    assert [each.classes[0] for each in predictions] == ["abcd"[level] for level in levels]
    assert model.sizes == [batch_size] * 3  # one size to compile for


def test_the_image_of_an_unreadable_file_is_black(tmp_path):
    write_levels(tmp_path, [3, 3])
    (tmp_path / "1.png").write_bytes(b"")
    model, started = Brightness(), []
    model.start = lambda images: started.append(images.copy()) or Brightness.start(model, images)
    list(model.predict(str(tmp_path)))
    assert [image.max() for image in started[0]] == [3, 0]


def test_confidences_are_the_softmax_of_logits_divided_by_the_temperature(tmp_path):
    write_levels(tmp_path, [1])
    model = Brightness(classes=3)
    model.temperature = 2.0
    (only,) = model.predict(str(tmp_path), top_k=8)
    expected = np.exp([0.0, -0.5, -0.5]) / np.exp([0.0, -0.5, -0.5]).sum()
    assert only.classes == ("b", "a", "c")
    np.testing.assert_allclose(only.confidences, expected, rtol=1e-6)


def test_predict_accepts_paths_and_lists(tmp_path):
    write_levels(tmp_path, [1])
    for images in (tmp_path, tmp_path / "*.png", [tmp_path / "0.png"]):
        (only,) = Brightness().predict(images)
        assert (only.file, only.classes[0]) == (str(tmp_path / "0.png"), "b")


def test_unreadable_files_have_an_error_in_their_place(tmp_path):
    write_levels(tmp_path, [0, 1, 2, 3])
    content = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(b"")
    (tmp_path / "2.png").write_bytes(content[:40])
    predictions = list(Brightness().predict([str(tmp_path / f"{n}.png") for n in (0, 1, 2, 3, 9)]))
    assert [each.classes[:1] for each in predictions] == [(), ("b",), (), ("d",), ()]
    errors = [each.error for each in predictions]
    assert errors[0] == "empty" and errors[2] and errors[4] == "No such file or directory"


def test_images_of_16_bits_are_counted(tmp_path, capsys):
    for number, brightest in enumerate((65535, 300, 200)):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.full((4, 4), brightest, np.uint16))
    (tmp_path / "8 bits").mkdir()
    write_levels(tmp_path / "8 bits", [0])
    list(Brightness().predict(str(tmp_path)))
    assert capsys.readouterr().err == (
        "note: 3 image(s) have 16 bits a channel, with brightest values from 200 to 65,535 of 65,535; "
        "the upper 8 bits are used, so 2 are dark: scale them to the full range\n"
    )


def test_files_are_read_only_a_few_batches_ahead(tmp_path):
    write_levels(tmp_path, [0])
    asked = []

    def endless():
        for number in itertools.count():
            asked.append(number)
            yield str(tmp_path / "0.png")

    batches = files.predictions(Brightness(), endless())
    for number in range(3):
        assert len(next(batches)) == 4
        assert len(asked) <= 4 * (number + files.AHEAD + 2)
    batches.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"view": None}, "size of its images is unknown"),
        ({"channels": 4}, "4 channels"),
        ({"top_k": 0}, "top_k = 0"),
    ],
)
def test_a_model_that_cannot_read_files_is_refused_immediately(change, message):
    model, top_k = Brightness(), change.pop("top_k", 5)
    for name, value in change.items():
        setattr(model, name, value)
    with pytest.raises(UserError, match=message):
        model.predict(["a.png"], top_k=top_k)


ROWS = [
    Prediction('a "b",\n.png', ("x", "y"), (0.75, 0.25)),
    Prediction("c\udcff.png", (), (), "empty"),
    Prediction("d\r.png", (), (), "empty"),
]


def test_a_table_has_all_columns_in_every_row():
    text = ",".join(predict_mode.header(2)) + "\n" + predict_mode.as_table(ROWS, 2)
    assert list(csv.DictReader(io.StringIO(text))) == [
        dict(file=ROWS[0].file, class_1="x", confidence_1="0.750000", class_2="y", confidence_2="0.250000", error=""),
        dict(file=ROWS[1].file, class_1="", confidence_1="", class_2="", confidence_2="", error="empty"),
        dict(file=ROWS[2].file, class_1="", confidence_1="", class_2="", confidence_2="", error="empty"),
    ]
    assert text.count("\r") == 1


def test_json_lines_are_unicode():
    lines = [json.loads(line) for line in predict_mode.as_lines(ROWS).splitlines()]
    classes = [{"class": "x", "confidence": 0.75}, {"class": "y", "confidence": 0.25}]
    assert lines == [
        {"file": ROWS[0].file, "classes": classes},
        {"file": "c\ufffd.png", "error": "empty"},
        {"file": ROWS[2].file, "error": "empty"},
    ]


def test_a_short_write_is_continued():
    written = []

    class Slow:
        def write(self, content):
            written.append(bytes(content[:3]))
            return min(3, len(content))

    predict_mode._write(Slow(), "ä,c\udcff\n")
    assert b"".join(written) == "ä,c".encode() + b"\xff\n"


@pytest.mark.parametrize("out", ["found.txt", "found", ""])
def test_an_output_of_unknown_format_is_refused(out):
    with pytest.raises(UserError, match=r"FILE\.csv, FILE\.jsonl \(JSON lines\), or -"):
        predict_mode.kind_of(out)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a ResNet-8 after 42 steps on 99 images, with 20 held out; and its 1,000 test images as files."""
    folder = tmp_path_factory.mktemp("prediction")
    split = {"data.holdout": 2, "data.max_count": 18, "data.imbalance": 3.0}
    config = tiny_config(**{"stages": ("ce",), "epochs": 6, "eval_every": 6, **split})
    train.train(config, folder / "run")
    (folder / "files").mkdir()
    for number, image in enumerate(data.load("fashion_mnist_lt").test_images):
        assert cv2.imwrite(str(folder / "files" / f"{number}.png"), image)
    return config, folder / "run", folder / "files"


def test_predictions_of_the_test_images_agree_with_the_evaluation(trained, tmp_path, capsys):
    config, workdir, files = trained
    evaluated = evaluate_workdir(config, workdir)
    capsys.readouterr()
    counted = predict_mode.predict_workdir(None, workdir, images=str(files), out=str(tmp_path / "o.csv"), top_k=3)
    assert counted == {"images": 1000, "unreadable": 0} and capsys.readouterr().out == ""
    rows = list(csv.DictReader((tmp_path / "o.csv").read_text().splitlines()))
    images = data.load("fashion_mnist_lt")
    right = np.array([row["class_1"] for row in rows]) == np.array(images.class_names)[images.test_labels]
    per_class = np.bincount(images.test_labels, weights=right) / np.bincount(images.test_labels)
    np.testing.assert_allclose(per_class, evaluated["per_class_accuracy"], atol=1e-12)
    assert len({row["class_1"] for row in rows}) > 2
    ece = metrics.calibration([float(row["confidence_1"]) for row in rows], right).ece
    assert float(ece) == pytest.approx(evaluated["ece"], abs=1e-5)


def test_predictions_use_the_fitted_temperature(trained, tmp_path):
    config, workdir, files = trained
    shutil.copytree(workdir, tmp_path / "run")
    fitted = calibrate.calibrate_workdir(config, tmp_path / "run")["replicas"][0]["temperature"]
    cold, warm = ltjax.load(workdir), ltjax.load(tmp_path / "run")
    assert (cold.temperature, warm.temperature) == (1.0, fitted) and fitted != 1
    image = cv2.imread(str(files / "3.png"), cv2.IMREAD_GRAYSCALE)[None, ..., None]
    (prediction,) = warm.predict(str(files / "3.png"), top_k=1)
    assert prediction.confidences[0] == pytest.approx(warm(image).max(), rel=1e-5)
    assert warm(image).max() != pytest.approx(cold(image).max(), rel=1e-5)


def test_a_model_finds_the_class_names_without_results(trained):
    _, workdir, _ = trained
    (workdir / "results.json").rename(workdir / "results.away")
    try:
        names = ltjax.load(workdir).class_names
    finally:
        (workdir / "results.away").rename(workdir / "results.json")
    assert names == data.load("fashion_mnist_lt").class_names


def predict(workdir, *arguments, **options):
    command = [sys.executable, "run.py", "--mode=predict", f"--workdir={workdir}", *arguments]
    defaults = dict(cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    return subprocess.run(command, **{**defaults, **options})


def test_the_command_line_writes_json_lines_and_names_unreadable_files(trained, tmp_path):
    _, workdir, files = trained
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes((files / f"{number}.png").read_bytes())
    touch(tmp_path, "3.png")
    ran = predict(workdir, f"--images={tmp_path}/*.png", f"--out={tmp_path}/new/found.jsonl", "--top_k=2")
    assert ran.returncode == 0 and ran.stdout == "", ran.stderr
    lines = [json.loads(line) for line in (tmp_path / "new" / "found.jsonl").read_text().splitlines()]
    assert [len(line.get("classes", [])) for line in lines] == [2, 2, 0]
    assert f"unreadable: {tmp_path}/3.png: empty" in ran.stderr and "3 images, 1 of them unreadable" in ran.stderr


def test_json_lines_can_go_to_standard_output(trained, capfd):
    _, workdir, files = trained
    predict_mode.predict_workdir(None, workdir, images=str(files / "1.png"), out="-.jsonl", top_k=2)
    assert len(json.loads(capfd.readouterr().out)["classes"]) == 2


def test_images_are_checked_before_a_temperature_is_fitted(trained, tmp_path):
    _, workdir, _ = trained
    ran = predict(workdir, "--calibrate", f"--images={tmp_path}/*.png", f"--out={tmp_path}/o.csv")
    assert ran.returncode == 2 and "nothing matches" in ran.stderr, ran.stderr
    assert not (workdir / "temperature.json").exists()


def test_files_that_were_found_are_not_searched_again(trained, tmp_path, monkeypatch):
    _, workdir, files = trained
    monkeypatch.setattr(predict_mode, "find", lambda _: pytest.fail("searched again"))
    found, out = iter([str(files / "1.png")]), tmp_path / "o.csv"
    assert predict_mode.predict_workdir(None, workdir, images=str(files), out=str(out), files=found)["images"] == 1


@pytest.mark.parametrize(("images", "out"), [("", "o.csv"), ("{}", "o.txt"), ("{}/none", "o.csv")])
def test_images_and_out_are_checked_before_loading_a_model(tmp_path, images, out):
    touch(tmp_path, "1.png")
    with pytest.raises(UserError, match=r"--images|no images|--out"):
        predict_mode.check(images.format(tmp_path), out)


def test_no_readable_file_is_an_error(trained, tmp_path):
    touch(tmp_path, "3.png")
    with pytest.raises(UserError, match="none of the 1 files"):
        predict_mode.predict_workdir(None, trained[1], images=str(tmp_path), out=str(tmp_path / "o.csv"))


@pytest.mark.parametrize("name", ["o.csv", "ö" * 125 + "o.csv"])
def test_an_output_has_its_name_only_if_it_is_complete(trained, tmp_path, monkeypatch, capfd, name):
    """Until then the former file stays. After a signal, the lines so far are in FILE.csv.partial."""
    _, workdir, files = trained
    out = tmp_path / name
    out.write_text("former")
    predictions = predict_mode.predictions

    def stopped(*arguments, **options):
        for batch in predictions(*arguments, **options):
            assert out.read_text() == "former"
            os.kill(os.getpid(), signal.SIGTERM)
            yield batch[:2]

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(predict_mode, "predictions", stopped)
        predict_mode.predict_workdir(None, workdir, images=str(files / "1*.png"), out=str(out))
    assert ended.value.code == 128 + signal.SIGTERM and out.read_text() == "former"
    unfinished = predict_mode.written_to(str(out))
    assert f"Their lines are in {unfinished}." in capfd.readouterr().err
    assert len(unfinished.read_text().splitlines()) == 1 + 2

    predict_mode.predict_workdir(None, workdir, images=str(files / "1*.png"), out=str(out))
    assert len(out.read_text().splitlines()) == 1 + 111 and not unfinished.exists()


def test_a_link_to_an_output_stays_a_link(trained, tmp_path):
    _, workdir, files = trained
    (tmp_path / "real").mkdir()
    (tmp_path / "o.csv").symlink_to(tmp_path / "real" / "table.csv")
    assert predict_mode.written_to(str(tmp_path / "o.csv")) == tmp_path / "real" / "table.csv.partial"
    predict_mode.predict_workdir(None, workdir, images=str(files / "1.png"), out=str(tmp_path / "o.csv"))
    assert (tmp_path / "o.csv").is_symlink()
    assert len((tmp_path / "real" / "table.csv").read_text().splitlines()) == 2


def test_a_pipe_is_written_to_directly(trained, tmp_path):
    _, workdir, files = trained
    os.mkfifo(tmp_path / "o.csv")
    reader = os.open(tmp_path / "o.csv", os.O_RDONLY | os.O_NONBLOCK)
    try:
        predict_mode.predict_workdir(None, workdir, images=str(files / "1.png"), out=str(tmp_path / "o.csv"))
        assert len(os.read(reader, 4096).splitlines()) == 2
    finally:
        os.close(reader)


def test_another_config_is_refused(trained, tmp_path):
    touch(tmp_path, "3.png")
    with pytest.raises(UserError, match=r"another config .*seed: 0 -> 3"):
        predict_mode.predict_workdir({**trained[0], "seed": 3}, trained[1], images=str(tmp_path))
