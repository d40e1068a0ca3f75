"""docs/authors.toml agrees with the configs: values are the authors', or have a reason."""

import re

import pytest

from configs import common, recipes
from docs import authors, settings

CONFIGS = (*settings.LONG_TAILED[:-1], *settings.BALANCED)  # image_folder has no authors
RECIPES = authors.read()["recipe"]
PAIRS = [(recipe, config) for recipe in RECIPES for config in recipe["configs"]]
LINE = re.compile(r"\S.*:\d+(-\d+)?( \(in a copy\))?|\S.* \(could not be read\)")


def methods_of(name):
    """Return the methods that a config takes."""
    with pytest.raises(common.Help) as caught:
        settings.module(name)["get_config"]("help")
    return caught.value.arguments["method"][1].split(", ")


@pytest.mark.parametrize(
    "recipe, config", PAIRS, ids=[f"{number}-{config}" for number, (_, config) in enumerate(PAIRS)]
)
def test_a_value_is_the_authors_unless_a_reason_is_given(recipe, config):
    wrong = [
        f"{value['what']}: theirs {value['theirs']}, ours {ours}, "
        + ("a reason is missing" if "why" not in value else "the reason is superfluous")
        for value in recipe["value"]
        if authors.same(value["theirs"], ours := authors.our_value(config, value)) == ("why" in value)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_method_of_a_config_is_compared_or_has_no_authors_recipe(name):
    compared = {
        re.search(r"method=(\w+)", config)[1]
        for recipe in RECIPES
        for config in recipe["configs"]
        if config.startswith(f"configs/{name}.py:")
    }
    alone = [method for entry in authors.read()["alone"] if name in entry["data"] for method in entry["methods"]]
    assert sorted(compared | set(alone)) == sorted(methods_of(name))
    assert not compared & set(alone) and len(set(alone)) == len(alone)


def test_every_value_has_its_line():
    for recipe in RECIPES:
        for value in recipe["value"]:
            parts = value["where"].split("; ")
            assert all(map(LINE.fullmatch, parts)), f"{value['what']}: {value['where']}"
            assert len({"ours", "said"} & set(value)) == 1, value["what"]
            assert set(value) <= {"what", "theirs", "where", "ours", "said", "why"}, value["what"]


MATTERS = {
    "epochs": r"(\w+\.)?epochs",
    "learning rate": r"\w+\.(rates|lr)",
    "weight decay": r"\w+\.optimizer\.weight_decay",
    "sampler": r"\w+\.sampler\.name",
    "augmentation": r"\w+\.augment\.\w+",
    "initial weights": r"model\.(init|classifier_init)|.*initial (weights|scales)",
    "seed": r"seed",
}


@pytest.mark.parametrize("kind", MATTERS)
def test_each_recipe_has_every_value_that_matters(kind):
    keys = {config: [] for _, config in PAIRS}
    for recipe, config in PAIRS:
        keys[config] += [text for value in recipe["value"] for text in (value.get("ours", ""), value["what"])]
    missing = {config for config in keys if not any(re.fullmatch(MATTERS[kind], key) for key in keys[config])}
    unread = {config for config in keys if "trades,awp" in config} if kind == "initial weights" else set()
    assert missing == unread  # TRADES-AWP's network could not be read


def test_every_source_is_a_repository_at_a_commit_and_is_used():
    sources = authors.read()["source"]
    assert {recipe["source"] for recipe in RECIPES} == set(sources)
    for source in sources.values():
        assert source["code"].startswith("https://github.com/")
        assert all(
            re.fullmatch(r"([\w-]+/[\w.-]+@)?[0-9a-f]{40}", commit)
            for commit in (source["commit"], *source.get("commits", {}).values())
        )
        files = " ".join(value["where"] for recipe in RECIPES for value in recipe["value"])
        assert [file for file in source.get("commits", {}) if file not in files] == []


def test_a_key_that_no_config_has_differs():
    value = dict(what="x", theirs=1.0, ours="first.method.betta")
    config = "configs/cifar100.py:method=trades"
    assert not authors.same(value["theirs"], authors.our_value(config, value))


@pytest.mark.parametrize(
    "theirs, ours, expected",
    [
        (0.1, 0.1000000001, True),
        (0.1, 0.101, False),
        ("8/255", 8 / 255, True),
        ("8/255", 0.031, False),
        ([1, 2], (1.0, 2.0), True),
        ([1, 2], (1.0,), False),
        (True, 1, False),
        (0.0, False, False),
        ({"1": 0.1, "9": 0.01}, {"1": 0.1}, False),
        ({"1": 0.1}, {"1": 0.1}, True),
        ("none", 0, False),
    ],
)
def test_values_are_equal_in_any_form(theirs, ours, expected):
    assert authors.same(theirs, ours) is expected


def test_rates_are_compared_at_the_authors_epochs():
    value = dict(what="rate", theirs={"1": 0, "75": 0, "76": 0, "101": 0}, ours="first.rates")
    ours = authors.our_value("configs/cifar100.py:method=lbgat", value)
    assert ours == pytest.approx({"1": 0.02, "75": 0.1, "76": 0.01})


def test_the_page_has_every_difference_and_every_method():
    page = (settings.ROOT / "docs" / "differences.md").read_text()
    assert all(value["why"] in page for recipe in RECIPES for value in recipe["value"] if "why" in value)
    assert all(recipe.title in page for recipe in recipes.RECIPES.values())


def test_a_link_has_the_commit_of_its_file():
    source = dict(code="https://github.com/a/b", commit="1" * 40, commits={"d.py": "2" * 40}, folder="f/")
    linked = authors._linked(source, "g/c.py:3-4; d.py:5; e (could not be read)")
    first = f"[c.py:3-4](https://github.com/a/b/blob/{'1' * 40}/f/g/c.py#L3-L4)"
    assert linked == f"{first}; [d.py:5](https://github.com/a/b/blob/{'2' * 40}/f/d.py#L5); e (could not be read)"


def test_a_link_to_a_file_of_a_copy_leads_to_the_copy():
    source = dict(code="https://github.com/a/b", commit="1" * 40, commits={"d.py": f"x/y@{'2' * 40}"})
    link = f"[d.py:5](https://github.com/x/y/blob/{'2' * 40}/d.py#L5) (in a copy)"
    assert authors._linked(source, "d.py:5; d:6 (in a copy)") == f"{link}; d:6 (in a copy)"


def test_methods_with_the_same_data_sets_are_listed_together():
    configs = ["configs/cifar100.py:method=lbgat,beta=6", "configs/cifar100.py:method=lbgat,beta=0"]
    configs += ["configs/cifar10.py:method=alp", "configs/cifar10.py:method=trades"]
    assert authors._concerned(configs) == "LBGAT: CIFAR-100 (beta 6, 0)<br>ALP, TRADES: CIFAR-10"
