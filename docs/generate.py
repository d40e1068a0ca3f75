"""Write the blocks of the pages that come from the configs: recipes, settings and figures.

    python -m docs.generate

Run it after a change of a config. It replaces the text between `<!-- recipe: cifar100_lt:method=mislas -->` and
`<!-- end -->`; a test checks that the pages are up to date. Our figures come from the archives in `results/`
(`ltjax.archive`), the papers' from the configs' docstrings.
"""

import functools
import math
import re
import runpy
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import thinned
from configs import common, recipes
from ltjax import compare, optim
from ltjax.config import RunConfig, StageConfig, parse
from ltjax.report.tables import markdown
from ltjax.runs.results import percent
from ltjax.system.files import read_json

ROOT = Path(__file__).parents[1]
FROM_SCRATCH = {"image_folder": ",pretrained=none"}  # where that is not the default
LONG_TAILED = ("cifar100_lt", "cifar10_lt", "imagenet_lt", "inat18", "places_lt", "image_folder")
BALANCED = ("cifar100", "cifar10", "tiny_imagenet")
RESULTS = ROOT / "results"
NOT_RUN = "not yet run"
SHORT = "budget=short"
TITLES = {
    "cifar100_lt": "CIFAR-100-LT",
    "cifar10_lt": "CIFAR-10-LT",
    "imagenet_lt": "ImageNet-LT",
    "inat18": "iNaturalist 2018",
    "places_lt": "Places-LT",
    "image_folder": "a folder of images",
    "cifar100": "CIFAR-100",
    "cifar10": "CIFAR-10",
    "tiny_imagenet": "Tiny ImageNet",
    "features": "features from a file",
}


def load(text: str) -> RunConfig:
    """Parse "cifar100_lt:method=mislas"."""
    name, _, arguments = text.partition(":")
    return parse(module(name)["get_config"](arguments or None).to_dict())


def module(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))


def command(text: str) -> str:
    name, colon, arguments = text.partition(":")
    return f"python run.py --config=configs/{name}.py{colon}{arguments}"


def shown(value: Any) -> str:
    """Format a setting: {"name": "erm", "net": "net"} -> "erm, net net"; floats with four digits."""
    if isinstance(value, Mapping):
        rest = [
            f"{key} ({shown(item)})" if isinstance(item, Mapping) else f"{key} {shown(item)}"
            for key, item in value.items()
            if key not in ("name", "kind") and is_set(item)
        ]
        return ", ".join([str(value[key]) for key in ("name", "kind") if key in value] + rest)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple):
        return " ".join(map(shown, value)) if len(value) <= 4 else f"{shown(value[0])} to {shown(value[-1])}"
    return str(value)


def is_set(value: Any) -> bool:
    """Return whether a setting is shown: not 0, empty or off."""
    return value not in (False, 0, "", None) and not (isinstance(value, (Mapping, tuple)) and not value)


def recipe(text: str) -> str:
    """Return a table with a column for each stage, and the command."""
    run = load(text)
    stages = run.stages
    rows: list[tuple[str, list[str]]] = [("", [stage.title for stage in stages.values()])]

    def row(title: str, values: list[str]) -> None:
        if any(values):
            rows.append((title, [value or "-" for value in values]))

    every = list(stages.values())
    row("name", [f"`config.{name}`" for name in stages])
    row("starts from", [stage.start_from for stage in every])
    row("new classifier", [shown(stage.surgery) for stage in every])
    row("method", [shown(stage.method) if stage.epochs else "" for stage in every])
    row("trains", [_trained(stage) for stage in every])
    row("epochs", [_epochs(stage) for stage in every])
    row("learning rate", [_schedule(stage) for stage in every])
    row("sampler", [shown(stage.sampler) if stage.epochs else "" for stage in every])
    row("augmentation", [_augmentation(stage.augment) if stage.epochs else "" for stage in every])
    row("views", [_views(stage.views) for stage in every])
    row("batch norm", [stage.batch_norm if stage.epochs else "" for stage in every])
    row("at evaluation", [shown(stage.eval_classifier) if stage.eval_classifier.get("tau") else "" for stage in every])
    optimizer = run.optimizer._replace(nesterov=any(stage.optimizer["nesterov"] for stage in every))
    lines = [f"| {title} | {' | '.join(values)} |" for title, values in rows]
    lines.insert(1, "|---|" + "---|" * len(every))
    lines += ["", f"Network: {_network(run.model)}{f'; guide: {_network(run.guide)}' if run.guide else ''}. "]
    decay, momentum = shown(optimizer.weight_decay), shown(optimizer.momentum)
    nesterov = " (Nesterov)" if optimizer.nesterov else ""
    lines[-1] += f"SGD with momentum {momentum}{nesterov}, weight decay {decay}, batches of {run.batch_size}."
    lines += ["", f"    {command(text)}"]
    return "\n".join(lines)


