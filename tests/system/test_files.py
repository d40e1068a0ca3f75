"""Files are replaced as a whole or not at all, and files that others changed are refused by name."""

import os

import pytest

from ltjax.system import files
from ltjax.types import UserError


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), files.replacing(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert files.read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_link_keeps_naming_the_file_that_is_replaced(tmp_path):
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    files.write_json(tmp_path / "link.json", {"a": 1})
    assert (tmp_path / "link.json").is_symlink()
    assert files.read_json(tmp_path / "real.json") == {"a": 1}


@pytest.mark.parametrize("age, stays", [(files.DAY / 2, True), (files.DAY * 2, False)])
def test_what_a_kill_left_is_deleted_a_day_later(tmp_path, monkeypatch, age, stays):
    path = tmp_path / "a.txt"
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "getpid", lambda: -1)  # another process
        with files.replacing(path) as part:
            part.write_text("half")
            left = part.with_name(part.name)
            left.write_text("half")
            os.link(left, tmp_path / "kept")
    os.rename(tmp_path / "kept", left)
    old = os.stat(left).st_mtime - age
    os.utime(left, (old, old))
    files.write_atomic(path, "whole")
    assert left.exists() == stays
    assert path.read_text() == "whole"


@pytest.mark.parametrize("content", ["[1]", "{", "[" * 100_000])
def test_a_file_that_holds_no_object_is_named_with_a_remedy(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a\.json.*: restore it"):
        files.read_json(tmp_path / "a.json", "restore it")


def test_a_block_blames_the_file_for_a_key_that_it_lacks(tmp_path):
    with pytest.raises(UserError, match=r"a\.json does not hold what ltjax writes there \(no 'b'\)"):
        with files.holding(tmp_path / "a.json"):
            {}["b"]


@pytest.mark.parametrize("error", [OSError, MemoryError])
def test_a_block_does_not_blame_the_file_for_the_machine(tmp_path, error):
    with pytest.raises(error), files.holding(tmp_path / "a.json"):
        raise error
