"""Images are found in folders and below, through links, each folder once."""

import os

from ltjax.data import folders

JPEG = b"\xff\xd8\xff\xe0"


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(JPEG)


def images_below(root, **settings):
    left_out = folders.LeftOut()
    paths = folders.images_below(str(root), left_out, **settings)
    return [os.path.relpath(path, root) for path in paths], left_out


def test_each_folder_counts_once_through_any_link(tmp_path):
    write(tmp_path, "a/1.jpg", "a/b/2.jpg")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "c").symlink_to(tmp_path / "a" / "b")
    assert images_below(tmp_path)[0] == ["a/1.jpg", "a/b/2.jpg"]


def test_images_without_an_ending_are_found_by_their_first_bytes(tmp_path):
    write(tmp_path, "photo")
    (tmp_path / "notes.txt").write_text("no image")
    paths, left_out = images_below(tmp_path)
    assert paths == ["photo"]
    assert left_out.notes() == ["1 file(s) are no images that can be decoded and are left out: .txt (1)"]


def test_hidden_files_and_folders_are_left_out_and_named(tmp_path):
    write(tmp_path, "1.jpg", ".2.jpg", "__MACOSX/3.jpg")
    paths, left_out = images_below(tmp_path)
    assert paths == ["1.jpg"]
    assert left_out.notes() == ["2 hidden file(s) or folder(s) are left out: .2.jpg, __MACOSX"]


def test_excluded_folders_are_not_entered_except_the_root(tmp_path):
    write(tmp_path, "a/1.jpg", "b/2.jpg")
    excluded = {folders.inode(tmp_path), folders.inode(tmp_path / "a")}
    assert images_below(tmp_path, excluded=excluded)[0] == ["b/2.jpg"]


def test_a_walk_has_hidden_files_too(tmp_path):
    write(tmp_path, "b/2.jpg", "a/.1.jpg")
    assert [files for _, _, files in folders.walk(tmp_path)] == [[], [".1.jpg"], ["2.jpg"]]
