"""Read a table of labels: a CSV or TSV file with the columns `file`, `label` and optionally `split`."""

import csv
import io
from pathlib import Path
from typing import NamedTuple

from ltjax.types import UserError, one_line, some

DELIMITERS = ",\t;"
SYNONYMS = {"labels": "label", "filenames": "file", "filename": "file", "files": "file"}  # of the columns


class Row(NamedTuple):
    """A row of a table.

    Attributes:
      line: Number of its (last) line in the file, from 1.
      file: Path of an image, as written.
      label: Name of its class, with single spaces.
      split: In lower case; "" if the table has no such column.
    """

    line: int
    file: str
    label: str
    split: str


def read(path: Path) -> list[Row]:
    """Read all rows.

    The first row names the columns, in any order and case; other columns are ignored. Commas, tabs or semicolons
    separate cells; double quotes may enclose them. Lines end in any way. The text is UTF-8, with or without a byte
    order mark, or UTF-16 with one. Bytes that are not UTF-8 stay, because names of files may have them.

    Raises:
      UserError: The file cannot be read, or is no such table; the message names the line.
    """
    try:
        content = path.read_bytes()
        encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
        text = content.decode(encoding, "strict" if encoding == "utf-16" else "surrogateescape")
    except OSError as error:
        raise UserError(f"cannot read the table of labels {path}: {error.strerror or one_line(error)}") from error
    except UnicodeError as error:
        raise UserError(f"{path} is neither UTF-8 nor whole UTF-16 text: save it as UTF-8") from error
    return _rows(path, text)


def _rows(path: Path, text: str) -> list[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), skipinitialspace=True, strict=True)
    columns: list[str] | None = None
    rows = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if columns is None:
                columns = _columns(path, cells)
                continue
            if any(cells[len(columns) :]):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells, and the first row has {len(columns)}: "
                    "enclose a cell that holds a separator in double quotes"
                )
            cell = dict(zip(columns, cells, strict=False))
            label, split = " ".join(cell.get("label", "").split()), cell.get("split", "").strip().lower()
            row = Row(reader.line_num, cell.get("file", ""), label, split)
            for name in ("file", "label", "split") if "split" in columns else ("file", "label"):
                if not getattr(row, name).strip():
                    raise UserError(f"{path}, line {row.line}: no {name}: fill it in, or remove the row")
            rows.append(row)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}: is a double quote missing?") from error
    if not rows:
        raise UserError(f"{path} has no rows: needed: the columns file and label, and a row for each image")
    return rows


def _delimiter(text: str) -> str:
    """Return the separator that makes the most columns of the first line."""
    first = next((line for line in io.StringIO(text, newline="") if line.strip()), "")
    return max(DELIMITERS, key=first.count)


def _columns(path: Path, cells: list[str]) -> list[str]:
    columns = [cell.strip().lower() for cell in cells]
    columns = [SYNONYMS.get(name, name) for name in columns]
    if [columns.count(name) for name in ("file", "label")] != [1, 1] or columns.count("split") > 1:
        found = some([repr(cell.strip()) for cell in cells])
        raise UserError(
            f"the first row of {path} names the columns {found}; needed: file and label, and optionally split, each "
            "once, with commas, tabs or semicolons between them"
        )
    return columns
