"""Folders of images."""

import os
import shutil
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from ltjax import data
from ltjax.data import identity, inspection
from ltjax.types import UserError
from tests.data.miniatures import photo


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make(root, counts, part="train", names="abcdefgh"):
    for label, count in enumerate(counts):
        (root / part / names[label]).mkdir(parents=True)
        for number in range(count):
            (root / part / names[label] / f"{number:03}.jpg").write_bytes(photo(label, number, 16))
    return root


def test_classes_and_counts_are_found(tmp_path):
    make(make(tmp_path, (7, 3)), (1, 2), "validation")
    loaded = data.load("image_folder", tmp_path)
    assert loaded.class_names == ("a", "b")
    assert np.bincount(loaded.train_labels).tolist() == [7, 3]
    assert np.bincount(loaded.test_labels).tolist() == [1, 2]
    assert loaded.train_files.name(7) == str(tmp_path / "train" / "b" / "000.jpg")
    assert loaded.train_files[7] == photo(1, 0, 16)


def test_images_in_subfolders_are_found_and_other_files_ignored(tmp_path):
    make(make(tmp_path, (2, 2)), (1, 1), "val")
    (tmp_path / "train" / "a" / "more").mkdir()
    (tmp_path / "train" / "a" / "more" / "x.JPEG").write_bytes(photo(0, 5, 16))
    for name in ("notes.txt", ".hidden.jpg", "Thumbs.db"):
        (tmp_path / "train" / "a" / name).write_bytes(b"no image")
    assert np.bincount(data.load("image_folder", tmp_path).train_labels).tolist() == [3, 2]


def test_images_of_every_ending_are_found_and_other_files_counted(tmp_path, capsys):
    make(make(tmp_path, (2, 2)), (1, 1), "val")
    for name in ("x.jfif", "y.JPG2", "without"):
        (tmp_path / "train" / "a" / name).write_bytes(photo(0, 9, 16))
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "train" / "a" / "z.gif")
    os.rename(tmp_path / "train" / "a" / "without", os.fsencode(tmp_path / "train" / "a") + b"/caf\xe9")
    for name in ("notes.txt", "more.txt", "photo.HEIC", "BM.md", "readme"):
        (tmp_path / "train" / "b" / name).write_bytes(b"BM no image")
    loaded = data.load("image_folder", tmp_path)
    assert np.bincount(loaded.train_labels).tolist() == [6, 2]
    (note,) = capsys.readouterr().err.splitlines()
    assert note == (
        f"note: {tmp_path}/train: 5 file(s) are no images that can be decoded and are left out: "
        ".txt (2), without an ending (1), .HEIC (1), .md (1)"
    )


def test_images_of_16_bits_are_counted_each_time(tmp_path, capsys):
    make(make(tmp_path, (2, 2)), (1, 1), "val")
    for number, brightest in enumerate((255, 4095)):
        cv2.imwrite(str(tmp_path / "train" / "a" / f"{number}.png"), np.full((4, 4), brightest, np.uint16))
    for _ in range(2):  # the second time from the cache
        data.load("image_folder", tmp_path)
        (note,) = capsys.readouterr().err.splitlines()
        assert note == (
            f"note: {tmp_path}: 2 image(s) have 16 bits a channel, with brightest values from 255 to 4,095 of 65,535; "
            "the upper 8 bits are used, so 2 are dark: scale them to the full range"
        )


def test_only_a_new_image_is_inspected(tmp_path, monkeypatch):
    make(make(tmp_path, (3, 2)), (1, 1), "val")
    before = data.load("image_folder", tmp_path).train_files
    (tmp_path / "train" / "a" / "1a.jpg").write_bytes(photo(0, 9, 16))
    (tmp_path / "train" / "a" / "002.jpg").unlink()
    inspect, inspected = inspection.decode.inspect, []
    monkeypatch.setattr(inspection.decode, "inspect", lambda content: inspected.append(content) or inspect(content))
    after = data.load("image_folder", tmp_path).train_files
    assert inspected == [photo(0, 9, 16)]
    expected = [before.identity(0), before.identity(1), identity.digest(photo(0, 9, 16)), before.identity(3)]
    assert [after.identity(i) for i in range(4)] == expected
    assert len(list((tmp_path / "cache" / "ltjax").glob("images-*.npz"))) == 1


