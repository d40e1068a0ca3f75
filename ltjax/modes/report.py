"""The report that every run ends with, and `--mode=report`, which makes it again."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ltjax import config as config_module
from ltjax.config import Run
from ltjax.engine import feed, stage
from ltjax.engine.measure import Observer, learned
from ltjax.engine.problem import Problem, evaluate_restored, make_method, restored, setup
from ltjax.report import analysis, figures, page
from ltjax.runs import logs, results
from ltjax.runs.checkpoint import read_json, write_json
from ltjax.runs.workdir import named_disk_errors, open_workdir
from ltjax.system import parallel, processes, xla
from ltjax.system.paths import local
from ltjax.types import UserError, Variables

SIDE = 64  # pixels of a sample image, at most


def report_workdir(
    config: Mapping[str, Any], workdir: str | Path, data_dir: str | Path | None = None
) -> dict[str, Any]:
    """Make `report/` again, from the newest checkpoint of each stage; of a run that is not finished, with its figures.

    Returns: what the page shows in its table, as in results.json; of a run that is not finished, "unfinished" too.
    Raises: UserError for anything the caller can mend.
    """
    workdir, console = local(workdir), logs.make_console(quiet=not processes.first())
    run, stages = config_module.parse(config)
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir} holds no run: train first, with --mode=train and the same --workdir")
    processes.on_first(lambda: open_workdir(workdir, config))
    console.print(f"Looking at the test images of {run.name} again.")
    problem = setup(run, data_dir)
    finished = processes.on_first((workdir / "results.json").exists)
    records, variables, epoch = {}, {}, 0.0
    for name, settings in stages.items():
        found = restored(run, name, settings, problem, workdir)
        if found is not None:
            built, state, record = found
            variables[name], epoch = state.variables, stage.steps_done(state) / built.steps_per_epoch
            evaluations = record["evaluations"]
            if not finished and (not evaluations or evaluations[-1]["step"] != stage.steps_done(state)):
                evaluations = [*evaluations, evaluate_restored(run, settings, problem, built, state)]
            records[name] = {**record, "evaluations": evaluations}
    if not records:
        raise UserError(f"{workdir} holds no checkpoint yet: train first, with --mode=train")
    kept = {name: stages[name] for name in records}
    if finished:
        summary = read_json(workdir / "results.json")
    else:
        last = stages[list(kept)[-1]]
        reached = {"stage": last.title, "number": len(kept), "stages": len(stages)}
        summary = results.summarise(run, kept, records, problem, results.git_commit())
        # the command of this process is not what trained
        summary |= {"command": None, "unfinished": {**reached, "epoch": round(epoch, 1), "epochs": last.epochs}}
    with named_disk_errors(workdir):
        write_report(run, kept, problem, variables, summary, workdir)
    console.print(f"The report is in {workdir / 'report' / 'index.html'}")
    return summary


def write_report(
    run: Run,
    stages: Mapping[str, config_module.Stage],
    problem: Problem,
    variables: Mapping[str, Variables],
    summary: dict[str, Any],
    workdir: Path,
    go_on: Callable[[], None] = lambda: None,
) -> None:
    """`report/`: index.html, the numbers it is made of, and summary.png. All processes have to call this.

    variables: what each stage ended with. summary: what results.json holds, or is about to.
    go_on: called before each stage; may raise to stop.
    """
    observer, observed = Observer(run, problem), {}
    for name in stages:
        go_on()
        observed[name] = observer.observe(stages[name], variables[name])
    if processes.several() and run.replicas > 1:  # each process has some of the replicas, and the first one wants all
        gather: Any = xla.jit(lambda tree: tree, out_shardings=parallel.replicated(problem.mesh))
        variables = gather(dict(variables))
    if not processes.first():
        return
    numbers = {
        "final_stage": summary["final_stage"],
        "stages": {
            name: analysis.stage_numbers(
                observed[name],
                problem.test_set.host_labels,
                problem.groups,
                learned(stages[name], make_method(stages[name], problem), variables[name], len(problem.class_names)),
            )
            for name in stages
        },
        "pairs": pairs(run, problem, {name: each[0] for name, each in observed.items()}, summary["final_stage"]),
    }
    folder = workdir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "numbers.json", numbers)
    figures.write_summary(summary, folder)
    page.write(workdir, summary)


def pairs(
    run: Run, problem: Problem, observed: Mapping[str, Mapping[str, np.ndarray]], final: str
) -> list[dict[str, Any]]:
    """The pairs of classes that the final stage confuses most, in the tail and elsewhere, with test images of them."""
    labels, own = problem.test_set.host_labels, observed[final]
    totals = np.bincount(labels, minlength=len(problem.class_names))
    tail = analysis.rarest(problem.groups)
    members = problem.groups[tail]
    lists = {f"Most confused: classes with {tail} training images" if not members.all() else "Most confused": members}
    lists |= {} if members.all() else {"Most confused: the other classes": ~members}
    found = []
    for title, members in lists.items():
        shown = []
        for pair in analysis.confused_pairs(own["predictions"], labels, members):
            images = [
                {**sample(run, problem, i), "confidence": float(own["confidences"][i])}
                for i in analysis.samples(pair, own["predictions"], own["confidences"], labels)
            ]
            there = np.flatnonzero((labels == pair.predicted) & (own["predictions"] == pair.predicted))
            there = there if len(there) else np.flatnonzero(labels == pair.predicted)
            images += [{**sample(run, problem, int(i)), "confidence": None} for i in there[:1]]
            taken = {
                name: float(((one["predictions"] == pair.predicted) & (labels == pair.true)).sum() / totals[pair.true])
                for name, one in observed.items()
            }
            here = {"true": pair.true, "predicted": pair.predicted, "total": int(totals[pair.true])}
            shown.append({**here, "shares": taken, "images": images})
        found.append({"title": title, "pairs": shown})
    return found


def sample(run: Run, problem: Problem, index: int) -> dict[str, Any]:
    """A test image small enough for the page: {"uri", "small": whether its pixels are to be seen as squares}."""
    pixels = feed.picture(run, problem.data, index)  # [H, W, channels]
    picture = Image.fromarray(np.ascontiguousarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0]))
    small = max(picture.size) <= SIDE
    picture.thumbnail((SIDE, SIDE))
    return {"uri": page.data_uri(picture, "png" if small else "jpeg"), "small": small}
