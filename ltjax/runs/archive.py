"""Archive a finished run in a folder of a few megabytes, for others to check.

    python -m ltjax.runs.archive runs/cifar100_lt-mislas-if100-seed0 results/cifar100_lt-mislas-if100-seed0

The folder holds `config.json`, `split.json`, `results.json` and `weights.safetensors`, the last stage's weights in
float32, averaged if the stage averages them. Every mode except training accepts it as a workdir:

    python run.py --mode=eval --workdir=results/cifar100_lt-mislas-if100-seed0

A stage can start from its weights if `config.weights` names it.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from ltjax.runs.checkpoint import StageRecord
from ltjax.runs.evaluated import with_ema
from ltjax.runs.weights import ARRAYS, DESCRIPTION, Weights, load_weights, save_arrays
from ltjax.system.command_line import Parser, exit_code
from ltjax.system.devices import start_devices
from ltjax.system.files import holding, read_json, replacing
from ltjax.system.paths import local
from ltjax.types import UserError

FILES = ("config.json", "split.json", "results.json")  # copied with the weights
OPTIONAL = ("attack.json", "temperature.json")


def archive(workdir: str | Path, folder: str | Path) -> None:
    """Write the archive of a finished run.

    Raises:
      UserError: The run is not finished or has several replicas, or `folder` holds something else.
    """
    from ltjax.runs.trained import newest, variables_of  # they read archives by the functions below

    workdir, folder = local(workdir), local(folder)
    for name in FILES:
        if not (workdir / name).is_file():
            raise UserError(f"{workdir} holds no finished run ({name} is missing): train it to the end first")
    same = folder.exists() and folder.samefile(workdir)
    if same or (folder / DESCRIPTION).exists() or (folder / "checkpoints").exists():
        raise UserError(f"{folder} holds something else than an archive: name another folder")
    trained = newest(workdir)
    if trained.run.replicas > 1:
        raise UserError(f"{workdir} holds {trained.run.replicas} replicas: an archive is of one seed; train them apart")
    with holding(workdir / "results.json"):
        if "evaluations" not in read_json(workdir / "results.json")["stages"][trained.stage.name]:
            raise UserError(f"{workdir}/results.json lacks the figures of each epoch: an older ltjax trained it")
    variables = with_ema(variables_of(workdir, trained))  # not tau-normalised: evaluating an archive does that
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").unlink(missing_ok=True)  # a folder without it is no archive
    save_arrays(folder, variables)
    for name in (*OPTIONAL, *FILES):
        if (workdir / name).is_file():
            with replacing(folder / name) as file:
                shutil.copyfile(workdir / name, file)


class Archived(NamedTuple):
    """The contents of an archive."""

    stage: str  # the last one
    step: int
    weights: Weights
    record: StageRecord


def is_archive(folder: Path) -> bool:
    """Return whether `archive` wrote a folder. A workdir is no archive."""
    return (
        all((folder / name).is_file() for name in ("config.json", "results.json", ARRAYS))
        and not (folder / "checkpoints").exists()
    )


def read_archive(folder: Path) -> Archived:
    """Read an archive. UserError if its results.json is not that of an archive."""
    results = read_json(folder / "results.json")
    with holding(folder / "results.json", "write the archive again"):
        stage = results["final_stage"]
        summary = results["stages"][stage]
        evaluations = [{**evaluation, "test": dict(evaluation)} for evaluation in summary["evaluations"]]
        evaluations[-1]["test"] = summary
        step: int = summary["evaluations"][-1]["step"]
        if not isinstance(stage, str) or not isinstance(step, int):
            raise TypeError("final_stage is no name, or step no number")
        seconds = float(summary["seconds"])
    record: StageRecord = {"seconds": seconds, "train_seconds": 0.0, "train_steps": 0, "evaluations": evaluations}
    return Archived(stage, step, load_weights(folder), record)


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Return the exit code: 0, or 2 after one line `error: ...` on stderr."""
    parser = Parser(
        prog="python -m ltjax.runs.archive", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", help="folder of a finished run")
    parser.add_argument("folder", help="folder to write; an archive there is replaced")

    def write() -> None:
        args = parser.parse_args(argv)
        start_devices()
        archive(args.workdir, args.folder)
        print(f"{args.folder}: {(local(args.folder) / ARRAYS).stat().st_size / 1e6:.1f} MB of weights")

    return exit_code(write)


if __name__ == "__main__":
    sys.exit(main())
