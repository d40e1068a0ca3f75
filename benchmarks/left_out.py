"""Evaluate runs on training images of CIFAR that their long tail leaves out: a hold-out that costs no training image.

    python -m benchmarks.left_out results/cifar100_lt-best-* --data_dir=DIR

A recipe is chosen on these images, not on the test images. A long tail with imbalance 100 has 10,847 of the 50,000
images. Of each class `--images` of the others are drawn; classes that have fewer, the largest ones, are not evaluated.
So the images are balanced over the remaining classes, and the same for all runs with the same split. `many` stands for
fewer classes than in a test; compare a column only with itself.

`fitted` is the expected calibration error after one temperature, fitted on half of the images of each class and
evaluated on the others.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import ltjax
from benchmarks import provenance
from ltjax import calibration, config, metrics
from ltjax.data import cifar, splits
from ltjax.system.files import read_json


def left_out(labels: np.ndarray, split: splits.Split, count: int, seed: int = 0) -> np.ndarray:
    """Draw `count` images of each class that are not in a split, sorted by class; none of a class that has fewer.

    Args:
      labels: [N] of all training images.

    Returns:
      [M] int64, indices into `labels`.
    """
    others = np.setdiff1d(np.arange(len(labels)), np.concatenate([split.train, split.holdout]))
    others = np.random.default_rng(seed).permutation(others)
    of_class = [others[labels[others] == label] for label in range(len(split.class_counts))]
    return np.concatenate([found[:count] for found in of_class if len(found) >= count])


def scores(logits: np.ndarray, labels: np.ndarray, class_counts: np.ndarray) -> dict[str, Any]:
    """Compute accuracy by group, calibration and the fitted temperature, in percent. Labels are sorted by class."""

    def ece(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
        probabilities = np.asarray(jax.nn.softmax(logits))
        correct = probabilities.argmax(-1) == labels
        found = metrics.calibration(probabilities.max(-1), correct)
        return float(probabilities.max(-1).mean()), float(found.ece)

    accuracy = metrics.group_accuracy(logits.argmax(-1) == labels, labels, class_counts)
    temperature = float(calibration.fit_temperature(logits[::2], labels[::2]))
    confidence, raw = ece(logits, labels)
    _, fitted = ece(logits[1::2] / temperature, labels[1::2])
    percent = {**accuracy, "confidence": confidence, "ece": raw, "fitted": fitted}
    return {**{name: 100 * value for name, value in percent.items()}, "temperature": temperature}


def evaluate(folder: Path, count: int, data_dir: str | None) -> dict[str, Any]:
    """Evaluate the archive of a run. UserError: see `ltjax.load` and `ltjax.data.cifar.load`."""
    settings = config.parse(read_json(folder / "config.json")).data
    images = cifar.load(settings.name, data_dir)
    split = splits.long_tailed_split(
        images.train_labels,
        len(images.class_names),
        imbalance=settings.imbalance,
        profile=settings.profile,
        max_count=settings.max_count or None,
        holdout=settings.holdout,
        seed=settings.seed,
    )
    chosen = left_out(images.train_labels, split, count)
    labels = images.train_labels[chosen]
    logits = ltjax.load(folder, temperature=1.0).logits(images.train_images[chosen])
    return {"classes": len(np.unique(labels)), **scores(logits, labels, split.class_counts)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="archives or workdirs of runs on CIFAR")
    parser.add_argument("--images", type=int, default=100, help="of each class; default: 100")
    parser.add_argument("--data_dir", help="prepared data sets; default: $TFDS_DATA_DIR or ~/tensorflow_datasets")
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    args = parser.parse_args(arguments)
    about = provenance.of("left_out", arguments)
    rows = {folder.name: evaluate(folder, args.images, args.data_dir) for folder in args.folders}
    names = list(next(iter(rows.values())))
    table = Table("run", *names)
    for run, row in rows.items():
        table.add_row(run, *(f"{row[name]:.4g}" for name in names))
    Console(width=160).print(table)
    provenance.write(args.out, {**about, "images": args.images, "runs": rows})


if __name__ == "__main__":
    main()
