"""Read tables that users write: labels of images, frequencies of classes."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ltjax.system.wording import one_line, some
from ltjax.types import UserError

DELIMITERS = ",\t;"
SYNONYMS = {"labels": "label", "filenames": "file", "filename": "file", "files": "file"}  # of the columns of labels


class Label(NamedTuple):
    """A row of a table of labels.

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


def labels(path: Path) -> list[Label]:
    """Read a table with the columns `file`, `label` and optionally `split`.

    UserError if a label is not UTF-8; for others see `rows`.
    """
    labelled = []
    for line, row in rows(path, ("file", "label"), ("split",), SYNONYMS):
        label = " ".join(row["label"].split())
        if any("\udc80" <= character <= "\udcff" for character in label):  # bytes that stay
            raise UserError(f"{path}, line {line}: the label is not UTF-8: save the table as UTF-8")
        labelled.append(Label(line, row["file"], label, row.get("split", "").strip().lower()))
    return labelled


def rows(
    path: Path, needed: tuple[str, ...], optional: tuple[str, ...], synonyms: Mapping[str, str] | None = None
) -> list[tuple[int, dict[str, str]]]:
    """Read the rows of a CSV or TSV file: (number of its last line, {column: cell}).

    The first row names the columns, in any order and case; other columns are ignored. Commas, tabs or semicolons
    separate cells; double quotes may enclose them. Lines end in any way. The text is UTF-8, with or without a byte
    order mark, or UTF-16 with one. Bytes that are not UTF-8 stay, because names of files may have them.

    Args:
      needed: Columns that it must have.
      optional: Columns that it may have. No cell of these columns is empty.
      synonyms: {other name of a column: its name}.

    Raises:
      UserError: The file cannot be read, or is no such table; the message names the line.
    """
    try:
        content = path.read_bytes()
        if content.startswith(b"PK\x03\x04"):
            raise UserError(f"{path} is a spreadsheet or an archive: save it as CSV in UTF-8")
        encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
        text = content.decode(encoding, "strict" if encoding == "utf-16" else "surrogateescape")
    except OSError as error:
        raise UserError(f"cannot read the table {path}: {error.strerror or one_line(error)}") from error
    except UnicodeError as error:
        raise UserError(f"{path} is neither UTF-8 nor whole UTF-16 text: save it as UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), skipinitialspace=True, strict=True)
    columns: list[str] | None = None
    numbered = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if columns is None:
                columns = _columns(path, cells, needed, optional, synonyms or {})
                continue
            if any(cells[len(columns) :]):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells, and the first row has {len(columns)}: "
                    "enclose a cell that holds a separator in double quotes"
                )
            padded = cells + [""] * (len(columns) - len(cells))
            row = {name: cell for name, cell in zip(columns, padded, strict=False) if name in (*needed, *optional)}
            if empty := [name for name, cell in row.items() if not cell.strip()]:
                raise UserError(f"{path}, line {reader.line_num}: no {empty[0]}: fill it in, or remove the row")
            numbered.append((reader.line_num, row))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}: is a double quote missing?") from error
    if not numbered:
        raise UserError(f"{path} has no rows: needed: the columns {' and '.join(needed)}, and rows below them")
    return numbered


def _delimiter(text: str) -> str:
    """Return the separator that makes the most columns of the first line."""
    first = next((line for line in io.StringIO(text, newline="") if line.strip()), "")
    return max(DELIMITERS, key=first.count)


def _columns(
    path: Path, cells: list[str], needed: tuple[str, ...], optional: tuple[str, ...], synonyms: Mapping[str, str]
) -> list[str]:
    columns = [cell.strip().lower() for cell in cells]
    columns = [synonyms.get(name, name) for name in columns]
    if any(columns.count(name) != 1 for name in needed) or any(columns.count(name) > 1 for name in optional):
        names = some([repr(cell.strip()) for cell in cells])
        raise UserError(
            f"the first row of {path} names the columns {names}; needed: {' and '.join(needed)}, and optionally "
            f"{' or '.join(optional)}, each once, with commas, tabs or semicolons between them"
        )
    return columns