def test_an_image_is_identified_by_its_content(tmp_path):
    make(make(tmp_path, (3, 2)), (1, 1), "val")
    before = data.load("image_folder", tmp_path).train_files
    assert before.identity(1) == identity.digest(photo(0, 1, 16))
    shutil.copytree(tmp_path, tmp_path / "copy", ignore=shutil.ignore_patterns("cache"))
    after = data.load("image_folder", tmp_path / "copy").train_files
    assert [after.identity(i) for i in range(5)] == [before.identity(i) for i in range(5)]


def test_files_with_exchanged_names_are_inspected_again(tmp_path):
    make(make(tmp_path, (2, 2)), (1, 1), "val")
    first, second = (tmp_path / "train" / "a" / f"{name}.bmp" for name in "xy")
    for number, path in enumerate((first, second)):
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(path)
        os.utime(path, (10**9, 10**9))
    before = data.load("image_folder", tmp_path).train_files
    first.rename(tmp_path / "other")
    second.rename(first)
    (tmp_path / "other").rename(second)
    after = data.load("image_folder", tmp_path).train_files
    assert [after.identity(i) for i in (2, 3)] == [before.identity(i) for i in (3, 2)]


def test_a_damaged_cache_is_written_again(tmp_path):
    make(make(tmp_path, (2, 2)), (1, 1), "val")
    before = data.load("image_folder", tmp_path).train_files.identity(0)
    (file,) = (tmp_path / "cache" / "ltjax").glob("images-*.npz")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert data.load("image_folder", tmp_path).train_files.identity(0) == before
    assert len(file.read_bytes()) == len(whole)


def test_without_validation_the_same_number_of_each_class_is_held_out(tmp_path):
    loaded = data.load("image_folder", make(tmp_path, (30, 11, 10)))
    assert np.bincount(loaded.test_labels).tolist() == [2, 2, 2]
    assert np.bincount(loaded.train_labels).tolist() == [28, 9, 8]
    names = [{files.name(i) for i in range(len(files))} for files in (loaded.train_files, loaded.test_files)]
    assert len(names[0] | names[1]) == 51
    again = data.load("image_folder", tmp_path)
    assert [again.test_files.name(i) for i in range(6)] == [loaded.test_files.name(i) for i in range(6)]


