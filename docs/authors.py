"""Tables that compare docs/authors.toml with the configs, for `docs.generate`."""

import functools
import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from configs import recipes
from docs.settings import ROOT, TITLES, at, load, shown
from ltjax import optim


class Compared(NamedTuple):
    """A value of docs/authors.toml and ours, as text.

    Attributes:
        what: the value's name.
        theirs: the authors' value.
        where: links to the lines.
        ours: our value.
        why: the reason for a difference; "" if ours is the same.
    """

    what: str
    theirs: str
    where: str
    ours: str
    why: str


@functools.cache
def read() -> dict[str, Any]:
    """Read docs/authors.toml."""
    return tomllib.loads((ROOT / "docs" / "authors.toml").read_text())


@functools.cache
def settings_of(text: str) -> dict[str, Any]:
    """Return the settings of "configs/cifar100_lt.py:method=ce"; `first` and `last` are stages."""
    run = load(text.removeprefix("configs/").replace(".py", "", 1))
    stages = run.stages
    every = {name: stage._asdict() for name, stage in stages.items()}
    top = {key: value._asdict() if hasattr(value, "_asdict") else value for key, value in run._asdict().items()}
    first, *_, last = (*run.stages, *run.stages)
    return {**top, **every, "first": every[first], "last": every[last]}


def our_value(config: str, value: Mapping[str, Any]) -> Any:
    """Return our value for a value of docs/authors.toml; `first.rates` has the rates at the authors' epochs."""
    if "said" in value:
        return value["said"]
    path, _, last = value["ours"].rpartition(".")
    if last != "rates":
        return at(settings_of(config), value["ours"])
    stage = at(settings_of(config), path)
    rates = stage["lr"] * optim.schedule_table(stage["epochs"], **stage["schedule"])
    return {epoch: float(rates[int(epoch) - 1]) for epoch in value["theirs"] if int(epoch) <= len(rates)}


def same(theirs: Any, ours: Any) -> bool:
    """Return whether two values are equal: "8/255" is a number, and a list equals a tuple."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        return theirs.keys() == ours.keys() and all(same(theirs[key], ours[key]) for key in theirs)
    if isinstance(theirs, (list, tuple)) and isinstance(ours, (list, tuple)):
        return len(theirs) == len(ours) and all(map(same, theirs, ours))
    theirs, ours = _number(theirs), _number(ours)
    if isinstance(theirs, float) and isinstance(ours, float):
        return math.isclose(theirs, ours, rel_tol=1e-6, abs_tol=1e-12)
    return type(theirs) is type(ours) and theirs == ours


def _number(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"[\d.]+(/\d+)?", value):
        return float(Fraction(value))
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def compared(recipe: Mapping[str, Any]) -> Iterator[Compared]:
    """Yield the values of a recipe of docs/authors.toml; `ours` lists the different values of its configs."""
    source = read()["source"][recipe["source"]]
    for value in recipe["value"]:
        ours = dict.fromkeys(_text(our_value(config, value)) for config in recipe["configs"])
        texts = _text(value["theirs"]), _linked(source, value["where"]), "; ".join(ours)
        yield Compared(value["what"], *texts, value.get("why", ""))


def differences(_: str) -> str:
    """Return the differences, each once: first the common ones, then the others by method and data set."""
    recipes_of: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for recipe in read()["recipe"]:
        for value in compared(recipe):
            if value.why:
                recipes_of.setdefault((value.what, value.theirs, value.ours, value.why), []).append(recipe)
    common_rows, rows = ["| what | theirs | ours | why | in the code of |", "|---|---|---|---|---|"], []
    for key, from_recipes in recipes_of.items():
        titles = dict.fromkeys(read()["source"][recipe["source"]]["title"] for recipe in from_recipes)
        if len(titles) > 3:
            common_rows.append(f"| {' | '.join(key)} | {', '.join(titles)} |")
        else:
            configs = [config for recipe in from_recipes for config in recipe["configs"]]
            rows.append(f"| {' | '.join(key)} | {_concerned(configs, imbalance=False)} |")
    head = ["", "| what | theirs | ours | why | method: data set |", "|---|---|---|---|---|"]
    return "\n".join([*common_rows, *head, *rows])


def values(_: str) -> str:
    """Return all values by repository, a row for each group of configs; differences are bold."""
    lines = []
    for name, source in read()["source"].items():
        where = f"[{source['code'].removeprefix('https://')}]({source['code']}/tree/{source['commit']})"
        lines += [f"### {source['title']}", "", f"{where}, commit {source['commit'][:7]}.", ""]
        lines += ["| method: data set | values |", "|---|---|"]
        for recipe in read()["recipe"]:
            if recipe["source"] == name:
                texts = [f"*{recipe['note']}*"] if "note" in recipe else []
                for value in compared(recipe):
                    text = f"{value.what}: {value.theirs}"
                    texts.append(f"{f'**{text}; ours {value.ours}**' if value.why else text} ({value.where})")
                lines.append(f"| {_concerned(recipe['configs'])} | {'<br>'.join(texts)} |")
        lines.append("")
    return "\n".join(lines[:-1])


def alone(_: str) -> str:
    """Return a table of the methods and data sets without a recipe in authors' code."""
    lines = ["| method | data set | origin of ours |", "|---|---|---|"]
    for entry in read()["alone"]:
        methods = ", ".join(recipes.RECIPES[method].title for method in entry["methods"])
        lines.append(f"| {methods} | {', '.join(TITLES[name] for name in entry['data'])} | {entry['why']} |")
    return "\n".join(lines)


