"""Features from files of each kind, and refused files."""

import numpy as np
import pytest

import ltjax
from ltjax import train
from ltjax.data import load
from ltjax.modes import report
from ltjax.modes.predict import predict_workdir
from ltjax.types import UserError
from tests.configs.reading import read

pytestmark = pytest.mark.usefixtures("no_reports")

CLASSES, WIDTH = ("cat", "dog", "emu"), 6


def made(count=24, dtype=np.float16, seed=0):
    """Draw rows of three classes around three directions, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    return (4 * np.eye(3, WIDTH)[labels] + rng.normal(size=(count, WIDTH))).astype(dtype), labels


def npz(folder, **changes):
    features, labels = made()
    arrays = dict(features=features, labels=labels, split=np.array(["train"] * 18 + ["validation"] * 6))
    arrays.update(changes)
    np.savez(folder / "f.npz", **{key: value for key, value in arrays.items() if value is not None})
    return folder / "f.npz"


def npy(folder):
    features, labels = made()
    np.save(folder / "f.npy", features)
    np.save(folder / "labels.npy", labels)
    return folder / "f.npy"


def csv(folder):
    features, labels = made(dtype=np.float32)
    header = ",".join(["filenames", *(f"embedding_{i}" for i in range(WIDTH)), "labels"])
    rows = [
        ",".join([f"{n}.jpg", *map(str, row), CLASSES[label]])
        for n, (row, label) in enumerate(zip(features, labels, strict=True))
    ]
    (folder / "f.csv").write_text("\ufeff" + "\r\n".join([header, *rows]) + "\r\n")
    return folder / "f.csv"


def parquet(folder):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    features, labels = made(dtype=np.float32)
    columns = {"label": [CLASSES[label] for label in labels], "embedding": features.tolist()}
    parquet.write_table(pyarrow.table(columns), folder / "f.parquet")
    return folder / "f.parquet"


def test_a_file_with_a_split(tmp_path):
    images = load("features", npz(tmp_path))
    features, labels = made()
    np.testing.assert_array_equal(images.train_images[:, 0, 0], features[:18])
    np.testing.assert_array_equal(images.test_labels, labels[18:])
    assert images.train_images.dtype == np.float16
    assert images.class_names == ("class 0", "class 1", "class 2")


@pytest.mark.parametrize("make", [npy, csv, parquet])
def test_without_a_split_the_same_rows_are_held_out_of_each_class(tmp_path, make, capsys):
    images = load("features", make(tmp_path))
    features, _ = made()
    assert np.bincount(images.train_labels).tolist() == [7, 7, 7]
    assert np.bincount(images.test_labels).tolist() == [1, 1, 1]
    together = np.concatenate([images.train_images, images.test_images])[:, 0, 0]
    order = np.lexsort(features.T[::-1])
    np.testing.assert_allclose(together[np.lexsort(together.T[::-1])], features[order], rtol=1e-3)
    assert "1 image(s) of each class are held out" in capsys.readouterr().err


def test_arrays_of_training_and_validation(tmp_path):
    features, labels = made()
    names = np.array(CLASSES)[labels]
    parts = dict(train_features=features[:18], train_labels=names[:18])
    parts |= dict(validation_features=features[18:], validation_labels=names[18:])
    np.savez(tmp_path / "f.npz", **parts)
    images = load("features", tmp_path / "f.npz")
    assert images.class_names == CLASSES
    np.testing.assert_array_equal(images.test_images[:, 0, 0], features[18:])


def test_names_of_integer_labels_come_from_classes(tmp_path):
    assert load("features", npz(tmp_path, classes=np.array(CLASSES))).class_names == CLASSES


def damaged(row, value):
    features, _ = made()
    features[row] = value
    return features


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(features=None), r"f.npz has labels, split: needed are features and labels"),
        (dict(features=damaged(3, np.nan)), r"1 of 24 features: row 3 is not finite: remove these rows"),
        (dict(features=damaged(5, 0)), r"1 of 24 features: row 5 is all zeros"),
        (
            dict(features=damaged(5, 0), files=np.array([f"{i}.jpg" for i in range(24)])),
            r"row 5 \(5.jpg\) is all zeros",
        ),
        (dict(features=np.array([b"x"] * 24)), r"features are \|S1 \[24\]: numbers \[N, D\] are needed"),
        (dict(labels=np.arange(5)), r"24 rows of features and labels of shape \[5\]"),
        (dict(labels=np.zeros((24, 2), int)), r"labels have shape \[24, 2\]: one value a row is needed"),
        (dict(labels=np.array([b"\xff"] * 24)), r"labels are bytes that are not UTF-8"),
        (dict(split=np.array(["train"] * 5)), r"24 rows of features and 5 of split"),
        (dict(classes=np.array("a")), r"classes have shape \[\]: one value a row is needed"),
        (dict(labels=np.arange(24) % 3 - 1), r"labels are int64: integers from 0 up, or names"),
        (dict(labels=np.arange(24) % 3 / 2), r"labels are float64: integers from 0 up, or names"),
        (dict(classes=np.array(["a", "b"])), r"labels up to 2, but `classes` has 2 names"),
        (dict(split=np.array(["train"] * 24)), r"24 rows of split train, 0 of validation: both are needed"),
        (
            dict(labels=np.repeat([0, 1, 2], 8), split=np.array(["train"] * 16 + ["val"] * 8)),
            r"no training row of class 2",
        ),
    ],
)
def test_invalid_features_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load("features", npz(tmp_path, **changes))


def test_arrays_of_objects_are_not_unpickled(tmp_path):
    np.savez(tmp_path / "f.npz", features=np.array([{}, 1], object), labels=np.arange(2))
    with pytest.raises(UserError, match=r"cannot read the features .* no intact npz file of numbers"):
        load("features", tmp_path / "f.npz")


def test_labels_of_bytes_are_text(tmp_path):
    assert load("features", npz(tmp_path, labels=np.array([b"emu", b"cat"] * 12))).class_names == ("cat", "emu")


def test_a_header_that_declares_too_many_labels_takes_no_memory(tmp_path):
    file = npy(tmp_path)
    header = dict(descr="<i8", fortran_order=False, shape=(1 << 45,))
    with open(tmp_path / "labels.npy", "wb") as labels:
        np.lib.format.write_array_header_1_0(labels, header)
    with pytest.raises(UserError, match=r"cannot read the features"):
        load("features", file)


def test_a_cell_that_is_too_long_for_a_table_is_refused(tmp_path):
    file = csv(tmp_path)
    file.write_text(file.read_text() + "x" * 200_000 + "\n")
    with pytest.raises(UserError, match=r"cannot read the features .* field larger than field limit"):
        load("features", file)


def test_rows_of_two_lengths_are_refused(tmp_path):
    file = csv(tmp_path)
    file.write_text(file.read_text() + "x.jpg,1,2,cat\n")
    with pytest.raises(UserError, match=r"line 26 has another number of columns than the header"):
        load("features", file)


@pytest.mark.parametrize(
    "name, message", [("", r"--config.data.root=FILE.npz"), ("f.txt", r"no file of features; one of")]
)
def test_a_missing_file_is_an_error(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        load("features", name and tmp_path / name)


def test_splits_that_are_not_known_are_left_out_with_a_note(tmp_path, capsys):
    images = load("features", npz(tmp_path, split=np.array(["train"] * 15 + ["extra"] * 3 + ["test"] * 6)))
    assert len(images.train_labels) == 15
    assert "3 row(s) of split extra are left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argument", ["", "method=mislas", "method=drolt", "method=tau_norm,holdout=2", "method=ldam_drw"]
)
def test_a_method_learns_from_features(tmp_path, argument):
    config = read("features", argument).to_dict()
    config["data"]["root"] = str(npz(tmp_path))
    config.update(epochs=5, eval_every=5, batch_size=8)
    assert train.train(config, tmp_path / "run")["accuracy"]["all"] == 1


def test_methods_that_train_a_backbone_are_refused():
    with pytest.raises(ValueError, match=r"allowed values of method: lift, mislas"):
        read("features", "method=reslt")
    with pytest.raises(ValueError, match=r"reslt trains a whole network, and the backbone is fixed"):
        read("features", "recipe=reslt+crt")


def test_standardised_features_do_not_depend_on_their_scale(tmp_path):
    """Each dimension is multiplied by its own factor; the trained classifier predicts the same."""
    features, _ = made()
    losses = []
    for scale in (np.ones(WIDTH), 10.0 ** np.arange(WIDTH - 3, -3, -1)):
        config = read("features", "method=ce,normalise=standardise").to_dict()
        config["data"]["root"] = str(npz(tmp_path, features=(features * scale).astype(np.float32)))
        config.update(epochs=2, batch_size=8)
        losses.append(train.train(config, tmp_path / f"run{scale[0]:g}")["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, no_reports):
    folder = tmp_path_factory.mktemp("trained")
    config = read("features").to_dict()
    config["data"]["root"] = str(npz(folder, classes=np.array(CLASSES)))
    config.update(epochs=5, batch_size=8)
    train.train(config, folder / "run")
    return folder / "run"


def test_a_trained_classifier_predicts_other_features(trained, tmp_path):
    features, labels = made(seed=1)
    model = ltjax.load(trained)
    assert model.takes_features and model.channels == WIDTH
    predicted = model(features).argmax(1)
    assert (predicted == labels).mean() > 0.9
    np.savez(tmp_path / "others.npz", features=features, files=np.array([f"{i}.jpg" for i in range(24)]))
    counts = predict_workdir(None, trained, images=str(tmp_path / "others.npz"), out=str(tmp_path / "out.csv"), top_k=1)
    assert counts == {"images": 24, "unreadable": 0}
    rows = (tmp_path / "out.csv").read_text().splitlines()[1:]
    assert [row.split(",")[:2] for row in rows] == [[f"{i}.jpg", CLASSES[c]] for i, c in enumerate(predicted)]


def test_a_classifier_of_features_refuses_images(trained, tmp_path):
    with pytest.raises(UserError, match=r"the network takes features, floats \[N, 6\]"):
        ltjax.load(trained)(np.zeros((2, 32, 32, 3), np.uint8))
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"photo.jpg: the network takes features of images: a file of .npz"):
        predict_workdir(None, trained, images=str(tmp_path / "photo.jpg"), out=str(tmp_path / "out.csv"))


def test_a_report_shows_features_as_grey_values(tmp_path):
    features, labels = made()
    config = read("features", "method=ce").to_dict()
    config["data"]["root"] = str(npz(tmp_path, labels=np.roll(labels, 1)[np.argsort(features[:, 3])]))  # mistakes
    config.update(epochs=1, batch_size=8)
    figures = train.train(config, tmp_path / "run")
    assert figures["accuracy"]["all"] < 1
    report.report_workdir(config, tmp_path / "run")
    assert "data:image/png" in (tmp_path / "run" / "report" / "index.html").read_text()
