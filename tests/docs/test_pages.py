"""The pages are correct: commands parse, links exist, figures and recipes are up to date."""

import argparse
import importlib
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from configs import recipes
from docs import figures, generate
from ltjax import losses
from ltjax.interop import pretrained, weights

ROOT = Path(__file__).parents[2]
PAGES = [*generate.pages(), *(ROOT / name for name in ("CONTRIBUTING.md", "benchmarks/README.md"))]
WRITTEN = [page for page in PAGES if page.name != "extend.md"]  # its commands need the config that it adds


def name_of(page):
    return str(page.relative_to(ROOT))


def commands(text):
    """Yield the words of every `python run.py ...` and `python -m ...` of a page, without comments and shell syntax."""
    text = re.sub(r"\\\n\s*", " ", text)
    for match in re.finditer(r"\bpython3? (?:run\.py|-m (?:ltjax|benchmarks|docs)\.[\w.]+)([^`\n]*)", text):
        line = re.split(r"\s+#|&&|;|</", match[0])[0]
        if line.count('"') % 2:  # the end of a quotation that contains the command
            line = line.rpartition('"')[0]
        yield shlex.split(line)


CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.py")) if "def get_config" in path.read_text()]


@pytest.fixture(scope="module")
def known_flags():
    """Read the names of run.py's flags and modes from its source; importing it would define the flags."""
    source = (ROOT / "run.py").read_text()
    names = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source)) | {"help"}
    modes = set(re.findall(r'"(\w+)":', re.search(r"MODES = \{(.*?)\}", source, re.DOTALL)[1]))
    return names, modes


def check_run(arguments, known_flags):
    names, modes = known_flags
    given = [argument.removeprefix("--").partition("=")[::2] for argument in arguments]
    settings = {name: value for name, value in given if name.startswith("config.")}
    rest = dict(item for item in given if not item[0].startswith("config."))
    assert set(rest) <= names, f"unknown flags {sorted(set(rest) - names)}"
    assert rest.get("mode", "train") in modes
    if "config" in rest and rest["config"] not in ("CONFIG", "FILE"):
        path, _, text = rest["config"].partition(":")
        values = runpy.run_path(str(ROOT / path))["get_config"](*([text] if text and text != "help" else []))
        for key in settings:
            folder = values
            for part in key.removeprefix("config.").split("."):
                assert part in folder, f"{path} has no {key}"
                folder = folder[part]


class Parsed(Exception):
    """The arguments were understood."""


def understood(module, arguments):
    """Return whether a module's command line takes these arguments."""
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, *given):
        parse(parser, *given)
        raise Parsed

    if module.startswith("docs."):
        return not arguments
    is_package = (ROOT / module.replace(".", "/")).is_dir()
    main = importlib.import_module(f"{module}.__main__" if is_package else module).main
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [module, *arguments])
        try:
            return main() is Parsed  # main rejected the arguments
        except Parsed:
            return True
        except SystemExit:
            return "--help" in arguments


@pytest.fixture
def backbones_of_others(monkeypatch):
    """Pretend that files and repositories of backbones are here: vision transformers or ResNets by their name."""
    find = pretrained.find

    def pretend(name):
        if name in weights.shipped():
            return find(name)
        network = dict(name="vit", depth=12) if "vit" in name else dict(name="resnet", depth=50, stem="large")
        settings = dict(**network, mean=(0.5,) * 3, std=(0.5,) * 3)
        return pretrained.Backbone(name, "0" * 64, settings, {"size": 224, "crop": 1.0}, "")

    monkeypatch.setattr(pretrained, "find", pretend)


@pytest.mark.parametrize("page", [*WRITTEN, *CONFIGS], ids=name_of)
def test_every_command_on_a_page_parses(page, known_flags, backbones_of_others):
    for command in commands(page.read_text()):
        if command[1] == "run.py":
            check_run(command[2:], known_flags)
        else:
            assert understood(command[2], command[3:]), " ".join(command)


def test_commands_are_found_whole():
    text = "x `python run.py --config=configs/cifar10.py` (y).\n    python -m ltjax.compare \\\n  a --no  # why\n"
    actual = [["python", "run.py", "--config=configs/cifar10.py"], ["python", "-m", "ltjax.compare", "a", "--no"]]
    assert list(commands(text)) == actual


