"""Write files atomically, read and write JSON files, and hash files."""

import contextlib
import hashlib
import json
import os
import time
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

from ltjax.system.wording import one_line
from ltjax.types import UserError

DAY = 86_400  # seconds
ANOTHER = "delete it, or use another --workdir"
MAX_JSON = 1 << 28  # bytes; larger files are not read


@contextlib.contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Write a file atomically: yield another path in the same folder, and give what is written there the name `path`.

    A reader sees the old file or the new one, even if this process is killed. What a kill leaves is deleted by the
    first write of this file a day later.
    """
    path = path.resolve()  # write to what a link names
    # Hashes, because `path` may have a name of 255 bytes.
    name, writer = zlib.crc32(os.fsencode(path.name)), zlib.crc32(f"{os.uname().nodename} {os.getpid()}".encode())
    written = path.with_name(f".{name:08x}-{writer:08x}.tmp")
    for left in path.parent.glob(f".{name:08x}-*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > DAY:
                left.unlink()
    try:
        yield written
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)


@contextlib.contextmanager
def holding(path: Path, remedy: str = ANOTHER) -> Generator[None]:
    """Raise UserError if the block cannot use the contents of a file, because it was changed.

    Put nothing else into the block: all errors except OSError and MemoryError count as the file's.

    Args:
      remedy: What to do, for the message.
    """
    try:
        yield
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:  # another shape than ltjax writes has many exception types
        what = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        raise UserError(f"{path} does not hold what ltjax writes there ({what}): {remedy}") from error


def load_json(path: Path) -> Any:
    """Read a JSON file. OSError if it cannot be read; ValueError if it is no JSON, or too large or too deep."""
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"more than {MAX_JSON} bytes")
    try:
        return json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: Path, remedy: str = ANOTHER) -> dict[str, Any]:
    """Read a file of `write_json`. UserError, which ends with `remedy`, if the file holds no JSON object."""
    try:
        value = load_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({one_line(error)}): {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold what ltjax writes there: {remedy}")
    return value


def file_sha256(path: Path) -> str:
    """Hash a file: SHA-256, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def write_atomic(path: Path, text: str, *, errors: str = "strict") -> None:
    """Write a text file in UTF-8, atomically. errors: of `str.encode`."""
    with replacing(path) as file:
        file.write_text(text, encoding="utf-8", errors=errors)
