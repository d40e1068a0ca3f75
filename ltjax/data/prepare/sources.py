"""Read official files: archives and unpacked folders, lists of images, JSON."""

import collections
import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from ltjax.data import folders
from ltjax.data.decode import MAX_IMAGE_BYTES
from ltjax.system.wording import one_line
from ltjax.types import UserError

READ_ERRORS = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)
SEARCH_DEPTH = 4  # levels of folders below --source, enough for ILSVRC/Data/CLS-LOC/train
IMAGE_FOLDERS = re.compile(
    r"(train|val|test)(_256|_large|_val2018|2018)?|data_(256|large)|places365_standard|n\d{8}|Annotations"
)


class Member(NamedTuple):
    """A file in an archive or folder. Call `read` before asking for the next member."""

    where: str  # full path, for messages
    name: str  # path relative to the archive or folder, with slashes
    read: Callable[[], bytes]  # at most MAX_IMAGE_BYTES + 1 bytes; OSError if a file in a folder cannot be read


def archives(stem: str) -> tuple[str, ...]:
    """Return the usual file names of an archive."""
    return (f"{stem}.tar", f"{stem}.tar.gz", f"{stem}.tgz")


def find(source: Path, names: Iterable[str]) -> dict[str, Path]:
    """Find files and folders by name in `source` and a few levels below, but not inside folders of images.

    Return {name: the path nearest to `source`}, without the names that are not found. UserError if `source` is not a
    readable folder, or holds a name twice at one depth.
    """
    if not source.is_dir():
        raise UserError(f"no folder at {source}: --source is the folder that holds the official archives and lists")
    wanted, nearest, level = set(names), {}, [source]
    for _ in range(SEARCH_DEPTH):
        matches, next_level = _search_level(level, wanted)
        for name, paths in matches.items():
            if name not in nearest and len(paths) > 1:
                raise UserError(f"{paths[0]} and {paths[1]}: which one is meant? Move one of them out of {source}")
            nearest.setdefault(name, paths[0])
        level = next_level
    return nearest


def _search_level(folders: list[Path], wanted: set[str]) -> tuple[dict[str, list[Path]], list[Path]]:
    """Return the wanted paths in these folders by name, and the subfolders to search next."""
    matches: dict[str, list[Path]] = collections.defaultdict(list)
    subfolders = []
    for folder in folders:
        try:
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if entry.name in wanted:
                        matches[entry.name].append(folder / entry.name)
                    elif not entry.name.startswith(".") and not IMAGE_FOLDERS.fullmatch(entry.name):
                        subfolders += [folder / entry.name] if entry.is_dir() else []
        except OSError as error:
            raise UserError(f"cannot list {folder}: {error.strerror}") from error
    return matches, subfolders


def pick(source: Path, found: dict[str, Path], what: str, names: Sequence[str]) -> Path:
    """Return the first of `names` that `find` has found; UserError that `what` is missing if there is none."""
    for name in names:
        if name in found:
            return found[name]
    raise UserError(f"{source} lacks {what}: expected {', '.join(names[:-1])}{' or ' if names[1:] else ''}{names[-1]}")


def walk(source: Path) -> Iterator[Member]:
    """Iterate over the files of a tar archive, in its order, or of a folder, sorted by name. Nothing is unpacked.

    Tar archives inside are walked as well. An archive needs memory for one header, a folder for one folder's names.
    UserError if an archive is damaged or truncated, if a member is a link or a device or its name leads out of the
    archive, or if a folder cannot be listed.
    """
    if source.is_dir():
        yield from _walk_folder(source)
    else:
        yield from _walk_file(source, "")


def _walk_folder(root: Path) -> Iterator[Member]:
    for folder, _, files in folders.walk(root):
        below = Path(folder).relative_to(root).as_posix()
        prefix = "" if below == "." else below + "/"
        for file in files:
            path = f"{folder}/{file}"
            if file.endswith(".tar"):
                yield from _walk_file(Path(path), prefix + file + "/")
            else:
                yield Member(path, prefix + file, lambda path=path: _read_file(path))


def _read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(MAX_IMAGE_BYTES + 1)


