"""Compare the gradients of convolution kernels in bfloat16 and float32. From the root of the checkout:

    python -m benchmarks.gradients --data_dir=DATA          # CIFAR-100, ResNet-32; ResNet-50 on synthetic images
    python -m benchmarks.gradients --nets resnet32 --depth=8

The gradients are of the first batch of a new network, without augmentation: a step of plain gradient descent at rate 1
subtracts the gradient from the kernel. For each kernel, it computes the cosine of both gradients, and the length of
their difference relative to float32's. On an accelerator, set JAX_DEFAULT_MATMUL_PRECISION=highest for full float32.
"""

import argparse
import contextlib
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import cifar_step, device_step, provenance
from configs import cifar100_lt
from ltjax import optim
from ltjax.system import devices

NETS = ("resnet32", "resnet50")


def kernel_gradients(values: Mapping[str, Any], data_dir: Path | None = None) -> dict[str, np.ndarray]:
    """Return {path: gradient of a convolution kernel} on the first batch of a config's first stage."""
    first = values["stages"][0]
    plain = dict(lr=1.0, schedule=dict(kind="constant"), augment={}, optimizer=dict(momentum=0.0))
    still = dict(momentum=0.0, nesterov=False, weight_decay=0.0)
    changed = {**values, first: {**values[first], **plain}, "optimizer": still, "stages": (first,)}
    prepared = device_step.prepare(changed, data_dir)
    state = prepared.state()
    before = {path: np.asarray(value) for path, value in optim.flatten(state.variables.params).items()}
    with prepared.batches(1) as feed:
        state, metrics = prepared.compiled.run(state, feed.take(0, 1, 0), 1)
    kept = jax.tree.leaves((state.variables, state.opt_state, metrics))
    if others := {x.dtype.name for x in kept} - {"float32", "int32", "uint32"}:
        raise RuntimeError(f"a step stores {min(others)}: only activations may have less precision")
    after = optim.flatten(state.variables.params)
    return {path: before[path] - np.asarray(after[path]) for path in before if before[path].ndim == 4}


def compare(exact: Mapping[str, np.ndarray], rounded: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Return {path: {"cosine", "relative_error"}} of the kernels with a non-zero gradient."""
    differences = {}
    for path, gradient in exact.items():
        length, other = np.linalg.norm(gradient), rounded[path]
        if length:
            cosine = (gradient * other).sum() / (length * max(np.linalg.norm(other), np.finfo(np.float32).tiny))
            error = np.linalg.norm(other - gradient) / length
            differences[path] = {"cosine": float(cosine), "relative_error": float(error)}
    return differences


def measure(net: str, args: argparse.Namespace) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        if net == "resnet50":
            stack.enter_context(device_step.made_up_large(width=500, height=375))
            values = device_step.large(depth=args.depth or 50, size=args.size, dtype="float32", batch_size=args.batch)
        else:
            config = cifar100_lt.get_config("method=ce,imbalance=100")
            config.batch_size, config.model.depth = args.batch, args.depth or 32
            values = config.to_dict()
            if args.data_dir is None:
                args.data_dir = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                cifar_step.write_random_images(args.data_dir, per_class=500)
        both = [{**values, "model": {**values["model"], "dtype": dtype}} for dtype in ("float32", "bfloat16")]
        with ThreadPoolExecutor(len(both)) as pool:  # they compile in parallel
            kernels = compare(*pool.map(partial(kernel_gradients, data_dir=args.data_dir), both))
    cosines = [each["cosine"] for each in kernels.values()]
    return {"median_cosine": statistics.median(cosines), "smallest_cosine": min(cosines), "kernels": kernels}


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gradients", description=__doc__.splitlines()[0])
    parser.add_argument("--nets", choices=NETS, nargs="+", default=list(NETS))
    parser.add_argument("--batch", type=int, default=128, help="images")
    parser.add_argument("--data_dir", type=Path, help="prepared CIFAR-100 (default: synthetic images)")
    parser.add_argument("--depth", type=int, default=0, help="depth of both networks, instead of 32 and 50")
    parser.add_argument("--size", type=int, default=224, help="resnet50: side of the images in pixels")
    parser.add_argument("--out", type=Path, help="JSON file to write, after each network")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    args = arguments_parser().parse_args(arguments)
    devices.use_cpu_cores(args.batch)
    numbers: dict[str, Any] = {**provenance.of("gradients", arguments), "batch_size": args.batch, "nets": {}}
    for net in args.nets:
        figures = numbers["nets"][net] = measure(net, args)
        provenance.write(args.out, numbers)
        print(
            f"{net}: cosine of bfloat16's and float32's gradient of {len(figures['kernels'])} kernels: "
            f"{figures['median_cosine']:.4f} by the median, {figures['smallest_cosine']:.4f} at least",
            flush=True,
        )


if __name__ == "__main__":
    main()
