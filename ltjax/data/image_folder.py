"""Load the user's own images: `ROOT/train/<class>/*.jpg` and optionally `ROOT/validation/<class>/*.jpg`.

Also `ROOT/<class>/*.jpg`, or images anywhere, with their classes in a table. Without a folder `validation` (or `val`,
`test`), a class-balanced part of the training images is held out. Notes on stderr say what is left out and what is held
out.
"""

import os
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ltjax.data import decode, folders, inspection, tables
from ltjax.data.folders import LeftOut, images_below, is_image, is_user_data, printable
from ltjax.data.progress import note
from ltjax.data.source import Stored, Subset
from ltjax.data.splits import long_tailed_split
from ltjax.system.paths import local
from ltjax.system.wording import form_only, some
from ltjax.types import UserError

TEST_NAMES = ("validation", "val", "test")
SIMILAR_NAMES = (*TEST_NAMES, "valid", "testing", "dev", "eval")  # other programs' names for validation, in any case
SIMILAR_TO_TRAIN = ("train", "training")
TABLES = (".csv", ".tsv")  # endings of tables of labels, for messages
FEW = 5  # test images of each class, too few for a reliable accuracy


class FilesInFolder:
    """Image files, by their paths relative to a root."""

    def __init__(self, root: Path, paths: list[str], identities: np.ndarray):
        self._root, self._paths, self._identities = root, paths, identities

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> bytes:
        return decode.read_file(self._root / self._paths[index])

    def name(self, index: int) -> str:
        return printable(str(self._root / self._paths[index]))

    def identity(self, index: int) -> bytes:
        return self._identities[index].tobytes()


class _Listed(NamedTuple):
    """The images of a data set, before any is decoded.

    Attributes:
      train: {class: paths of its training images, relative to the root}. Classes without training images are left out.
      test: The same for testing; None if images are to be held out.
      train_title: Where `train` comes from, for messages.
      test_title: Where `test` comes from.
      test_source: Where test images are expected, for messages, such as "folder validation".
    """

    train: dict[str, list[str]]
    test: dict[str, list[str]] | None
    train_title: str
    test_title: str
    test_source: str


def load(name: str = "image_folder", root: str | os.PathLike | None = None, labels: str = "") -> Stored:
    """Find the images below `root`; the classes are the folders of `root/train`, in alphabetical order.

    Without a folder `train`, and without one for validation, the classes are the folders of `root`. With a table of
    `labels`, they are the labels in it, wherever the images lie.

    Images lie in a class's folder or deeper, and may be of any kind that OpenCV decodes, whatever their ending. A note
    counts the files of other kinds. Hidden files, hidden folders and `__MACOSX` are left out, and counted in a note.
    Symbolic links are followed, but each folder counts once. Every image is decoded and hashed once, which is
    remembered until the files change. Without a validation folder, each class gives a fifth of the smallest class, at
    most 20 images; the choice is the same every time.

    Args:
      root: Folder of the images. Default: that of the table.
      labels: Path of a table, see `ltjax.data.tables`; as it is or below `root`. Its files are relative to `root`.
        Its splits are train, and one or more of `TEST_NAMES`, of which the first is read.

    Raises:
      UserError: A folder is missing, a class has no images, validation has other classes than training, or images
        cannot be read; or the table is none, or gives an image two classes or splits.
    """
    if not root and not labels:
        raise UserError(
            "image_folder needs the folder of the images: --config.data.root=DIR, with DIR/train/<class>/*.jpg or "
            "DIR/<class>/*.jpg, or a table of labels: --config.data.labels=FILE"
        )
    table = _table(root, labels) if labels else None
    root = local(root or (table.parent if table else ""))
    if not root.is_dir():
        raise UserError(f"no folder {root}: --config.data.root is the folder of the images")
    try:
        listed = _in_folders(root) if table is None else _in_table(root, table)
        class_names = _class_names(listed)
    except UserError as error:
        beside = () if table else sorted(path.name for path in root.iterdir() if path.suffix.lower() in TABLES)
        if not beside:
            raise
        name = printable(beside[0])
        raise UserError(f"{error}; or, if {name} is a table of labels: --config.data.labels={name}") from error
    titles = tuple(map(printable, class_names))
    train_paths, train_labels = _labelled(listed.train, class_names)
    test_paths, test_labels = _labelled(listed.test or {}, class_names)
    identities = inspection.identities(root, train_paths + test_paths)
    train = FilesInFolder(root, train_paths, identities[: len(train_paths)])
    if listed.test is None:
        kept, test = choose_test_images(str(table or root), train_labels, titles, listed.test_source)
        parts = Subset(train, kept), train_labels[kept], Subset(train, test), train_labels[test]
        return Stored(*parts, titles)
    if lacking := [title for label, title in enumerate(titles) if label not in test_labels]:
        note(f"{listed.test_title} has no images of {some(lacking)}: their accuracy will be unknown")
    test = FilesInFolder(root, test_paths, identities[len(train_paths) :])
    return Stored(train, train_labels, test, test_labels, titles)


