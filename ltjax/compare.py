"""One table of finished runs; seeds of the same config share a row.

    python -m ltjax.compare runs/*                                # in the terminal
    python -m ltjax.compare runs/ce-seed* runs/mislas-seed* --stages --format=latex > table.tex
    python -m ltjax.compare runs/* --html=comparison.html         # and a page with figures

Figures are those of the last epoch, from each run's results.json: mean ± sample standard deviation over seeds.
"""

import json
import math
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from ltjax import config as configs
from ltjax.report.tables import Cell, latex, markdown, plain
from ltjax.runs.results import COLUMNS, GROUPS, LEGACY_BEST, Column, percent
from ltjax.runs.seeds import MeanStd, mean_and_std
from ltjax.system.command_line import Parser, exit_code
from ltjax.system.files import holding, read_json
from ltjax.system.paths import local
from ltjax.types import UserError

# {key in `Row.figures`: column} of what `--mode=attack` measured, shown if some run has it
ATTACKED = {"pgd-20": "PGD-20", "cw-20": "CW-20", "autoattack": "AutoAttack", "autoattack few": "AutoAttack few"}
# {key in `Row.figures`: heading}. A column of `COLUMNS` is shown if some run shows it; `best` is shown on demand.
FIGURES = {
    **{group: group for group in GROUPS},
    **{column.key: column.title for column in COLUMNS},
    **ATTACKED,
    "best": "legacy best",
}
NOTES = "Last epoch; mean ± sample standard deviation over seeds, in %. Time: h:mm:ss a seed."
COLUMN_NOTES = {  # {heading: line below the table}
    **{column.title: column.note for column in COLUMNS if column.note},
    "AutoAttack": "PGD-20, CW-20, AutoAttack: accuracy on test images attacked by `--mode=attack`.",
    "legacy best": LEGACY_BEST,
}
BEST = {column.key: column.best for column in COLUMNS}  # of other figures: the highest
MOST_DIFFERENCES = 3  # in a row's name
NOT_COMPARABLE = "warning: not comparable"


class FinishedStage(NamedTuple):
    title: str
    seconds: float
    seeds: dict[int, dict[str, float]]  # {seed: {key of `FIGURES`: fraction}}, measured ones only


class FinishedRun(NamedTuple):
    path: Path  # the workdir, or the file if it is not called results.json
    name: str
    settings: dict[str, Any] | None  # those that change what is trained; None without a config.json
    stages: dict[str, FinishedStage]
    final_stage: str
    seconds: float
    facts: dict[str, str | None]  # what two runs must share to be compared; None: unknown


class Row(NamedTuple):
    name: str
    figures: dict[str, MeanStd]  # {key of `FIGURES`: fraction}, those of all seeds
    seconds: float  # of a seed, mean over runs
    seeds: tuple[int, ...]
    runs: tuple[Path, ...]  # those whose seeds were counted
    stage: str | None = None  # None: the final one


class Comparison(NamedTuple):
    rows: list[Row]
    notes: list[str]  # a line each: runs left out or counted once, and warnings


def rows(paths: Iterable[str | Path], *, stages: bool = False) -> list[Row]:
    """Return the table's rows, in the order of the paths.

    Args:
      paths: Workdirs, folders of workdirs, or results.json files with config.json and split.json beside them.
      stages: Make a row for every stage instead of the final one alone.

    Raises:
      UserError: Naming a path that is no finished run.
    """
    return compare(paths, stages=stages).rows


def compare(paths: Iterable[str | Path], *, stages: bool = False) -> Comparison:
    """Return `rows`, and notes on runs left out, counted once, or not comparable."""
    files, notes, refused = [], [], []
    for path in map(local, paths):
        try:
            finished, unfinished = results_files(path)
        except UserError as error:
            if not path.is_dir():
                raise
            refused.append(error)  # `runs/*` may contain runs that are still training
            continue
        files += finished
        notes += [f"note: {folder} is left out: no results.json, not trained to the end" for folder in unfinished]
    if refused and not files:
        raise refused[0]
    notes += [f"note: left out: {error}" for error in refused]
    distinct = list({file.resolve(): file for file in reversed(files)}.values())[::-1]
    groups = group([read_run(file) for file in distinct])
    named = dict(zip(row_names(groups), groups, strict=True))
    table = []
    for name, runs in named.items():
        run_of_seed, repeated = runs_by_seed(runs)
        notes += repeated
        if runs[0].settings is None:
            notes.append(f"note: {runs[0].path} has no config.json beside it: a row of its own")
        table += [make_row(name, run_of_seed, stage) for stage in (runs[0].stages if stages else [None])]
    return Comparison(table, notes + not_comparable(named))


