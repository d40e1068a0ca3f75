"""Any names of classes, files and folders are shown, written and read unchanged, or refused in one line."""

import csv
import io
import json
import os
import re
import tempfile
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st
from rich.console import Console

from ltjax import compare, data
from ltjax.modes import predict as predict_mode
from ltjax.predictor import files
from ltjax.predictor.files import Prediction
from ltjax.report import page
from ltjax.runs import results
from ltjax.runs.checkpoint import Checkpoints, like
from ltjax.runs.workdir import check_workdir
from ltjax.system.files import write_json
from ltjax.system.paths import local
from ltjax.types import UserError
from tests.data.miniatures import photo
from tests.report import made_up

ODD = (
    "[red]stop",
    "[/]",
    "100%",
    "%s",
    "{x}",
    "a b",
    " a",
    "a\nb",
    "-rf",
    "--out",
    "~",
    "~root",
    "cafe\u0301",
    "caf\u00e9",
)
ODD += (
    "<b>",
    "&amp;",
    "</script>",
    '"',
    "'",
    "\\",
    "\t",
    "\u202e",
    "日本",
    "🦉",
    "x" * 255,
    "CON",
    "a,b",
    "=1+1",
    "$HOME",
)
texts = st.one_of(
    st.sampled_from(ODD), st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=20)
)


def as_file_name(text):
    """Return a name that a file system takes, and that is not hidden."""
    name = text.replace("/", "|").encode()[:255].decode(errors="ignore").lstrip(".")
    return name if name and name != "__MACOSX" else "x"


file_names = texts.map(as_file_name)
byte_names = st.one_of(file_names.map(os.fsencode), st.binary(min_size=1, max_size=20).map(lambda name: b"x" + name))
byte_names = byte_names.map(lambda name: os.fsdecode(name.replace(b"/", b"|").replace(b"\0", b"|")[:250]))


class Text(HTMLParser):
    """Collects the visible text of a page."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts, self.tags = [], set()

    def handle_data(self, data):
        self.parts.append(data)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)


def squeezed(text):
    return " ".join(text.split())


@given(st.lists(file_names, min_size=2, max_size=5, unique=True), byte_names)
def test_every_folder_of_a_class_is_found(names, image):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for label, name in enumerate(names):
            for part in ("train", "val"):
                (root / part / name).mkdir(parents=True)
                (root / part / name / image).write_bytes(photo(label, 0, 16))
        loaded = data.load("image_folder", root)
        assert loaded.class_names == tuple(sorted(names))
        for index, label in enumerate(loaded.train_labels):
            assert loaded.train_files[index] == photo(names.index(loaded.class_names[label]), 0, 16)


@given(st.lists(byte_names, min_size=1, max_size=5, unique=True))
def test_every_image_of_a_folder_is_predicted(names):
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            (Path(folder) / name).write_bytes(photo(0, 0, 16))
        assert sorted(files.find(folder)) == sorted(os.path.join(folder, name) for name in names)


@given(texts, texts)
def test_predictions_can_be_read_back(file, name):
    prediction = Prediction(file, (name, "other"), (0.75, 0.25))
    table = predict_mode.as_table([prediction], top_k=2)
    assert list(csv.reader(io.StringIO(table, newline=""))) == [[file, name, "0.750000", "other", "0.250000", ""]]
    (line,) = predict_mode.as_lines([prediction]).splitlines()
    assert json.loads(line)["file"] == file and json.loads(line)["classes"][0]["class"] == name


@given(st.lists(texts, min_size=10, max_size=10, unique=True), texts)
def test_a_report_shows_names_as_they_are(names, title):
    def page_of(**changes):
        with tempfile.TemporaryDirectory() as folder:
            counts = made_up.class_counts(10)
            groups = {name: np.flatnonzero(member).tolist() for name, member in made_up.groups_of(counts).items()}
            write_json(Path(folder) / "split.json", {"groups": groups})
            (Path(folder) / "report").mkdir()
            write_json(Path(folder) / "report" / "numbers.json", made_up.numbers(10))
            text = Text()
            text.feed(page.write(Path(folder), made_up.results(**changes)).read_text(encoding="utf-8"))
            return text

    plain, odd = page_of(), page_of(names=names, name=title, command=f"python run.py --workdir={title}")
    assert odd.tags == plain.tags  # no name became an element
    assert squeezed(title) in squeezed(" ".join(odd.parts))


@given(texts)
def test_a_table_in_a_terminal_shows_a_name_as_it_is(name):
    assume(all(unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn") for character in name))
    assume(name.isascii() and name.strip() == name and "  " not in name and len(name) < 50)  # on one line
    out = io.StringIO()
    console = Console(file=out, width=2000, markup=False, emoji=False, highlight=False)
    console.print(results.table({**made_up.results(), "name": name}))
    assert name in out.getvalue()


@given(texts)
def test_a_workdir_keeps_readable_checkpoints_or_is_refused(name):
    state = {"x": jnp.arange(3.0)}
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / as_file_name(name)
        try:
            check_workdir(workdir, {})
        except UserError as error:
            assert re.search(r"cannot keep checkpoints in|cannot use workdir", str(error))
            return
        try:
            with Checkpoints(workdir / "checkpoints") as checkpoints:
                checkpoints.save(1, state, {})
                checkpoints.wait()
                restored = checkpoints.restore(like(state))
        except UserError as error:
            assert "cannot keep checkpoints in" in str(error) or "cannot write to" in str(error)
            return
        np.testing.assert_array_equal(restored[0]["x"], state["x"])
        assert [path.name for path in Path(folder).iterdir()] == [workdir.name]  # nothing beside the workdir


@given(texts, st.sampled_from(["", "~/", "~root/", "~nobody-of-that-name/", "gs://", "s3+x://"]))
def test_a_path_is_expanded_as_in_a_shell_or_refused(text, start):
    given = start + text.lstrip("~")
    try:
        path = local(given)
    except UserError as error:
        assert start in ("gs://", "s3+x://", "~nobody-of-that-name/") or "://" in text
        assert "address" in str(error) or "no home folder is known" in str(error)
        return
    homes = {"~/": os.path.expanduser("~") + "/", "~root/": os.path.expanduser("~root") + "/"}
    assert path == Path(homes.get(start, start) + text.lstrip("~"))


@given(st.lists(texts, min_size=1, max_size=3, unique=True))
def test_a_comparison_names_its_rows_as_they_are(names):
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names):
            (Path(folder) / str(number)).mkdir()
            write_json(Path(folder) / str(number) / "results.json", {**made_up.results(seed=number), "name": name})
        runs, _ = compare.results_files(Path(folder))
        assert sorted(compare.read_run(run).name for run in runs) == sorted(names)
