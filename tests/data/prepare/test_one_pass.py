"""The pass over the archives of a large data set, with miniatures of iNaturalist 2018."""

import io
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image as Picture

from ltjax.data import decode, index
from ltjax.data.prepare import inat18, one_pass, shards, sources
from ltjax.data.prepare.__main__ import main
from tests.data import miniatures
from tests.data.prepare.preparing import (
    NAME,
    VERSION,
    directory,
    error_line,
    incomplete,
    originals,
    raw,
    records,
    run,
    run_with_small_shards,
)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_IMAGES", 2)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return miniatures.inat18(tmp_path_factory.mktemp("source"), counts=(6, 3, 2))


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    """Return a prepared miniature, in shards of two images."""
    return run_with_small_shards(source, tmp_path_factory.mktemp("prepared"))


# What is written.


def test_images_of_16_bits_a_channel_are_counted(tmp_path, capsys):
    deep = io.BytesIO()
    Picture.fromarray(np.full((64, 80), 4095, np.uint16)).save(deep, "PNG")
    source = miniatures.inat18(tmp_path / "source", spoil=lambda images: images.update({[*images][1]: deep.getvalue()}))
    assert run(source, tmp_path / "data") == 0
    assert "1 image(s) have 16 bits a channel, with brightest values from 4,095" in capsys.readouterr().err


def test_image_files_are_kept_byte_for_byte(source, prepared):
    images = {r["id"].decode(): r["image"] for split in ("train", "validation") for r in records(prepared, split)}
    assert images == originals(source)


def test_tfds_reads_pixels(prepared):
    images = tfds.builder_from_directory(prepared).as_data_source("train")
    assert images[5]["image"].shape == (64, 80, 3)


def test_shards_have_the_names_and_lengths_that_tfds_expects(prepared):
    info = tfds.builder_from_directory(prepared).info
    assert info.full_name == f"{NAME}/{VERSION}" and info.file_format.value == "array_record"
    assert info.splits["train"].shard_lengths == [2, 2, 2, 2, 2, 1]
    expected = {f"{NAME}-train.array_record-{i:05d}-of-00006" for i in range(6)}
    expected |= {f"{NAME}-validation.array_record-{i:05d}-of-00002" for i in range(2)}
    expected |= {"dataset_info.json", "features.json", "label.labels.txt", "supercategory.labels.txt"}
    assert set(os.listdir(prepared)) == expected | {"train.index.npz", "validation.index.npz"}


def test_num_bytes_is_the_size_of_the_records(prepared):
    serialised, _, _ = raw(prepared)
    splits = tfds.builder_from_directory(prepared).info.splits
    assert all(splits[split].num_bytes == sum(map(len, serialised[split])) for split in ("train", "validation"))


def test_records_equal_the_serialisation_of_tfds(prepared):
    from tensorflow_datasets.core import example_serializer
    from tensorflow_datasets.proto import tf_example_pb2

    features = tfds.builder_from_directory(prepared).info.features
    ours, theirs = tf_example_pb2.Example(), tf_example_pb2.Example()
    ours.ParseFromString(raw(prepared)[0]["train"][0])
    record = records(prepared, "train")[0] | {"id": records(prepared, "train")[0]["id"].decode()}
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    theirs.ParseFromString(serializer.serialize_example(features.encode_example(record)))
    assert ours == theirs


def test_the_index_is_sorted_by_id(prepared):
    for split in ("train", "validation"):
        stored, sidecar = records(prepared, split), np.load(prepared / f"{split}.index.npz")
        ordered = [stored[number] for number in sidecar["records"]]
        assert [record["id"] for record in ordered] == sorted(record["id"] for record in stored)
        assert sidecar["labels"].tolist() == [record["label"] for record in ordered]


def test_the_index_holds_the_fingerprint_of_the_shards(prepared):
    paths = list(prepared.glob(f"{NAME}-train.array_record*"))
    assert str(np.load(prepared / "train.index.npz")["fingerprint"]) == index.shards_fingerprint(paths)


