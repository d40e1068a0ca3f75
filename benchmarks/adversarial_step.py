"""Measure a step of adversarial training: PGD alone, PGD-AT and LBGAT. From the root of the checkout:

    python -m benchmarks.adversarial_step                              # WRN-10-1 on a CPU, WRN-34-10 on an accelerator
    python -m benchmarks.adversarial_step --batch_size=16 --attack_steps=2 --repeats=2                # a quick look
    python -m benchmarks.adversarial_step --dtype=bfloat16 --no_flops --out=step.json
    python -m benchmarks.adversarial_step --model=wrn34_10 --guide=resnet18 --repeats=0    # count operations only

The images are random, in the shape of CIFAR-100. The programs are

- pgd: the attack of TRADES and LBGAT alone, which maximises the KL from the natural prediction;
- pgd_at, lbgat-0, lbgat-6: the training step of PGD-AT, and of LBGAT with beta 0 and 6;
- lbgat-0-recomputed: lbgat-0, but each step of the attack computes the natural prediction, as in the authors' code.
  Computing it once saves the difference.

The table has milliseconds and images a second, by the median of `--repeats` timings in turns, so that other load on the
machine affects all programs; evaluations of a network for each image (forward passes, with or without a backward pass);
and operations for each image, by XLA and the minimum, see `benchmarks/flops.py`.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks import flops, provenance
from benchmarks.cifar_step import write_random_images
from configs import cifar100, common
from ltjax.config import StageConfig, parse
from ltjax.engine import experiment as experiments
from ltjax.engine.stage import make_apply
from ltjax.methods import adversarial
from ltjax.system import devices, parallel
from ltjax.types import Batch, Method, Variables


class Program(NamedTuple):
    method: str  # "pgd" for the attack alone
    beta: float = 0.0
    recomputes: bool = False  # each step of the attack computes the natural prediction


PROGRAMS = {
    "pgd": Program("pgd"),
    "pgd_at": Program("pgd_at"),
    "lbgat-0": Program("lbgat"),
    "lbgat-6": Program("lbgat", 6.0),
    "lbgat-0-recomputed": Program("lbgat", 0.0, True),
}
create = adversarial.create


def config(
    program: Program, *, model: str, guide: str, batch_size: int, attack_steps: int, dtype: str = "float32"
) -> dict[str, Any]:
    """Return `configs/cifar100.py` with one epoch."""
    method = "lbgat" if program.method == "pgd" else program.method
    extra = f",guide={guide},beta={program.beta:g}" if method == "lbgat" else ""
    values = cifar100.get_config(f"method={method},model={model}{extra}")
    values.update(batch_size=batch_size, epochs=1)
    values.model.dtype = dtype
    if values.guide:
        values.guide.dtype = dtype
    values[method].method.attack.num_steps = attack_steps
    return values.to_dict()


def recomputing(given: adversarial.LossOf, objective: adversarial.Objective, *more: Any, **settings: Any) -> Method:
    """Replace `adversarial.create`: each step of its attack predicts the clean images."""
    inside: list[Any] = []

    def recomputed(natural: jax.Array, logits: jax.Array, batch: Batch, variables: Variables) -> jax.Array:
        del natural
        apply, variables = inside[-1]
        images = batch.images + 0 * jax.lax.stop_gradient(logits).sum()  # otherwise XLA would compute it once
        return objective(apply(variables, images, bn="eval")[0].logits, logits, batch, variables)

    method = create(given, recomputed, *more, **settings)

    def loss(apply, variables, batch, rng):
        inside.append((apply, jax.lax.stop_gradient(variables)))
        return method.loss(apply, variables, batch, rng)

    return method._replace(loss=loss)


def attack_alone(stage: StageConfig, nets: Any) -> Callable[..., jax.Array]:
    """Return the attack of a stage's method: (variables, images, rng) -> adversarial images."""

    def given(apply, variables, batch, images):
        return images.sum(), (variables, {"images": images})

    method = adversarial.create(given, adversarial.divergence, attack=stage.method["attack"], awp=0.0)
    apply = make_apply(nets, "train")

    def attack(variables, images, rng):
        batch = Batch(images, jnp.zeros(len(images), jnp.int32))
        return method.loss(apply, variables, batch, rng)[1][1]["images"]

    return attack


