"""One pass over official archives or folders to a TFDS directory, for sets of any number of images, and resumable.

What belongs to one data set is its `Plan`, made from its lists by `prepare_imagenet_lt`, `prepare_places_lt` and
`prepare_inat18`.
"""

import collections
import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import MofNCompleteColumn, ProgressColumn, TimeRemainingColumn
from rich.text import Text

from ltjax.data import index, progress
from ltjax.data.decode import problem
from ltjax.data.prepare_shards import JOURNAL, SHARD_BYTES, Shards, locked
from ltjax.data.prepare_sources import walk
from ltjax.data.source import newest_version
from ltjax.types import UserError, one_line

IN_FLIGHT = 64  # images in memory, being checked


class Image(NamedTuple):
    """What the lists say of an image."""

    split: str
    label: int


class Plan(NamedTuple):
    """What a data set of N images consists of.

    An image is known by a key, the same in every layout of the archives: its `file_name`, or its `id`.
    """

    name: str
    version: str
    description: str
    homepage: str
    key_feature: str  # what TFDS calls the key
    class_names: dict[str, list[str]]  # by feature; `label` is one
    by_label: dict[str, list[int]]  # the other features: their value for each label
    official: dict[str, int]  # how many images the official splits have
    images: dict[str, Image]  # N, by key
    key: Callable[[str], str]  # of a file of that path
    sources: list[Path]  # archives and folders, in the order in which they are read
    expected: str  # what paths in them look like, for messages


class Problem(NamedTuple):
    """An image that cannot be had."""

    key: str
    what: str
    where: str


class _Rate(ProgressColumn):
    def render(self, task) -> Text:
        return Text(f"{task.speed:.0f} images/s" if task.speed else "")