class _Header(tarfile.TarInfo):
    """Raise ReadError for a damaged header, where tarfile would silently end the archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: Any):  # pyrefly: ignore[bad-override-param-name]
        try:
            return super().fromtarfile(tarfile_)
        except (tarfile.EOFHeaderError, tarfile.EmptyHeaderError):  # pyrefly: ignore[missing-attribute]
            raise  # the regular end of the archive
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{one_line(error)} at byte {tarfile_.offset}") from error


def _walk_file(path: Path, prefix: str) -> Iterator[Member]:
    try:
        with tarfile.open(path, tarinfo=_Header) as tar:
            yield from _walk_tar(tar, str(path), prefix)
            stream: Any = tar.fileobj
            stream.seek(0, os.SEEK_END)  # the checksum of a compressed file is at its end
    except READ_ERRORS as error:
        raise UserError(
            f"cannot read {path} as a tar archive ({one_line(error)}): it is damaged, cut short or something else; "
            "replace it and run the same command again (what is finished is kept)"
        ) from error


def _walk_tar(tar: Any, where: str, prefix: str) -> Iterator[Member]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # tarfile would keep all headers in memory
        if leads_outside(member.name):
            raise UserError(
                f"{where}: the name {member.name!r} leads out of the archive; replace it by the official one"
            )
        if not (member.isfile() or member.isdir()):
            raise UserError(f"{where}: {member.name!r} is a link or a device; replace the archive by the official one")
        name = member.name.removeprefix("./")
        if member.isfile() and name.endswith(".tar"):
            with tarfile.open(fileobj=tar.extractfile(member), mode="r:", tarinfo=_Header) as inner:
                yield from _walk_tar(inner, f"{where}/{name}", f"{prefix}{name}/")
        elif member.isfile():
            yield Member(f"{where}/{name}", prefix + name, lambda member=member: _read_member(tar, where, member))


def leads_outside(name: str) -> bool:
    """Return whether the name of an archive's member is an absolute path or contains "..", on any system."""
    return bool(re.match(r"[/\\]|[A-Za-z]:", name)) or ".." in re.split(r"[/\\]", name)


def _read_member(tar: Any, where: str, member: tarfile.TarInfo) -> bytes:
    try:
        return tar.extractfile(member).read(MAX_IMAGE_BYTES + 1)
    except READ_ERRORS as error:
        raise UserError(
            f"cannot read {member.name} in {where} ({one_line(error)}): the archive is damaged or cut short; replace "
            "it and run the same command again (what is finished is kept)"
        ) from error


class Line(NamedTuple):
    """A line of a list: an image's path and label."""

    where: str  # list and line number, for messages
    path: str
    label: int


def read_list(path: Path, num_classes: int) -> list[Line]:
    """Read a list of images with lines `<path> <label>`; UserError if it is unreadable or empty, or a line is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list {path}: {one_line(error)}") from error
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        name, _, label = line.strip().rpartition(" ")
        if not name or not re.fullmatch(r"\d+", label, re.ASCII):
            raise UserError(f"{where}: expected the path of an image, a space and its label, found {line[:200]!r}")
        if int(label) >= num_classes:
            raise UserError(f"{where}: the label {label} is out of range: there are {num_classes} classes, from 0")
        lines.append(Line(where, name.strip(), int(label)))
    if not lines:
        raise UserError(f"{path} lists no image: expected a line `<path> <label>` for each")
    return lines


def read_json(path: Path, keep: Set[str]) -> Any:
    """Read a JSON file, or the JSON file in a tar archive; UserError if that fails.

    Only the keys in `keep` are kept of each object, to save memory.
    """
    if path.name.endswith(".json"):
        members = iter([Member(str(path), path.name, path.read_bytes)])
    else:
        members = (member for member in walk(path) if member.name.endswith(".json") and "/._" not in f"/{member.name}")
    if (member := next(members, None)) is None:
        raise UserError(f"{path} holds no JSON file: expected the official one")
    try:
        return json.loads(member.read(), object_hook=lambda item: {key: item[key] for key in item.keys() & keep})
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise UserError(
            f"cannot read {member.where} as JSON ({one_line(error)}): replace it by the official one"
        ) from error
