"""Prepare a data set of any size in one resumable pass over its official archives or folders.

Each data set describes itself with a `DatasetSpec`, read from its lists by `read_spec` in its own module.
"""

import collections
import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from rich.progress import MofNCompleteColumn, ProgressColumn, TimeRemainingColumn
from rich.text import Text

from ltjax.data import index, prepared, progress
from ltjax.data.decode import DeepImages, inspect
from ltjax.data.prepare.in_memory import require_writable
from ltjax.data.prepare.shards import JOURNAL, SHARD_BYTES, Shards
from ltjax.data.prepare.sources import Member, walk
from ltjax.data.source import newest_version
from ltjax.system.locks import locked
from ltjax.system.wording import some
from ltjax.types import UserError

VERSION = "1.0.0"  # of all data sets; TFDS has the same for those that it knows
IN_FLIGHT = 64  # images in memory while threads check them


class Image(NamedTuple):
    """An image in the lists."""

    split: str
    label: int


class DatasetSpec(NamedTuple):
    """The images of a data set and their labels.

    A key names an image, the same in every layout of the archives: its `file_name`, or its `id`.
    """

    name: str
    description: str
    homepage: str
    key_feature: str  # TFDS' name for the key
    class_names: dict[str, list[str]]  # {feature: names}; `label` is one of the features
    official: dict[str, int]  # {split: number of images in the official split}
    images: dict[str, Image]  # {key: image}, N of them
    key: Callable[[str], str]  # path of a file -> key
    sources: list[Path]  # archives and folders, in reading order
    expected: str  # examples of paths in them, for messages
    by_label: Mapping[str, list[int]] = MappingProxyType({})  # {further feature: its value for each label}


class _Rate(ProgressColumn):
    def render(self, task) -> Text:
        return Text(f"{task.speed:.0f} images/s" if task.speed else "")


