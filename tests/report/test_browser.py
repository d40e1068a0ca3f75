"""The page in a real browser: no errors, and everything visible on a phone and on a desktop."""

import os

import numpy as np
import pytest

from ltjax.report import page, sections
from tests.report import browser, made_up

pytestmark = pytest.mark.skipif(
    browser.program() is None and not os.environ.get("LTJAX_REQUIRE_BROWSER"),
    reason=f"none of {', '.join(browser.PROGRAMS)} on the PATH",
)
WIDTHS = (360, 1280)
# Figures that are tall enough and contain shapes.
DRAWN = """[...document.querySelectorAll('svg')].filter(f => f.getBoundingClientRect().height > 100
           && f.querySelectorAll('line, path, rect, circle, polygon').length > 5).length"""
# Text that is cut off by the frame of its figure.
CUT = """[...document.querySelectorAll('svg text')].filter(t => {
  const [a, b] = [t.getBoundingClientRect(), t.ownerSVGElement.getBoundingClientRect()];
  return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
}).map(t => t.textContent)"""
# The lowest contrast between text and its background, as WCAG defines it.
CONTRAST = """(() => {
  const light = c => { const [r, g, b] = c.match(/\\d+/g).map(v => { v /= 255;
    return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const ratio = c => { const [a, b] = [light(c), paper].sort((x, y) => y - x); return (a + 0.05) / (b + 0.05); };
  const html = [...document.querySelectorAll('h1, h2, p, td, th, a')].map(e => ratio(getComputedStyle(e).color));
  const drawn = [...document.querySelectorAll('svg text:not(.inside)')].map(e => ratio(getComputedStyle(e).fill));
  return Math.min(...html, ...drawn); })()"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Return a page and a tab that can open it."""
    path = tmp_path_factory.mktemp("page") / "index.html"
    names = [f"a class with quite a long name indeed, number {c}" for c in range(10)]
    results = made_up.results(names=names, robustness=made_up.robustness())
    groups = made_up.groups_of(np.asarray(results["class_counts"]))
    path.write_text(page.of_run(results, groups, made_up.numbers(), made_up.curves()))
    with browser.opened() as tab:
        yield path, tab


@pytest.fixture(params=WIDTHS)
def opened(shown, request):
    path, tab = shown
    tab.open(path, request.param)
    return tab, request.param


def test_the_console_stays_empty_and_nothing_is_fetched(opened):
    tab, _ = opened
    assert tab.complaints == []
    assert [url for url in tab.requests if not url.startswith(("file:", "data:"))] == []


def test_all_figures_are_drawn(opened):
    tab, _ = opened
    assert tab.evaluate(DRAWN) == tab.evaluate("document.querySelectorAll('svg').length") == 18


def test_the_page_does_not_scroll_sideways(opened):
    tab, width = opened
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_no_text_is_cut_off(opened):
    tab, _ = opened
    assert tab.evaluate(CUT) == []


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_contrast_in_light_and_dark_mode(shown, dark):
    path, tab = shown
    tab.open(path, 1280, dark=dark)
    assert tab.evaluate(CONTRAST) >= 4.5


COLUMN = """(heading => {
  const listing = document.querySelector('.listing');
  const heads = [...listing.querySelectorAll('thead th')], place = heads.findIndex(h => h.textContent === heading);
  return [...listing.querySelectorAll('tbody tr')].map(row => row.children[place].textContent); })"""
CLICK = "(heading => [...document.querySelectorAll('.listing th button')].find(b => b.textContent === heading).click())"


def test_a_click_on_a_heading_sorts_the_classes(shown):
    path, tab = shown
    tab.open(path, 1280)
    as_numbers = [int(text.replace(",", "")) for text in tab.evaluate(f"{COLUMN}('training images')")]
    for expected in (sorted(as_numbers, reverse=True), sorted(as_numbers)):
        tab.evaluate(f"{CLICK}('training images')")
        actual = tab.evaluate(f"{COLUMN}('training images')")
        assert [int(text.replace(",", "")) for text in actual] == expected
    assert tab.evaluate("document.querySelector('.listing [aria-sort]').getAttribute('aria-sort')") == "ascending"


