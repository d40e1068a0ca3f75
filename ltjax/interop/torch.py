"""Weights of the authors' and torchvision's PyTorch networks, as ltjax variables, and back.

    python -m ltjax.interop.torch CHECKPOINT --model=resnet_cifar,depth=32,normalise=cifar --out=DIR

Needs no PyTorch where CHECKPOINT is a .safetensors or .npz file: a state_dict is {name: array}.
"""

import argparse
import ast
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ltjax import models
from ltjax.interop import checkpoints, names
from ltjax.interop.weights import described, save_weights
from ltjax.optim import flatten, unflatten
from ltjax.system.paths import local
from ltjax.types import UserError, Variables

NORMALISE = {  # mean and std of each channel
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # torchvision's, and the authors' on large images
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),  # MiSLAS, DRO-LT and ResLT, CIFAR-100 as well
    "inat": ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192)),  # MiSLAS on iNaturalist
    "none": ((0.0,), (1.0,)),  # LBGAT
}


class Placed(NamedTuple):
    variables: Variables
    placed: dict[str, str]  # {PyTorch's name: our path}
    ignored: tuple[str, ...]  # names passed over by rule


def import_state_dict(state_dict: Mapping[str, np.ndarray], model: nn.Module) -> Variables:
    """The variables of `model` with the weights of a PyTorch state_dict.

    Args:
      state_dict: {name: array} with PyTorch's names and layouts (convolutions OIHW, linear [out, in]); keys may begin
        with `module.` and `model.`. Understood: torchvision's ResNets (`layer1.0.downsample.0`, `fc`); the authors'
        CIFAR ResNets of DRO-LT (`conv1`, `layer1.0.conv1`, `linear`), MiSLAS (`classifier.`, `lws_model.learned_norm`,
        and for Places `block.`) and ResLT (`linear`, `BNH`, `BNM`, `BNT`, or one 1x1 convolution and batch norm);
        LBGAT's ResNet-18 (`layer2.0.shortcut.0`) and the wide ResNets of LBGAT and TRADES (`block1.layer.0.conv1`,
        `fc`); pre-activation ResNets (`bn` last). Passed over: `num_batches_tracked`; `sub_block1`, which the class of
        those wide ResNets holds and never uses; `epsilons`, the margins that DRO-LT's loss learns. Without a place:
        LBGAT's second network, to be given on its own, without `teacher.`.
      model: from `ltjax.models.create`.
    Returns: Variables with `params["net"]` and `stats["net"]`, float32, but float64 where both the state_dict and
      JAX_ENABLE_X64 say so. A `logit_scale` the state_dict does not have is 1.
    Raises: UserError naming every key that has no place or another shape, and every weight that no key gives.

    Examples:
      >>> net = models.create("resnet_cifar", 3, depth=8, width=2)
      >>> made = net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
      >>> ours = Variables({"net": made["params"]}, {"net": made["batch_stats"]}, {})
      >>> state_dict = torch.export_state_dict(ours, net)  # or, of PyTorch: {key: value.numpy(), ...}
      >>> variables = torch.import_state_dict(state_dict, net)
      >>> variables.params["net"]["backbone"]["conv"]["kernel"].shape
      (3, 3, 3, 2)
    """
    return place(state_dict, model).variables


def place(state_dict: Mapping[str, np.ndarray], model: nn.Module) -> Placed:
    """`import_state_dict`, and what became of each name."""
    arrays = {key: np.asarray(value) for key, value in state_dict.items()}
    wanted = _wanted(model, arrays)
    ignored = tuple(key for key in arrays if re.fullmatch(names.IGNORED, names.bare(key)))
    paths = {key: names.path_of(names.bare(key), arrays[key].ndim) for key in arrays.keys() - set(ignored)}
    if "branches/conv/kernel" in wanted:
        left = {key: arrays[key] for key, path in paths.items() if path not in wanted}
        paths |= names.branches_by_shape(left, wanted["branches/conv/kernel"].shape[2])
    found: dict[str, jax.Array] = {}
    placed, unplaced = {}, []
    for key in (key for key in arrays if key in paths):
        path, value = paths[key], arrays[key]
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        elif path == "logit_scale":
            value = value.reshape(-1)
        elif value.ndim == 2:
            value = value.T
        if path is None or path not in wanted:
            unplaced.append(key)
        elif path in found:
            unplaced.append(f"{key} (another one has given {path})")
        elif wanted[path].shape != value.shape:
            unplaced.append(f"{key} (shape {value.shape}, the model has {wanted[path].shape})")
        else:
            array = jnp.asarray(value)  # never float64 where JAX has it switched off
            found[path] = array.astype(jnp.float64 if array.dtype == jnp.float64 else jnp.float32)
            placed[key] = path
    if "logit_scale" in wanted:
        found.setdefault("logit_scale", jnp.ones(wanted["logit_scale"].shape, jnp.float32))
    missing = [path for path in wanted if path not in found]
    if unplaced or missing:
        raise UserError(f"state_dict does not fit the model: no place for {unplaced}; nothing for {missing}")
    stats = {path: value for path, value in found.items() if path.endswith(("/mean", "/var"))}
    params = {path: value for path, value in found.items() if path not in stats}
    return Placed(Variables({"net": unflatten(params)}, {"net": unflatten(stats)}, {}), placed, ignored)


