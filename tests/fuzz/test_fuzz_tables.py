"""Any table of labels is read correctly, or refused in one line."""

import csv
import io
import tempfile
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from ltjax.data import tables
from ltjax.types import UserError

cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)
cells = cells.filter(lambda cell: cell.strip() and not cell.startswith(" "))  # spaces after a separator do not count


def read(content):
    with tempfile.NamedTemporaryFile(suffix=".csv") as file:
        Path(file.name).write_bytes(content)
        return tables.labels(Path(file.name))


@given(
    st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=5),
    st.permutations(["file", "label", "other"]),
    st.sampled_from(tables.DELIMITERS),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
@example([("a", "0", "\r0")], ["file", "label", "other"], ",", "\n", csv.QUOTE_MINIMAL, "utf-8")
def test_a_table_is_read_as_it_was_written(rows, columns, delimiter, end, quoting, encoding):
    if any("\r" in cell or "\n" in cell for row in rows for cell in row):
        quoting = csv.QUOTE_ALL  # csv quotes only the line ends that it writes itself
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerow(columns)
    for row in rows:
        cells = dict(zip(("file", "label", "other"), row, strict=True))
        writer.writerow([cells[column] for column in columns])
    actual = read(text.getvalue().encode(encoding))
    assert [(row.file, row.label) for row in actual] == [(file, " ".join(label.split())) for file, label, _ in rows]


@given(st.one_of(st.binary(max_size=100), st.binary(max_size=60).map(lambda rest: b"file,label,split\n" + rest)))
def test_any_bytes_are_rows_or_refused_in_one_line(content):
    try:
        rows = read(content)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert rows and all(row.file.strip() and row.label for row in rows)
