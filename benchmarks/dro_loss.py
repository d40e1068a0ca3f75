"""Measure time and memory of DRO-LT's loss and its gradient over many classes. From the root of the checkout:

    python -m benchmarks.dro_loss                                # 1,000 and 8,142 classes: minutes on a CPU
    python -m benchmarks.dro_loss --num_classes 100 --dim=64 --batch_size=32           # a quick look
    python -m benchmarks.dro_loss --out=dro_loss.json

Three implementations compute the loss and its gradient to features and margins:

- ltjax: `ltjax.losses.dro_loss`, distances of the batch to its classes' centroids by a matrix product, [B, B];
- naive: the formula as written, in JAX: differences of every centroid and every example, [C, B, D];
- torch: distances of every centroid and every example by `torch.cdist`, [C, B]; if PyTorch is installed.

Each runs in a new process, one after the other. The table has the median time of a call, the device's memory by XLA's
plan, on Linux the growth of the process's peak resident memory in the first call (the only figure for torch on a CPU),
and the largest difference of loss and gradients from the naive ones.
"""

import argparse
import functools
import importlib.util
import json
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import provenance
from ltjax.runs import results
from ltjax.system.files import write_json

TEMPERATURE = 1.0
CLOSE = 1e-4  # tolerance of loss and gradients, relative to their largest number; float32 sums in another order
MEMORY = {"plan_bytes": "XLA's plan", "resident_growth_bytes": "resident growth"}


def batch(batch_size: int, num_classes: int, dim: int) -> tuple[np.ndarray, ...]:
    """Draw features [B, D], labels [B], centroids [C, D] and margins [C], in float32.

    Centroids are closer together than features: with distant classes, gradients would be rounding noise.
    """
    rng = np.random.default_rng(0)
    centroids = rng.standard_normal((num_classes, dim), np.float32) / 10
    labels = rng.integers(num_classes, size=batch_size // 4).repeat(4)  # 4 images of a class in a row, as in the method
    features = centroids[labels] + rng.standard_normal((len(labels), dim), np.float32)
    return features, labels, centroids, rng.uniform(0, 2, num_classes).astype(np.float32)


def naive(features, labels, centroids, *, margins, temperature):
    """Compute the loss as in the paper, but with a sum of exponentials that cannot underflow."""
    import jax
    import jax.numpy as jnp

    member = jnp.arange(len(centroids))[:, None] == labels[None]  # [C, B]
    distance = jnp.sqrt(jnp.square(centroids[:, None] - features[None]).sum(-1))  # [C, B] of [C, B, D]
    similarity = -(distance + jnp.where(member, margins[:, None], 0)) / temperature
    minus_log = jax.nn.logsumexp(similarity, axis=1, keepdims=True) - similarity  # [C, B]
    bound = jnp.where(member, minus_log, 0).sum(1) / jnp.maximum(member.sum(1), 1)  # [C]
    return bound.sum() / member.any(1).sum()


def with_jax(loss, features, labels, centroids, margins):
    """Return call() -> (loss, gradient to features, to margins), the device, and XLA's plan of memory in bytes."""
    import jax

    def both(features, labels, centroids, margins):
        return jax.value_and_grad(
            lambda z, e: loss(z, labels, centroids, margins=e, temperature=TEMPERATURE), argnums=(0, 1)
        )(features, margins)

    arguments = [jax.device_put(array) for array in (features, labels.astype(np.int32), centroids, margins)]
    compiled = jax.jit(both).lower(*arguments).compile()
    plan = compiled.memory_analysis()
    planned = plan and plan.temp_size_in_bytes + plan.output_size_in_bytes + plan.argument_size_in_bytes

    def call():
        value, gradients = jax.block_until_ready(compiled(*arguments))
        return value, *gradients

    return call, f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}", planned


def with_torch(features, labels, centroids, margins):
    """Return the same as `with_jax`, without a plan."""
    import torch  # pyrefly: ignore[missing-import]

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    z, y, m, e = (torch.from_numpy(array).to(device) for array in (features, labels, centroids, margins))
    z.requires_grad_()
    e.requires_grad_()

    def call():
        member = torch.arange(len(m), device=device)[:, None] == y[None]  # [C, B]
        similarity = -(torch.cdist(m, z) + member * e[:, None]) / TEMPERATURE
        minus_log = similarity.logsumexp(1, keepdim=True) - similarity
        bound = (minus_log * member).sum(1) / member.sum(1).clamp(min=1)  # [C]
        loss = bound.sum() / member.any(1).sum()
        return [array.detach().cpu() for array in (loss, *torch.autograd.grad(loss, (z, e)))]  # waits for the device

    return call, str(device), None


def resident(field: str) -> int | None:
    """Read VmRSS or VmHWM (its peak) of this process in bytes; return None if the system has no such file."""
    try:
        match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return 1024 * int(match[1]) if match else None