def _wanted(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """{our path: shape} of the model, for images of as many channels as the state_dict's first convolution takes."""
    first = [v for key, v in arrays.items() if names.path_of(names.bare(key), v.ndim) == "backbone/conv/kernel"]
    channels = first[0].shape[1] if first and first[0].ndim == 4 else 3
    shapes = jax.eval_shape(lambda rng: model.init(rng, jnp.zeros((1, 32, 32, channels))), jax.random.key(0))
    return {**flatten(shapes["params"]), **flatten(shapes.get("batch_stats", {}))}


def export_state_dict(variables: Variables, model: nn.Module, *, net: str = "net") -> dict[str, np.ndarray]:
    """A PyTorch state_dict {name: array} of a network's variables, the inverse of `import_state_dict`.

    Names are torchvision's for `resnet`; for the others the authors': DRO-LT's, or with branches ResLT's, for CIFAR
    ResNets; LBGAT's for wide ResNets (their class wants `strict=False`, for its unused `sub_block1`). A network with a
    `logit_scale` or a further block has MiSLAS's, `model.`, `classifier.`, `lws_model.` and `block.`, which their code
    keeps as a state_dict each. The convolution and norm of ResLT's branches for large images are `branches.0` and
    `branches.1`. Float32, and `num_batches_tracked` 0, for PyTorch's `strict=True`.

    Args:
      variables: of one replica. model: what they belong to. net: which of the networks in `variables`.

    Examples:
      >>> net = models.create("resnet_cifar", 3, depth=8, width=2)
      >>> made = net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
      >>> variables = Variables({"net": made["params"]}, {"net": made["batch_stats"]}, {})
      >>> state_dict = torch.export_state_dict(variables, net)
      >>> state_dict["conv1.weight"].shape, state_dict["linear.weight"].shape
      ((2, 3, 3, 3), (3, 8))
    """
    flat = {**flatten(variables.params[net]), **flatten(variables.stats[net])}
    parts, state_dict = {path.split("/")[0] for path in flat}, {}
    form = dict(mislas=bool({"logit_scale", "block"} & parts), reslt="branches" in parts)
    for path, leaf in flat.items():
        value, key = np.asarray(leaf), names.key_of(path, names.family(model), **form)
        if path == "logit_scale":
            value = value[None]
        elif value.ndim == 4:
            value = value.transpose(3, 2, 0, 1)
        elif value.ndim == 2:
            value = value.T
        state_dict[key] = np.array(value, np.float32, order="C")
        if path.endswith("/var"):
            state_dict[f"{key.rpartition('.')[0]}.num_batches_tracked"] = np.zeros((), np.int64)
    return state_dict


def read_model(spec: str) -> dict[str, Any]:
    """ "resnet_cifar,depth=32,normalise=cifar" -> {"name": "resnet_cifar", "depth": 32, "mean": ..., "std": ...}.

    Values are Python's (`blocks=(3,8,36,2)`), or text.
    """
    name, *settings = re.split(r",(?![^()\[\]]*[)\]])", spec)
    read: dict[str, Any] = {"name": name.strip()}
    for setting in settings:
        key, equals, text = (part.strip() for part in setting.partition("="))
        if not equals:
            raise UserError(f"--model={spec}: {setting!r} is no setting; write NAME,key=value,key=value")
        try:
            read[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            read[key] = text
    if "normalise" in read:
        kind = read.pop("normalise")
        if kind not in NORMALISE:
            raise UserError(f"--model: normalise={kind}; known: {', '.join(NORMALISE)}, or mean=(...) and std=(...)")
        read["mean"], read["std"] = NORMALISE[kind]
    return read


def implied(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Settings of a model that names in a state_dict ask for: `num_classes`, and ResLT's and MiSLAS's parts."""
    paths = {names.path_of(names.bare(key), value.ndim): value for key, value in state_dict.items()}
    found: dict[str, Any] = {}
    if "classifier/kernel" in paths:
        found["num_classes"] = paths["classifier/kernel"].shape[0]
    if "logit_scale" in paths:
        found["logit_scale"] = True
    if any(path and path.startswith("block/") for path in paths):
        found["extra_block"] = True
    norms = [path for path in ("branches/norm1/scale", "branches/norm2/scale", "branches/norm3/scale") if path in paths]
    if norms:
        found["branches"] = len(norms)
    return found


def class_order(text: str, num_classes: int) -> list[int] | None:
    """What `--class_order` says: for each of a network's outputs, our class.

    A file holds integers, as a JSON list or as text. "FILE": the order itself. "map:FILE": the authors' `class_map`,
    for each class its output. "counts:FILE": training images of each class; outputs go by falling count (MiSLAS's
    ImageNet-LT, Places-LT and iNaturalist), of equal ones by class. "counts-ascending:FILE": by rising count (ResLT's
    ImageNet-LT). The authors sort with NumPy's default, which leaves the order of equal counts to chance: a map
    printed by their data loader is better than counts.
    """
    if not text:
        return None
    kind, _, file = text.rpartition(":")
    kinds = ("", "map", "counts", "counts-ascending")
    if kind not in kinds:
        kind, file = "", text  # a path with a colon in it
    try:
        content = local(file).read_text()
        numbers = np.asarray(json.loads(content) if content.lstrip().startswith("[") else content.split(), np.int64)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--class_order={text}: no list of integers in {file!r} ({error})") from error
    if numbers.shape != (num_classes,):
        raise UserError(f"--class_order={text}: {numbers.size} numbers for {num_classes} classes")
    if kind.startswith("counts"):
        return np.argsort(numbers if kind == "counts-ascending" else -numbers, kind="stable").tolist()
    if sorted(numbers.tolist()) != list(range(num_classes)):
        raise UserError(
            f"--class_order={text}: each class from 0 to {num_classes - 1} once; for counts write counts:FILE"
        )
    return (np.argsort(numbers) if kind == "map" else numbers).tolist()


def convert(checkpoint: str, model: str, out: str, *, num_classes: int = 0, order: str = "", net: str = "") -> str:
    """A PyTorch checkpoint as a folder of `ltjax.interop.weights` -> what to tell the user. See `main`."""
    read = checkpoints.read(local(checkpoint))
    chosen, left_out = checkpoints.network(read, net)
    settings = {**implied(chosen), **read_model(model)}
    num_classes = num_classes or settings.get("num_classes", 0)
    settings.pop("num_classes", None)
    if not num_classes:
        raise UserError(f"{checkpoint}: no classifier to tell the number of classes from; give --num_classes")
    name = settings.pop("name")
    done = place(chosen, models.create(name, num_classes, **settings))
    settings = {"name": name, **settings}
    with open(checkpoint, "rb") as file:
        source = {"file": Path(checkpoint).name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    classes = class_order(order, num_classes)
    save_weights(out, done.variables, settings, num_classes=num_classes, class_order=classes, source=source)
    lines = [f"{len(done.placed)} tensors placed in {described(settings, num_classes)}"]
    if "mean" not in settings:
        lines.append(
            "images are taken as they are, in [0, 1]: most networks want normalise=cifar or imagenet in --model"
        )
    if done.ignored or left_out:
        lines.append(f"passed over: {', '.join(_folded((*done.ignored, *left_out)))}")
    lines.append(f"weights are in {out}; to judge them:")
    lines.append(f"  python run.py --config=CONFIG --mode=eval --workdir=NEW_FOLDER --config.weights={out}")
    lines.append("  and the same with --mode=attack; without --mode, training starts from them")
    return "\n".join(lines)


def _folded(keys: tuple[str, ...]) -> list[str]:
    """Names, those that every batch norm has told once with their number."""
    counted = [key for key in keys if key.endswith("num_batches_tracked")]
    rest = [key for key in keys if key not in set(counted)]
    return rest if len(counted) < 3 else [*rest, f"{counted[0]} and {len(counted) - 1} more num_batches_tracked"]


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see `{self.prog} --help`)")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 after one line `error: ...` on stderr."""
    parser = Parser(prog="python -m ltjax.interop.torch", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=".safetensors, .npz, or (with PyTorch) .pt .pth .tar")
    parser.add_argument(
        "--model",
        required=True,
        help="NAME,key=value,...: as in config.model; normalise=imagenet|cifar|inat|none stands for mean and std",
    )
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--net", default="", help="which network, where CHECKPOINT holds several")
    parser.add_argument("--num_classes", type=int, default=0, help="default: what the classifier has")
    parser.add_argument(
        "--class_order",
        default="",
        help="our class of each output: FILE, map:FILE (the authors' class_map), counts:FILE or counts-ascending:FILE",
    )
    try:
        args = parser.parse_args(argv)
        options = dict(num_classes=args.num_classes, order=args.class_order, net=args.net)
        print(convert(args.checkpoint, args.model, args.out, **options))
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