def test_damaged_images_are_counted_and_named(tmp_path):
    make(tmp_path, (8, 8))
    whole = photo(0, 0, 16)
    for number, content in enumerate((b"", whole[: len(whole) // 2], b"no image")):
        (tmp_path / "train" / "a" / f"00{number}.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"3 of 16 images cannot be read: .*a/000.jpg .*empty.*a/001.jpg"):
        data.load("image_folder", tmp_path)


def test_images_are_checked_again_only_after_a_change(tmp_path, monkeypatch):
    make(make(tmp_path, (2, 2)), (1, 1), "val")
    data.load("image_folder", tmp_path)
    monkeypatch.setattr(inspection.decode, "inspect", lambda content: pytest.fail("decoded again"))
    data.load("image_folder", tmp_path)
    monkeypatch.undo()
    (tmp_path / "train" / "a" / "000.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="1 of 6 images"):
        data.load("image_folder", tmp_path)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda root: shutil.rmtree(root / "train"), "no folder .*train: expected .*/train/<class>/.*or"),
        (lambda root: shutil.rmtree(root), "no folder .*images: --config.data.root is the folder"),
        (lambda root: (root / "train").rename(root / "Training"), "no folder .*train: rename .*Training; expected"),
        (lambda root: (root / "train").rename(root / "Test"), "no folder .*train beside .*Test: expected"),
        (lambda root: shutil.rmtree(root / "train" / "b"), "images of one class, a: a classifier needs two"),
        (lambda root: put_into(root / "train" / "images", root / "train"), "one folder, .*root=.*/train/images$"),
        (lambda root: put_into(root / "photos", root), "one folder, .*has a folder train: .*root=.*/photos$"),
        (lambda root: spoil_by_heic(root), r"no images that can be decoded in c, of 2 file.s.: .HEIC .2.; convert"),
        (lambda root: spoil_by_a_class_to_test_alone(root), "no images of c, and .*val has: add"),
        (lambda root: [shutil.rmtree(root / "train" / name) for name in "ab"], "no images in .*train: a classifier"),
        (lambda root: (root / "val" / "c").mkdir(parents=True), "classes that .*train lacks: c"),
        (lambda root: (root / "val").mkdir(), "no images in .*val"),
        (
            lambda root: [(root / "train" / "a" / f"00{n}.jpg").unlink() for n in (1, 2)],
            "one image in a, so none can be held out: add some, or make a folder validation, val",
        ),
    ],
)
def test_folders_that_are_no_data_set_are_explained(tmp_path, spoil, message):
    root = make(tmp_path / "images", (3, 3))
    spoil(root)
    with pytest.raises(UserError, match=message) as raised:
        data.load("image_folder", root)
    assert "\n" not in str(raised.value)


def test_a_table_in_a_folder_that_is_no_data_set_is_named(loose):
    (loose / "labels.csv").write_text(ROWS)
    with pytest.raises(UserError, match=r"; or, if labels.csv is a table of labels: --config.data.labels=labels.csv$"):
        data.load("image_folder", loose)


def test_an_empty_folder_is_noted_and_is_no_class(tmp_path, capsys):
    make(make(tmp_path, (3, 0, 3)), (1, 0, 1), "val")
    (tmp_path / "train" / "b" / "empty too").mkdir()
    loaded = data.load("image_folder", tmp_path)
    assert loaded.class_names == ("a", "c") and np.bincount(loaded.train_labels).tolist() == [3, 3]
    assert np.bincount(loaded.test_labels).tolist() == [1, 1]
    (note,) = capsys.readouterr().err.splitlines()
    assert note == f"note: {tmp_path}/train has 1 empty folder(s), which are no classes: b"


def test_classes_may_be_at_the_top(tmp_path, capsys):
    make(tmp_path, (30, 11), "photos")
    (tmp_path / "photos" / "a" / "more").mkdir()
    (tmp_path / "photos" / "a" / "more" / "x.png").write_bytes(photo(0, 30, 16))
    (tmp_path / "photos" / "stray.jpg").write_bytes(photo(0, 31, 16))
    loaded = data.load("image_folder", tmp_path / "photos")
    assert loaded.class_names == ("a", "b")
    assert [np.bincount(each).tolist() for each in (loaded.train_labels, loaded.test_labels)] == [[29, 9], [2, 2]]
    stray, held_out = capsys.readouterr().err.splitlines()
    assert stray == f"note: 1 image(s) in {tmp_path}/photos, outside the classes' folders, are ignored: stray.jpg"
    assert held_out.startswith(
        f"note: {tmp_path}/photos has no folder train beside a folder validation: 2 image(s) of each"
    )


def test_three_images_in_all_are_enough_with_validation(tmp_path):
    loaded = data.load("image_folder", make(make(tmp_path, (2, 1)), (1, 1), "val"))
    assert (loaded.train_labels.tolist(), loaded.test_labels.tolist()) == ([0, 0, 1], [0, 1])


def write_table(root, text, name="labels.csv", encoding="utf-8"):
    (root / name).write_bytes(text.encode(encoding))
    return name


def loaded_from(root, text, **settings):
    """Return {file: (its class, whether it is tested on)} of the images that a table of labels chooses."""
    loaded = data.load("image_folder", root, write_table(root, text, **settings))
    parts = ((loaded.train_files, loaded.train_labels, False), (loaded.test_files, loaded.test_labels, True))
    return {
        os.path.relpath(files.name(i), root): (loaded.class_names[label], tested)
        for files, labels, tested in parts
        for i, label in enumerate(labels)
    }


@pytest.fixture
def loose(tmp_path):
    """Return a folder with 8 images, of which two are in a folder of their own."""
    root = tmp_path / "images"
    (root / "more").mkdir(parents=True)
    for number in range(8):
        (root / ("more" if number > 5 else ".") / f"{number}.jpg").write_bytes(photo(number % 2, number, 16))
    return root


ROWS = "split,file,label\r\n" + "".join(
    f"{'val' if n in (2, 3) else 'train'},{'more/' if n > 5 else ''}{n}.jpg,{'cat' if n % 2 else 'dog'}\r\n"
    for n in range(8)
)
LOADED = {f"{'more/' if n > 5 else ''}{n}.jpg": ("cat" if n % 2 else "dog", n in (2, 3)) for n in range(8)}


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text,
        lambda text: text.replace(",", "\t"),
        lambda text: text.replace(",", ";"),
        lambda text: text.replace("more/", "./more//"),
        lambda text: text.replace("more/", "more\\"),
        lambda text: text.replace("more/6.jpg,dog", "gone.jpg,dog\r\ntrain,more/6.jpg,dog"),
        lambda text: text.replace("file", "File").replace("more/6.jpg,dog", "more/6.jpg,dog\r\ntrain,more/6.jpg,dog"),
    ],
)
def test_a_table_gives_classes_and_splits(loose, change):
    assert loaded_from(loose, change(ROWS)) == LOADED


