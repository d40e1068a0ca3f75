"""Walking archives and folders, finding files by name, reading lists."""

import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from ltjax.data.prepare import sources
from ltjax.types import UserError
from tests.data import miniatures
from tests.data.prepare.preparing import error_line, run

# Archives.


@pytest.mark.parametrize("name", ["../x.jpg", "/x.jpg", "a/../../x.jpg", "..\\x.jpg", "\\x.jpg", "C:\\x.jpg"])
def test_a_name_that_leads_out_of_the_archive_is_refused(name, tmp_path, capsys):
    def spoil(images):
        images[name] = b"x"

    source = miniatures.inat18(tmp_path / "source", spoil=spoil)
    before = sorted(tmp_path.rglob("*"))
    assert run(source, tmp_path / "data") == 2
    assert f"the name {name!r} leads out of the archive" in error_line(capsys)
    inside = [path for path in tmp_path.rglob("*") if tmp_path / "data" not in [path, *path.parents]]
    assert sorted(inside) == before and not Path("/x.jpg").exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE], ids=["sym", "hard", "char", "fifo"]
)
def test_links_and_devices_are_refused(kind, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        link = tarfile.TarInfo("a/link.jpg")
        link.type, link.linkname = kind, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(UserError, match=r"'a/link\.jpg' is a link or a device"):
        list(sources.walk(tmp_path / "x.tar"))


def test_a_name_that_leads_out_of_a_nested_archive_is_refused(tmp_path):
    inner = miniatures.write_tar(tmp_path / "inner.tar", {"../x.JPEG": b"x"}).read_bytes()
    outer = miniatures.write_tar(tmp_path / "outer.tar", {"n01440764.tar": inner})
    with pytest.raises(UserError, match=r"outer\.tar/n01440764\.tar: the name '\.\./x\.JPEG' leads out"):
        list(sources.walk(outer))


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_nested_archives_are_walked_in_order(mode, tmp_path):
    inner = {f"n{i}.tar": {f"n{i}_{j}.JPEG": f"{i}{j}".encode() * 3000 for j in range(3)} for i in range(3)}
    packed = {
        name: miniatures.write_tar(tmp_path / name, members).read_bytes() for name, members in reversed(inner.items())
    }
    outer = miniatures.write_tar(tmp_path / "outer", {"./first.jpg": b"1"} | packed | {"last.jpg": b"2"}, mode)
    members = {member.name: member.read() for member in sources.walk(outer)}
    expected = {"first.jpg": b"1"}
    for name in reversed(inner):
        expected |= {f"{name}/{file}": content for file, content in inner[name].items()}
    assert list(members.items()) == [*expected.items(), ("last.jpg", b"2")]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.8])
def test_a_truncated_archive_is_named(mode, part, tmp_path):
    members = {f"{i}.jpg": os.urandom(3000) for i in range(20)}
    path = miniatures.write_tar(tmp_path / "x.tar", members, mode)
    os.truncate(path, int(path.stat().st_size * part))
    with pytest.raises(UserError, match=r"cannot read .*x\.tar.* damaged(,| or) cut short"):
        for member in sources.walk(path):
            member.read()


def test_a_damaged_header_is_an_error(tmp_path):
    path = miniatures.write_tar(tmp_path / "x.tar", {f"{i}.jpg": b"x" * 100 for i in range(5)})
    content = bytearray(path.read_bytes())
    content[2 * 1024 + 10] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*x\.tar as a tar archive \(bad checksum at byte 2048\)"):
        list(sources.walk(path))


def test_a_wrong_byte_in_a_compressed_archive_is_found(tmp_path):
    path = miniatures.write_tar(tmp_path / "x.tar.gz", {"1.jpg": os.urandom(100000)}, "w:gz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.tar\.gz"):
        list(sources.walk(path))


def test_a_file_that_is_no_archive_is_named(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"PK\x03\x04" * 1000)
    with pytest.raises(UserError, match=r"cannot read .*x\.tar as a tar archive"):
        list(sources.walk(tmp_path / "x.tar"))


def test_a_folder_is_walked_by_name(tmp_path):
    miniatures.write_folder(tmp_path, {"b/2": b"", "b/1": b"", "a": b"", "c/d/3": b""})
    miniatures.write_tar(tmp_path / "c" / "x.tar", {"4": b""})
    assert [member.name for member in sources.walk(tmp_path)] == ["a", "b/1", "b/2", "c/x.tar/4", "c/d/3"]


def test_links_to_folders_are_followed_once(tmp_path):
    miniatures.write_folder(tmp_path, {"elsewhere/1.jpg": b"", "root/2.jpg": b""})
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "root")
    assert [member.name for member in sources.walk(tmp_path / "root")] == ["2.jpg", "linked/1.jpg"]


def test_walking_does_not_keep_headers_in_memory(tmp_path):
    path = miniatures.write_tar(tmp_path / "x.tar", {f"{i:06d}.jpg": b"" for i in range(4000)})
    tracemalloc.start()
    assert sum(1 for _ in sources.walk(path)) == 4000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6  # bytes; the headers would be four times that


# Finding files.


def test_files_are_found_in_subfolders_but_not_among_images(tmp_path):
    names = ["ILSVRC/Data/CLS-LOC/train/list.txt", "ILSVRC/Annotations/CLS-LOC/train/x", "ILSVRC/lists/list.txt"]
    miniatures.write_folder(tmp_path, dict.fromkeys(names, b""))
    paths = sources.find(tmp_path, ["train", "list.txt", "val"])
    assert paths == {"train": tmp_path / "ILSVRC/Data/CLS-LOC/train", "list.txt": tmp_path / "ILSVRC/lists/list.txt"}


def test_the_file_nearest_to_the_source_is_taken(tmp_path):
    miniatures.write_folder(tmp_path, {"a/list.txt": b"", "list.txt": b""})
    assert sources.find(tmp_path, ["list.txt"]) == {"list.txt": tmp_path / "list.txt"}


def test_two_files_of_one_name_are_an_error(tmp_path):
    miniatures.write_folder(tmp_path, {"a/list.txt": b"", "b/list.txt": b""})
    with pytest.raises(UserError, match=r"a/list\.txt and .*b/list\.txt: which one is meant"):
        sources.find(tmp_path, ["list.txt"])


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(UserError, match="no folder at"):
        sources.find(tmp_path / "nothing", ["x"])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a.jpg 0\n\nb.jpg\n", r"list\.txt, line 3: expected the path .* found 'b\.jpg'"),
        ("a.jpg 0\nb.jpg one\n", r"list\.txt, line 2: expected the path"),
        ("a.jpg -1\n", r"line 1: expected the path"),
        ("a.jpg 10\n", r"line 1: the label 10 is out of range: there are 10 classes"),
        ("\n", "lists no image"),
        (b"\xff\xfe\x00", "cannot read the list"),
    ],
)
def test_a_wrong_line_is_named(text, expected, tmp_path):
    (tmp_path / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=expected):
        sources.read_list(tmp_path / "list.txt", 10)
