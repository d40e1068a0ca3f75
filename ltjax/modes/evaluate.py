"""`--mode=eval`: evaluate the newest checkpoint of each stage on the test images."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ltjax.config import parse
from ltjax.engine.experiment import class_means_for, evaluate_set, set_up
from ltjax.engine.restore import Imported, evaluate_restored, import_weights, restored_stages
from ltjax.runs import logs, results
from ltjax.runs.checkpoint import StageRecord
from ltjax.runs.workdir import named_disk_errors, prepare_workdir
from ltjax.system import processes
from ltjax.system.files import write_json
from ltjax.system.paths import local


def evaluate_workdir(
    config: Mapping[str, Any], workdir: str | Path, data_dir: str | Path | None = None
) -> dict[str, Any]:
    """Evaluate the newest checkpoint of each stage, or `config.weights` if the workdir holds no run.

    Print the table and write `eval.json`.

    Returns:
      The content of `eval.json`.

    Raises:
      UserError: For any mistake that the caller can correct.
    """
    workdir, console = local(workdir), logs.make_console(quiet=not processes.first())
    run = parse(config)
    imported = import_weights(run, workdir, data_dir)
    processes.on_first(lambda: prepare_workdir(workdir, config, needs_run=imported is None))
    if imported is not None:
        experiment, records = imported.experiment, {"imported": _evaluate_weights(imported)}
        summary = results.content(experiment, {"imported": imported.stage}, records, results.git_commit())
        summary["weights"] = run.weights
    else:
        experiment, records = set_up(run, data_dir, workdir), {}
        for stage, restored in restored_stages(experiment, workdir):
            evaluation = evaluate_restored(experiment, stage, restored)
            records[stage.name] = {**restored.record, "evaluations": [evaluation]}
        stages = {name: run.stages[name] for name in records}
        summary = results.content(experiment, stages, records, results.git_commit())
    with named_disk_errors(workdir):
        if processes.first():
            write_json(workdir / "eval.json", summary)
    console.print(results.table(summary))
    return summary


def _evaluate_weights(imported: Imported) -> StageRecord:
    """Evaluate imported weights, and make the record of a stage without training."""
    began, (experiment, stage, variables) = time.monotonic(), imported
    means = class_means_for(experiment, stage, variables)
    test = evaluate_set(experiment, stage, variables, experiment.test_set, means)
    evaluations = [{"epoch": 0, "step": 0, "test": test}]
    return StageRecord(seconds=time.monotonic() - began, train_seconds=0.0, train_steps=0, evaluations=evaluations)