def results_files(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the results.json files of a path, and the unfinished runs in it. UserError if there is no results.json."""
    if path.is_file():
        return [path], []
    if not path.is_dir():
        raise UserError(f"no {path}: name a run's workdir or its results.json")
    if (path / "results.json").exists():
        return [path / "results.json"], []
    if (path / "config.json").exists():
        raise UserError(f"{path} has no results.json: train it to the end first (the same command resumes)")
    files = sorted(path.glob("*/results.json"))
    if not files:
        raise UserError(f"{path} holds no finished run: name a workdir with a results.json, or a folder of them")
    finished = {file.parent for file in files}
    return files, [file.parent for file in sorted(path.glob("*/config.json")) if file.parent not in finished]


def read_run(path: Path) -> FinishedRun:
    """Read a run from its results.json, with config.json and split.json beside it. UserError names a wrong file."""
    again = "move it away and run the training command again, which rewrites it"
    results = read_json(path, again)
    alone = "repair it, or copy results.json to an empty folder and name the copy"
    files = [path.with_name(name) for name in ("config.json", "split.json")]
    config, split = (read_json(file, alone) if file.exists() else None for file in files)
    split = split or {}
    with holding(path, again):
        stages = {name: _stage(name, stage, results) for name, stage in results["stages"].items()}
        final = results["final_stage"]
        run = FinishedRun(
            path=path.parent if path.name == "results.json" else path,
            name=str(results["name"]),
            settings=None,
            stages=stages,
            final_stage=final,
            seconds=float(results["seconds"]),
            facts={
                "data set": None,
                "training images": _text(split.get("sha256")),
                "content of the training images": _text(split.get("images", {}).get("train")),
                "content of the test images": _text(split.get("images", {}).get("test")),
                "number of test images": _text(_measured(results["stages"][final])[0].get("num_images")),
                "group sizes": _text(results.get("group_sizes")),
                "attack": _attack(results),
            },
        )
        if not all(math.isfinite(seconds) for seconds in (run.seconds, *(stage.seconds for stage in stages.values()))):
            raise ValueError("its seconds are not finite")
        if any(set(stage.seeds) != set(stages[final].seeds) for stage in stages.values()):
            raise ValueError("its stages have different seeds")
    if config is not None:
        with holding(path.with_name("config.json"), alone):
            run.facts["data set"] = _text(config["data"]["name"])
            run = run._replace(settings=trained_settings(config))
    return run


def _text(value: Any) -> str | None:
    return None if value is None else json.dumps(value, sort_keys=True)


def _measured(stage: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return what a stage of results.json measured for each seed; with replicas, the stage itself holds means."""
    return stage.get("replicas") or [stage]


def _attack(results: Mapping[str, Any]) -> str | None:
    """Return the attack's settings, for which the robust accuracy holds."""
    about = results.get("robustness")
    return about and _text([about["norm"], about["epsilon"], about["num_images"], about.get("images_sha256")])


def _stage(name: str, stage: Mapping[str, Any], results: Mapping[str, Any]) -> FinishedStage:
    def seed(measured: Mapping[str, Any]) -> int:
        return int((measured if stage.get("replicas") else results)["seed"])

    columns = [column for column in COLUMNS if column.shown(results)]
    seeds = {seed(measured): _figures(measured, columns) for measured in _measured(stage)}
    attack = results.get("robustness") or {}
    for test, attacked in attack.get("tests", {}).items() if attack.get("stage") == name else ():
        for measured in _measured(attacked):
            accuracy = {test: measured["accuracy"]["all"], f"{test} few": measured["accuracy"].get("few")}
            shown = {key: float(accuracy[key]) for key in ATTACKED if accuracy.get(key) is not None}
            seeds[seed(measured)].update(shown)
    return FinishedStage(title=str(stage["title"]), seconds=float(stage["seconds"]), seeds=seeds)


def _figures(measured: Mapping[str, Any], columns: Iterable[Column]) -> dict[str, float]:
    figures = {
        **{group: measured["accuracy"].get(group) for group in GROUPS},
        **{column.key: column.figure(measured) for column in columns},
        "best": measured.get("best_on_test", {}).get("accuracy"),
    }
    return {key: float(value) for key, value in figures.items() if value is not None}


def trained_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that change what is trained, with today's defaults for keys that an older config lacks."""
    settings = {key: value for key, value in configs.with_defaults(config).items() if key not in configs.WITHIN_A_ROW}
    return {**settings, "root": config.get("data", {}).get("root", "")}  # folders of images are different data sets


def group(runs: Iterable[FinishedRun]) -> list[list[FinishedRun]]:
    """Group runs of the same settings and any seeds, in the order of their first."""
    groups: list[list[FinishedRun]] = []
    for run in runs:
        same = next((members for members in groups if _same(members[0], run)), [])
        if not same:
            groups.append(same)
        same.append(run)
    return groups


def _same(a: FinishedRun, b: FinishedRun) -> bool:
    if a.settings is None or b.settings is None:
        return False
    return list(a.stages) == list(b.stages) and not configs.differences(a.settings, b.settings)


def row_names(groups: Sequence[Sequence[FinishedRun]]) -> list[str]:
    """Return a name for each group of runs: the runs' name, and what differs from the first group of that name."""
    firsts: dict[str, FinishedRun] = {}
    names: list[str] = []
    for run, *_ in groups:
        name, first = run.name, firsts.setdefault(run.name, run)
        if run is not first:
            known = first.settings is not None and run.settings is not None
            changed = _telling(first.settings or {}, run.settings or {}) if known else []
            more = [f"and {len(changed) - MOST_DIFFERENCES} more"] if len(changed) > MOST_DIFFERENCES else []
            shown = [line.replace(": ", " ", 1) for line in changed[:MOST_DIFFERENCES]]
            name = f"{name} ({', '.join(shown + more) or run.path})"
        names.append(name if name not in names else f"{name} ({run.path})")
    return names


def _telling(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the lines of `ltjax.config.differences`: stages first, then data, network and the rest.

    A key that a stage has on one side alone, such as a setting of another method, follows from the rest: left out.
    """
    stages = {*old.get("stages", ()), *new.get("stages", ())}
    lines = configs.differences(old, new)
    both = [line for line in lines if "(absent)" not in line or re.split(r"[.:]", line)[0] not in stages]
    first = ("stages", "data", "model")
    place = {key: number for number, key in enumerate(first)}
    return sorted(both or lines, key=lambda line: place.get(re.split(r"[.:]", line)[0], len(first)))


def runs_by_seed(runs: Iterable[FinishedRun]) -> tuple[dict[int, FinishedRun], list[str]]:
    """Return {seed: the first run that has it}, and a note for each run that repeats seeds."""
    run_of_seed: dict[int, FinishedRun] = {}
    notes = []
    for run in runs:
        repeated: dict[Path, list[str]] = {}
        for seed in run.stages[run.final_stage].seeds:
            if run_of_seed.setdefault(seed, run) is not run:
                repeated.setdefault(run_of_seed[seed].path, []).append(str(seed))
        for path, seeds in repeated.items():
            which = f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"
            notes.append(f"note: {which} of {run.name} in {run.path} as in {path}: counted once, from {path}")
    return run_of_seed, notes


def make_row(name: str, run_of_seed: Mapping[int, FinishedRun], stage: str | None) -> Row:
    """Return the row of one stage; None: of the final stage, with the seconds of the whole run."""
    runs = list({id(run): run for run in run_of_seed.values()}.values())
    chosen = {id(run): run.stages[stage or run.final_stage] for run in runs}
    measured = [chosen[id(run)].seeds[seed] for seed, run in run_of_seed.items()]
    common = [key for key in FIGURES if all(key in values for values in measured)]
    if len({run.facts["attack"] for run in runs}) > 1:  # a mean over different attacks means nothing
        common = [key for key in common if key not in ATTACKED]
    seconds = [(run.seconds if stage is None else chosen[id(run)].seconds) / len(chosen[id(run)].seeds) for run in runs]
    return Row(
        name=name if stage is None else f"{name} / {chosen[id(runs[0])].title}",
        figures={key: mean_and_std([values[key] for values in measured]) for key in common},
        seconds=math.fsum(seconds) / len(seconds),
        seeds=tuple(run_of_seed),
        runs=tuple(run.path for run in runs),
        stage=stage,
    )


def not_comparable(groups: Mapping[str, Sequence[FinishedRun]]) -> list[str]:
    """Return a warning for each split of the rows by a fact about their runs.

    A warning names the rows on each side; if runs of one row are on different sides, it names their paths.
    """
    splits: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    facts = dict.fromkeys(fact for runs in groups.values() for run in runs for fact in run.facts)
    for fact in facts:
        sides: dict[str, list[str]] = {}
        for name, runs in groups.items():
            within = {run.facts[fact] for run in runs} - {None}
            for run in runs:
                value = run.facts[fact]
                if value is not None:
                    sides.setdefault(value, []).append(name if len(within) == 1 else str(run.path))
        if len(sides) > 1:
            parts = tuple(tuple(dict.fromkeys(labels)) for labels in sides.values())
            splits.setdefault(parts, []).append(fact)
    return [
        f"{NOT_COMPARABLE}, different {', '.join(different)}: {' | '.join(', '.join(part) for part in parts)}"
        for parts, different in splits.items()
    ]


def cells(rows: Sequence[Row], *, legacy_best: bool = False, comparable: bool = True) -> list[list[Cell]]:
    """Return the table as text, header first: figures in %, "-" if one is missing, the best of each column marked.

    Args:
      rows: What `rows` returns.
      legacy_best: Add a column of the best epoch as picked on the test set.
      comparable: Mark the best.
    """
    measured = {key for row in rows for key in row.figures} - {"best"}
    keys = [key for key in FIGURES if key in {*GROUPS, *measured, *["best"] * legacy_best}]
    best = {key: _best(key, [row.figures[key].mean for row in rows if key in row.figures]) for key in keys * comparable}
    table = [[Cell(title) for title in ("last epoch, %", *(FIGURES[key] for key in keys), "time", "seeds")]]
    for row in rows:
        figures = [row.figures.get(key) for key in keys]
        shown = [
            Cell("-") if figure is None else Cell(percent(*figure), _rounded(figure.mean) == best.get(key))
            for key, figure in zip(keys, figures, strict=True)
        ]
        table.append([Cell(row.name), *shown, Cell(_clock(row.seconds)), Cell(str(len(row.seeds)))])
    return table


def _best(key: str, means: Iterable[float]) -> float | None:
    """Return the best mean as it is shown; None if there are fewer than two. NaN is never best."""
    shown = [_rounded(mean) for mean in means if not math.isnan(mean)]
    return None if len(shown) < 2 else BEST.get(key, max)(shown)


def _rounded(mean: float) -> float:
    return float(f"{100 * mean:.1f}")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, or 2 after one line `error: ...` on stderr."""
    parser = Parser(
        prog="python -m ltjax.compare",
        description="One table of finished runs at their last epoch: mean and deviation over the seeds of a config.",
        epilog="example: python -m ltjax.compare runs/ce-seed* runs/mislas-seed* --format=markdown",
        allow_abbrev=False,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a workdir, a folder of workdirs, or a results.json")
    parser.add_argument("--format", choices=("plain", "markdown", "latex"), default="plain", help="default: plain")
    parser.add_argument("--stages", action="store_true", help="a row for each stage, not for the final one alone")
    parser.add_argument(
        "--best", action="store_true", help="add the legacy figure: the best epoch as picked on the test set"
    )
    parser.add_argument("--html", metavar="FILE", help="write a page with figures as well, one file without references")

    def show() -> None:
        args = parser.parse_args(argv)
        table_rows, notes = compare(args.runs, stages=args.stages)
        comparable = not any(note.startswith(NOT_COMPARABLE) for note in notes)
        table = cells(table_rows, legacy_best=args.best, comparable=comparable)
        if args.html:
            from ltjax.report import compared  # slow to import

            command = shlex.join(["python", "-m", "ltjax.compare", *(sys.argv[1:] if argv is None else argv)])
            header, *body = cells(table_rows, legacy_best=True, comparable=comparable)
            about = [COLUMN_NOTES[cell.text] for cell in header if cell.text in COLUMN_NOTES]
            titles = [cell.text for cell in header]
            compared.write(local(args.html), titles, body, table_rows, [*about, *notes], command)
            print(f"The page is in {args.html}", file=sys.stderr)
        for note in notes:
            print(note, file=sys.stderr)
        _print(table, args.format)

    return exit_code(show)


def _print(table: Sequence[Sequence[Cell]], style: str) -> None:
    try:
        if style == "plain":
            _print_plain(table)
        else:
            print({"markdown": markdown, "latex": latex}[style](table), end="")
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):  # `| head` closed the pipe; rich would exit with 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing fails at exit


def _print_plain(table: Sequence[Sequence[Cell]]) -> None:
    console = Console(markup=False, emoji=False)  # names as they are
    if not console.is_terminal:
        console.width = 10_000  # do not wrap in a file
    console.print(plain(table))
    marked = console.is_terminal and any(cell.best for row in table for cell in row)
    bold = ["Bold: best of the column."] * marked
    about = [COLUMN_NOTES[header.text] for header in table[0] if header.text in COLUMN_NOTES]
    for line in (" ".join([NOTES, *bold]), *about):
        console.print(line, style="dim", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
