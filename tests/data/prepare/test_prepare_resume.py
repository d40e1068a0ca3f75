"""Resuming a preparation after it was stopped or killed, with miniatures of iNaturalist 2018."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ltjax.data import index
from ltjax.data.prepare import one_pass, shards
from ltjax.system.locks import locked
from tests.data import miniatures
from tests.data.prepare.preparing import (
    directory,
    error_line,
    incomplete,
    originals,
    raw,
    records,
    run,
    run_with_small_shards,
)

ROOT = Path(__file__).parents[3]


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


# Interruptions.


@pytest.fixture
def stopped(source, monkeypatch):
    """`stopped(data_dir, number, error)`: raise an error at record `number`, return the exit code."""

    def stopped(data_dir, number, error, *flags):
        serialise, calls = one_pass._record, []

        def record(*args):
            calls.append(args)
            if len(calls) == number:
                raise error
            return serialise(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(one_pass, "_record", record)
            return run(source, data_dir, *flags)

    return stopped


@pytest.mark.parametrize("number", [1, 4, 7, 10, 14])
def test_resuming_a_stopped_run_gives_the_same_records(number, stopped, source, prepared, small_shards, tmp_path):
    assert stopped(tmp_path, number, KeyboardInterrupt) == 130
    assert not directory(tmp_path).exists()
    assert run(source, tmp_path) == 0
    assert raw(directory(tmp_path)) == raw(prepared)
    assert set(os.listdir(directory(tmp_path))) == set(os.listdir(prepared))


def test_resuming_many_times_gives_the_same_records(stopped, source, prepared, small_shards, tmp_path):
    while (code := stopped(tmp_path, 4, KeyboardInterrupt)) == 130:
        pass
    assert code == 0 and raw(directory(tmp_path)) == raw(prepared)


def test_only_images_of_unfinished_shards_are_read_again(stopped, source, small_shards, tmp_path, monkeypatch):
    stopped(tmp_path, 6, KeyboardInterrupt)
    finished = [json.loads(line)["keys"] for line in journal(tmp_path)[1:]]
    assert finished
    read = []
    walk = one_pass.walk

    def counting(source):
        for member in walk(source):
            yield member._replace(read=lambda member=member: read.append(Path(member.name).stem) or member.read())

    monkeypatch.setattr(one_pass, "walk", counting)
    assert run(source, tmp_path) == 0
    assert sorted(read) == sorted(originals(source).keys() - {key for keys in finished for key in keys})


def journal(data_dir):
    return (incomplete(data_dir) / shards.JOURNAL).read_text().splitlines()


def test_ctrl_c_prints_the_finished_part(stopped, small_shards, tmp_path, capsys):
    assert stopped(tmp_path, 6, KeyboardInterrupt) == 130
    line = error_line(capsys)
    kept = sum(len(json.loads(line)["keys"]) for line in journal(tmp_path)[1:])
    assert 0 < kept < 6
    assert f"interrupted: {kept} of 14 images are finished and kept in {incomplete(tmp_path)}" in line
    assert "the same command goes on" in line


def test_the_same_command_resumes_after_sigkill(source, prepared, small_shards, tmp_path):
    code = f"""
import os, signal
from ltjax.data.prepare import one_pass, shards
from ltjax.system.locks import locked
from ltjax.data.prepare.__main__ import main
shards.SHARD_IMAGES = 2
serialise, calls = one_pass._record, []
def record(*args):
    calls.append(args)
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return serialise(*args)
one_pass._record = record
main(["inat18", "--source={source}", "--data_dir={tmp_path}"])
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True)
    assert ran.returncode == -signal.SIGKILL and not directory(tmp_path).exists()
    assert run(source, tmp_path) == 0
    assert raw(directory(tmp_path)) == raw(prepared)


def kill_at_the_end(source, data_dir, *flags):
    """Kill a run after it has renamed the shards."""

    def killed(*args):
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "write_index", killed)
        with pytest.raises(SystemExit):
            run(source, data_dir, *flags)
    assert list(incomplete(data_dir).glob("*array_record*")) and not directory(data_dir).exists()


def test_a_run_killed_at_the_end_reads_no_image_again(source, prepared, small_shards, tmp_path, monkeypatch):
    kill_at_the_end(source, tmp_path)

    def walk(source):
        raise AssertionError(f"{source} is read again")

    monkeypatch.setattr(one_pass, "walk", walk)
    assert run(source, tmp_path) == 0
    assert raw(directory(tmp_path)) == raw(prepared)


def test_an_image_replaced_after_a_kill_is_not_listed_as_skipped(tmp_path, small_shards):
    def spoil(images):
        images[next(iter(images))] = b""

    source = miniatures.inat18(tmp_path / "source", spoil=spoil)
    kill_at_the_end(source, tmp_path / "data", "--skip_damaged")
    miniatures.inat18(source)  # the official images
    assert run(source, tmp_path / "data") == 0
    assert not (directory(tmp_path / "data") / "skipped.txt").exists()
    assert len(records(directory(tmp_path / "data"), "train")) == 9


def test_a_truncated_journal_is_used_up_to_its_end(stopped, source, prepared, small_shards, tmp_path):
    stopped(tmp_path, 10, KeyboardInterrupt)
    path = incomplete(tmp_path) / shards.JOURNAL
    path.write_text(path.read_text()[:-20])
    assert run(source, tmp_path) == 0
    assert raw(directory(tmp_path)) == raw(prepared)


def test_a_damaged_shard_is_written_again(stopped, source, prepared, small_shards, tmp_path):
    stopped(tmp_path, 10, KeyboardInterrupt)
    os.truncate(incomplete(tmp_path) / "train-00001", 100)
    assert run(source, tmp_path) == 0
    assert raw(directory(tmp_path)) == raw(prepared)


def test_resuming_with_other_lists_is_an_error(stopped, small_shards, tmp_path, capsys):
    stopped(tmp_path / "data", 6, KeyboardInterrupt)
    capsys.readouterr()
    other = miniatures.inat18(tmp_path / "other", counts=(5, 3, 2))
    assert run(other, tmp_path / "data") == 2
    assert "was begun with other lists" in error_line(capsys)


def test_a_full_disk_prints_the_finished_part(stopped, source, prepared, small_shards, tmp_path, capsys):
    class Full:
        def __init__(self, *args): ...
        def write(self, record): ...
        def close(self):
            raise RuntimeError("No space left on device")

    from array_record.python import array_record_module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_record_module, "ArrayRecordWriter", Full)
        assert run(source, tmp_path) == 2
    line = error_line(capsys)
    assert "No space left on device" in line and "what is finished is kept" in line
    assert run(source, tmp_path) == 0
    assert raw(directory(tmp_path)) == raw(prepared)


def test_a_second_run_at_the_same_time_is_an_error(source, tmp_path, capsys):
    incomplete(tmp_path).mkdir(parents=True)
    with locked(incomplete(tmp_path), "busy"):
        assert run(source, tmp_path) == 2
    assert "another run is writing" in error_line(capsys)


def test_an_unwritable_folder_is_named(source, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run(source, tmp_path / "file") == 2
    assert "choose another --data_dir" in error_line(capsys)
