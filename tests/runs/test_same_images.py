"""A run is only resumed and evaluated with the images that it started with, in any folder."""

import json
import shutil

import pytest

from ltjax import train
from ltjax.config import parse
from ltjax.engine.experiment import set_up
from ltjax.modes import attack, calibrate, dry_run, evaluate, report
from ltjax.runs.archive import archive
from ltjax.types import UserError
from tests.configs.reading import read
from tests.data.miniatures import photo

pytestmark = pytest.mark.usefixtures("one_device", "no_reports")

CLASSES = ("cat", "dog", "owl")
MODES = {
    "train": train.train,
    "dry_run": dry_run.dry_run,
    "eval": evaluate.evaluate_workdir,
    "attack": attack.attack_workdir,
    "report": report.report_workdir,
    "calibrate": calibrate.calibrate_workdir,
}


def config_of(root):
    config = read("image_folder", "method=ce,model=resnet10,size=32,holdout=1")
    config.update(batch_size=8, eval_batch_size=8, epochs=1, eval_every=1)
    config.model = dict(name="vit", depth=1, width=8, heads=2, patch=8, grid=4)  # little to trace and compile
    config.data.root = str(root)
    config.attack.update(tests=("pgd-1",), num_images=2, radii=())
    return config.to_dict()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(root of the images, workdir) of a run that is not finished, on a folder without validation."""
    root = tmp_path_factory.mktemp("images")
    for label, name in enumerate(CLASSES):
        (root / "train" / name).mkdir(parents=True)
        for number in range(7 - label):
            (root / "train" / name / f"{number}.jpg").write_bytes(photo(label, number, 16))
    workdir = root.parent / "run"
    train.train(config_of(root), workdir)
    archive(workdir, root.parent / "archive")
    (workdir / "results.json").unlink()
    return root, workdir


@pytest.fixture
def weights(trained, tmp_path):
    """Return a copy of the run's weights."""
    return shutil.copytree(trained[0].parent / "archive", tmp_path / "weights")