def prepare(
    name: str,
    data_dir: Path,
    source: Path | None,
    read_spec: Callable[[Path], DatasetSpec],
    pieces: Sequence[str],
    skip_damaged: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write a data set below `data_dir` unless it is there; return a line for the user.

    Image files are kept byte for byte; each is decoded once as a check. Memory holds the lists and a few images. If the
    run stops for any reason, `<name>/<version>.incomplete` keeps the finished shards. The next run continues from there
    and ends with the same records. At the end the folder is renamed to `<version>`. An index of each split lies beside
    the shards (`ltjax.data.index`).

    Args:
      data_dir: the folder of all prepared data sets; made if missing.
      source: the folder with the official files.
      read_spec: reads the lists in `source`.
      pieces: names of official files, for messages.
      skip_damaged: leave out missing and damaged images and list them in `skipped.txt`. If False, list them in
        `problems.txt` and raise UserError.

    Raises:
      UserError: an existing data set is damaged; official files are missing, damaged or different; or `data_dir`
        cannot be written.
      KeyboardInterrupt: with a message that says what is kept.
    """
    if newest_version(data_dir, name) is not None:
        return f"{name} is already prepared: {_counts(name, data_dir)}"
    if source is None:
        raise UserError(
            f"{name} has to be fetched by hand: pass --source=FOLDER, a folder with its official files "
            f"({', '.join(pieces)})"
        )
    spec = read_spec(source)
    _compare_with_official(spec)
    folder = data_dir / name / f"{VERSION}.incomplete"
    require_writable(folder)
    with locked(folder, f"another run is writing {folder}: wait for it, or stop it"):
        shards = Shards(folder, name, _hash(spec), shard_bytes)
        try:
            problems = _write_records(spec, shards)
            left_out = _handle_problems(spec, folder, problems, skip_damaged)
            _finish(spec, shards)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted: {len(shards.keys())} of {len(spec.images)} images are finished and kept in {folder}; "
                "the same command goes on"
            ) from None
        finally:
            shards.abandon()
    return f"prepared {name}: {_counts(name, data_dir)}{left_out}"


def _counts(name: str, data_dir: Path) -> str:
    """Say how many images a prepared data set has, and where it is; UserError if it is damaged."""

    def count(builder: Any, directory: Path, class_names: tuple[str, ...]) -> str:
        splits = builder.info.splits
        missing = [file for info in splits.values() for file in info.filepaths if not Path(file).exists()]
        if missing or not splits:
            raise FileNotFoundError(f"{missing[0] if missing else 'every split'} is missing")
        counts = [f"{info.num_examples} {split}" for split, info in splits.items()]
        return f"{', '.join(counts[:-1])} and {counts[-1]} images in {directory}"

    return prepared.read(name, data_dir, count, flags=" --source=...")


def _compare_with_official(spec: DatasetSpec) -> None:
    """Warn on stderr if the lists do not have the official lengths."""
    counts = collections.Counter(image.split for image in spec.images.values())
    if differences := [
        f"{counts[split]} {split} images, not {n}" for split, n in spec.official.items() if counts[split] != n
    ]:
        print(f"warning: these are not the official lists of {spec.name}: {', '.join(differences)}", file=sys.stderr)


def _hash(spec: DatasetSpec) -> str:
    """Hash the records to write, for any layout of the archives."""
    digest = hashlib.sha256(repr((VERSION, spec.class_names)).encode())
    for key in sorted(spec.images):
        digest.update(f"{key}\t{spec.images[key].split}\t{spec.images[key].label}\n".encode())
    return digest.hexdigest()


def _write_records(spec: DatasetSpec, shards: Shards) -> list[str]:
    """Read the sources once and write the images that no finished shard holds.

    Return the missing and damaged images, "KEY (WHAT)", which `problems.txt` lists as well. UserError if an image is
    in the sources twice, or if they hold no image of the lists.
    """
    finished, seen = shards.keys(), set()
    problems: list[str] = []
    deep = DeepImages()
    if len(finished) == len(spec.images):
        return problems
    columns = (MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with (
        open(shards.folder / "problems.txt", "w", buffering=1) as log,
        progress.bar(*columns) as bar,
        _threads() as threads,
    ):
        task = bar.add_task(f"preparing {spec.name}", total=len(spec.images), completed=len(finished))

        def report(key: str, what: str, where: str) -> None:
            problems.append(f"{key} ({what})")
            log.write(f"{key}\t{what}\t{where}\n")

        for key, where, content, what in _checked(_listed_images(spec, seen), finished, threads, deep):
            if what:
                report(key, what, where)
            else:
                shards.add(spec.images[key].split, key, _record(spec, key, content))
            bar.advance(task)
        if not seen:
            raise UserError(
                f"no image of the lists is in {', '.join(map(str, spec.sources))}: expected paths like {spec.expected}"
            )
        for key in sorted(spec.images.keys() - seen - finished):
            report(key, "missing", " or ".join(source.name for source in spec.sources))
    shards.close()
    if note := deep.note():
        print(f"note: {spec.name}: {note}", file=sys.stderr)
    return problems


@contextlib.contextmanager
def _threads() -> Generator[ThreadPoolExecutor]:
    """Yield a thread pool that cancels pending work on exit."""
    threads = ThreadPoolExecutor()
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)


def _listed_images(spec: DatasetSpec, seen: set[str]) -> Iterator[tuple[str, Member]]:
    """Iterate over the keys and files of listed images, in the order of the sources; add each key to `seen`."""
    for source in spec.sources:
        for member in walk(source):
            key = spec.key(member.name)
            if key not in spec.images:
                continue
            if key in seen:
                raise UserError(
                    f"{key} is there twice, for the second time as {member.where}: leave one of them in --source"
                )
            seen.add(key)
            yield key, member


def _checked(
    images: Iterator[tuple[str, Member]], finished: Set[str], threads: ThreadPoolExecutor, deep: DeepImages
) -> Iterator[tuple[str, str, bytes, str]]:
    """Read and check images, all but the finished ones: yield key, path, content, and what is wrong ("": nothing).

    Threads decode images in the order of the sources, at most `IN_FLIGHT` at a time. `deep` collects those of 16 bits a
    channel.
    """
    pending: collections.deque[tuple[str, str, bytes, Future[tuple[str, int | None]]]] = collections.deque()

    def first() -> tuple[str, str, bytes, str]:
        key, where, content, check = pending.popleft()
        what, brightest = check.result()
        deep.add(brightest)
        return key, where, content, what

    for key, member in images:
        if key in finished:
            continue
        try:
            content = member.read()
        except OSError as error:
            yield key, member.where, b"", f"cannot be read: {error.strerror}"
            continue
        pending.append((key, member.where, content, threads.submit(inspect, content)))
        if len(pending) >= IN_FLIGHT:
            yield first()
    while pending:
        yield first()


def _record(spec: DatasetSpec, key: str, content: bytes) -> bytes:
    """Serialise a `tf.train.Example`, deterministically."""
    from tensorflow_datasets.proto import tf_example_pb2

    label = spec.images[key].label
    example: Any = tf_example_pb2.Example()  # pyrefly: ignore
    feature = example.features.feature
    feature["image"].bytes_list.value.append(content)
    feature[spec.key_feature].bytes_list.value.append(key.encode())
    feature["label"].int64_list.value.append(label)
    for name, values in spec.by_label.items():
        feature[name].int64_list.value.append(values[label])
    return example.SerializeToString(deterministic=True)


def _handle_problems(spec: DatasetSpec, folder: Path, problems: list[str], skip_damaged: bool) -> str:
    """With `skip_damaged`, keep the list of left-out images and return a clause about them; else UserError."""
    log = folder / "problems.txt"
    (folder / "skipped.txt").unlink(missing_ok=True)
    if not problems:
        log.unlink(missing_ok=True)
        return ""
    if skip_damaged:
        log.replace(folder / "skipped.txt")
        return f", without {len(problems)} that are missing or damaged (skipped.txt)"
    raise UserError(
        f"{len(problems)} of {len(spec.images)} images of {spec.name} are missing or damaged: {some(problems)}; {log} "
        "names them all: replace them and run the same command again (what is finished is kept), or leave them out "
        "with --skip_damaged"
    )


def _finish(spec: DatasetSpec, shards: Shards) -> None:
    """Add metadata and indices, and give the folder its final name."""
    folder = shards.folder
    if empty := [split for split in spec.official if not shards.finished.get(split)]:
        raise UserError(f"no image of {spec.name}'s split {empty[0]} is left: prepare it from other files")
    paths = shards.finish()
    _write_metadata(spec, shards)
    for split in spec.official:
        keys = [key for shard in shards.finished[split] for key in shard.keys]
        labels = [spec.images[key].label for key in keys]
        index.write_index(folder / f"{split}.index.npz", index.make_index(labels, keys, split), paths[split])
    directory = folder.with_name(VERSION)
    os.rename(folder, directory)
    (directory / JOURNAL).unlink()


def _write_metadata(spec: DatasetSpec, shards: Shards) -> None:
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(
        data_dir=shards.folder,
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        dataset_name=spec.name,
        filetype_suffix="array_record",
    )
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[len(shard.keys) for shard in shards.finished[split]],
            num_bytes=sum(shard.num_bytes for shard in shards.finished[split]),
            filename_template=template,
        )
        for split in spec.official
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=shards.folder,
        features=features(spec.key_feature, spec.class_names),
        split_infos=infos,
        version=VERSION,
        check_data=False,
        description=spec.description,
        homepage=spec.homepage,
        supervised_keys=("image", "label"),
    )


def features(key_feature: str, class_names: Mapping[str, list[str]]) -> Any:
    """Return the TFDS features of a data set."""
    import tensorflow_datasets as tfds

    labels = {name: tfds.features.ClassLabel(names=names) for name, names in class_names.items()}
    return tfds.features.FeaturesDict({key_feature: tfds.features.Text(), "image": tfds.features.Image(), **labels})