def _epochs(stage: StageConfig) -> str:
    """Epochs, and how many draws an epoch has if it is not one pass over the images."""
    balanced = ", each of (largest class count) x (classes) draws"
    return str(stage.epochs) + (balanced if stage.epoch_size == "balanced" else "")


def _schedule(stage: StageConfig) -> str:
    """Describe the learning rate: "0.1; warm-up over 5 epochs; times 0.1 at epoch 160 and again at 180"."""
    if not stage.epochs:
        return ""
    parts, schedule = [f"{stage.lr:g}"], dict(stage.schedule)
    if schedule["kind"] == "cosine":
        parts.append("falling as a cosine")
    if warmup := round(schedule.get("warmup", 0) * stage.epochs):
        start = schedule.get("warmup_start", 0)
        parts.append(f"warm-up over {warmup} epoch{'s' * (warmup > 1)}" + (f" from {start:.3g} of it" if start else ""))
    if schedule["kind"] == "step" and schedule.get("decay_at"):
        at = " and again at ".join(str(round(share * stage.epochs)) for share in schedule["decay_at"])
        parts.append(f"times {schedule['decay']:g} at epoch {at}")
    return "; ".join(parts)


def _trained(stage: StageConfig) -> str:
    rates = {name: group["rate"] for name, group in stage.groups.items() if group["rate"]}
    return ", ".join(name if rate == 1 else f"{name} at {rate:g} of the rate" for name, rate in rates.items())


def _augmentation(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        key if value is True else f"{key} {shown(value)}" for key, value in settings.items() if is_set(value)
    )


def _views(views: Mapping[str, Mapping[str, Any]]) -> str:
    """Describe the views of a stage; those of equal settings together: "2 x (flip, grey 0.2)"."""
    shown = [_augmentation(views[name]) for name in sorted(views)]
    return ", ".join(f"{shown.count(text)} x ({text})" for text in dict.fromkeys(shown))


def _network(settings: Mapping[str, Any]) -> str:
    """Return its name and the settings that differ from the usual ones."""
    usual = dict(classifier="linear", classifier_init="he", cosine_scale=30.0, dtype="float32", branch_kind="norm")
    if settings.get("classifier") == "cosine":
        del usual["cosine_scale"]
    rest = {
        key: value
        for key, value in settings.items()
        if key not in ("name", "mean", "std") and is_set(value) and usual.get(key) != value
    }
    return f"`{settings['name']}`" + "".join(f", {key} {shown(value)}" for key, value in rest.items())


def across(text: str) -> str:
    """Return the table for "mislas: epochs, features.augment.mixup_alpha=mixup": settings on each long-tailed set."""
    method, _, columns = text.partition(":")
    paths = [column.strip().partition("=") for column in columns.split(",")]
    lines = ["| data set | " + " | ".join(title or path for path, _, title in paths) + " |"]
    lines.append("|---|" + "---|" * len(paths))
    for name in LONG_TAILED:
        for imbalance in (100, 50, 10) if name.startswith("cifar") else (None,):
            arguments = f"method={method}" + (f",imbalance={imbalance}" if imbalance else FROM_SCRATCH.get(name, ""))
            config = module(name)["get_config"](arguments).to_dict()
            title = TITLES[name] + (f", imbalance {imbalance}" if imbalance else "")
            lines.append(f"| {title} | " + " | ".join(shown(_at(config, path)) for path, _, _ in paths) + " |")
    return "\n".join(lines)


def _at(config: Any, path: str) -> Any:
    for key in path.split("."):
        config = config.get(key, "-") if isinstance(config, Mapping) else "-"
    return config


