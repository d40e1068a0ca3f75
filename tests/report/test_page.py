"""The report's page of made-up numbers: its contents, for any size and class names."""

import base64
import io
import json
import re
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ltjax.report import figures, page, panels, plots, sections
from tests.report import made_up

VOID = {"meta", "link", "img", "br", "input", "rect", "line", "circle", "path", "polygon"}


class Checked(HTMLParser):
    """A parser that checks that elements are closed in order, and collects tags and identifiers."""

    def __init__(self, made):
        super().__init__()
        self.open, self.ids, self.tags = [], [], []
        self.feed(made)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def made(num_classes=10, **also):
    results = made_up.results(num_classes, **also)
    groups = made_up.groups_of(np.asarray(results["class_counts"]))
    stages = tuple(results["stages"])
    return page.of_run(results, groups, made_up.numbers(num_classes, stages), made_up.curves(stages))


SECTIONS = (
    "how",
    "accuracy",
    "scores",
    "calibration",
    "learning",
    "errors",
    "confusion",
    "mistakes",
    "geometry",
    "learned",
)


def test_sections_have_their_order():
    actual = [name for name in Checked(made(robustness=made_up.robustness())).ids if name in (*SECTIONS, "robust")]
    assert actual == [*SECTIONS, "robust"]


def test_a_section_is_a_function_in_a_tuple(monkeypatch):
    def added(content):
        return sections.Section("added", "Added", "", [(panel.title, "a picture") for panel in content.panels], [])

    monkeypatch.setattr(sections, "SECTIONS", (*sections.SECTIONS, added))
    html = made()
    assert '<a href="#added">Added</a>' in html and html.count("a picture") == 2


@pytest.mark.parametrize("key, heading", [("balanced_accuracy", "balanced"), ("macro_f1", "macro F1")])
def test_an_unequal_test_set_has_columns_of_means_over_classes(key, heading):
    results = made_up.results(test_class_counts=[10] * 9 + [9])
    for stage in results["stages"].values():
        stage[key] = 0.4321
    groups = made_up.groups_of(np.asarray(results["class_counts"]))
    html = page.of_run(results, groups, {}, {})
    assert f">{heading}</th>" in html and html.count("<td>43.2</td>") == 2
    assert f">{heading}</th>" not in made()


def test_elements_are_closed_and_identifiers_unique():
    parsed = Checked(made(robustness=made_up.robustness()))
    assert len(parsed.ids) == len(set(parsed.ids))


def test_every_figure_has_a_name_and_a_description():
    parsed = Checked(made())
    figures = [attributes for tag, attributes in parsed.tags if tag == "svg"]
    assert len(figures) == 16  # two stages have six figures each, and two learned numbers each
    for attributes in figures:
        assert attributes["role"] == "img"
        assert set(attributes["aria-labelledby"].split()) <= set(parsed.ids)


def test_every_section_with_figures_has_its_numbers_in_tables():
    sections = re.findall(r"<section.*?</section>", made(robustness=made_up.robustness()), re.DOTALL)
    drawn = [section for section in sections if "<svg" in section]
    assert len(drawn) == 8  # the confusion matrix of few classes is a table
    assert all("<table" in section for section in drawn)


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b 'c'"])
def test_class_names_are_escaped(name):
    names = [f"{name}{c}" for c in range(10)]
    actual = made(names=names)
    assert name not in actual
    tags = [tag for tag, attributes in Checked(made()).tags]
    assert [tag for tag, attributes in Checked(actual).tags] == tags  # no more scripts than without such names
    assert not [tag for tag, attributes in Checked(actual).tags if "onerror" in attributes]


def test_the_page_refers_to_no_other_file():
    actual = made(robustness=made_up.robustness())
    for reference in re.findall(r"""(?:src|href)=["']([^"']*)|url\(([^)]*)""", actual):
        assert "".join(reference).startswith(("#", "data:"))


@pytest.mark.parametrize("num_classes", [2, 10, 365, 8142])
def test_the_page_is_smaller_than_3_megabytes(num_classes):
    stages = ("a", "b", "c", "d")
    names = tuple(f"Plantae Tracheophyta Magnoliopsida Asterales number {c}" for c in range(num_classes))
    assert len(made(num_classes, stages=stages, names=names)) < 3e6


def test_many_classes_are_drawn_as_ranges_of_counts():
    actual = made(8142)
    assert actual.count("<polygon") + actual.count("<rect") + actual.count("<circle") < 2000
    assert "classes of" in actual


def test_the_worst_classes_of_the_final_stage_are_named_if_there_are_many():
    results = made_up.results(151)
    results["stages"]["classifier"]["per_class_accuracy"][5] = 0.0
    groups = made_up.groups_of(np.asarray(results["class_counts"]))
    actual = page.of_run(results, groups, {}, {})
    tables = re.findall(r"<table[^>]*the 50 classes of lowest test accuracy.*?</table>", actual, re.DOTALL)
    assert len(tables) == 1 and "Stage classifier" in tables[0]
    assert tables[0].count('<th scope="row">') == 50 and "class 3<" not in tables[0]
    assert f'<th scope="row">class 5</th><td>{results["class_counts"][5]:,}</td><td>0.0</td>' in tables[0]