def test_shard_bytes_limits_a_shard(source, tmp_path):
    one_pass.prepare(NAME, tmp_path, source, inat18.read_spec, (), shard_bytes=1)
    assert set(raw(directory(tmp_path))[2]["train"]) == {1}


def test_the_command_prints_counts_and_warns_of_short_lists(source, tmp_path, capsys):
    assert run(source, tmp_path) == 0
    out, err = capsys.readouterr()
    assert out == f"prepared {NAME}: 11 train and 3 validation images in {directory(tmp_path)}\n"
    assert err == (
        f"warning: these are not the official lists of {NAME}: 11 train images, not 437513, "
        "3 validation images, not 24426\n"
    )


def test_a_second_run_needs_no_source(prepared, capsys):
    assert main([NAME, f"--data_dir={prepared.parents[1]}"]) == 0
    assert capsys.readouterr() == (
        f"{NAME} is already prepared: 11 train and 3 validation images in {prepared}\n",
        "",
    )


def test_a_second_run_finds_a_missing_shard(source, tmp_path, capsys):
    assert run(source, tmp_path) == 0
    next(directory(tmp_path).glob("*train.array_record*")).unlink()
    capsys.readouterr()
    assert run(source, tmp_path) == 2
    assert "delete that folder" in error_line(capsys)


def test_without_a_source_the_command_names_the_official_files(tmp_path, capsys):
    assert main(["inat18", f"--data_dir={tmp_path}"]) == 2
    line = error_line(capsys)
    assert "--source=FOLDER" in line and "train_val2018.tar.gz" in line


def test_skip_damaged_is_refused_for_other_data_sets(tmp_path, capsys):
    assert main(["cifar10", f"--data_dir={tmp_path}", "--skip_damaged"]) == 2
    assert "leave it out for cifar10" in error_line(capsys)


# Images.


def encoded(kind, **options):
    pixels = np.random.default_rng(0).integers(256, size=(8, 10, 3), dtype=np.uint8)
    picture = Picture.fromarray(pixels).resize((100, 80))
    out = io.BytesIO()
    mode, form = kind.split()
    picture.convert(mode).save(out, form, **options)
    return out.getvalue()


def rotated():
    exif = Picture.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


WHOLE = encoded("RGB JPEG")
CMYK = encoded("CMYK JPEG")
PROGRESSIVE = encoded("RGB JPEG", progressive=True)
PNG = encoded("RGBA PNG")


