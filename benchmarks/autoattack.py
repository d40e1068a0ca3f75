"""Measure AutoAttack on the CNN of tests/golden/autoattack.npz, compared with the authors' code. From the root:

    python -m benchmarks.autoattack                                          # 256 images: long on a CPU
    python -m benchmarks.autoattack --attacks=apgd-ce --images=32            # a quick look
    python -m benchmarks.autoattack --attacks=standard --repeats=3           # alternating with the authors' code
    python -m benchmarks.autoattack --out=autoattack.json

Each attack runs alone on all images. Then `standard`, the suite, runs each attack on the images that are still robust.
The table has robust images, here and by the reference, the time, and evaluations of the model. An evaluation is a
forward pass, with or without a backward pass:

- done: of images that are not decided yet, also for each image that the attack starts with;
- slots: of whole batches, with idle places, as the device computes them;
- reference: `REFERENCE` for each image that an attack starts with. The authors' Square also stops on fooled images, so
  its number is an upper bound;
- whole batches: slots without compaction inside an attack, so that every image runs to the attack's end;
- every attack on all: slots without any compaction, so that all images run through every attack.

The network is a plain port from PyTorch: NCHW, `lax.conv_general_dilated`. An attack's seconds include compilation,
unless an earlier run has compiled it. If PyTorch and pyautoattack (PyPI) are installed, the authors' suite alternates
with `standard`, with a thread for each core.
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import provenance
from ltjax import attacks
from ltjax.system.cores import num_cores

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "autoattack.npz"
WHOLE = {"apgd-ce": 101, "apgd-t": 9 * 101, "fab-t": 9 * 2 * 101, "square": 5000}  # evaluations of a robust image
REFERENCE = {"apgd-ce": 100, "apgd-t": 9 * 100, "fab-t": 9 * (100 + 100), "square": 5000}  # FAB-T: half forward only
RUNS = (*attacks.STANDARD, "standard")
CONVOLUTIONS = ((0, 1), (2, 2), (4, 2))  # number of the layer, strides


def logits(weights: dict[str, jax.Array], images: jax.Array) -> jax.Array:
    """Compute logits [B, 10] of images [B, 32, 32, 3] by the golden CNN, with PyTorch's weights."""
    x = images.transpose(0, 3, 1, 2)
    for number, strides in CONVOLUTIONS:
        how = dict(padding=((1, 1), (1, 1)), dimension_numbers=("NCHW", "OIHW", "NCHW"))
        x = jax.lax.conv_general_dilated(x, weights[f"{number}.weight"], (strides, strides), **how)
        x = jax.nn.relu(x + weights[f"{number}.bias"][:, None, None])
    x = x.reshape(len(x), -1)
    x = jax.nn.relu(x @ weights["7.weight"].T + weights["7.bias"])
    return x @ weights["9.weight"].T + weights["9.bias"]


def golden(num_images: int) -> tuple[jax.tree_util.Partial, np.ndarray, np.ndarray, dict[str, np.ndarray], float]:
    """Return model, images [N, 32, 32, 3], labels [N], the reference's {attack: robust [N]} and epsilon."""
    kept = dict(np.load(GOLDEN))
    weights = {name[8:]: jnp.asarray(array) for name, array in kept.items() if name.startswith("weights/")}
    images = (kept["images"][:num_images] / 255).astype(np.float32)
    robust = {name: kept[f"robust_{name.replace('-', '_')}"][:num_images] for name in (*attacks.STANDARD, "standard")}
    return jax.tree_util.Partial(logits, weights), images, kept["labels"][:num_images], robust, float(kept["epsilon"])


