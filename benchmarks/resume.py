"""Check whether training resumed in a new process is bit-identical, by XLA's flags. From the checkout's root:

    python -m benchmarks.resume                                    # ResNet-20, bfloat16
    python -m benchmarks.resume --depth=8 --width=4 --batch_size=16 --steps=2

One process trains twice `--steps` steps and saves halfway; another one resumes there. Both compile without JAX's
compilation cache. There are three ways: without flags; with deterministic operations; and with XLA's choice of kernels
saved in a folder for the second process. Otherwise each process on a GPU times kernels and may choose others.
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
MEMORY = "0.15"  # share of the device's memory for each of the three parallel runs


def part(which: str, folder: Path, args: argparse.Namespace) -> None:
    """Save a run, or resume it and print the differences. `which` is "saves" or "resumes"."""
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
        pairs = [(expected[f"arr_{number}"], array) for number, array in enumerate(arrays)]
    differ = [np.abs(a.astype(np.float64) - b).max() for a, b in pairs if a.tobytes() != b.tobytes()]
    summary = {"equal": not differ, "arrays": len(pairs), "differ": len(differ), "largest": max(differ, default=0.0)}
    print(json.dumps({**provenance.of("resume", []), "summary": summary}))


def attempt(way: str, arguments: Sequence[str], data_dir: Path) -> dict[str, Any]:
    """Run both processes; return the second one's summary. Raise RuntimeError with the output of a failed one."""
    folder = data_dir / way
    (folder / "autotuned").mkdir(parents=True)
    flags = f"{os.environ.get('XLA_FLAGS', '')} {WAYS[way].format(folder=folder)}".strip()
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = MEMORY
    output = ""
    for which in ("saves", "resumes"):
        command = [sys.executable, "-m", "benchmarks.resume", *arguments, f"--part={which}", f"--folder={folder}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{way}, the process that {which}: {done.stderr[-2000:]}")
        output = done.stdout
    return json.loads(output.splitlines()[-1])


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resume", description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=20, help="depth of the ResNet: 6 n + 2")
    parser.add_argument("--width", type=int, default=16, help="channels of its first stage")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=20, help="steps before the checkpoint, and after it")
    parser.add_argument("--out", type=Path, help="JSON file to write, after each way")
    parser.add_argument("--part", choices=("saves", "resumes"), help=argparse.SUPPRESS)  # for a child
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # for a child
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = arguments_parser().parse_args(arguments)
    if args.part:
        devices.use_cpu_cores(args.batch_size)
        part(args.part, args.folder, args)
        return
    settings = [argument for argument in arguments if not argument.startswith("--out")]
    numbers: dict[str, Any] = {"ways": {}}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(WAYS)) as pool:
        cifar_step.write_random_images(Path(folder), per_class=500)
        run = partial(attempt, arguments=settings, data_dir=Path(folder))
        for way, about in zip(WAYS, pool.map(run, WAYS), strict=True):
            summary = about.pop("summary")
            numbers = {**about, "ways": {**numbers["ways"], way: {"flags": WAYS[way], **summary}}}
            numbers["command"] = " ".join(["python -m benchmarks.resume", *arguments])
            provenance.write(args.out, numbers)
            print(f"{way}: {summary}", flush=True)


if __name__ == "__main__":
    main()