def prepare(
    name: str,
    data_dir: Path,
    make_plan: Callable[[], Plan],
    skip_damaged: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Writes a data set below `data_dir` unless it is there; returns a sentence that says which.

    The files of the images are kept byte for byte, each decoded once to see that it can be. Memory holds the lists and
    a few images. Whatever stops the run, the shards that are whole are kept in `<name>/<version>.incomplete`, and the
    next run goes on from there to the same records; at the end that folder is renamed to `<version>`. Beside the
    shards lies an index of each split (`ltjax.data.index`).

    Args:
      name: of the data set.
      data_dir: the folder of all prepared data sets; made if missing.
      make_plan: reads the lists.
      skip_damaged: leaves out images that are missing or damaged, and lists them in `skipped.txt`; otherwise they
        are collected in `problems.txt`, and nothing is prepared.
      shard_bytes: the size of a shard.

    Raises:
      UserError: what is there already is damaged, the official files are missing, damaged or others, images are
        missing or damaged, or `data_dir` cannot be written.
      KeyboardInterrupt: with a message that says what is kept.
    """
    directory = newest_version(data_dir, name)
    if directory is not None:
        return f"{name} is already prepared: {_counts(directory)} in {directory}"
    plan = make_plan()
    _compare_with_official(plan)
    folder = data_dir / name / f"{plan.version}.incomplete"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another --data_dir") from error
    with locked(folder):
        shards = Shards(folder, name, _hash(plan), shard_bytes)
        try:
            problems = _pass(plan, shards)
            left_out = _settle(plan, folder, problems, skip_damaged)
            directory = _finish(plan, shards)
        except KeyboardInterrupt:
            kept = len(shards.keys())
            raise KeyboardInterrupt(
                f"interrupted: {kept} of {len(plan.images)} images are finished and kept in {folder}; the same command "
                "goes on"
            ) from None
        finally:
            shards.abandon()
    return f"prepared {name}: {_counts(directory)} in {directory}{left_out}"


def prepare_from(
    name: str,
    data_dir: Path,
    source: Path | None,
    plan: Callable[[Path], Plan],
    pieces: Sequence[str],
    skip_damaged: bool,
) -> str:
    """`prepare` with the plan of what lies in the folder `source`, where some of `pieces` are expected."""

    def make_plan() -> Plan:
        if source is None:
            raise UserError(
                f"{name} has to be fetched by hand: pass --source=FOLDER, a folder with its official files "
                f"({', '.join(pieces)})"
            )
        return plan(source)

    return prepare(name, data_dir, make_plan, skip_damaged)


def _counts(directory: Path) -> str:
    """In words how many images a prepared data set has. Raises: UserError where it cannot be read."""
    import tensorflow_datasets as tfds

    try:
        builder: Any = tfds.builder_from_directory(directory)
        splits = {split: info.num_examples for split, info in builder.info.splits.items()}
        missing = [file for info in builder.info.splits.values() for file in info.filepaths if not Path(file).exists()]
        if missing or not splits:
            raise FileNotFoundError(f"{missing[0] if missing else 'every split'} is missing")
    except Exception as error:  # TFDS and protobuf each raise their own kinds on a damaged folder
        raise UserError(
            f"{directory} is damaged or incomplete ({one_line(error)}): delete that folder, then prepare it again"
        ) from error
    counts = [f"{count} {split}" for split, count in splits.items()]
    return f"{', '.join(counts[:-1])} and {counts[-1]} images"


def _compare_with_official(plan: Plan) -> None:
    """Remarks on stderr where the lists are not the official ones, by their lengths."""
    counts = collections.Counter(image.split for image in plan.images.values())
    if other := [
        f"{counts[split]} {split} images, not {n}" for split, n in plan.official.items() if counts[split] != n
    ]:
        print(f"warning: these are not the official lists of {plan.name}: {', '.join(other)}", file=sys.stderr)


def _hash(plan: Plan) -> str:
    """Of what is to be written, whatever the archives look like."""
    digest = hashlib.sha256(repr((plan.version, plan.class_names)).encode())
    for key in sorted(plan.images):
        digest.update(f"{key}\t{plan.images[key].split}\t{plan.images[key].label}\n".encode())
    return digest.hexdigest()


def _pass(plan: Plan, shards: Shards) -> list[Problem]:
    """Reads the sources once and writes what no finished shard holds; returns the images that cannot be had.

    Raises: UserError for an image that is there twice, sources without any image of the lists, and what `walk` raises.
    """
    finished, seen = shards.keys(), set()
    problems: list[Problem] = []
    if len(finished) == len(plan.images):
        return problems
    pending: collections.deque[tuple[str, str, bytes, Future]] = collections.deque()
    columns = (MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with (
        open(shards.folder / "problems.txt", "w", buffering=1) as notes,
        progress.bar(*columns) as bar,
        _threads() as threads,
    ):
        task = bar.add_task(f"preparing {plan.name}", total=len(plan.images), completed=len(finished))

        def note(key: str, what: str, where: str) -> None:
            problems.append(Problem(key, what, where))
            notes.write(f"{key}\t{what}\t{where}\n")

        def write_first() -> None:
            key, where, content, checked = pending.popleft()
            if what := checked.result():
                note(key, what, where)
            else:
                shards.add(plan.images[key].split, key, _record(plan, key, content))
            bar.advance(task)

        for where, key, read in _wanted(plan, seen):
            if key in finished:
                continue
            try:
                content = read()
            except OSError as error:
                note(key, f"cannot be read: {error.strerror}", where)
                bar.advance(task)
                continue
            pending.append((key, where, content, threads.submit(problem, content)))
            if len(pending) >= IN_FLIGHT:
                write_first()
        while pending:
            write_first()
        if not seen:
            raise UserError(
                f"no image of the lists is in {', '.join(map(str, plan.sources))}: expected paths like {plan.expected}"
            )
        for key in sorted(plan.images.keys() - seen - finished):
            note(key, "missing", " or ".join(source.name for source in plan.sources))
    shards.close()
    return problems


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """A pool that an exception does not keep waiting for work that nobody will ask for."""
    threads = ThreadPoolExecutor()
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)


def _wanted(plan: Plan, seen: set[str]) -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    """Where each image of the lists is, its key, and how to read it, in the order of the sources; adds it to `seen`."""
    for source in plan.sources:
        for member in walk(source):
            key = plan.key(member.name)
            if key not in plan.images:
                continue
            if key in seen:
                raise UserError(
                    f"{key} is there twice, for the second time as {member.where}: leave one of them in --source"
                )
            seen.add(key)
            yield member.where, key, member.read


def _record(plan: Plan, key: str, content: bytes) -> bytes:
    """A serialised `tf.train.Example`, the same bytes each time."""
    from tensorflow_datasets.proto import tf_example_pb2

    label = plan.images[key].label
    example: Any = tf_example_pb2.Example()  # pyrefly: ignore
    feature = example.features.feature
    feature["image"].bytes_list.value.append(content)
    feature[plan.key_feature].bytes_list.value.append(key.encode())
    feature["label"].int64_list.value.append(label)
    for name, values in plan.by_label.items():
        feature[name].int64_list.value.append(values[label])
    return example.SerializeToString(deterministic=True)


def _settle(plan: Plan, folder: Path, problems: list[Problem], skip_damaged: bool) -> str:
    """A clause about images that are left out, which is allowed only with `skip_damaged`; else UserError."""
    listed = folder / "problems.txt"
    (folder / "skipped.txt").unlink(missing_ok=True)
    if not problems:
        listed.unlink(missing_ok=True)
        return ""
    if skip_damaged:
        listed.replace(folder / "skipped.txt")
        return f", without {len(problems)} that are missing or damaged (skipped.txt)"
    some = ", ".join(f"{key} ({what})" for key, what, _ in problems[:5])
    some += f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    raise UserError(
        f"{len(problems)} of {len(plan.images)} images of {plan.name} are missing or damaged: {some}; {listed} names "
        "them all: replace them and run the same command again (what is finished is kept), or leave them out with "
        "--skip_damaged"
    )


def _finish(plan: Plan, shards: Shards) -> Path:
    """Adds the metadata and the indices and gives the folder its final name, which it returns."""
    import tensorflow_datasets as tfds

    folder = shards.folder
    if empty := [split for split in plan.official if not shards.finished.get(split)]:
        raise UserError(f"no image of {plan.name}'s split {empty[0]} is left: prepare it from other files")
    paths = shards.finish()
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder,
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        dataset_name=plan.name,
        filetype_suffix="array_record",
    )
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[len(shard.keys) for shard in shards.finished[split]],
            num_bytes=sum(shard.num_bytes for shard in shards.finished[split]),
            filename_template=template,
        )
        for split in plan.official
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features(plan.key_feature, plan.class_names),
        split_infos=infos,
        version=plan.version,
        check_data=False,
        description=plan.description,
        homepage=plan.homepage,
        supervised_keys=("image", "label"),
    )
    for split in plan.official:
        keys = [key for shard in shards.finished[split] for key in shard.keys]
        labels = [plan.images[key].label for key in keys]
        index.write_index(folder / f"{split}.index.npz", labels, keys, paths[split])
    directory = folder.with_name(plan.version)
    os.rename(folder, directory)
    (directory / JOURNAL).unlink()
    return directory


def features(key_feature: str, class_names: Mapping[str, list[str]]) -> Any:
    """The features of a data set as TFDS has them."""
    import tensorflow_datasets as tfds

    labels = {name: tfds.features.ClassLabel(names=names) for name, names in class_names.items()}
    return tfds.features.FeaturesDict({key_feature: tfds.features.Text(), "image": tfds.features.Image(), **labels})