def _class_names(listed: _Listed) -> tuple[str, ...]:
    """Return the names of all classes with training images. UserError if they are not those of a data set."""
    class_names = tuple(sorted(name for name, images in listed.train.items() if images))
    if not class_names:
        raise UserError(f"no images in {listed.train_title}: a classifier needs some of each class")
    if unknown := sorted(set(listed.test or {}) - set(listed.train)):
        names = some([printable(name) for name in unknown])
        remark = form_only(unknown, sorted(set(listed.train) - set(listed.test or {})))
        raise UserError(f"{listed.test_title} has classes that {listed.train_title} lacks: {names}{remark}")
    empty = sorted(set(listed.train) - set(class_names))
    if tested := [printable(name) for name in empty if listed.test and listed.test.get(name)]:
        raise UserError(f"{listed.train_title} has no images of {some(tested)}, and {listed.test_title} has: add some")
    if len(class_names) < 2:
        raise UserError(
            f"{listed.train_title} has images of one class, {printable(class_names[0])}: a classifier needs two or "
            "more, each with a folder or label of its own"
        )
    if empty:
        names = some([printable(name) for name in empty])
        note(f"{listed.train_title} has {len(empty)} empty folder(s), which are no classes: {names}")
    if listed.test is not None and not any(listed.test.values()):
        raise UserError(f"no images in {listed.test_title}: add some for each class, or remove it")
    return class_names


def _labelled(images: dict[str, list[str]], class_names: tuple[str, ...]) -> tuple[list[str], np.ndarray]:
    """Return the paths of all images, class by class, and their labels [N]."""
    counts = [len(images.get(name, ())) for name in class_names]
    labels = np.repeat(np.arange(len(class_names), dtype=np.int32), counts)
    return [path for name in class_names for path in images.get(name, ())], labels