def agreement(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Compare two results, bool [N]: counts of robust images, and the images on which they differ."""
    return {
        "robust": int(ours.sum()),
        "reference": int(theirs.sum()),
        "robust_here_only": np.flatnonzero(ours & ~theirs).tolist(),
        "robust_there_only": np.flatnonzero(theirs & ~ours).tolist(),
    }


def work(now: attacks.Progress, num_images: int) -> dict[str, Any]:
    """Count an attack's evaluations, and those that it saves, from its last progress report."""
    given = now.total
    return {
        "given": given,
        "seconds": now.seconds,
        "images_per_second": given / now.seconds if now.seconds else None,
        "evaluations": {
            "done": now.evaluations,
            "slots": now.slots,
            "reference": given * REFERENCE[now.attack],
            "whole_batches": given * WHOLE[now.attack],
            "every_attack_on_all": num_images * WHOLE[now.attack],
        },
        "evaluations_per_image": now.evaluations / num_images,
        "evaluations_per_given_image": now.evaluations / given if given else None,
        "reference_per_given_image": REFERENCE[now.attack],
    }


def measure(name: str, num_images: int, batch_size: int) -> dict[str, Any]:
    """Run one attack alone, or "standard"."""
    predict, images, labels, theirs, epsilon = golden(num_images)
    last: dict[str, attacks.Progress] = {}

    def follow(now: attacks.Progress) -> None:
        last[now.attack] = now
        attacks.show_progress(now)

    chosen = attacks.STANDARD if name == "standard" else (name,)
    settings: dict[str, Any] = dict(epsilon=epsilon, attacks=chosen, batch_size=batch_size, progress=follow)
    started = time.perf_counter()
    result = attacks.autoattack(predict, images, labels, jax.random.key(0), **settings)
    seconds = time.perf_counter() - started
    rows = {attack: work(now, len(images)) for attack, now in last.items()}
    totals = {key: sum(row["evaluations"][key] for row in rows.values()) for key in rows[chosen[0]]["evaluations"]}
    return {
        **agreement(result.robust, theirs[name]),
        "seconds": seconds,
        "images_per_second": len(images) / seconds,
        "evaluations": totals,
        "evaluations_per_image": totals["done"] / len(images),
        "evaluations_per_standing_image": totals["done"] / max(1, int(result.robust.sum())),
        "slots_saved": {key: totals[key] / totals["slots"] for key in ("whole_batches", "every_attack_on_all")},
        "attacks": rows,
    }


def of_the_authors(num_images: int, batch_size: int) -> dict[str, Any] | None:
    """Run the authors' suite on the same images; return None if it is not installed."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "pyautoattack")):
        return None
    pyautoattack, torch = (importlib.import_module(name) for name in ("pyautoattack", "torch"))
    nn = torch.nn

    torch.set_num_threads(num_cores())
    kept = dict(np.load(GOLDEN))
    layers = []
    for (channels, wider), (_, strides) in zip(((3, 32), (32, 64), (64, 64)), CONVOLUTIONS, strict=True):
        layers += [nn.Conv2d(channels, wider, 3, strides, 1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4096, 128), nn.ReLU(), nn.Linear(128, 10)).eval()
    net.load_state_dict({k[8:]: torch.from_numpy(v) for k, v in kept.items() if k.startswith("weights/")})
    net.requires_grad_(False)
    images = torch.from_numpy((kept["images"][:num_images] / 255).astype(np.float32).transpose(0, 3, 1, 2).copy())
    labels = torch.from_numpy(kept["labels"][:num_images]).long()
    suite = pyautoattack.AutoAttack(net, eps=float(kept["epsilon"]), norm="Linf", seed=0)
    started = time.perf_counter()
    _, predicted = suite.run_standard_evaluation(images, labels, batch_size=batch_size)
    seconds = time.perf_counter() - started
    robust = (predicted == labels).numpy()
    return {**agreement(robust, kept["robust_standard"][:num_images]), "seconds": seconds, "torch": torch.__version__}


def table(numbers: dict[str, Any]) -> Table:
    grid = Table(title=f"{numbers['num_images']} images, batch {numbers['batch_size']}, {numbers['device']}")
    for head in ("", "robust", "reference", "here / there only", "s", "evaluations an image given", "reference's"):
        grid.add_column(head, justify="right")
    for head in ("done", "slots", "whole batches", "every attack on all"):
        grid.add_column(head, justify="right")

    def add(title, row, shares, *work):
        counts = [f"{row['evaluations'][k]:,}" for k in ("done", "slots")]
        counts += [
            f"{row['evaluations'][k]:,} ({row['evaluations'][k] / row['evaluations']['slots']:.2f})"
            for k in ("whole_batches", "every_attack_on_all")
        ]
        grid.add_row(title, *shares, f"{row['seconds']:.0f}", *work, *counts)

    for name, row in numbers["runs"].items():
        only = f"{len(row['robust_here_only'])} / {len(row['robust_there_only'])}"
        shares = (str(row["robust"]), str(row["reference"]), only)
        for attack, part in row["attacks"].items():
            each = (f"{part['evaluations_per_given_image']:.1f}", f"{part['reference_per_given_image']:,}")
            if name == "standard":
                add(f"  {attack}, of {part['given']}", part, ("", "", ""), *each)
            else:
                add(name, row, shares, *each)
        if name == "standard":
            add(name, row, shares, f"{row['evaluations_per_image']:.1f}", "")
    for seconds, theirs in numbers["turns"]:
        again = f"{theirs['seconds']:.0f} s ({seconds / theirs['seconds']:.2f})" if theirs else "not installed"
        grid.add_row("standard", "", "", "", f"{seconds:.0f}", "the authors':", again)
    return grid


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.autoattack", description=__doc__.splitlines()[0])
    parser.add_argument("--attacks", default=",".join(RUNS), help="default: %(default)s; standard is the suite")
    parser.add_argument("--images", type=int, default=256, help="number of golden images")
    parser.add_argument("--batch_size", type=int, default=128, help="images in an evaluation, on all devices together")
    parser.add_argument("--repeats", type=int, default=1, help="timings of the suite, and of the authors' if installed")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


def main() -> None:
    parser = arguments_parser()
    args = parser.parse_args()
    if unknown := [name for name in args.attacks.split(",") if name not in RUNS]:
        parser.error(f"unknown attack {unknown[0]!r}; known: {', '.join(RUNS)}")
    numbers: dict[str, Any] = {
        **provenance.of("autoattack"),
        "num_images": min(args.images, len(np.load(GOLDEN)["labels"])),
        "batch_size": args.batch_size,
        "runs": {},
        "turns": [],  # seconds of the suite, and the authors' result
    }
    for name in args.attacks.split(","):
        for _ in range(args.repeats if name == "standard" else 1):
            numbers["runs"][name] = measure(name, args.images, args.batch_size)
            if name == "standard":
                theirs = of_the_authors(args.images, args.batch_size)
                numbers["turns"].append((numbers["runs"][name]["seconds"], theirs))
            provenance.write(args.out, numbers)
    Console(width=None if sys.stdout.isatty() else 160).print(table(numbers))


if __name__ == "__main__":
    main()
