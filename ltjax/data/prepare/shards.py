"""Write the shards of a data set so that a killed run can continue: a journal lists the finished shards."""

import contextlib
import json
import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

from ltjax.system.wording import one_line
from ltjax.types import UserError

JOURNAL = "journal.jsonl"
SHARD_BYTES = 512 << 20
SHARD_IMAGES = 1 << 16


class Shard(NamedTuple):
    """A finished shard."""

    split: str
    number: int  # within the split
    size: int  # of the file, in bytes
    num_bytes: int  # of the records alone
    keys: list[str]  # of the records

    @property
    def file(self) -> str:
        return f"{self.split}-{self.number:05d}"


class _Open:
    """A shard that is being written."""

    def __init__(self, path: Path):
        from array_record.python import array_record_module

        self.path, self.keys, self.num_bytes = path, [], 0
        self.writer: Any = array_record_module.ArrayRecordWriter(str(path), "group_size:1")  # single records by number


class Shards:
    """The shards in a folder: those that earlier runs have finished, and those that this run writes.

    A shard is written as `<split>-<number>.part`, renamed when it is complete, and then added to the journal. Shards
    that the journal does not list are deleted at the start. `finish` gives the shards the names that TFDS expects.
    """

    def __init__(self, folder: Path, name: str, spec_hash: str, shard_bytes: int = SHARD_BYTES):
        """Open a folder, made if missing; UserError if it was begun with another hash of what is to be written.

        A shard is full with `shard_bytes` bytes of records, or with `SHARD_IMAGES` records.
        """
        self.folder, self.name, self.shard_bytes = folder, name, shard_bytes
        self.finished: dict[str, list[Shard]] = {}
        self._open: dict[str, _Open] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._undo_finish()
        self._read_journal(spec_hash)
        finished = [shard for shards in self.finished.values() for shard in shards]
        files = {shard.file for shard in finished}
        for path in folder.iterdir():
            if re.fullmatch(r"\w+-\d{5}(\.part)?", path.name) and path.name not in files:
                path.unlink()
        lines = [{"plan": spec_hash}, *(shard._asdict() for shard in finished)]
        part = folder / f"{JOURNAL}.part"
        part.write_text("".join(json.dumps(line) + "\n" for line in lines))
        part.replace(folder / JOURNAL)

    def _undo_finish(self) -> None:
        """Undo the renaming of a killed `finish`."""
        pattern = re.compile(rf"{self.name}-(\w+)\.array_record-(\d{{5}})-of-\d{{5}}")
        for path in self.folder.iterdir():
            if match := pattern.fullmatch(path.name):
                path.rename(self.folder / f"{match[1]}-{match[2]}")

    def _read_journal(self, spec_hash: str) -> None:
        """Accept each split's shards up to the first that is missing or has another size."""
        journal = self.folder / JOURNAL
        lines = journal.read_text().splitlines() if journal.exists() else []
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
            except ValueError:
                break  # a line that a kill has cut short
            if number == 0:
                if entry != {"plan": spec_hash}:
                    raise UserError(
                        f"{self.folder} was begun with other lists: go on with those, or delete it to start over"
                    )
                continue
            shard = Shard(**entry)
            path, shards = self.folder / shard.file, self.finished.setdefault(shard.split, [])
            if shard.number == len(shards) and path.is_file() and path.stat().st_size == shard.size:
                shards.append(shard)

    def keys(self) -> set[str]:
        """Return the keys of all records in finished shards."""
        return {key for shards in self.finished.values() for shard in shards for key in shard.keys}

    def add(self, split: str, key: str, record: bytes) -> None:
        """Append a record to a split; UserError if it cannot be written."""
        if split not in self._open:
            number = len(self.finished.setdefault(split, []))
            with self._write_errors():
                self._open[split] = _Open(self.folder / f"{split}-{number:05d}.part")
        shard = self._open[split]
        with self._write_errors():
            shard.writer.write(record)
        shard.keys.append(key)
        shard.num_bytes += len(record)
        if shard.num_bytes >= self.shard_bytes or len(shard.keys) >= SHARD_IMAGES:
            self._close(split)

    def _close(self, split: str) -> None:
        """Finish a split's open shard."""
        from array_record.python import array_record_module

        opened = self._open.pop(split)
        with self._write_errors():
            opened.writer.close()
            reader: Any = array_record_module.ArrayRecordReader(str(opened.path))
            if reader.num_records() != len(opened.keys):
                raise OSError(f"{opened.path} does not read back")
            reader.close()
            with open(opened.path, "rb") as file:
                os.fsync(file.fileno())
            shard = Shard(split, len(self.finished[split]), opened.path.stat().st_size, opened.num_bytes, opened.keys)
            opened.path.replace(self.folder / shard.file)
            with open(self.folder / JOURNAL, "a") as file:
                file.write(json.dumps(shard._asdict()) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.finished[split].append(shard)

    def close(self) -> None:
        """Finish all open shards, however small."""
        for split in list(self._open):
            self._close(split)

    def abandon(self) -> None:
        """Close the open shards without finishing them; the next run deletes their files."""
        for opened in self._open.values():
            with contextlib.suppress(RuntimeError):
                opened.writer.close()
        self._open.clear()

    def finish(self) -> dict[str, list[Path]]:
        """Rename the shards as TFDS expects; return each split's paths in order."""
        paths: dict[str, list[Path]] = {}
        for split, shards in self.finished.items():
            for shard in shards:
                file = f"{self.name}-{split}.array_record-{shard.number:05d}-of-{len(shards):05d}"
                paths.setdefault(split, []).append((self.folder / shard.file).rename(self.folder / file))
        return paths

    @contextlib.contextmanager
    def _write_errors(self) -> Generator[None]:
        """Turn write errors into UserErrors."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # array_record reports a full disk as a RuntimeError
            raise UserError(
                f"cannot write {self.folder} ({one_line(error)}): make room there, then run the same command again "
                "(what is finished is kept)"
            ) from error