@pytest.fixture
def copy(trained, tmp_path, monkeypatch):
    """Copy both, to spoil them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(trained[0], tmp_path / "moved"), shutil.copytree(trained[1], tmp_path / "run")


def add_one_to_every_class(root):
    for label, name in enumerate(CLASSES):
        (root / "train" / name / "99.jpg").write_bytes(photo(label, 99, 16))


def rename_one(root):
    (root / "train" / "cat" / "0.jpg").rename(root / "train" / "cat" / "99.jpg")


def replace_one(root):
    (root / "train" / "dog" / "0.jpg").write_bytes(photo(1, 99, 16))


def make_validation(root):
    shutil.copytree(root / "train", root / "validation")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_refuses_other_images(copy, mode):
    root, workdir = copy
    add_one_to_every_class(root)
    with pytest.raises(UserError, match=r"other train images of cat \(5 then, 6 now\), dog \(4 then, 5 now\)"):
        MODES[mode](config_of(root), workdir)


@pytest.mark.parametrize(
    "change, message",
    [
        (rename_one, "began with other images than those at hand .*other train images of cat"),
        (replace_one, "other (train|holdout|test) images of dog"),
        (make_validation, "other test images of cat, dog, owl"),
        (lambda root: (root / "train" / "dog").rename(root / "train" / "dog\u0301"), "different class_names in"),
        (lambda root: (root / "train" / "owl").rename(root / "train" / "eagle"), "different class_names"),
    ],
)
def test_the_message_names_the_change(copy, change, message):
    root, workdir = copy
    change(root)
    with pytest.raises(UserError, match=message):
        evaluate.evaluate_workdir(config_of(root), workdir)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "calibrate"])  # it needs a better network
def test_a_folder_that_was_moved_holds_the_same_images(copy, mode):
    root, workdir = copy
    config = config_of(root)
    config["data"]["threads"] = 1
    before = (workdir / "split.json").read_bytes()
    MODES[mode](config, workdir)
    assert (workdir / "split.json").read_bytes() == before


def in_a_table(root, change=lambda path, label: label):
    """Move all images into one folder, with their classes in a table. Return the config."""
    rows = ["file\tlabel"]
    for path in sorted((root / "train").rglob("*.jpg")):
        name = f"{path.parent.name} {path.name}"
        rows.append(f"{name}\t{change(path, path.parent.name)}")
        path.rename(root / name)
    shutil.rmtree(root / "train")
    (root / "labels.tsv").write_text("\n".join(rows))
    config = config_of(root)
    config["data"]["labels"] = "labels.tsv"
    return config


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "calibrate"])
def test_a_table_of_the_same_labels_is_the_same_data_set(copy, mode):
    root, workdir = copy
    before = (workdir / "split.json").read_bytes()
    MODES[mode](in_a_table(root), workdir)
    assert (workdir / "split.json").read_bytes() == before


def test_a_changed_label_is_refused(copy):
    root, workdir = copy
    config = in_a_table(root, lambda path, label: "owl" if path.match("cat/0.jpg") else label)
    with pytest.raises(UserError, match=r"other train images of cat \(5 then, 4 now\), (dog, )?owl \(3 then, 4 now\)"):
        evaluate.evaluate_workdir(config, workdir)


def test_an_added_class_is_not_called_a_unicode_change(copy):
    root, workdir = copy
    shutil.copytree(root / "train" / "owl", root / "train" / "rat")
    with pytest.raises(UserError, match=r"different class_names; ") as raised:
        evaluate.evaluate_workdir(config_of(root), workdir)
    assert "Unicode" not in str(raised.value)


def test_names_in_another_unicode_form_are_reported(copy, tmp_path):
    root, _ = copy
    (root / "train" / "owl").rename(root / "train" / "caf\u00e9")
    train.train(config_of(root), tmp_path / "accents")
    (root / "train" / "caf\u00e9").rename(root / "train" / "cafe\u0301")
    with pytest.raises(UserError, match=r"different class_names .the names differ in Unicode form only"):
        evaluate.evaluate_workdir(config_of(root), tmp_path / "accents")


def test_an_older_run_gets_a_note_on_its_images(copy, capsys):
    root, workdir = copy
    split = json.loads((workdir / "split.json").read_text())
    del split["images"]
    (workdir / "split.json").write_text(json.dumps(split))
    train.train(config_of(root), workdir)
    assert "does not identify the images by content" in capsys.readouterr().err
    assert "images" not in json.loads((workdir / "split.json").read_text())


def test_weights_of_a_run_on_other_images_are_noted(copy, weights, tmp_path, capsys):
    root, _ = copy
    config = {**config_of(root), "weights": str(weights)}
    evaluate.evaluate_workdir(config, tmp_path / "same")
    assert "trained on" not in capsys.readouterr().err
    add_one_to_every_class(root)
    evaluate.evaluate_workdir(config, tmp_path / "other")
    assert "note: some test images may have been trained on" in capsys.readouterr().err


def test_weights_may_be_moved_but_not_exchanged(copy, weights, tmp_path):
    root, _ = copy
    config = {**config_of(root), "weights": str(weights)}
    train.train(config, tmp_path / "tuned")
    archive(tmp_path / "tuned", tmp_path / "others")
    shutil.move(weights, tmp_path / "moved")
    evaluate.evaluate_workdir({**config, "weights": str(tmp_path / "moved")}, tmp_path / "tuned")
    with pytest.raises(UserError, match=r"different weights_sha256, of config\.weights"):
        evaluate.evaluate_workdir({**config, "weights": str(tmp_path / "others")}, tmp_path / "tuned")


def test_split_json_counts_test_images_that_were_trained_on(copy, tmp_path):
    root, _ = copy
    for name in ("owl", "dog"):
        shutil.copytree(root / "train" / name, root / "val" / name)
    config = config_of(root)
    config["data"]["holdout"] = 0
    train.train(config, tmp_path / "other")
    split = json.loads((tmp_path / "other" / "split.json").read_text())
    assert split == set_up(parse(config), None).description
    assert (split["num_test"], split["also_trained_on"]) == (6 + 5, {"holdout": 0, "test": 6 + 5})


def test_copies_are_counted_in_the_first_lines_of_a_run(copy, tmp_path, capsys):
    root, _ = copy
    shutil.copytree(root / "train" / "owl", root / "val" / "owl")
    shutil.copytree(root / "train" / "dog", root / "val" / "dog")
    config = config_of(root)
    config["data"]["holdout"] = 0
    dry_run.dry_run(config, tmp_path / "other", None)
    told = " ".join("".join(capsys.readouterr()).split())
    assert "11 of them training images, too" in told


def test_a_held_out_copy_of_a_training_image_is_counted(copy):
    root, _ = copy
    for number in range(5):
        (root / "train" / "owl" / f"{number}.jpg").write_bytes(photo(2, 0, 16))
    assert set_up(parse(config_of(root)), None).description["also_trained_on"] == {"holdout": 1, "test": 1}