def sections(name: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the figures in a config's docstring: a heading that ends with a colon, and the indented lines below."""
    for paragraph in module(name)["__doc__"].split("\n\n"):
        lines = paragraph.strip("\n").split("\n")
        first = next((n for n, line in enumerate(lines) if line.startswith("  ") and line.strip()), 0)
        if first and lines[first - 1].endswith(":"):
            yield " ".join(lines[:first]).rstrip(":"), [line.strip() for line in lines[first:] if line[:2] == "  "]


def published(name: str, method: str) -> list[str]:
    """Return the paper's figures on this data set, from the config's docstring."""
    return [value for who, value in _lines(name, "paper") if _is(who, method)]


def ours(name: str, method: str) -> list[str]:
    """Return the figures of our full-length runs, or [NOT_RUN]."""
    written = [value for who, value in _lines(name, "ours") if _is(who, method) and value != NOT_RUN]
    return written + archived(name, method, "-bf16") + archived(name, method, "") or [NOT_RUN]


def archived(name: str, method: str, ending: str) -> list[str]:
    """Return accuracy and ECE of archives at imbalance 100, 50 and 10, or [] if there are none.

    Such as ["47.1 / 4.7; 52.0 / 2.3; - (bf16, 3 seeds)"]. `ending` ends the run's name: "-bf16", "" for float32, or
    "-bf16-short".
    """
    by_name = {row.name: row for row in result_rows(f"{name}-{method}-if*")}
    rows = [by_name.get(f"{name}-{method}-if{imbalance}{ending}") for imbalance in (100, 50, 10)]
    cells = [
        "-" if row is None else " / ".join(percent(*row.figures[key]) for key in ("all", "ece") if key in row.figures)
        for row in rows
    ]
    seeds = max((len(row.seeds) for row in rows if row), default=0)
    kind = f"{'bf16' if '-bf16' in ending else 'float32'}, {seeds} seed{'s' * (seeds > 1)}"
    return [f"{'; '.join(cells)} ({kind})"] if seeds else []


def result_rows(pattern: str, *, stages: bool = False) -> list[compare.Row]:
    """Return the table's rows for archives whose name without the seed matches a glob, as "cifar100_lt-*-if100"."""
    folders = sorted(RESULTS.glob(f"{pattern}-seed*"))
    return compare.rows(folders, stages=stages) if folders else []


def results_table(text: str) -> str:
    """Return a table of archives, the best first, for "cifar100_lt-*-if100-bf16" or "stages: cifar100_lt-*"."""
    stages, _, pattern = text.rpartition(": ")
    rows = result_rows(pattern, stages=bool(stages))
    if not rows:
        return f"No runs yet: `python -m benchmarks.reproduce` makes them in `results/{pattern}-seed*`."
    if not stages:
        rows = sorted(rows, key=lambda row: -row.figures["all"].mean)
    sources = [read_json(folder / "results.json") for row in rows for folder in row.runs]
    commits = sorted({source["git_commit"][:7] for source in sources if source["git_commit"]})
    versions = sorted({f"jax {source['versions']['jax']}" for source in sources})
    devices = sorted({f"{source['num_devices']} x {source['device'].partition(':')[0]}" for source in sources})
    origin = [f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}", *versions, *devices]
    return f"{markdown(compare.cells(rows))}\n{compare.NOTES} {'; '.join(origin)}."


def ours_short(name: str, method: str) -> list[str]:
    """Return the figures of budget=short, each named, with the commit if the line has one."""
    found = archived(name, method, "-bf16-short")
    for heading, lines in sections(name):
        if SHORT in heading:
            named = re.split(r" (?:of|on|in) ", heading)[0].split(" / ")  # Top-1 / ECE of the last epoch in %, ...
            pattern = rf"\b{method}(, \w[\w ,]*?)?\s+(\d+\.\d+(?: / \d+\.\d+)+)(?:\s+(?:commit )?([0-9a-f]{{7}}))?"
            for variant, values, commit in re.findall(pattern, "\n".join(lines)):
                pairs = zip(named, values.split(" / "), strict=True)
                figure = ", ".join(f"{what} {value}" for what, value in pairs)
                found.append(figure + (f" ({variant[2:]})" if variant else "") + (f", {commit}" if commit else ""))
    return found


def _lines(name: str, whose: str) -> Iterator[tuple[str, str]]:
    """`MiSLAS, ResNet-50, paper    52.7 / 1.78` -> ("MiSLAS", "ResNet-50: 52.7 / 1.78")."""
    for _, lines in sections(name):
        for line in lines:
            if match := re.match(rf"(.*?), {whose}[^ ]*\s{{2,}}(.*)", line):
                who, _, variant = match[1].partition(", ")
                parts = re.split(r"\s{2,}", match[2])
                values = "".join(part + ("; " if re.search(r"\d\.\d|^-$", part) else " ") for part in parts)
                values = values.rstrip("; ").replace("; (", " (")
                yield who, (f"{variant}: " if variant else "") + values


def _is(who: str, method: str) -> bool:
    return who in (recipes.METHODS[method].title, method, "any method")


def headings(name: str) -> list[str]:
    return [heading for heading, _ in sections(name)]


def abouts(name: str) -> list[tuple[bool, str]]:
    """Return (whether a column is of budget=short, its content) for each column of figures."""
    return [(SHORT in heading, re.sub(rf"{SHORT} \((.*?)\)", r"\1", heading)) for heading in headings(name)]


def methods_of(name: str) -> list[str]:
    """Return the methods that a config allows, its default first."""
    try:
        module(name)["get_config"]("help")
    except common.Help as asked:
        return asked.arguments["method"][1].split(", ")
    raise ValueError(f"{name} answers no help")


def reproduction(name: str) -> str:
    """Return a table of all methods on a data set: the paper's figure, ours, and the argument."""
    methods = methods_of(name)
    columns = {False: "Published, and ours at full length", True: f"Ours with `{SHORT}`"}
    lines = [f"{columns[short]}: {about}.\n" for short, about in abouts(name)] or ["No figures yet.\n"]
    lines += ["This command makes the first row:\n", f"    {command(f'{name}:method={methods[0]}')}\n"]
    lines.append("| method | published | ours, full length | ours, budget=short | argument |")
    lines.append("|---|---|---|---|---|")
    for method in methods:
        cells = (published(name, method), ours(name, method), ours_short(name, method))
        values = ["<br>".join(cell) or "-" for cell in cells]
        lines.append(f"| {recipes.METHODS[method].title} | {' | '.join(values)} | `method={method}` |")
    return "\n".join(lines)


def figures(method: str) -> str:
    """Return a table of a method's figures on all data sets that have any."""
    lines = ["| data set | published | ours, full length | ours, budget=short |", "|---|---|---|---|"]
    notes = []
    for name in (*LONG_TAILED, *BALANCED):
        cells = (published(name, method), ours(name, method), ours_short(name, method))
        if cells[0] or cells[2] or cells[1] != [NOT_RUN]:
            about = dict(abouts(name))
            long = f": {about[False].partition(', full length')[0]}" if cells[0] or cells[1] != [NOT_RUN] else ""
            lines.append(f"| {TITLES[name]}{long} | {' | '.join('<br>'.join(cell) or '-' for cell in cells)} |")
            notes += [f"`{SHORT}` on {TITLES[name]}: {about[True]}."] if cells[2] else []
    if len(lines) == 2:
        return "We know of no published figures on these data sets with these networks. Ours: not yet run."
    return "\n".join([*lines, *(f"\n{note}" for note in notes)])


def full(text: str) -> str:
    """Return a table of the figures at full length of "cifar100_lt: mislas, drolt"."""
    name, _, methods = text.partition(": ")
    lines = [f"| {TITLES[name]}: {dict(abouts(name))[False]} | published | ours |", "|---|---|---|"]
    for method in methods.split(", "):
        cells = ("<br>".join(cell) for cell in (published(name, method), ours(name, method)))
        lines.append(f"| {recipes.METHODS[method].title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def docstring(name: str) -> str:
    """Return the figures of a config's docstring as lists."""
    return "\n\n".join(
        "\n".join([f"{heading}:\n", *(f"- {part.strip()}" for line in lines for part in line.split(";"))])
        for heading, lines in sections(name)
    )


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
def authors() -> dict[str, Any]:
    """Read docs/authors.toml."""
    return tomllib.loads((ROOT / "docs" / "authors.toml").read_text())


@functools.cache
def settings_of(text: str) -> dict[str, Any]:
    """Return the settings of "configs/cifar100_lt.py:method=ce"; `first` and `last` are its first and last stage."""
    run = load(text.removeprefix("configs/").replace(".py", "", 1))
    stages = run.stages
    every = {name: stage._asdict() for name, stage in stages.items()}
    top = {key: value._asdict() if hasattr(value, "_asdict") else value for key, value in run._asdict().items()}
    first, *_, last = (*run.stages, *run.stages)
    return {**top, **every, "first": every[first], "last": every[last]}


def our_value(config: str, value: Mapping[str, Any]) -> Any:
    """Return our value for one of docs/authors.toml; `first.rates` has the epochs of the authors' rates."""
    if "said" in value:
        return value["said"]
    path, _, last = value["ours"].rpartition(".")
    if last != "rates":
        return _at(settings_of(config), value["ours"])
    stage = _at(settings_of(config), path)
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
    """Yield the values of a recipe of docs/authors.toml; if its configs differ, ours lists all their values."""
    source = authors()["source"][recipe["source"]]
    for value in recipe["value"]:
        ours = dict.fromkeys(_text(our_value(config, value)) for config in recipe["configs"])
        texts = _text(value["theirs"]), _linked(source, value["where"]), "; ".join(ours)
        yield Compared(value["what"], *texts, value.get("why", ""))


def differences(_: str) -> str:
    """Return the differences, each once: first those of most recipes, then the others by method and data set."""
    recipes_of: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for recipe in authors()["recipe"]:
        for value in compared(recipe):
            if value.why:
                recipes_of.setdefault((value.what, value.theirs, value.ours, value.why), []).append(recipe)
    common_rows, rows = ["| what | theirs | ours | why | in the code of |", "|---|---|---|---|---|"], []
    for key, from_recipes in recipes_of.items():
        titles = dict.fromkeys(authors()["source"][recipe["source"]]["title"] for recipe in from_recipes)
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
    for name, source in authors()["source"].items():
        where = f"[{source['code'].removeprefix('https://')}]({source['code']}/tree/{source['commit']})"
        lines += [f"### {source['title']}", "", f"{where}, commit {source['commit'][:7]}.", ""]
        lines += ["| method: data set | values |", "|---|---|"]
        for recipe in authors()["recipe"]:
            if recipe["source"] == name:
                texts = [f"*{recipe['note']}*"] if "note" in recipe else []
                for value in compared(recipe):
                    text = f"{value.what}: {value.theirs}"
                    texts.append(f"{f'**{text}; ours {value.ours}**' if value.why else text} ({value.where})")
                lines.append(f"| {_concerned(recipe['configs'])} | {'<br>'.join(texts)} |")
        lines.append("")
    return "\n".join(lines[:-1])


def alone(_: str) -> str:
    """Return a table of methods and data sets for which no authors' code has a recipe."""
    lines = ["| method | data set | origin of ours |", "|---|---|---|"]
    for entry in authors()["alone"]:
        methods = ", ".join(recipes.METHODS[method].title for method in entry["methods"])
        lines.append(f"| {methods} | {', '.join(TITLES[name] for name in entry['data'])} | {entry['why']} |")
    return "\n".join(lines)


def _text(value: Any) -> str:
    """Format a value; rates as "0.02 at epoch 1, 0.1 at 2"."""
    if isinstance(value, Mapping):
        rates = ", ".join(f"{rate:.4g} at {epoch}" for epoch, rate in value.items())
        return rates.replace(" at ", " at epoch ", 1) or "it has fewer epochs"
    return shown(tuple(value) if isinstance(value, list) else value).replace("|", "\\|")


def _linked(source: Mapping[str, Any], where: str) -> str:
    """Link each `file:line` to that line, without the file's folder; a file of a copy to the copy."""
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
    """List methods and data sets of configs; those with the same data sets and arguments are together.

    `imbalance` says whether to show that argument.
    """
    of_method: dict[str, dict[str, dict[str, list[str]]]] = {}
    for config in dict.fromkeys(configs):
        path, _, arguments = config.partition(":")
        given = dict(part.split("=") for part in arguments.split(","))
        of_data_set = of_method.setdefault(recipes.METHODS[given.pop("method")].title, {})
        values = of_data_set.setdefault(TITLES[Path(path).stem], {})
        for key, value in given.items():
            if (imbalance or key != "imbalance") and value not in values.setdefault(key, []):
                values[key].append(value)
    of_data: dict[str, list[str]] = {}
    for method, data in of_method.items():
        texts = []
        for title, arguments in data.items():
            given = "; ".join(f"{key} {', '.join(some)}" for key, some in arguments.items())
            texts.append(title + (f" ({given})" if given else ""))
        of_data.setdefault(", ".join(texts), []).append(method)
    return "<br>".join(f"{', '.join(methods)}: {data}" for data, methods in of_data.items())


def photographs(_: str) -> str:
    """Return the table of `benchmarks.thinned`."""
    measured = read_json(ROOT / "benchmarks" / "thinned.json")
    about = f"{len({row['draw'] for row in measured['rows']})} draws, jax {measured['versions']['jax']}, commit "
    about += measured["git_commit"].replace(measured["git_commit"][:40], measured["git_commit"][:7])
    return f"{thinned.summary(measured['rows'])}\n\nMeans of {about}; ± is the sample standard deviation over draws."


BLOCKS = {
    "results": results_table,
    "recipe": recipe,
    "across": across,
    "reproduction": reproduction,
    "figures": figures,
    "full": full,
    "docstring": docstring,
    "differences": differences,
    "values": values,
    "alone": alone,
    "photographs": photographs,
}
PATTERN = re.compile(r"(<!-- (?P<kind>\w+): (?P<what>.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(markdown: str) -> str:
    """Return a page with its blocks generated."""
    return PATTERN.sub(lambda match: f"{match[1]}\n{BLOCKS[match['kind']](match['what'])}\n\n{match[4]}", markdown)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    for page in pages():
        before = page.read_text()
        after = filled(before)
        if before != after:
            page.write_text(after)
            print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
