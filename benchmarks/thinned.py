"""Compare methods on a fixed backbone, for photographs thinned to a long tail: accuracy and calibration.

    python -m benchmarks.thinned DIR --out=FILE.json
    python -m benchmarks.thinned DIR --methods=lift,ncm --draws=1 --tails=100-1

DIR is a folder of images as for `configs/image_folder.py`, with a part for validation. Its training images are thinned,
so that counts fall exponentially from the largest class to the smallest: 300 to 3 images, and 100 to 1. A class with
fewer images keeps all. "Few" classes have fewer than 20 training images.
"""

import argparse
import contextlib
import csv
import io
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from benchmarks import provenance
from configs import image_folder
from ltjax import train
from ltjax.data import load

TAILS = {"300-3": (300, 3), "100-1": (100, 1)}
METHODS = ("lift", "ncm", "logit_adjustment_posthoc", "logit_adjustment", "balanced_softmax", "ce", "cb_ce", "ldam_drw")
METHODS += ("crt", "lws", "mislas", "drolt")


def thinned(labels: np.ndarray, most: int, least: int, seed: int) -> np.ndarray:
    """Return the indices of images whose counts fall exponentially, from `most` of the largest class to `least`."""
    counts, rng = np.bincount(labels), np.random.default_rng(seed)
    chosen = []
    for rank, c in enumerate(np.argsort(-counts, kind="stable")):
        count = round(most * (least / most) ** (rank / (len(counts) - 1)))
        chosen.append(rng.choice(np.flatnonzero(labels == c), min(counts[c], max(count, 1)), replace=False))
    return np.sort(np.concatenate(chosen))


def write_table(root: Path, file: Path, chosen: np.ndarray) -> None:
    """Write the labels of a thinned folder as a table for `config.data.labels`."""
    images: Any = load("image_folder", root)
    rows = [(images.train_files, images.train_labels, "train", chosen)]
    rows += [(images.test_files, images.test_labels, "validation", np.arange(len(images.test_labels)))]
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["file", "label", "split"])
        for files, labels, part, order in rows:
            writer.writerows((files.name(int(i)), images.class_names[labels[i]], part) for i in order)


def figures(config: Any, root: Path, table: Path, workdir: Path) -> dict[str, float]:
    """Train on a thinned folder. Return percentages of the last stage."""
    config.data.update(root=str(root), labels=str(table), groups="counts", few_below=20)
    config.eval_every = config.epochs
    with contextlib.redirect_stdout(io.StringIO()):
        stages = train.train(config.to_dict(), workdir)["stages"]
    last = stages[config.stages[-1]]
    shares = dict(all=last["accuracy"]["all"], few=last["accuracy"]["few"], ece=last["ece"])
    return {key: 100 * value for key, value in shares.items() if value is not None}  # nearest means have no ECE


def measure(root: Path, methods: Sequence[str], tails: Sequence[str], draws: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each tail, method and draw."""
    labels = load("image_folder", root).train_labels
    with tempfile.TemporaryDirectory() as folder:
        for tail in tails:
            for draw in range(draws):
                table = Path(folder) / f"{tail}-{draw}.csv"
                chosen = thinned(labels, *TAILS[tail], seed=draw)
                write_table(root, table, chosen)
                for method in methods:
                    config = image_folder.get_config(f"method={method}")
                    percents = figures(config, root, table, Path(folder) / f"{tail}-{draw}-{method}")
                    yield dict(tail=tail, draw=draw, method=method, images=len(chosen), **percents)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table in Markdown: a line for each method, all / few / ECE in % for each tail, means over the draws."""
    tails = list(dict.fromkeys(row["tail"] for row in rows))
    sizes = {row["tail"]: row["images"] for row in rows}
    titles = [f"{' to '.join(tail.split('-'))} a class ({sizes[tail]:,} images)" for tail in tails]
    lines = [f"| method | {' | '.join(titles)} |", "|---|" + "---|" * len(tails)]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for tail in tails:
            of_cell = [row for row in rows if (row["method"], row["tail"]) == (method, tail)]
            spread = f" ± {stdev(row['all'] for row in of_cell):.1f}" if len(of_cell) > 1 else ""
            values = {key: [row[key] for row in of_cell if key in row] for key in ("all", "few", "ece")}
            of_all, few, ece = (f"{mean(each):.1f}" if each else "-" for each in values.values())
            cells.append(f"{of_all}{spread} / {few} / {ece}")
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="DIR")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--tails", default=",".join(TAILS), help="among " + ", ".join(TAILS))
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    about, rows = provenance.of("thinned"), []
    for row in measure(args.root.resolve(), args.methods.split(","), args.tails.split(","), args.draws):
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
        provenance.write(args.out, {**about, "rows": rows})
    print(summary(rows))


if __name__ == "__main__":
    main()