def test_classes_can_be_searched_and_more_be_shown(shown, tmp_path):
    _, tab = shown
    results = made_up.results(8142)
    groups = made_up.groups_of(np.asarray(results["class_counts"]))
    (tmp_path / "many.html").write_text(page.of_run(results, groups, made_up.numbers(8142), {}))
    tab.open(tmp_path / "many.html", 360)
    count = "document.querySelector('.listing').querySelectorAll('tbody tr').length"
    assert tab.evaluate(count) == sections.MOST_ROWS
    tab.evaluate("document.querySelector('.listing .more button').click()")
    assert tab.evaluate(count) > sections.MOST_ROWS
    tab.evaluate("{const s = document.querySelector('.listing input'); s.value = 'CLASS 814'; s.oninput(); }")
    assert sorted(tab.evaluate(f"{COLUMN}('class')")) == ["class 814", "class 8140", "class 8141"]
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("num_classes", [5, 30, 100, 8142])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_confusion_matrix_fits_the_window(shown, tmp_path, num_classes, width):
    _, tab = shown
    results = made_up.results(num_classes, smallest=5)
    groups = made_up.groups_of(np.asarray(results["class_counts"]))
    (tmp_path / "page.html").write_text(page.of_run(results, groups, made_up.numbers(num_classes), {}))
    tab.open(tmp_path / "page.html", width)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate(CUT) == [] and tab.complaints == []
    drawn = "document.querySelector('.confusion tbody td, svg image').getBoundingClientRect()"
    assert tab.evaluate(f"{drawn}.width") >= (30 if num_classes <= 30 else 200)


# The lowest contrast of a number in the confusion matrix with the colour behind it. Colours are mixed on a canvas.
INSIDE = """(() => {
  const context = Object.assign(document.createElement('canvas'), { width: 1, height: 1 }).getContext('2d');
  const shown = (...colours) => { for (const c of colours) { context.fillStyle = c; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3); };
  const light = rgb => { const [r, g, b] = rgb.map(v => { v /= 255;
    return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const paper = getComputedStyle(document.body).backgroundColor;
  return Math.min(...[...document.querySelectorAll('.confusion .right, .confusion .wrong')].map(cell => {
    const style = getComputedStyle(cell), colours = [shown(style.color), shown(paper, style.backgroundColor)];
    const [a, b] = colours.map(light).sort((x, y) => y - x); return (a + 0.05) / (b + 0.05); })); })()"""


@pytest.mark.parametrize("dark", [False, True])
def test_numbers_in_the_confusion_matrix_have_contrast(shown, tmp_path, dark):
    _, tab = shown
    numbers, results = made_up.numbers(), made_up.results()
    numbers["confusion"]["cells"] = [[0, 0, 9], [0, 1, 1], [1, 0, 8], [2, 2, 1]]  # from a tenth to all of the row
    groups = made_up.groups_of(np.asarray(results["class_counts"]))
    (tmp_path / "page.html").write_text(page.of_run(results, groups, numbers, {}))
    tab.open(tmp_path / "page.html", 1280, dark=dark)
    assert 4.5 <= tab.evaluate(INSIDE) < 15  # below that of text on paper: the colours are there


def test_the_first_tab_focuses_the_link_to_the_figures(shown):
    path, tab = shown
    tab.open(path, 1280)
    tab.key("Tab")
    assert tab.evaluate("document.activeElement.getAttribute('href')") == "#main"
    assert tab.evaluate("document.activeElement.getBoundingClientRect().left") >= 0


def test_accuracies_and_ece_are_visible_on_a_phone(shown):
    path, tab = shown
    tab.open(path, 360)
    ece = "[...document.querySelectorAll('th')].find(cell => cell.textContent === 'ECE')"
    assert 0 < tab.evaluate(f"{ece}.getBoundingClientRect().right") <= 360


def test_long_row_names_leave_the_figures_visible(shown, tmp_path):
    _, tab = shown
    header = ["last epoch, %", *"abcdefgh", "ECE"]
    name = f"quickstart (data.imbalance 100.0 -> 50.0, {'model.depth 8 -> 14, ' * 4}and 5 more)"
    table = sections.Table("Figures", header, [[name, *["50.0 ± 1.0"] * 9]])
    rest = dict(title="t", subtitle="", notes=[], sections=[], how_first=False, how_title="h", commands=[], facts=[])
    (tmp_path / "long.html").write_text(page.render(main=table, **rest))
    tab.open(tmp_path / "long.html", 1280)
    assert tab.evaluate("document.querySelector('td:last-child').getBoundingClientRect().right") <= 1280
