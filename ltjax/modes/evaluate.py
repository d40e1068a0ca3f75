"""`--mode=eval`: the newest checkpoint of each stage on the test images."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ltjax import config as config_module
from ltjax.engine.problem import (
    Imported,
    class_means_for,
    evaluate_restored,
    evaluate_split,
    imported,
    restored,
    setup,
)
from ltjax.runs import logs, results
from ltjax.runs.checkpoint import write_json
from ltjax.runs.workdir import named_disk_errors, open_workdir
from ltjax.system import processes
from ltjax.system.paths import local
from ltjax.types import UserError


def evaluate_workdir(
    config: Mapping[str, Any], workdir: str | Path, data_dir: str | Path | None = None
) -> dict[str, Any]:
    """Evaluate the newest checkpoint of every stage that has one, or `config.weights` where the workdir holds no run;
    print the table and write `eval.json`."""
    workdir, console = local(workdir), logs.make_console(quiet=not processes.first())
    run, stages = config_module.parse(config)
    found = imported(run, stages, workdir, data_dir)
    if found is None and not (workdir / "config.json").exists():
        raise UserError(f"{workdir} holds no run: train first, with --mode=train and the same --workdir")
    processes.on_first(lambda: open_workdir(workdir, config))
    if found is not None:
        summary = results.summarise(
            found.run,
            {"imported": found.settings},
            {"imported": judge_imported(found)},
            found.problem,
            results.git_commit(),
        )
        return write_evaluation({**summary, "weights": run.weights}, workdir, console)
    problem = setup(run, data_dir)
    records = {}
    for name, settings in stages.items():
        found = restored(run, name, settings, problem, workdir)
        if found is not None:
            built, state, record = found
            records[name] = {**record, "evaluations": [evaluate_restored(run, settings, problem, built, state)]}
    if not records:
        raise UserError(f"{workdir} holds no checkpoint yet: train first, with --mode=train")
    summary = results.summarise(run, {name: stages[name] for name in records}, records, problem, results.git_commit())
    return write_evaluation(summary, workdir, console)


def judge_imported(found: Imported) -> dict[str, Any]:
    """The record, as of a stage without training, of weights alone."""
    began, (run, problem, settings, variables) = time.monotonic(), found
    means = class_means_for(settings, problem, variables)
    test = evaluate_split(run, settings, problem, variables, problem.test_set, means)
    record = {"train_seconds": 0.0, "train_steps": 0, "evaluations": [{"epoch": 0, "step": 0, "test": test}]}
    return {**record, "seconds": time.monotonic() - began}


def write_evaluation(summary: dict[str, Any], workdir: Path, console: Console) -> dict[str, Any]:
    with named_disk_errors(workdir):
        if processes.first():
            write_json(workdir / "eval.json", summary)
    console.print(results.table(summary))
    return summary