def test_no_class_is_named_as_worst_if_there_are_few():
    assert "lowest test accuracy" not in made(150)


def listing(html, caption):
    """Return the rows that a sortable table shows without its script, and all rows."""
    part = re.search(rf'<div class="listing">\s*<p class="caption">{caption}.*?</script>', html, re.DOTALL)
    assert part is not None
    return re.findall(r"<tr><th scope=.row.*?</tr>", part[0]), json.loads(re.search(r"json\">(.*?)<", part[0])[1])


@pytest.mark.parametrize("num_classes, shown", [(10, 10), (8142, sections.MOST_ROWS)])
def test_every_class_is_in_the_table_of_scores(num_classes, shown):
    rows, everything = listing(made(num_classes), "Stage classifier: precision")
    assert len(rows) == shown and len(everything) == num_classes
    assert f'<th scope="row">{everything[0][0]}</th>' in rows[0]


def test_classes_are_sorted_by_f1_and_those_without_test_images_are_last():
    numbers = made_up.numbers()
    scores = {"images": [9.0] * 10, "predicted": [8.0] * 10, "precision": [0.5] * 10, "recall": [0.25] * 10}
    scores |= {"f1": [0.3, None, 0.1, *[0.2] * 7]}
    numbers["stages"]["classifier"]["scores"] = scores
    results = made_up.results()
    groups = made_up.groups_of(np.asarray(results["class_counts"]))
    _, rows = listing(page.of_run(results, groups, numbers, {}), "Stage classifier: precision")
    assert [row[0] for row in rows[:3]] == ["class 2", "class 3", "class 4"] and rows[-1][0] == "class 1"
    assert rows[0] == ["class 2", "251", "many", "9", "8", "50.0", "25.0", "10.0"]
    assert rows[-1][-1] == "-"


def test_few_classes_have_a_confusion_matrix_with_numbers():
    numbers = made_up.numbers()
    numbers["confusion"] |= {"cells": [[0, 0, 7], [0, 2, 3], [1, 1, 5]], "pairs": [[0, 2, 3, 1]]}
    results = made_up.results()
    groups = made_up.groups_of(np.asarray(results["class_counts"]))
    html = page.of_run(results, groups, numbers, {})
    (matrix,) = re.findall(r'<table class="confusion".*?</table>', html, re.DOTALL)
    assert 'title="class 0 taken for class 2: 3, 30.0 %"' in matrix and matrix.count('class="wrong"') == 1
    assert re.findall(r"<td[^>]*>(\d+)</td>", matrix) == ["7", "3", "5"]
    _, rows = listing(html, "Stage classifier: the 1 pairs confused most often")
    assert rows[0][:3] == ["class 0", "class 2", "3"] and rows[0][4] == "1"


@pytest.mark.parametrize("num_classes, side", [(31, 31), (400, 400), (401, 81), (8142, 100)])
def test_the_confusion_matrix_of_many_classes_is_a_picture(num_classes, side):
    html = made(num_classes)
    (uri,) = re.findall(r'<image href="data:image/png;base64,([^"]*)"', html)
    assert Image.open(io.BytesIO(base64.b64decode(uri))).size == (side, side)
    assert '<table class="confusion"' not in html


def test_mistakes_are_orange_and_correct_counts_are_grey():
    results = made_up.results(31)
    panel = panels.of_stage(results, "classifier", made_up.groups_of(np.asarray(results["class_counts"])), {}, {})
    drawn = plots.confusion_map("key", panel, {"classes": 1, "cells": [[0, 0, 3], [0, 5, 1], [30, 0, 2]]})
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(re.findall('base64,([^"]*)', drawn)[0]))))
    assert sorted(zip(*np.nonzero(pixels[..., 3]), strict=True)) == [(0, 0), (0, 5), (30, 0)]
    assert tuple(pixels[0, 0, :3]) == plots.GREY and tuple(pixels[0, 5, :3]) == plots.ORANGE
    assert pixels[30, 0, 3] == 255 > pixels[0, 5, 3] > 90  # all of the row, or a quarter of it


def section(html, name):
    """Return the text of a section, with spaces for what breaks no line."""
    (actual,) = re.findall(rf'<section aria-labelledby="{name}".*?</section>', html, re.DOTALL)
    return " ".join(re.sub("<[^>]*>", " ", actual).replace("\u00a0", " ").split())


def test_the_surest_mistakes_are_shown_with_classes_confidence_and_name():
    html = made()
    text = section(html, "mistakes")
    assert "class 0 taken for class 9 , 90.0 % sure val/a/1.jpg" in text
    assert "1 of the 2 wrong predictions for 1,000 test images" in text
    assert '<img class="small" src="data:image/png;base64,iVBORw0KGgo=" alt="test image of class 0">' in html


