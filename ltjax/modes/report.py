"""Write a run's report, at the end of training or with `--mode=report`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ltjax.config import parse
from ltjax.engine import feed
from ltjax.engine.experiment import Experiment, make_method, set_up
from ltjax.engine.observe import Observer, class_values
from ltjax.engine.restore import evaluate_restored, restored_stages
from ltjax.engine.stage import steps_done
from ltjax.report import analysis, charts, figures, files, page
from ltjax.runs import logs, results
from ltjax.runs.workdir import named_disk_errors, prepare_workdir
from ltjax.system import parallel, processes, xla
from ltjax.system.files import holding, read_json, write_json
from ltjax.system.paths import local
from ltjax.types import Variables

SIDE, LARGER_SIDE = 64, 96  # largest side of a sample image in pixels, in a pair of classes and alone


def report_workdir(
    config: Mapping[str, Any], workdir: str | Path, data_dir: str | Path | None = None
) -> dict[str, Any]:
    """Write `report/` again from the newest checkpoint of each stage. The run may be unfinished.

    Returns:
      The figures of the page's table, as in results.json; with "unfinished" if the run is not finished.

    Raises:
      UserError: For any mistake that the caller can correct.
    """
    workdir, console = local(workdir), logs.make_console(quiet=not processes.first())
    run = parse(config)
    processes.on_first(lambda: prepare_workdir(workdir, config, needs_run=True))
    console.print(f"Looking at the test images of {run.name} again.")
    experiment = set_up(run, data_dir, workdir)
    finished = processes.on_first((workdir / "results.json").exists)
    records, variables, epoch = {}, {}, 0.0
    for stage, restored in restored_stages(experiment, workdir):
        step, evaluations = steps_done(restored.state), restored.record["evaluations"]
        if not finished and (not evaluations or evaluations[-1]["step"] != step):
            evaluations = [*evaluations, evaluate_restored(experiment, stage, restored)]
        variables[stage.name], epoch = restored.state.variables, step / restored.compiled.steps_per_epoch
        records[stage.name] = {**restored.record, "evaluations": evaluations}
    if finished:
        summary = read_json(workdir / "results.json")
        with holding(workdir / "results.json"):  # found now, not after all images were looked at
            page.of_run(summary, experiment.groups, {}, {})
            figures.summary(summary)
    else:
        stages = {name: run.stages[name] for name in records}
        last = list(stages.values())[-1]
        reached = {"stage": last.title, "number": len(stages), "stages": len(run.stages)}
        summary = results.content(experiment, stages, records, results.git_commit())
        # The command of this process is not the one that trained.
        summary |= {"command": None, "unfinished": {**reached, "epoch": round(epoch, 1), "epochs": last.epochs}}
    with named_disk_errors(workdir):
        make_report(experiment, variables, summary, workdir)
    console.print(f"The report is in {workdir / 'report' / 'index.html'}")
    return summary


def make_report(
    experiment: Experiment,
    variables: Mapping[str, Variables],
    summary: dict[str, Any],
    workdir: Path,
    check_stop: Callable[[], None] = lambda: None,
) -> None:
    """Write `report/`: index.html, numbers.json, summary.png and tables. All processes have to call this.

    Args:
      variables: The variables at the end of each stage.
      check_stop: Called before each stage; may raise to stop.
    """
    stages = {name: experiment.config.stages[name] for name in variables}
    observer, observations = Observer(experiment), {}
    for name, stage in stages.items():
        check_stop()
        observations[name] = observer.observe(stage, variables[name])
    if processes.several() and experiment.config.replicas > 1:  # each process holds some of the replicas
        gather: Any = xla.jit(lambda tree: tree, out_shardings=parallel.replicated(experiment.mesh))
        variables = gather(dict(variables))
    if not processes.first():
        return
    labels, num_classes = experiment.test_set.host_labels, len(experiment.class_names)
    numbers_of_stages = {}
    for name, stage in stages.items():
        of_classes = class_values(stage, make_method(experiment, stage), variables[name], num_classes)
        numbers_of_stages[name] = analysis.stage_numbers(observations[name], labels, experiment.groups, of_classes)
    of_first_replica = {name: of_replicas[0] for name, of_replicas in observations.items()}
    numbers = {
        "final_stage": summary["final_stage"],
        "stages": numbers_of_stages,
        "pairs": pairs(experiment, of_first_replica, summary["final_stage"]),
    }
    last = observations[summary["final_stage"]]
    cells = analysis.confusions(
        np.concatenate([replica["predictions"] for replica in last]), np.tile(labels, len(last)), num_classes
    )
    order = charts.class_order(experiment.groups, experiment.split.class_counts)
    numbers["confusion"] = {"seeds": len(last), **analysis.confusion_numbers(cells, order)}
    surest = analysis.surest_mistakes(last[0]["predictions"], last[0]["confidences"], labels)
    shown = [_mistake(experiment, last[0], int(i)) for i in surest[: analysis.MISTAKES]]
    numbers["mistakes"] = {"wrong": len(surest), "shown": shown}
    folder = workdir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "numbers.json", numbers)
    write_tables(experiment, last, cells, surest, summary, folder)
    figures.write_summary(summary, folder)
    page.write(workdir, summary)


def write_tables(
    experiment: Experiment,
    observed: Sequence[Mapping[str, np.ndarray]],
    cells: analysis.Confusions,
    mistakes: np.ndarray,
    summary: Mapping[str, Any],
    folder: Path,
) -> None:
    """Write the final stage's tables to the report's folder: classes, confusions and mistakes.

    Args:
      observed: The final stage's observations, for each replica.
      cells: Of the confusion matrix, over all replicas.
      mistakes: Test images that the first replica has wrong, in the order of the table.
    """
    labels, names, counts = experiment.test_set.host_labels, experiment.class_names, experiment.split.class_counts
    scores = analysis.scores_by_class(observed, labels, len(names))
    columns = {
        "class": names,
        "group": charts.group_names(experiment.groups, len(names)),
        "training_images": counts.tolist(),
        "test_images": np.bincount(labels, minlength=len(names)).tolist(),
        **{name: [x if np.isfinite(x) else None for x in scores[name].tolist()] for name in analysis.SCORES[1:]},
    }
    files.write_classes(folder, summary["stages"][summary["final_stage"]]["title"], columns)
    confused = zip(*(x.tolist() for x in cells), strict=True)
    rows = [(names[true], names[predicted], images) for true, predicted, images in confused]
    files.write_csv(folder / "confusion.csv", ["true", "predicted", "images"], rows)
    predictions, confidences = observed[0]["predictions"], observed[0]["confidences"].tolist()
    wrong = [(feed.picture_name(experiment.config, experiment.data, i), i) for i in mistakes.tolist()]
    rows = [(image, names[labels[i]], names[predictions[i]], confidences[i]) for image, i in wrong]
    files.write_csv(folder / "mistakes.csv", ["image", "true", "predicted", "confidence"], rows)


def pairs(experiment: Experiment, observed: Mapping[str, Mapping[str, np.ndarray]], final: str) -> list[dict[str, Any]]:
    """List the pairs of classes that the final stage confuses most, in the tail and outside it, with test images."""
    tail = analysis.rarest(experiment.groups)
    members = experiment.groups[tail]
    if members.all():
        lists = {"Most confused": members}
    else:
        lists = {
            f"Most confused: classes with {tail} training images": members,
            "Most confused: the other classes": ~members,
        }
    labels, predictions = experiment.test_set.host_labels, observed[final]["predictions"]
    found = []
    for title, true_classes in lists.items():
        confused = analysis.confused_pairs(predictions, labels, true_classes)
        found.append({"title": title, "pairs": [_pair(experiment, observed, final, pair) for pair in confused]})
    return found


def _pair(experiment: Experiment, observed: Mapping[str, Mapping[str, np.ndarray]], final: str, pair: Any) -> dict:
    """Describe a pair of classes: how often each stage confuses them, confused images, one image of the other class."""
    labels = experiment.test_set.host_labels
    predictions, confidences = observed[final]["predictions"], observed[final]["confidences"]
    images = [
        {**sample(experiment, i), "confidence": float(confidences[i])}
        for i in analysis.samples(pair, predictions, confidences, labels)
    ]
    of_other = labels == pair.predicted
    right = np.flatnonzero(of_other & (predictions == pair.predicted))
    right = right if len(right) else np.flatnonzero(of_other)
    images += [{**sample(experiment, int(i)), "confidence": None} for i in right[:1]]
    total = int((labels == pair.true).sum())
    shares = {
        name: float(((of_stage["predictions"] == pair.predicted) & (labels == pair.true)).sum() / total)
        for name, of_stage in observed.items()
    }
    return {"true": pair.true, "predicted": pair.predicted, "total": total, "shares": shares, "images": images}


def _mistake(experiment: Experiment, observed: Mapping[str, np.ndarray], index: int) -> dict[str, Any]:
    """Describe a test image that is predicted wrongly."""
    return {
        "true": int(experiment.test_set.host_labels[index]),
        "predicted": int(observed["predictions"][index]),
        "confidence": float(observed["confidences"][index]),
        "name": feed.picture_name(experiment.config, experiment.data, index),
        **sample(experiment, index, LARGER_SIDE),
    }


def sample(experiment: Experiment, index: int, side: int = SIDE) -> dict[str, Any]:
    """Shrink a test image for the page: {"uri", "small": whether the page enlarges its pixels as squares}."""
    pixels = feed.picture(experiment.config, experiment.data, index)  # [H, W, channels]
    picture = Image.fromarray(np.ascontiguousarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0]))
    small = max(picture.size) <= SIDE
    picture.thumbnail((side, side))
    return {"uri": charts.data_uri(picture, "png" if small else "jpeg"), "small": small}