def test_wrong_commands_are_rejected(known_flags):
    with pytest.raises(AssertionError, match="epoks"):
        check_run(["--config=configs/cifar100_lt.py:method=ce", "--config.epoks=3"], known_flags)
    with pytest.raises(ValueError, match="unknown config argument"):
        check_run(["--config=configs/cifar100_lt.py:metod=ce"], known_flags)
    with pytest.raises(AssertionError, match="modus"):
        check_run(["--modus=eval"], known_flags)
    assert not understood("ltjax.compare", ["runs", "--no"])


def anchors(page):
    """Return the anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_target_of_every_relative_link_exists(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.is_file(), f"{target} does not exist"
        assert not anchor or anchor in anchors(file), f"{target} has no heading #{anchor}"


@pytest.mark.parametrize("page", [page for page in generate.pages() if "<!-- end -->" in page.read_text()], ids=name_of)
def test_generated_blocks_are_up_to_date(page):
    text = page.read_text()
    assert generate.filled(text) == text, "run `python -m docs.generate`"


def numbers(text):
    return set(re.findall(r"\d+\.\d+", text))


@pytest.mark.parametrize("name", [*generate.LONG_TAILED[:-1], *generate.BALANCED])
def test_every_figure_of_a_config_is_in_its_table(name):
    text = "\n".join(line for _, lines in generate.sections(name) for line in lines)
    assert numbers(text) <= numbers(generate.reproduction(name))
    assert generate.headings(name) or name == "tiny_imagenet"


def test_our_figure_replaces_not_yet_run(monkeypatch, tmp_path):
    lines = (
        "Top-1 in %, full length:",
        "MiSLAS, paper  47.0",
        "MiSLAS, ours  46.5, commit abc",
        "any method, ours  not yet run",
    )
    doc = "\n  ".join(lines)
    monkeypatch.setattr(generate, "module", lambda name: {"__doc__": doc})
    monkeypatch.setattr(generate, "RESULTS", tmp_path)  # no archives
    assert generate.ours("cifar100_lt", "mislas") == ["46.5, commit abc"]
    assert generate.ours("cifar100_lt", "ce") == ["not yet run"]


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """Return write(name, seed, accuracy, ece), which makes an archive with what tables read."""
    monkeypatch.setattr(generate, "RESULTS", tmp_path)

    def write(name, seed, accuracy, ece, **more):
        folder = tmp_path / f"{name}-seed{seed}"
        folder.mkdir()
        figures = {"accuracy": {"all": accuracy, "few": accuracy / 2}, "ece": ece, "num_images": 10_000}
        stage = {"title": "One", "seconds": 60.0, **figures}
        results = {"name": name, "final_stage": "one", "seconds": 60.0, "seed": seed, "stages": {"one": stage}}
        origin = {"git_commit": "abcdef123", "versions": {"jax": "0.12.0"}, "device": "cpu: cpu", "num_devices": 2}
        (folder / "results.json").write_text(json.dumps({**results, **origin, **more}))
        config = {"name": name, "data": {"name": "cifar100"}, "stages": ["one"], "one": {}, "seed": seed}
        (folder / "config.json").write_text(json.dumps(config))

    return write


def test_our_figures_come_from_archives(archives):
    assert generate.ours("cifar100_lt", "mislas") == ["not yet run"]
    archives("cifar100_lt-mislas-if100-bf16", 0, 0.46, 0.05)
    archives("cifar100_lt-mislas-if100-bf16", 1, 0.48, 0.05)
    archives("cifar100_lt-mislas-if10-bf16", 0, 0.63, 0.02)
    archives("cifar100_lt-mislas-if100", 0, 0.465, 0.05)
    archives("cifar100_lt-mislas-if100-bf16-short", 0, 0.19, 0.05)
    assert generate.ours("cifar100_lt", "mislas") == [
        "47.0 ± 1.4 / 5.0 ± 0.0; -; 63.0 / 2.0 (bf16, 2 seeds)",
        "46.5 / 5.0; -; - (float32, 1 seed)",
    ]
    assert generate.archived("cifar100_lt", "mislas", "-bf16-short") == ["19.0 / 5.0; -; - (bf16, 1 seed)"]


def test_a_table_of_archives_has_configs_sorted_by_accuracy_and_origins(archives):
    archives("cifar100_lt-ce-if100-bf16", 0, 0.38, 0.2)
    archives("cifar100_lt-mislas-if100-bf16", 0, 0.47, 0.05)
    archives("cifar100_lt-mislas-if10-bf16", 0, 0.63, 0.02)
    lines = generate.results_table("cifar100_lt-*-if100-bf16").splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["MiSLAS", "Cross-entropy"]
    assert lines[-1].endswith("Commit abcdef1; jax 0.12.0; 2 x cpu.")
    assert "63.0" not in "".join(lines)


def test_a_table_without_archives_says_how_to_make_them(archives):
    assert "`python -m benchmarks.reproduce` makes them" in generate.results_table("nothing-*")


def test_short_figures_have_the_names_of_their_heading(monkeypatch):
    lines = "Top-1 / few-shot classes / ECE of the last epoch in %, budget=short:", "drolt  15.3 / 0.8 / 0.9   2411053"
    monkeypatch.setattr(generate, "module", lambda name: {"__doc__": "\n  ".join(lines)})
    assert generate.ours_short("cifar100_lt", "drolt") == ["Top-1 15.3, few-shot classes 0.8, ECE 0.9, 2411053"]


def test_short_figures_of_several_recipes_are_listed(monkeypatch):
    lines = (
        "Top-1 / ECE in %, budget=short:",
        "reslt  27.2 / 40.1  6c4cfef",
        "reslt, before, float32  28.5 / 39.7  1ccdba6",
    )
    monkeypatch.setattr(generate, "module", lambda name: {"__doc__": "\n  ".join(lines)})
    assert generate.ours_short("cifar100_lt", "reslt") == [
        "Top-1 27.2, ECE 40.1, 6c4cfef",
        "Top-1 28.5, ECE 39.7 (before, float32), 1ccdba6",
    ]


def test_full_length_figures_are_the_papers_and_those_of_archives(archives):
    archives("cifar100_lt-mislas-if100-bf16", 0, 0.46, 0.05)
    header, _, mislas, drolt = generate.full("cifar100_lt: mislas, drolt").splitlines()
    assert "imbalance 100, 50, 10" in header
    assert "47.0 / 4.83" in mislas and mislas.endswith("| 46.0 / 5.0; -; - (bf16, 1 seed) |")
    assert drolt.startswith("| DRO-LT | 47.3") and drolt.endswith("| not yet run |")


def test_every_method_has_a_page():
    listed = (ROOT / "docs" / "methods" / "index.md").read_text()
    assert all(f"`{method}`" in listed for method in recipes.RECIPES)


def test_the_page_of_combinations_has_every_block():
    listed = (ROOT / "docs" / "methods" / "combinations.md").read_text()
    assert all(f"`{block}`" in listed for block in (*recipes.FIRST, *recipes.NEXT))


def test_every_public_loss_is_on_a_page():
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "methods").glob("*.md"))
    alone = {"cross_entropy", "log_prior", "SMOOTHING_SHAPES"}
    assert [name for name in losses.__all__ if name not in pages and name not in alone] == []


@pytest.mark.parametrize("name", ["losses", "attacks"])
def test_every_public_function_of_a_package_is_on_its_page(name):
    package = importlib.import_module(f"ltjax.{name}")
    shown = re.search(r"members: \[(.*)\]", (ROOT / "docs" / "api" / f"{name}.md").read_text())[1].split(", ")
    assert sorted(shown) == sorted(public for public in package.__all__ if callable(getattr(package, public)))


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_picture_is_up_to_date(name):
    svg = (figures.FOLDER / f"{name}.svg").read_text()
    stored = [float(number) for number in re.search(r"<dc:description>(.*?)</dc:description>", svg)[1].split()]
    current = figures.numbers(figures.FIGURES[name]())
    assert stored == pytest.approx(current, rel=0.01, abs=0.003), "run `python -m docs.figures`"


def test_every_page_is_in_the_menu():
    menu = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")} <= menu