def choose_test_images(
    what: str, labels: np.ndarray, titles: tuple[str, ...], test_source: str
) -> tuple[np.ndarray, np.ndarray]:
    """Choose images to test on: a fifth of the smallest class, at most 20, of each class, the same every time.

    Args:
      what: Names the data set in messages.
      labels: [N].
      test_source: Where test images are expected, for messages.

    Returns:
      The indices of training and test images, sorted by class.
    """
    counts = np.bincount(labels, minlength=len(titles))
    smallest = int(counts.min())
    if smallest < 2:
        single = some([titles[c] for c in np.flatnonzero(counts < 2)])
        raise UserError(f"{what}: one image in {single}, so none can be held out: add some, or make a {test_source}")
    each = min(20, max(1, smallest // 5))
    few = "" if each > FEW else ", too few for a reliable accuracy: make one if you have more images"
    note(f"{what} has no {test_source}: {each} image(s) of each class are held out of train to test on{few}")
    split = long_tailed_split(labels, len(titles), imbalance=1, profile="natural", holdout=each)
    return split.train, split.holdout


def _in_folders(root: Path) -> _Listed:
    """Find the images of `root/train` and of validation; or those of `root`, if it has neither."""
    test_folder = next((part for part in TEST_NAMES if (root / part).is_dir()), None)
    part, test_source = "train", f"folder {', '.join(TEST_NAMES)}"
    if not (root / "train").is_dir():
        present = _folders(root)
        expected = f"expected {root}/train/<class>/*.jpg or {root}/<class>/*.jpg, one folder a class"
        if training := [name for name in present if name.lower() in SIMILAR_TO_TRAIN]:
            raise UserError(f"no folder {root / 'train'}: rename {root / training[0]}; {expected}")
        if similar := [name for name in present if name.lower() in SIMILAR_NAMES]:
            raise UserError(f"no folder {root / 'train'} beside {root / similar[0]}: {expected}")
        if not present:
            raise UserError(f"no folder {root / 'train'}: {expected}")
        part, test_source = ".", "folder train beside a folder validation"
    train = _images_of_folders(root, part)
    test = _images_of_folders(root, test_folder) if test_folder else None
    listed = _Listed(train, test, str(root / part), str(root / (test_folder or "")), test_source)
    _note_ignored(root, part, test_folder)
    if len(train) == 1:
        (only,) = train
        below, folder = _folders(root / part / only), printable(str(root / part / only))
        if len(below) > 1 or "train" in below:
            what = "it has a folder train" if "train" in below else f"the {len(below)} folders in it may be the classes"
            raise UserError(
                f"{listed.train_title} has one folder, and a classifier needs two classes or more; {what}: use "
                f"--config.data.root={folder}"
            )
    return listed


def _in_table(root: Path, table: Path) -> _Listed:
    """Find the images that a table of labels names."""
    below = sorted(os.path.relpath(path, root) for path in images_below(str(root), LeftOut()))
    by_name = {unicodedata.normalize("NFC", path): path for path in below} | {path: path for path in below}
    splits: dict[str, dict[str, list[str]]] = {}
    seen: dict[str, tables.Label] = {}
    missing, repeated = [], 0
    for row in tables.labels(table):
        if row.split not in ("", "train", *TEST_NAMES):
            known = ", ".join(("train", *TEST_NAMES))
            raise UserError(f"{table}, line {row.line}: split {printable(row.split)!r}; allowed: {known}")
        path = _path_of_row(root, row.file, by_name)
        if path is None:
            missing.append(row)
            continue
        before = seen.setdefault(path, row)
        if (before.label, before.split) != (row.label, row.split):
            raise UserError(
                f"{table}, lines {before.line} and {row.line}: {printable(row.file)} has two labels or splits; an "
                "image has one class, and is trained on or tested on"
            )
        if before is not row:
            repeated += 1
            continue
        splits.setdefault(row.split or "train", {}).setdefault(row.label, []).append(path)
    if not seen:
        names = ", ".join(printable(row.file) for row in missing[:3])
        there = f"the images there are {some([printable(path) for path in below])}" if below else "there are no images"
        raise UserError(
            f"no row of {table} names an image below {root}: {names}; {there}. Files are relative to "
            "--config.data.root, with their endings"
        )
    if missing:
        lost = sorted({row.label for row in missing}.difference(*splits.values()))
        names = some([printable(row.file) for row in missing])
        remark = f"; no image remains of {some([printable(name) for name in lost])}" if lost else ""
        note(f"{table}: {len(missing)} row(s) name no image below {root} and are left out: {names}{remark}")
    if repeated:
        note(f"{table}: {repeated} row(s) repeat another one")
    if rest := [printable(path) for path in below if path not in seen]:
        note(f"{root}: {len(rest)} image(s) have no row in {table} and are left out: {some(rest)}")
    test_split = next((name for name in TEST_NAMES if name in splits), None)
    for name in sorted(set(splits) - {"train", test_split}):
        count = sum(map(len, splits[name].values()))
        note(f"{table}: the {count} image(s) of split {name} are not read: {test_split} is")
    for images in splits.values():
        for paths in images.values():
            paths.sort()
    test = splits[test_split] if test_split else None
    titles = f"{table}, split train", f"{table}, split {test_split}"
    return _Listed(splits.get("train", {}), test, *titles, f"split {', '.join(TEST_NAMES)}")


def _table(root: str | os.PathLike | None, labels: str) -> Path:
    """Return the path of a table of labels. UserError if it is no file."""
    candidates = [local(labels), *([local(root) / labels] if root else [])]
    if path := next((path for path in candidates if path.is_file()), None):
        return path
    raise UserError(
        f"no file {' or '.join(map(str, dict.fromkeys(candidates)))}: --config.data.labels is a CSV or TSV file with "
        "the columns file and label, and optionally split"
    )


def _path_of_row(root: Path, file: str, by_name: dict[str, str]) -> str | None:
    """Return the path of the image that a table names as `file`; None if there is none."""
    for name in (file, file.replace("\\", "/")):
        path = os.path.relpath(name, root) if os.path.isabs(name) else os.path.normpath(name)
        if known := by_name.get(path) or by_name.get(unicodedata.normalize("NFC", path)):
            return known
    path = os.path.normpath(file)  # hidden, or not below the root
    return path if "\0" not in path and is_image(str(root / path)) and os.path.isfile(root / path) else None


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and is_user_data(path.name))


def _images_of_folders(root: Path, part: str) -> dict[str, list[str]]:
    """Return the sorted paths, relative to `root`, of the images in each folder of a part.

    UserError if a folder has files, and none is an image.
    """
    classes, left_out = _folders(root / part), LeftOut()
    for path in sorted((root / part).iterdir()):
        if path.is_dir() and not is_user_data(path.name):
            left_out.add(path.name)
    # Do not follow links from one class to another or to a parent folder.
    excluded = {folders.inode(folder) for folder in (root, root / part, *(root / part / name for name in classes))}
    images = {}
    for name in classes:
        others = LeftOut()
        paths = images_below(str(root / part / name), others, excluded=excluded)
        images[name] = sorted(os.path.relpath(path, root) for path in paths)
        if others.endings and not images[name]:
            raise UserError(
                f"{root / part}: no images that can be decoded in {printable(name)}, of {others.endings.total()} "
                f"file(s): {others.kinds()}; convert them, or move that folder away"
            )
        left_out.update(others)
    for text in left_out.notes():
        note(f"{root / part}: {text}")
    return images


def _note_ignored(root: Path, train_folder: str, test_folder: str | None) -> None:
    """Note folders that look like validation but are not read, and images outside the classes' folders."""
    parts = [part for part in (train_folder, test_folder) if part]
    reason = f"{test_folder} is" if test_folder else "rename it to validation to use it"
    read = {folders.inode(root / part) for part in parts}
    for path in sorted(root.iterdir()):
        if path.is_dir() and path.name.lower() in SIMILAR_NAMES and folders.inode(path) not in read:
            note(f"{path} is not read: {reason}")
    for part in parts:
        files = [path for path in sorted((root / part).iterdir()) if is_user_data(path.name) and path.is_file()]
        if strays := [printable(path.name) for path in files if is_image(str(path))]:
            note(f"{len(strays)} image(s) in {root / part}, outside the classes' folders, are ignored: {some(strays)}")