def test_without_mistakes_there_is_no_section():
    results, numbers = made_up.results(), made_up.numbers()
    numbers["mistakes"] = {"wrong": 0, "shown": []}
    groups = made_up.groups_of(np.asarray(results["class_counts"]))
    assert "mistakes" not in Checked(page.of_run(results, groups, numbers, {})).ids


def test_marks_of_balanced_classes_do_not_overlap():
    actual = Checked(made(largest=500, smallest=500))
    centres = [a["cx"] for tag, a in actual.tags if tag == "circle" and a["class"] == "mark many"]
    assert len(set(centres)) >= 8


def test_balanced_classes_have_no_imbalance_factor():
    actual = made(largest=500, smallest=500)
    assert "classes of 500 training images each" in actual and "imbalance factor" not in actual


def test_a_stage_without_calibration_has_no_reliability_chart():
    results = made_up.results()
    results["stages"]["classifier"].update(ece=None, mce=None)
    groups = made_up.groups_of(np.asarray(results["class_counts"]))
    actual = Checked(page.of_run(results, groups, made_up.numbers(), made_up.curves()))
    assert "calibration0-t" in actual.ids and "calibration1-t" not in actual.ids


def test_an_unfinished_run_is_announced_above_its_table():
    reached = {"stage": "Stage ce", "number": 1, "stages": 2, "epoch": 2.5, "epochs": 4}
    actual = made(stages=("ce",), command=None, unfinished=reached)
    note = "not trained to its end: Stage ce (stage 1 of 2) is at epoch 2.5 of 4."
    assert 0 < actual.find(note) < actual.find("<table")
    assert "last epoch" not in actual.lower() and "How to get this again" not in actual


def test_names_outside_utf8_are_written_with_question_marks(tmp_path):
    results = made_up.results(names=["caf\udce9 au lait", *map(str, range(9))])
    split = {name: np.flatnonzero(m).tolist() for name, m in made_up.groups_of(made_up.class_counts(10)).items()}
    (tmp_path / "split.json").write_text(json.dumps({"groups": split}))
    assert "caf? au lait" in page.write(tmp_path, results).read_text(encoding="utf-8")


def test_groups_are_described_by_their_training_images():
    assert "Training images a class: many 126 to 1,000, medium 32 to 63, few 2 to 16." in made()


def test_the_attacked_images_are_named():
    assert "Stage classifier: linf radius 8/255, 1,000 test images." in made(robustness=made_up.robustness())


def test_the_summary_is_drawn_for_any_class_names(tmp_path):
    results = made_up.results(names=["猫", "US$ and $_$", *map(str, range(8))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert figures.write_summary(results, tmp_path).stat().st_size > 10_000


@pytest.mark.parametrize("largest, expected", [(1000, ["10", "100", "1,000"]), (60, ["10", "20", "50"])])
def test_the_summary_counts_training_images_in_figures(largest, expected):
    drawn = figures.summary(made_up.results(largest=largest, smallest=8))
    drawn.draw_without_rendering()
    (behind,) = (axes for axes in drawn.axes if axes.get_ylabel() == "training images")
    low, high = behind.get_ylim()
    shown = [tick.label1.get_text() or tick.label2.get_text() for tick in behind.yaxis.get_major_ticks()]
    assert set(expected) <= set(shown) and not any("$" in text for text in shown)
    assert low < 10 and high > 50


def test_without_numbers_the_summary_shows_the_results():
    results = made_up.results()
    groups = made_up.groups_of(np.asarray(results["class_counts"]))
    actual = Checked(page.of_run(results, groups, {}, {})).ids
    assert "accuracy" in actual and "calibration" in actual
    assert "geometry" not in actual and "learning" not in actual


def test_figures_of_several_seeds_have_their_spread():
    results = made_up.results(seeds=[0, 1])
    for stage in results["stages"].values():
        stage["std"] = {"accuracy": dict.fromkeys(stage["accuracy"], 0.0123), "ece": 0.005}
    groups = made_up.groups_of(np.asarray(results["class_counts"]))
    actual = page.of_run(results, groups, made_up.numbers(), made_up.curves())
    assert "± 1.2" in actual and "10.0 ± 0.5" in actual and "0, 1" in actual
    assert actual.count('class="band') == 6  # of two stages' three groups


def test_the_table_has_every_stage_with_last_and_legacy_best():
    results = made_up.results()
    actual = re.search(r"<table.*?</table>", made(), re.DOTALL)
    assert actual is not None
    for name in ("Stage ce", "Stage classifier"):
        assert name in actual[0]
    last, best = (f"{100 * value:.1f}" for value in (results["accuracy"]["all"], results["best_on_test"]["accuracy"]))
    assert last in actual[0] and best in actual[0]
    assert results["command"] in made()