@pytest.mark.parametrize(
    "content",
    [
        WHOLE,
        PROGRESSIVE,
        encoded("L JPEG"),
        CMYK,
        encoded("RGB JPEG", exif=rotated()),
        PNG,
        encoded("P PNG"),
        WHOLE + b"\xff\xda" + bytes(100),
        WHOLE[:-2] + b"stray bytes" + WHOLE[-2:],
    ],
    ids=["rgb", "progressive", "grey", "cmyk", "rotated", "rgba", "palette", "appended bytes", "stray bytes"],
)
def test_intact_images_of_all_kinds_have_no_problem(content):
    assert decode.problem(content) == ""


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "empty"),
        (WHOLE[:-2], "Premature end of JPEG file"),
        (WHOLE[:-20], "Premature end of JPEG file"),
        (WHOLE[: len(WHOLE) // 2], "Premature end of JPEG file"),
        (WHOLE[: len(WHOLE) // 2] + b"\xff\xd9", "Corrupt JPEG data: premature end of data segment"),
        (PROGRESSIVE[: len(PROGRESSIVE) * 3 // 4], "Premature end of JPEG file"),
        (CMYK[: len(CMYK) // 2], "Premature end of JPEG file"),
        (WHOLE[:100], "not an image"),
        (b"\xff\xd8" + b"x" * 500 + b"\xff\xd9", "not an image"),
        (b"<html>not found</html>", "not an image"),
        (bytes(5000), "not an image"),
    ],
)
def test_a_damaged_image_has_a_problem(content, expected):
    assert decode.problem(content).startswith(expected)


def test_a_truncated_png_has_a_problem():
    assert "not an image" in decode.problem(PNG[: len(PNG) // 2])


@pytest.fixture
def kinds(tmp_path):
    """Return a source whose first images have different formats."""
    contents = [CMYK, encoded("L JPEG"), PNG, encoded("RGB JPEG", exif=rotated())]

    def spoil(images):
        images.update(dict(zip(images, contents, strict=False)))

    return miniatures.inat18(tmp_path / "source", counts=(6, 3, 2), spoil=spoil), contents


def test_cmyk_grey_rgba_and_rotated_images_are_kept_unchanged(kinds, tmp_path):
    source, contents = kinds
    assert run(source, tmp_path / "data") == 0
    assert [record["image"] for record in records(directory(tmp_path / "data"), "train")[:4]] == contents


DAMAGE = {"empty": b"", "cut": WHOLE[:-2], "text": b"sorry", "half": WHOLE[: len(WHOLE) // 2]}


@pytest.fixture
def damaged(tmp_path):
    """Return a source with four damaged images and a missing one, and their ids, the missing one last."""
    names = []

    def spoil(images):
        names.extend(list(images)[1:6])
        images.update(dict(zip(names, DAMAGE.values(), strict=False)))
        del images[names[4]]

    return miniatures.inat18(tmp_path / "source", counts=(6, 3, 2), spoil=spoil), [Path(name).stem for name in names]


def test_missing_and_damaged_images_are_counted_and_named(damaged, tmp_path, capsys):
    source, ids = damaged
    assert run(source, tmp_path / "data") == 2
    line = error_line(capsys)
    assert f"5 of 14 images of {NAME} are missing or damaged: {ids[0]} (empty), {ids[1]} (Premature end" in line
    assert f"{ids[4]} (missing)" in line and str(incomplete(tmp_path / "data") / "problems.txt") in line
    assert "--skip_damaged" in line and not directory(tmp_path / "data").exists()


def test_problems_txt_lists_all_problems_with_their_paths(damaged, tmp_path):
    source, ids = damaged
    run(source, tmp_path / "data")
    lines = (incomplete(tmp_path / "data") / "problems.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ids
    assert lines[0] == f"{ids[0]}\tempty\t{source}/train_val2018.tar.gz/train_val2018/Aves/0/{ids[0]}.jpg"
    assert lines[4] == f"{ids[4]}\tmissing\ttrain_val2018.tar.gz"


def test_the_message_names_at_most_five_images(tmp_path, capsys):
    def spoil(images):
        images.update(dict.fromkeys(list(images)[:7], b""))

    assert run(miniatures.inat18(tmp_path / "source", spoil=spoil), tmp_path / "data") == 2
    line = error_line(capsys)
    assert line.count("(empty)") == 5 and " and 2 more;" in line


def test_skip_damaged_lists_the_images_it_leaves_out(damaged, tmp_path, capsys):
    source, ids = damaged
    assert run(source, tmp_path / "data", "--skip_damaged") == 0
    folder = directory(tmp_path / "data")
    assert "without 5 that are missing or damaged (skipped.txt)" in capsys.readouterr().out
    assert [line.split("\t")[0] for line in (folder / "skipped.txt").read_text().splitlines()] == ids
    assert not {record["id"].decode() for record in records(folder, "train")} & set(ids)
    assert len(np.load(folder / "train.index.npz")["labels"]) == len(records(folder, "train")) == 6


def test_replaced_images_complete_the_records(damaged, tmp_path, small_shards, monkeypatch):
    source, ids = damaged
    data_dir = tmp_path / "data"
    assert run(source, data_dir) == 2
    miniatures.inat18(source, counts=(6, 3, 2))  # the official images
    written = []
    serialise = one_pass._record
    monkeypatch.setattr(one_pass, "_record", lambda *a: written.append(a[1]) or serialise(*a))
    assert run(source, data_dir) == 0
    assert sorted(written) == sorted(ids)
    images = {r["id"].decode(): r["image"] for s in ("train", "validation") for r in records(directory(data_dir), s)}
    assert images == originals(source)
    assert not (directory(data_dir) / "problems.txt").exists() and not (directory(data_dir) / "skipped.txt").exists()


def test_skipping_after_an_error_equals_skipping_at_once(damaged, tmp_path, small_shards):
    source, _ = damaged
    assert run(source, tmp_path / "twice") == 2
    assert run(source, tmp_path / "twice", "--skip_damaged") == 0
    assert run(source, tmp_path / "once", "--skip_damaged") == 0
    assert raw(directory(tmp_path / "twice")) == raw(directory(tmp_path / "once"))


def test_an_unreadable_file_in_a_folder_is_a_damaged_image(tmp_path, capsys):
    source = miniatures.inat18(tmp_path / "source", extracted=True)
    victim = next((source / "train_val2018").rglob("*.jpg"))
    victim.unlink()
    victim.symlink_to(tmp_path / "nowhere")
    assert run(source, tmp_path / "data") == 2
    assert f"{victim.stem} (cannot be read: No such file or directory)" in error_line(capsys)


def test_a_split_without_intact_images_is_an_error(tmp_path, capsys):
    def spoil(images):
        images.update(dict.fromkeys(list(images)[-3:], b""))

    source = miniatures.inat18(tmp_path / "source", spoil=spoil)
    assert run(source, tmp_path / "data", "--skip_damaged") == 2
    assert "split validation is left" in error_line(capsys)


def test_an_image_that_occurs_twice_is_an_error(tmp_path, capsys):
    def spoil(images):
        name = next(iter(images))
        images[f"copy/{Path(name).name}"] = images[name]

    assert run(miniatures.inat18(tmp_path / "source", spoil=spoil), tmp_path / "data") == 2
    line = error_line(capsys)
    assert "is there twice" in line and "/copy/" in line


def test_an_archive_without_listed_images_is_an_error(tmp_path, capsys):
    def spoil(images):
        content = next(iter(images.values()))
        images.clear()
        images["readme/x.jpg"] = content

    assert run(miniatures.inat18(tmp_path / "source", spoil=spoil), tmp_path / "data") == 2
    assert "expected paths like train_val2018/Aves/2820/HASH.jpg" in error_line(capsys)


# Memory.


def spec_of(names):
    return one_pass.DatasetSpec(
        name="many",
        description="",
        homepage="",
        key_feature="file_name",
        class_names={"label": ["a"]},
        official={"train": len(names)},
        images=dict.fromkeys(names, one_pass.Image("train", 0)),
        key=lambda name: name,
        sources=[Path("unused")],
        expected="",
    )


def test_few_images_are_in_memory_at_a_time(tmp_path, monkeypatch):
    names = [f"{i:04d}.jpg" for i in range(500)]
    read, written, ahead, lock = [], [], [], threading.Lock()

    def walk(source):
        for name in names:

            def content(name=name):
                with lock:
                    read.append(name)
                    ahead.append(len(read) - len(written))
                return WHOLE

            yield sources.Member(name, name, content)

    serialise = one_pass._record
    monkeypatch.setattr(one_pass, "walk", walk)
    monkeypatch.setattr(one_pass, "_record", lambda *args: written.append(args[1]) or serialise(*args))
    one_pass.prepare("many", tmp_path, tmp_path, lambda source: spec_of(names), ())
    assert read == written == names  # each once, in the order of the source
    assert max(ahead) <= one_pass.IN_FLIGHT


def test_a_huge_image_is_not_read_completely(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_IMAGE_BYTES", 1000)
    monkeypatch.setattr(decode, "MAX_IMAGE_BYTES", 1000)
    path = miniatures.write_tar(tmp_path / "x.tar", {"1.jpg": bytes(5000)})
    (member,) = [(len(m.read()), decode.problem(m.read())) for m in sources.walk(path)]
    assert member == (1001, "more than 1000 bytes")


# Progress.


def test_the_bar_counts_images_and_shows_rate_and_time_left(source, tmp_path, monkeypatch, capsys):
    from rich.console import Console

    from ltjax.data import progress

    out = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **given: Console(file=out, force_terminal=True, width=100, **given))
    assert run(source, tmp_path) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "preparing i_naturalist2018" in text and "14/14" in text and "images/s" in text and "0:00:00" in text