def _text(value: Any) -> str:
    """Format a value; rates become "0.02 at epoch 1, 0.1 at 2"."""
    if isinstance(value, Mapping):
        rates = ", ".join(f"{rate:.4g} at {epoch}" for epoch, rate in value.items())
        return rates.replace(" at ", " at epoch ", 1) or "it has fewer epochs"
    return shown(tuple(value) if isinstance(value, list) else value).replace("|", "\\|")


def _linked(source: Mapping[str, Any], where: str) -> str:
    """Link each `file:line` to its line, without the folder; link a file of a copy to the copy."""
    parts = []
    for part in where.split("; "):
        if match := re.fullmatch(r"(\S+\.\w+):(\d+)(?:-(\d+))?", part):
            copy, _, commit = source.get("commits", {}).get(match[1], source["commit"]).rpartition("@")
            code = f"https://github.com/{copy}" if copy else source["code"]
            lines = f"#L{match[2]}" + (f"-L{match[3]}" if match[3] else "")
            short = part.rpartition("/")[2]
            part = f"[{short}]({code}/blob/{commit}/{source.get('folder', '')}{match[1]}{lines})"
            part += " (in a copy)" if copy else ""
        parts.append(part)
    return "; ".join(parts)


def _concerned(configs: Iterable[str], *, imbalance: bool = True) -> str:
    """List methods and data sets of configs, grouped by data sets and arguments; `imbalance`: show that argument."""
    of_method: dict[str, dict[str, dict[str, list[str]]]] = {}
    for config in dict.fromkeys(configs):
        path, _, arguments = config.partition(":")
        settings = dict(part.split("=") for part in arguments.split(","))
        of_data_set = of_method.setdefault(recipes.RECIPES[settings.pop("method")].title, {})
        values = of_data_set.setdefault(TITLES[Path(path).stem], {})
        for key, value in settings.items():
            if (imbalance or key != "imbalance") and value not in values.setdefault(key, []):
                values[key].append(value)
    of_data: dict[str, list[str]] = {}
    for method, data in of_method.items():
        texts = []
        for title, arguments in data.items():
            shown_arguments = "; ".join(f"{key} {', '.join(some)}" for key, some in arguments.items())
            texts.append(title + (f" ({shown_arguments})" if shown_arguments else ""))
        of_data.setdefault(", ".join(texts), []).append(method)
    return "<br>".join(f"{', '.join(methods)}: {data}" for data, methods in of_data.items())