def peak_growth(call) -> int | None:
    """Return the growth of peak resident memory during call(), in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        call()
        return None
    before = resident("VmRSS")
    call()
    after = resident("VmHWM")
    return None if before is None or after is None else max(0, after - before)


def measure_here(way: str, repeats: int, arrays: Path, *shape: int) -> dict[str, Any]:
    """Measure one implementation in this process; write loss and gradients to the npz file `arrays`."""
    if way == "torch":
        build = with_torch
    else:
        from ltjax import losses

        build = functools.partial(with_jax, naive if way == "naive" else losses.dro_loss)
    build(*batch(4, 2, 2))[0]()  # a first call starts threads
    call, device, plan = build(*batch(*shape))
    growth = peak_growth(call)
    seconds, numbers = [], ()
    for _ in range(repeats):
        started = time.perf_counter()
        numbers = call()
        seconds.append(time.perf_counter() - started)
    loss, to_features, to_margins = map(np.asarray, numbers)
    np.savez(arrays, loss=loss, features=to_features, margins=to_margins)
    return {
        "device": device,
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "plan_bytes": plan,
        "resident_growth_bytes": growth,
    }


def measure(shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Return {implementation: numbers} at (batch size, classes, dimensions), each from its own process."""
    ways = ["ltjax", "naive"] + (["torch"] if importlib.util.find_spec("torch") else [])
    numbers, arrays = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for way in ways:
            npz_file, json_file = Path(folder) / f"{way}.npz", Path(folder) / f"{way}.json"
            child = [way, str(repeats), str(npz_file), str(json_file), *map(str, shape)]
            subprocess.run([sys.executable, "-m", "benchmarks.dro_loss", "--child", *child], check=True)
            numbers[way], arrays[way] = json.loads(json_file.read_text()), dict(np.load(npz_file))
    for way in ways:
        numbers[way]["difference_from_naive"] = {
            name: float(np.abs(arrays[way][name] - expected).max() / np.abs(expected).max())
            for name, expected in arrays["naive"].items()
        }
        numbers[way]["over_ltjax"] = {
            key: ratio(numbers[way][key], numbers["ltjax"][key]) for key in ("median_seconds", *MEMORY)
        }
    return numbers


def ratio(theirs: float | None, ours: float | None) -> float | None:
    return theirs / ours if theirs is not None and ours else None


def table(shape: tuple[int, int, int], numbers: dict[str, Any]) -> Table:
    grid = Table(title="batch {}, {:,} classes, {} dimensions".format(*shape))
    for name in ("", "ms a call", *(f"MB, {title}" for title in MEMORY.values()), "difference from naive"):
        grid.add_column(name, justify="right")
    for way, row in numbers.items():
        times = {key: "" if r is None else f" ({r:,.1f}x)" for key, r in row["over_ltjax"].items()}
        memory = ["-" if row[key] is None else f"{row[key] / 1e6:.1f}{times[key]}" for key in MEMORY]
        milliseconds = f"{1e3 * row['median_seconds']:.2f}{times['median_seconds']}"
        grid.add_row(f"{way}, {row['device']}", milliseconds, *memory, f"{farthest(row):.1e}")
    return grid


def farthest(row: dict[str, Any]) -> float:
    return max(row["difference_from_naive"].values())


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--child"]:
        way, repeats, npz_file, json_file, *shape = argv[1:]
        write_json(Path(json_file), measure_here(way, int(repeats), Path(npz_file), *map(int, shape)))
        return 0
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dro_loss", description=__doc__.splitlines()[0])
    parser.add_argument("--num_classes", type=int, nargs="+", default=[1000, 8142], help="ImageNet-LT's, iNaturalist's")
    parser.add_argument("--batch_size", type=int, default=128, help="a multiple of 4")
    parser.add_argument("--dim", type=int, default=2048, help="dimensions of the features")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each implementation")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    commit, sizes = results.git_commit(), []
    console = Console(width=None if sys.stdout.isatty() else 120)
    for num_classes in args.num_classes:
        shape = (args.batch_size, num_classes, args.dim)
        ways = measure(shape, args.repeats)
        console.print(table(shape, ways))
        sizes.append({"num_classes": num_classes, "ways": ways})
    same = all(farthest(row) < CLOSE for size in sizes for row in size["ways"].values())
    print(f"numbers agree to {CLOSE:g}: {'yes' if same else 'NO'}")
    if args.out:
        numbers = {
            "benchmark": "dro_loss",
            "batch_size": args.batch_size,
            "dim": args.dim,
            "temperature": TEMPERATURE,
            "sizes": sizes,
            "same_numbers": same,
            "device": sizes[0]["ways"]["ltjax"]["device"],
            "versions": results.versions() | torch_version(),
            "git_commit": commit,
            "command": shlex.join(["python", "-m", "benchmarks.dro_loss", *argv]),
        }
        provenance.write(args.out, numbers)
    return 0 if same else 1


def torch_version() -> dict[str, str]:
    from importlib import metadata

    return {"torch": metadata.version("torch")} if importlib.util.find_spec("torch") else {}


if __name__ == "__main__":
    sys.exit(main())