def test_files_may_have_absolute_paths_or_be_relative_to_the_table(loose):
    write_table(loose, ROWS.replace("more/", f"{loose}/more/"))
    loaded = data.load("image_folder", None, str(loose / "labels.csv"))
    assert np.bincount(loaded.train_labels).tolist() == [3, 3] and loaded.class_names == ("cat", "dog")
    assert loaded.train_files[2] == (loose / "more" / "7.jpg").read_bytes()


def test_a_table_may_be_in_another_folder(loose, tmp_path):
    write_table(tmp_path, ROWS)
    assert len(data.load("image_folder", loose, str(tmp_path / "labels.csv")).train_files) == 6


def test_without_splits_the_same_number_of_each_class_is_held_out(loose, capsys):
    rows = "file,label\n" + "".join(f"{n}.jpg,{'cat' if n % 2 else 'dog'}\n" for n in range(6))
    actual = loaded_from(loose, rows)
    assert sorted(label for label, tested in actual.values() if tested) == ["cat", "dog"] and len(actual) == 6
    rest, held_out = capsys.readouterr().err.splitlines()
    assert (
        rest == f"note: {loose}: 2 image(s) have no row in {loose}/labels.csv and are left out: more/6.jpg, more/7.jpg"
    )
    assert held_out.startswith(f"note: {loose}/labels.csv has no split validation, val, test: 1 image(s) of each")


def test_accents_are_found_in_any_unicode_form(loose):
    (loose / "0.jpg").rename(loose / "caf\u00e9.jpg")
    actual = loaded_from(loose, ROWS.replace("0.jpg", "cafe\u0301.jpg"))
    assert actual["caf\u00e9.jpg"] == ("dog", False) and len(actual) == 8


def test_rows_without_an_image_and_images_without_a_row_are_named(loose, capsys):
    (loose / "notes.txt").write_text("no image")
    text = ROWS.replace("train,5.jpg,cat", "train,5.jpeg,cat").replace("train,4.jpg,dog", "train,notes.txt,owl")
    assert len(loaded_from(loose, text)) == 6
    missing, rest = capsys.readouterr().err.splitlines()
    assert missing == (
        f"note: {loose}/labels.csv: 2 row(s) name no image below {loose} and are left out: notes.txt, 5.jpeg; "
        "no image remains of owl"
    )
    assert rest == f"note: {loose}: 2 image(s) have no row in {loose}/labels.csv and are left out: 4.jpg, 5.jpg"