def steps_of(program: Program):
    return mock.patch.object(adversarial, "create", recomputing) if program.recomputes else contextlib.nullcontext()


def prepare(program: Program, data_dir: Path, shape: dict[str, Any]):
    """Return the configs of the run and of its stage, and the experiment. `shape` has keywords of `config`."""
    run = parse(config(program, **shape))
    (stage,) = run.stages.values()
    return run, stage, experiments.set_up(run, data_dir)


def runner(program: Program, data_dir: Path, shape: dict[str, Any], steps: int) -> Callable[[], Any]:
    """Return a function that runs `steps` training steps or attacks and waits for the device."""
    run, stage, experiment = prepare(program, data_dir, shape)
    variables = experiments.starting_variables(experiment, stage)
    if program.method == "pgd":
        images = jax.random.uniform(jax.random.key(0), (run.batch_size, *experiment.image_shape))
        images = jax.device_put(images, parallel.split_batch(experiment.mesh))
        attack = jax.jit(attack_alone(stage, experiment.nets))

        def call():
            jax.block_until_ready([attack(variables, images, jax.random.key(number)) for number in range(steps)])
    else:
        with steps_of(program):
            compiled = experiments.build_stage(experiment, stage)
            state = [compiled.init(experiments.seeds(run), variables)]

        def call():
            with steps_of(program):  # the first call traces
                state[0], _ = jax.block_until_ready(compiled.run(state[0], experiment.train_data, steps))

    return call


