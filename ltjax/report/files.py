"""Tables in the report's folder, for spreadsheets and scripts."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ltjax.system.files import write_atomic, write_json


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a table as UTF-8. Floats have six digits; None is empty."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    write_atomic(path, text.getvalue(), errors="replace")


def write_classes(folder: Path, stage: str, classes: Mapping[str, Sequence[Any]]) -> None:
    """Write `classes.csv` and the same as `classes.json`, a row for each class.

    Args:
      classes: {column: [C]}.
    """
    rows = list(zip(*classes.values(), strict=True))
    write_csv(folder / "classes.csv", list(classes), rows)
    records = [dict(zip(classes, row, strict=True)) for row in rows]
    write_json(folder / "classes.json", {"stage": stage, "classes": records})