def test_one_split_is_tested_on_and_others_are_counted(loose, capsys):
    actual = loaded_from(loose, ROWS.replace("val,2.jpg", "test,2.jpg").replace("val,3.jpg", "VALIDATION ,3.jpg"))
    assert actual["3.jpg"] == ("cat", True) and "2.jpg" not in actual
    unread, lacking = capsys.readouterr().err.splitlines()
    assert unread == f"note: {loose}/labels.csv: the 1 image(s) of split test are not read: validation is"
    assert lacking.startswith(f"note: {loose}/labels.csv, split validation has no images of dog: their accuracy")


@pytest.mark.parametrize(
    "change, message",
    [
        (("more/6.jpg,dog", "more/6.jpg,dog\ntrain,more/6.jpg,cat"), r"lines 8 and 9: more/6.jpg has two labels or"),
        (("more/6.jpg,dog", "more/6.jpg,dog\nval,./more/6.jpg,dog"), r"lines 8 and 9: \./more/6.jpg has two labels or"),
        (("val", "valid"), r"line 4: split 'valid'; allowed: train, validation, val, test"),
        (
            (".jpg", ".png"),
            r"no row of .*labels.csv names an image below .*: 0.png, 1.png, 2.png; the images there are 0",
        ),
        (("dog", "cat"), r"labels.csv, split train has images of one class, cat: a classifier needs two"),
        (("val,3.jpg,cat", "val,3.jpg,owl"), r"split val has classes that .*split train lacks: owl"),
        (("train,", "val,"), r"no images in .*labels.csv, split train: a classifier needs some of each class"),
    ],
)
def test_a_table_that_is_no_data_set_is_explained(loose, change, message):
    with pytest.raises(UserError, match=message) as raised:
        loaded_from(loose, ROWS.replace("\r", "").replace(*change))
    assert "\n" not in str(raised.value)


def test_a_class_with_one_row_cannot_be_held_out(loose):
    with pytest.raises(UserError, match=r"one image in dog, so none can be held out: add some, or make a split val"):
        loaded_from(loose, "file,label\n0.jpg,dog\n1.jpg,cat\n3.jpg,cat\n")


def test_a_missing_table_is_named(loose):
    with pytest.raises(
        UserError, match=r"no file other.csv or .*images/other.csv: --config.data.labels is a CSV or TSV"
    ):
        data.load("image_folder", loose, "other.csv")


def test_a_table_is_only_for_folders_of_images():
    with pytest.raises(UserError, match=r"config.data.labels = 'x.csv': cifar10 has labels of its own"):
        data.load("cifar10", "", "x.csv")


def put_into(folder, content):
    """Move what a folder holds into a folder of it, or of another one."""
    paths = [path for path in content.iterdir() if path != folder]
    folder.mkdir()
    for path in paths:
        path.rename(folder / path.name)


def spoil_by_a_class_to_test_alone(root):
    (root / "train" / "c").mkdir()
    make(root, (1, 1, 1), "val")


def spoil_by_heic(root):
    (root / "train" / "c").mkdir()
    for number in range(2):
        (root / "train" / "c" / f"{number}.HEIC").write_bytes(b"....ftypheic")


def test_classes_that_differ_only_in_unicode_form_are_named(tmp_path):
    make(tmp_path, (2, 2), names=("a", "caf\u00e9"))
    make(tmp_path, (1, 1), "val", names=("a", "cafe\u0301"))
    with pytest.raises(UserError, match=r"lacks: cafe\u0301 .the names differ in Unicode form only"):
        data.load("image_folder", tmp_path)


def test_links_to_parents_or_other_classes_add_no_images(tmp_path):
    make(make(tmp_path, (3, 2)), (1, 1), "val")
    (tmp_path / "train" / "a" / "loop").symlink_to(tmp_path / "train" / "a")
    (tmp_path / "train" / "a" / "all").symlink_to(tmp_path / "train")
    (tmp_path / "train" / "a" / "other").symlink_to(tmp_path / "train" / "b")
    assert np.bincount(data.load("image_folder", tmp_path).train_labels).tolist() == [3, 2]