def operations(program: Program, data_dir: Path, shape: dict[str, Any]) -> float:
    """Count operations for one image by XLA. Compile, but run nothing."""

    def count(num_steps: int) -> float:
        run, stage, experiment = prepare(program, data_dir, {**shape, "attack_steps": num_steps})
        with steps_of(program):
            if program.method != "pgd":
                return flops.by_xla(experiment, stage)
        attack = attack_alone(stage, flops.plain_nets(run, len(experiment.class_names)))
        images = jax.ShapeDtypeStruct((run.batch_size, *experiment.image_shape), jnp.float32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        with jax.default_device(jax.devices("cpu")[0]):
            lowered = jax.jit(attack).lower(experiments.fresh_shapes(experiment), images, key)
        return flops.operations(flops.compile_to_count(lowered)) / run.batch_size

    return flops.with_attack(count, shape["attack_steps"])


def least(program: Program, shape: dict[str, Any]) -> int:
    """Count the minimum of operations for one image."""
    net, guide = (flops.network(common.model(shape[key]), 100) for key in ("model", "guide"))
    return flops.of_step(program.method, net, guide, num_steps=shape["attack_steps"], beta=program.beta)


def evaluations(program: Program, attack_steps: int) -> int:
    """Count forward passes of a network for an image: the attack's, then the training's."""
    natural = 0 if program.method == "pgd_at" else attack_steps if program.recomputes else 1
    return natural + attack_steps + {"pgd": 0, "pgd_at": 1, "lbgat": 3}[program.method]


def measure(args: argparse.Namespace, data_dir: Path) -> dict[str, Any]:
    """Return the numbers of all programs."""
    shape = {key: getattr(args, key) for key in ("model", "guide", "batch_size", "attack_steps", "dtype")}
    rows: dict[str, Any] = {}
    chosen = {name: PROGRAMS[name] for name in args.only}
    for name, program in chosen.items():
        rows[name] = {"evaluations_per_image": evaluations(program, args.attack_steps)}
        if not args.no_flops:
            counted, by_hand = operations(program, data_dir, shape), least(program, shape)
            rows[name]["flops_per_image"] = {"by_xla": counted, "least": by_hand, "xla_over_least": counted / by_hand}
    calls = {}
    for name, program in chosen.items() if args.repeats else ():
        calls[name] = runner(program, data_dir, shape, args.steps)
        started = time.perf_counter()
        calls[name]()
        rows[name]["first_call_seconds"] = time.perf_counter() - started
        rows[name]["seconds_per_step"] = []
    for turn in range(args.repeats):
        for name, call in calls.items() if turn % 2 else reversed(calls.items()):
            started = time.perf_counter()
            call()
            rows[name]["seconds_per_step"].append((time.perf_counter() - started) / args.steps)
    for row in rows.values() if args.repeats else ():
        row["images_per_second"] = args.batch_size / median(row)
    saved = {}
    if rows.keys() >= {"lbgat-0", "lbgat-0-recomputed"}:
        once, recomputed = rows["lbgat-0"], rows["lbgat-0-recomputed"]
        if args.repeats:
            saved["seconds"] = median(recomputed) / median(once)
        if not args.no_flops:
            saved["flops"] = recomputed["flops_per_image"]["by_xla"] / once["flops_per_image"]["by_xla"]
    return {"programs": rows, "recomputed_over_lbgat_0": saved}


def median(row: dict[str, Any]) -> float:
    return statistics.median(row["seconds_per_step"])


def table(numbers: dict[str, Any]) -> Table:
    grid = Table(
        title="{model}, guide {guide}, batch {batch_size}, {attack_steps} attack steps, {dtype}, {num_devices} x "
        "{device}".format_map(numbers)
    )
    for head in ("", "ms", "images/s", "evaluations", "MFLOP an image, XLA", "minimum", "ratio"):
        grid.add_column(head, justify="right")
    for name, row in numbers["programs"].items():
        speed, counts = ["-", "-"], ["-", "-", "-"]
        if flop := row.get("flops_per_image"):
            counts = [f"{flop['by_xla'] / 1e6:,.1f}", f"{flop['least'] / 1e6:,.1f}", f"{flop['xla_over_least']:.3f}"]
        if "images_per_second" in row:
            speed = [f"{1e3 * median(row):,.1f}", f"{row['images_per_second']:,.1f}"]
        grid.add_row(name, *speed, str(row["evaluations_per_image"]), *counts)
    saved = numbers["recomputed_over_lbgat_0"]
    if saved:
        grid.caption = "natural prediction in each attack step instead of once: " + ", ".join(
            f"{saved[key]:.3f} times the {what}"
            for key, what in (("seconds", "time"), ("flops", "FLOP"))
            if key in saved
        )
    return grid


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adversarial_step", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="such as wrn10_1 (a CPU's default), wrn34_10 (an accelerator's) or preact18")
    parser.add_argument("--guide", help="natural network of LBGAT: wrn10_1, or resnet18")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--attack_steps", type=int, default=10)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=1, help="training steps in a timing, one dispatch")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each program; 0: only count operations")
    parser.add_argument("--no_flops", action="store_true", help="skip counting operations, which compiles for a CPU")
    parser.add_argument(
        "--only", nargs="+", choices=tuple(PROGRAMS), default=list(PROGRAMS), help="programs to measure"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


def main() -> None:
    args = arguments_parser().parse_args()
    devices.use_cpu_cores(args.batch_size)
    origin, on_cpu = provenance.of("adversarial_step"), jax.default_backend() == "cpu"
    args.model = args.model or ("wrn10_1" if on_cpu else "wrn34_10")
    args.guide = args.guide or ("wrn10_1" if on_cpu else "resnet18")
    with tempfile.TemporaryDirectory() as data_dir:
        write_random_images(Path(data_dir), per_class=-(-args.batch_size // 100))
        measured = measure(args, Path(data_dir))
    numbers = {
        **origin,
        **{key: value for key, value in vars(args).items() if key not in ("out", "no_flops")},
        **measured,
        "images": "random",
    }
    Console(width=None if sys.stdout.isatty() else 120).print(table(numbers))
    provenance.write(args.out, numbers)


if __name__ == "__main__":
    main()
