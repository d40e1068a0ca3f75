"""Whether a run that goes on in a new process repeats itself bit for bit, by XLA's flags. From the checkout's root:

    python -m benchmarks.resume                                    # ResNet-20, bfloat16
    python -m benchmarks.resume --depth=8 --width=4 --batch_size=16 --steps=2

One process trains twice `--steps` steps and saves halfway; another one goes on from there. Both compile for
themselves, without JAX's compilation cache. Three ways: without flags; with deterministic operations; and with XLA's
choice of kernels kept in a folder, where the second process finds it. Otherwise each process on a GPU times kernels
anew, and another one may win.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import cifar_step, device_step, provenance
from ltjax.runs.checkpoint import Checkpoints, like
from ltjax.system import devices

WAYS = {  # XLA_FLAGS
    "none": "",
    "deterministic": "--xla_gpu_deterministic_ops=true",
    "autotuned": "--xla_gpu_per_fusion_autotune_cache_dir={folder}/autotuned",
}
MEMORY = "0.15"  # of the device, for each of the three that run side by side


def part(which: str, folder: Path, args: argparse.Namespace) -> None:
    """The process that saves, or the one that goes on; the latter prints what differs."""
    shape = dict(depth=args.depth, width=args.width, batch_size=args.batch_size, dtype=args.dtype)
    prepared = device_step.prepare(cifar_step.one_epoch_config(**shape), folder.parent)
    state, source = prepared.state(), prepared.experiment.train_data
    with Checkpoints(folder / "checkpoints") as checkpoints:
        if which == "saves":
            state, _ = prepared.compiled.run(state, source, args.steps)
            checkpoints.save(args.steps, state, {})
            checkpoints.wait()
        else:
            state, _ = checkpoints.restore(like(state)) or (None, None)
        state, metrics = prepared.compiled.run(state, source, args.steps)
    arrays = [np.asarray(each) for each in jax.tree.leaves((state, metrics))]
    if which == "saves":
        np.savez(folder / "expected.npz", *arrays)
        return
    with np.load(folder / "expected.npz") as expected:
        pairs = [(expected[f"arr_{number}"], found) for number, found in enumerate(arrays)]
    differ = [np.abs(a.astype(np.float64) - b).max() for a, b in pairs if a.tobytes() != b.tobytes()]
    summary = {"equal": not differ, "arrays": len(pairs), "differ": len(differ), "largest": max(differ, default=0.0)}
    print(json.dumps({**provenance.of("resume", []), "summary": summary}))


def attempt(way: str, arguments: Sequence[str], data_dir: Path) -> dict[str, Any]:
    """Both processes of a way -> what the second one says. Raises: RuntimeError with what a process printed."""
    folder = data_dir / way
    (folder / "autotuned").mkdir(parents=True)
    flags = f"{os.environ.get('XLA_FLAGS', '')} {WAYS[way].format(folder=folder)}".strip()
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = MEMORY
    said = ""
    for which in ("saves", "goes_on"):
        command = [sys.executable, "-m", "benchmarks.resume", *arguments, f"--part={which}", f"--folder={folder}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{way}, the process that {which}: {done.stderr[-2000:]}")
        said = done.stdout
    return json.loads(said.splitlines()[-1])


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resume", description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=20, help="of the ResNet: 6 n + 2")
    parser.add_argument("--width", type=int, default=16, help="channels of its first stage")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=20, help="before, and after")
    parser.add_argument("--out", type=Path, help="JSON file to write, after each way")
    parser.add_argument("--part", choices=("saves", "goes_on"), help=argparse.SUPPRESS)  # a child
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of a child
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = arguments_parser().parse_args(arguments)
    if args.part:
        devices.use_cpu_cores(args.batch_size)
        part(args.part, args.folder, args)
        return
    own = [argument for argument in arguments if not argument.startswith("--out")]
    numbers: dict[str, Any] = {"ways": {}}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(WAYS)) as pool:
        cifar_step.write_random_images(Path(folder), per_class=500)
        for way, found in zip(
            WAYS, pool.map(partial(attempt, arguments=own, data_dir=Path(folder)), WAYS), strict=True
        ):
            summary = found.pop("summary")
            numbers = {**found, "ways": {**numbers["ways"], way: {"flags": WAYS[way], **summary}}}
            numbers["command"] = " ".join(["python -m benchmarks.resume", *arguments])
            provenance.write(args.out, numbers)
            print(f"{way}: {summary}", flush=True)


if __name__ == "__main__":
    main()