def test_images_behind_a_link_are_found(tmp_path):
    make(make(tmp_path, (3, 2)), (1, 1), "val")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "train" / "b" / "001.jpg").rename(tmp_path / "elsewhere" / "x.jpg")
    (tmp_path / "train" / "b" / "more").symlink_to(tmp_path / "elsewhere")
    assert np.bincount(data.load("image_folder", tmp_path).train_labels).tolist() == [3, 2]


def test_a_broken_link_is_a_damaged_image(tmp_path):
    make(tmp_path, (3, 3))
    (tmp_path / "train" / "a" / "x.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(UserError, match=r"1 of 7 images cannot be read: .*a/x.jpg \(No such file"):
        data.load("image_folder", tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_names_that_are_not_utf8_are_printable(tmp_path):
    make(make(tmp_path, (3, 3)), (1, 1), "val")
    for part in ("train", "val"):
        os.rename(tmp_path / part / "b", os.fsencode(tmp_path / part) + b"/caf\xe9")
    folder = os.fsencode(tmp_path) + b"/train/caf\xe9"
    os.rename(folder + b"/000.jpg", folder + b"/\xe9.jpg")
    loaded = data.load("image_folder", tmp_path)
    assert loaded.class_names == ("a", "caf\ufffd")
    assert loaded.train_files.name(5) == f"{tmp_path}/train/caf\ufffd/\ufffd.jpg"
    assert loaded.train_files[5] == photo(1, 0, 16)
    with open(folder + b"/\xe9.jpg", "wb") as file:
        file.write(b"no image")
    with pytest.raises(UserError, match=r"1 of 8 images cannot be read: .*caf\ufffd/\ufffd"):
        data.load("image_folder", tmp_path)


def spoil_nothing(root):
    make(root, (1, 1), "val")


def spoil_by_two_for_validation(root):
    make(make(root, (1, 1), "val"), (1, 1), "test")


def spoil_by_strays(root):
    make(root, (1, 1), "val")
    (root / "train" / "x.jpg").write_bytes(b"")
    (root / "train" / "__MACOSX").mkdir()
    (root / "train" / "a" / "__MACOSX").mkdir()
    (root / "train" / "a" / "__MACOSX" / "y.jpg").write_bytes(b"")


def spoil_by_hidden_names(root):
    make(root, (1, 1), "val")
    for name in (".class/1.jpg", "a/.sub/1.jpg", "b/.x.png"):
        (root / "train" / name).parent.mkdir(exist_ok=True)
        (root / "train" / name).write_bytes(photo(0, 0, 16))


@pytest.mark.parametrize(
    "spoil, notes",
    [
        (spoil_nothing, []),
        (lambda root: None, ["{} has no folder validation, val, test: 1 image(s) of each class are held out of train"]),
        (lambda root: make(root, (1,), "val"), ["{}/val has no images of b: their accuracy will be unknown"]),
        (
            lambda root: make(root, (1, 1), "valid"),
            ["{}/valid is not read: rename it to validation to use it", "{} has no folder"],
        ),
        (spoil_by_two_for_validation, ["{}/test is not read: val is"]),
        (
            spoil_by_hidden_names,
            ["{}/train: 3 hidden file(s) or folder(s) are left out: .class, .sub, .x.png"],
        ),
        (
            spoil_by_strays,
            [
                "{}/train: 2 hidden file(s) or folder(s) are left out: __MACOSX",
                "1 image(s) in {}/train, outside the classes' folders, are ignored: x.jpg",
            ],
        ),
    ],
)
def test_notes_name_ignored_and_held_out_files(tmp_path, capsys, spoil, notes):
    spoil(make(tmp_path, (5, 5)))
    data.load("image_folder", tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(notes), said
    for line, note in zip(said, notes, strict=True):
        assert line.startswith("note: " + note.format(tmp_path)), line


def test_the_folder_is_required():
    with pytest.raises(UserError, match=r"--config\.data\.root=DIR"):
        data.load("image_folder", "")
