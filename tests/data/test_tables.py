"""Tables of labels."""

import pytest

from ltjax.data import tables
from ltjax.data.tables import Label
from ltjax.types import UserError


def read(tmp_path, text, encoding="utf-8"):
    (tmp_path / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return tables.labels(tmp_path / "t.csv")


ROWS = [Label(2, "a.jpg", "cat", ""), Label(3, "b/c d.jpg", "café", "")]


@pytest.mark.parametrize(
    "text",
    [
        "file,label\na.jpg,cat\nb/c d.jpg,café\n",
        "file,label\r\na.jpg,cat\r\nb/c d.jpg,café",
        "file,label\ra.jpg,cat\rb/c d.jpg,café\r",
        "label,file\ncat,a.jpg\ncafé,b/c d.jpg\n",
        "label\tfile\ncat\ta.jpg\ncafé\tb/c d.jpg\n",
        "label;file\ncat;a.jpg\ncafé;b/c d.jpg\n",
        '"file","label"\n"a.jpg","cat"\n"b/c d.jpg","café"\n',
        "LABEL, File\n cat , a.jpg\ncafé,b/c d.jpg,,\n",
        "id,file,width,label\n1,a.jpg,3,cat\n2,b/c d.jpg,,café\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_columns_have_any_order_and_separator(tmp_path, text, encoding):
    assert read(tmp_path, text, encoding) == ROWS


def test_cells_in_quotes_hold_separators_quotes_and_lines(tmp_path):
    text = 'file,label,split\n"a, ""b"".jpg","cat\n  and dog",Train\n\n\nc.jpg,owl,val\n'
    expected = [Label(3, 'a, "b".jpg', "cat and dog", "train"), Label(6, "c.jpg", "owl", "val")]
    assert read(tmp_path, text) == expected


def test_names_that_are_no_utf8_stay(tmp_path):
    assert read(tmp_path, b"file,label\ncaf\xe9.jpg,cat\n")[0].file == "caf\udce9.jpg"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "has no rows: needed: the columns file and label"),
        ("file,label\n", "has no rows"),
        (
            "image,class\na.jpg,cat\n",
            "names the columns 'image', 'class'; needed: file and label, and optionally split",
        ),
        ("file,label,label\na.jpg,cat,dog\n", "needed: file and label, and optionally split, each once"),
        ("a.jpg,cat\nb.jpg,dog\n", "the first row of .* names the columns 'a.jpg', 'cat'; needed"),
        ("file,label\na.jpg\n", "line 2: no label: fill it in, or remove the row"),
        ("file,label\na.jpg, \n", "line 2: no label"),
        ("file,label\n,cat\n", "line 2: no file"),
        ("file,label,split\na.jpg,cat,\n", "line 2: no split"),
        ("file,label\na,b.jpg,cat\n", "line 2: 3 cells, and the first row has 2: enclose .* in double quotes"),
        ('file,label\n"a.jpg,cat\nb.jpg,dog\n', "line 3: unexpected end of data: is a double quote missing"),
        ('file,label\n"a".jpg,cat\n', "line 2: ',' expected after '\"': is a double quote missing"),
        (b"PK\x03\x04" + bytes(range(256)), "is a spreadsheet or an archive: save it as CSV in UTF-8"),
        (b"file,label\na.jpg,cat\nb.jpg,d\xf6g\n", "line 3: the label is not UTF-8: save the table as UTF-8"),
        (b"\xff\xfef", "neither UTF-8 nor whole UTF-16 text: save it as UTF-8"),
    ],
)
def test_an_invalid_table_is_explained_with_its_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as raised:
        read(tmp_path, text)
    assert "\n" not in str(raised.value)


def test_a_table_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the table .*x\.csv: No such file"):
        tables.labels(tmp_path / "x.csv")
