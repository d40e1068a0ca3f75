"""Convert weights of the authors' and torchvision's PyTorch networks to ltjax variables, and back.

    python -m ltjax.interop.torch CHECKPOINT --model=resnet_cifar,depth=32,normalise=cifar --out=DIR

If CHECKPOINT is a .safetensors or .npz file, PyTorch is not needed: a state_dict is {name: array}.
"""

import ast
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from ltjax import models
from ltjax.interop import checkpoints, names, resnets, vit
from ltjax.optim import flatten, unflatten
from ltjax.runs.weights import Weights, described, save_weights
from ltjax.system.command_line import Parser, exit_code
from ltjax.system.devices import start_devices
from ltjax.system.files import file_sha256
from ltjax.system.paths import local
from ltjax.system.wording import one_line, some
from ltjax.types import UserError, Variables

NORMALISE = {  # mean and std of each channel
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # torchvision's, and the authors' on large images
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),  # MiSLAS, DRO-LT and ResLT, also on CIFAR-100
    "inat": ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192)),  # MiSLAS on iNaturalist
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # Google's vision transformers, timm's augreg
    "lite": ((127 / 255,) * 3, (128 / 255,) * 3),  # EfficientNet-Lite
    "none": ((0.0,), (1.0,)),  # LBGAT
}

OF_OTHER_PARTS = ("num_classes", "logit_scale", "extra_block", "branches")  # settings that are none of a backbone's


class Placed(NamedTuple):
    """An imported state_dict.

    Attributes:
      variables: NumPy arrays.
      placed: {PyTorch's name: our path}.
      ignored: Names without use, see `ltjax.interop.names.prepared`, and those of parts that were not asked for.
    """

    variables: Variables
    placed: dict[str, str]
    ignored: tuple[str, ...]


class Checkpoint(NamedTuple):
    """The weights of a file.

    Attributes:
      weights: Ours. `num_classes` is 0 if they have no classifier.
      placed: {PyTorch's name: our path}.
      ignored: Everything else in the file.
      notes: What had to be assumed about the network, a sentence each.
    """

    weights: Weights
    placed: dict[str, str]
    ignored: tuple[str, ...]
    notes: tuple[str, ...]


def import_state_dict(state_dict: Mapping[str, np.ndarray], model: nn.Module) -> Variables:
    """Return the variables of `model` with the weights of a PyTorch state_dict.

    Supported are torchvision's ResNets (`layer1.0.downsample.0`, `fc`); the CIFAR ResNets of DRO-LT (`conv1`,
    `layer1.0.conv1`, `linear`), MiSLAS (`classifier.`, `lws_model.learned_norm`, for Places `block.`) and ResLT
    (`linear`, `BNH`, `BNM`, `BNT`, or one 1x1 convolution and batch norm); LBGAT's ResNet-18 (`layer2.0.shortcut.0`)
    and the wide ResNets of LBGAT and TRADES (`block1.layer.0.conv1`, `fc`); pre-activation ResNets (`bn` last);
    EfficientNet-Lite0 in the names of timm's `tf_efficientnet_lite0` (`blocks.1.0.conv_pw`) and of efficientnet_pytorch
    (`_blocks.1._expand_conv`); and the vision transformers of timm (`blocks.0.attn.qkv`), DINOv2 and CLIP
    (`visual.transformer.resblocks.0.ln_1`). Ignored are `num_batches_tracked`; the unused `sub_block1` of those wide
    ResNets; `epsilons`, the margins of DRO-LT's loss; DINOv2's `mask_token`; and CLIP's tower for text. Import LBGAT's
    second network separately, without `teacher.`.

    Args:
      state_dict: {name: array} with PyTorch's names and layouts (convolutions OIHW, linear [out, in]). Names may begin
        with `module.` and `model.`.
      model: From `ltjax.models.create`.

    Returns:
      Variables with `params["net"]` and `stats["net"]`, float32. float64 arrays stay float64 with JAX_ENABLE_X64. A
        `logit_scale` that the state_dict lacks is 1.

    Raises:
      UserError: A name is unknown, a shape differs, or a weight is missing. The message lists the first of them.

    Examples:
      >>> net = models.create("resnet_cifar", 3, depth=8, width=2)
      >>> collections = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
      >>> ours = Variables({"net": collections["params"]}, {"net": collections["batch_stats"]}, {})
      >>> state_dict = torch.export_state_dict(ours, net)  # or, from PyTorch: {key: value.numpy(), ...}
      >>> variables = torch.import_state_dict(state_dict, net)
      >>> variables.params["net"]["backbone"]["conv"]["kernel"].shape
      (3, 3, 3, 2)
    """
    return jax.device_put(place(state_dict, model).variables)


def place(state_dict: Mapping[str, np.ndarray], model: nn.Module, parts: Sequence[str] = ()) -> Placed:
    """Do what `import_state_dict` does, with NumPy arrays, and also return what became of each name.

    Args:
      state_dict: See `import_state_dict`.
      model: See `import_state_dict`.
      parts: Parts of the network to import, such as ("backbone",); the variables have no others. (): all.
    """
    arrays, unused = names.prepared(state_dict)
    shapes = {path: leaf for path, leaf in _shapes(model, arrays).items() if not parts or path.split("/")[0] in parts}
    normalisation = names.normalisation(arrays)
    for kind, (key, values) in normalisation.items():
        ours = tuple(getattr(model, kind))
        if not np.allclose(ours, values, atol=1e-3):
            raise UserError(
                f"state_dict normalises images: {key} is {values}, and the model's {kind} is {ours}: give the model "
                f"{kind}={values}"
            )
    path_of = {key: names.path_of(names.bare(key), value.ndim) for key, value in arrays.items()}
    ignored = (*unused, *(key for key, _ in normalisation.values()))
    ignored += tuple(key for key, path in path_of.items() if path and parts and path.split("/")[0] not in parts)
    if "backbone/projection" not in shapes:  # a network without CLIP's last layer, such as LIFT's
        ignored += tuple(key for key, path in path_of.items() if path == "backbone/projection")
    paths = {key: path for key, path in path_of.items() if key not in ignored}
    if "branches/conv/kernel" in shapes:
        left = {key: arrays[key] for key, path in paths.items() if path not in shapes}
        paths |= names.branches_by_shape(left, shapes["branches/conv/kernel"].shape[2])
    weights: dict[str, Any] = {}
    placed, unplaced = {}, []
    for key, path in paths.items():
        value = arrays[key]
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        elif path == "logit_scale":
            value = value.reshape(-1)
        elif path in names.TOKENS.values():
            value = _token(value, shapes[path]) if path in shapes else value
        elif value.ndim == 2:
            value = value.T
        if path is None or path not in shapes:
            unplaced.append(key)
        elif path in weights:
            unplaced.append(f"{key} ({path} is already set)")
        elif shapes[path].shape != value.shape:
            unplaced.append(f"{key} (shape {value.shape}, the model has {shapes[path].shape})")
        else:
            double = value.dtype == np.float64 and jax.config.values["jax_enable_x64"]
            weights[path] = value.astype(np.float64 if double else np.float32)
            placed[key] = path
    if "logit_scale" in shapes:
        weights.setdefault("logit_scale", np.ones(shapes["logit_scale"].shape, np.float32))
    missing = [path for path in shapes if path not in weights]
    if unplaced or missing:
        raise UserError(
            f"state_dict does not fit the model: no place for {_first(unplaced)}; nothing for {_first(missing)}"
        )
    stats = {path: value for path, value in weights.items() if path.endswith(("/mean", "/var"))}
    params = {path: value for path, value in weights.items() if path not in stats}
    return Placed(Variables({"net": unflatten(params)}, {"net": unflatten(stats)}, {}), placed, ignored)


def _first(items: list[str]) -> list[str]:
    """Return the first 15 items and the number of the others."""
    return items if len(items) <= 15 else [*items[:15], f"and {len(items) - 15} more"]


def _token(value: np.ndarray, like: Any) -> np.ndarray:
    """Bring tokens or positions of a vision transformer to our shape, if they are as many numbers."""
    return value.reshape(like.shape) if value.size == math.prod(like.shape) else value


def _shapes(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return {our path: shape} of the model, with as many input channels as the state_dict."""
    first = [v for key, v in arrays.items() if names.path_of(names.bare(key), v.ndim) == "backbone/conv/kernel"]
    channels = first[0].shape[1] if first and first[0].ndim == 4 else 3
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), models.example(model, channels)))
    return {**flatten(shapes["params"]), **flatten(shapes.get("batch_stats", {}))}


def export_state_dict(variables: Variables, model: nn.Module, *, net: str = "net") -> dict[str, np.ndarray]:
    """Return a network's variables as a PyTorch state_dict {name: array}, the inverse of `import_state_dict`.

    Names are torchvision's for `resnet`; timm's for `vit` and `efficientnet_lite0`; DRO-LT's, or with branches ResLT's,
    for CIFAR ResNets; LBGAT's for wide ResNets (load with `strict=False` because of their unused `sub_block1`). A
    network with a `logit_scale` or an extra block has MiSLAS's names, `model.`, `classifier.`, `lws_model.` and
    `block.`; their code stores a state_dict of each. The convolution and norm of ResLT's branches for large images are
    `branches.0` and `branches.1`. Arrays are float32. `num_batches_tracked` is 0, for PyTorch's `strict=True`.

    Args:
      variables: Of one replica.
      model: Their network.
      net: Name of the network in `variables`.

    Raises:
      UserError: PyTorch has no names for the network, such as one with adapters.

    Examples:
      >>> net = models.create("resnet_cifar", 3, depth=8, width=2)
      >>> collections = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
      >>> variables = Variables({"net": collections["params"]}, {"net": collections["batch_stats"]}, {})
      >>> state_dict = torch.export_state_dict(variables, net)
      >>> state_dict["conv1.weight"].shape, state_dict["linear.weight"].shape
      ((2, 3, 3, 3), (3, 8))
    """
    flat = {**flatten(variables.params[net]), **flatten(variables.stats[net])}
    parts, state_dict = {path.split("/")[0] for path in flat}, {}
    family = getattr(model.backbone, "family", "")  # pyrefly: ignore[missing-attribute]
    if family == "vit":
        vit.check_export(model.backbone)  # pyrefly: ignore[missing-attribute]
    form = dict(mislas=bool({"logit_scale", "block"} & parts), reslt="branches" in parts)
    for path, leaf in flat.items():
        value, key = np.asarray(leaf), names.key_of(path, family, **form)
        if path == "logit_scale":
            value = value[None]
        elif path in names.TOKENS.values():
            value = vit.exported(path, value, registers="backbone/registers" in flat)
        elif value.ndim == 4:
            value = value.transpose(3, 2, 0, 1)
        elif value.ndim == 2:
            value = value.T
        state_dict[key] = np.array(value, np.float32, order="C")
        if path.endswith("/var"):
            state_dict[f"{key.rpartition('.')[0]}.num_batches_tracked"] = np.zeros((), np.int64)
    return state_dict


def read_model(spec: str) -> dict[str, Any]:
    """Parse "resnet_cifar,depth=32,normalise=cifar" to {"name": "resnet_cifar", "depth": 32, "mean": ..., "std": ...}.

    Values are Python literals (`blocks=(3,8,36,2)`) or text.
    """
    name, *pairs = re.split(r",(?![^()\[\]]*[)\]])", spec)
    settings: dict[str, Any] = {"name": name.strip()}
    for pair in pairs:
        key, equals, text = (part.strip() for part in pair.partition("="))
        if not equals:
            raise UserError(f"--model={spec}: {pair!r} is not a setting; write NAME,key=value,key=value")
        try:
            settings[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            settings[key] = text
    if "normalise" in settings:
        kind = settings.pop("normalise")
        if kind not in NORMALISE:
            raise UserError(f"--model: normalise={kind}; known: {', '.join(NORMALISE)}, or mean=(...) and std=(...)")
        settings["mean"], settings["std"] = NORMALISE[kind]
    return settings


def implied(state_dict: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Infer settings of a model from a state_dict.

    They are `num_classes`, `mean`, `std`, ResLT's and MiSLAS's parts, and all settings of a vision transformer, of
    torchvision's ResNets, and of EfficientNet-Lite0.

    Args:
      state_dict: See `import_state_dict`.
      config: See `ltjax.interop.vit.config_beside`.
    """
    arrays, _ = names.prepared(state_dict)
    paths = {names.path_of(names.bare(key), value.ndim): value for key, value in arrays.items()}
    settings: dict[str, Any] = {kind: values for kind, (_, values) in names.normalisation(arrays).items()}
    settings |= vit.implied(arrays, config or {})[0] or resnets.implied(arrays)
    if "classifier/kernel" in paths and paths["classifier/kernel"].ndim:
        settings["num_classes"] = paths["classifier/kernel"].shape[0]
    if "logit_scale" in paths:
        settings["logit_scale"] = True
    if any(path and path.startswith("block/") for path in paths):
        settings["extra_block"] = True
    norms = [path for path in ("branches/norm1/scale", "branches/norm2/scale", "branches/norm3/scale") if path in paths]
    if norms:
        settings["branches"] = len(norms)
    return settings


def class_order(text: str, num_classes: int) -> list[int] | None:
    """Read `--class_order`: our class of each of a network's outputs.

    FILE holds integers, as a JSON list or as text:

    - "FILE": our class of each output.
    - "map:FILE": the output of each class, the authors' `class_map`.
    - "counts:FILE": training images of each class. Outputs are sorted by falling count (MiSLAS's ImageNet-LT, Places-LT
      and iNaturalist), then by class.
    - "counts-ascending:FILE": the same by rising count (ResLT's ImageNet-LT and iNaturalist).

    The authors sort with NumPy's default, which does not define the order of equal counts. A map printed by their data
    loader is safer than counts.
    """
    if not text:
        return None
    kind, _, file = text.rpartition(":")
    kinds = ("", "map", "counts", "counts-ascending")
    if kind not in kinds:
        kind, file = "", text  # a path with a colon in it
    try:
        content = local(file).read_text()
        listed = json.loads(content) if content.lstrip().startswith("[") else list(map(int, content.split()))
        if not all(isinstance(number, int) and not isinstance(number, bool) for number in listed):
            raise ValueError("another kind of value")
        numbers = np.asarray(listed, np.int64)
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"--class_order={text}: no list of integers in {file!r} ({one_line(error)})") from error
    if numbers.shape != (num_classes,):
        raise UserError(f"--class_order={text}: {numbers.size} numbers for {num_classes} classes")
    if kind.startswith("counts"):
        return np.argsort(numbers if kind == "counts-ascending" else -numbers, kind="stable").tolist()
    if sorted(numbers.tolist()) != list(range(num_classes)):
        raise UserError(
            f"--class_order={text}: each class from 0 to {num_classes - 1} once; for counts write counts:FILE"
        )
    return (np.argsort(numbers) if kind == "map" else numbers).tolist()


def read_checkpoint(
    file: str | Path,
    settings: Mapping[str, Any],
    *,
    net: str = "",
    num_classes: int = 0,
    backbone: bool = False,
    config: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Read the weights of a file.

    Args:
      file: See `ltjax.interop.checkpoints.read`.
      settings: Of the model, see `ltjax.models.create`. They override those that the file implies, see `implied`. If it
        implies no network, at least `name` is needed.
      net: Which network, if there are several.
      num_classes: Default: that of the classifier; without a classifier, the weights are those of the other parts.
      backbone: Take the backbone alone, whatever the classifier.
      config: See `ltjax.interop.vit.config_beside`. None: read it from the file's folder.

    Raises:
      UserError: The file cannot be read, or is not of that network.
    """
    state_dict, left_out = checkpoints.network(checkpoints.read(local(file)), net)
    config = vit.config_beside(local(file)) if config is None else config
    arrays, _ = names.prepared(state_dict)
    inferred = implied(state_dict, config)
    if settings.get("name", inferred.get("name")) != inferred.get("name"):
        if inferred.get("name") == "vit":
            raise UserError(f"{file} holds a vision transformer, not a {settings['name']}: set the model to vit")
        of_network = resnets.implied(arrays)
        inferred = {key: value for key, value in inferred.items() if key not in of_network}
    if "name" not in {**inferred, **settings}:
        raise UserError(f"{file} is of no network that ltjax recognises by its arrays: name it with --model=NAME,...")
    if backbone:
        inferred = {key: value for key, value in inferred.items() if key not in OF_OTHER_PARTS}
    merged = {**inferred, **settings}
    notes = tuple(
        f"{key}={merged[key]} is assumed ({reason}): give {key}= if it is another"
        for key, reason in vit.implied(arrays, config)[1].items()
        if key not in settings
    )
    name, of_file = merged.pop("name"), merged.pop("num_classes", 0)
    classes = num_classes or of_file
    paths = (names.path_of(names.bare(key), value.ndim) for key, value in arrays.items())
    parts = ("backbone",) if backbone else () if classes else tuple({path.split("/")[0] for path in paths if path})
    imported = place(state_dict, models.create(name, classes or 1, **merged), parts)
    weights = Weights(imported.variables, {"name": name, **merged}, 0 if parts else classes)
    return Checkpoint(weights, imported.placed, (*imported.ignored, *left_out), notes)


def convert(checkpoint: str, model: str, out: str, *, num_classes: int = 0, order: str = "", net: str = "") -> str:
    """Convert a PyTorch checkpoint to a folder of `ltjax.runs.weights`, and return the text to print. See `main`."""
    weights, placed, ignored, notes = read_checkpoint(checkpoint, read_model(model), net=net, num_classes=num_classes)
    settings, num_classes = weights.settings, weights.num_classes
    source = {"file": Path(checkpoint).name, "sha256": file_sha256(Path(checkpoint))}
    classes = class_order(order, num_classes)
    save_weights(out, weights.variables, settings, num_classes=num_classes, class_order=classes, source=source)
    lines = [f"{len(placed)} tensors placed in {described(settings, num_classes)}", *notes]
    if "mean" not in settings:
        known = ", ".join(name for name in NORMALISE if name != "none")
        lines.append(f"images in [0, 1] are not normalised: most networks need normalise= in --model, one of {known}")
    if ignored:
        lines.append(f"ignored: {', '.join(_folded(ignored))}")
    if num_classes:
        lines.append(f"weights are in {out}; to evaluate them:")
        lines.append(f"  python run.py --config=CONFIG --mode=eval --workdir=NEW_FOLDER --config.weights={out}")
        lines.append("  and the same with --mode=attack; without --mode, training starts from them")
    else:
        lines.append(f"weights are in {out}; they have no classifier, and training starts from them:")
        lines.append(f"  python run.py --config=CONFIG --config.weights={out}")
    return "\n".join(lines)


def _folded(keys: tuple[str, ...]) -> list[str]:
    """Shorten a list of names to the first and the number of the others, `num_batches_tracked` apart."""
    counted = [key for key in keys if key.endswith("num_batches_tracked")]
    if len(counted) < 3:
        return [some(keys)]
    rest = [key for key in keys if key not in set(counted)]
    return [*([some(rest)] if rest else []), f"{counted[0]} and {len(counted) - 1} more num_batches_tracked"]


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return the exit code: 0, or 2 after one line `error: ...` on stderr."""
    parser = Parser(prog="python -m ltjax.interop.torch", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=".safetensors, .npz, or (with PyTorch) .pt .pth .tar")
    parser.add_argument(
        "--model",
        required=True,
        help=f"NAME,key=value,...: as in config.model; normalise={'|'.join(NORMALISE)} stands for mean and std",
    )
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--net", default="", help="which network, if CHECKPOINT holds several")
    parser.add_argument("--num_classes", type=int, default=0, help="default: that of the classifier")
    parser.add_argument(
        "--class_order",
        default="",
        help="our class of each output: FILE, map:FILE (the authors' class_map), counts:FILE or counts-ascending:FILE",
    )

    def import_checkpoint() -> None:
        args = parser.parse_args(argv)
        start_devices()
        options = dict(num_classes=args.num_classes, order=args.class_order, net=args.net)
        print(convert(args.checkpoint, args.model, args.out, **options))

    return exit_code(import_checkpoint)


if __name__ == "__main__":
    sys.exit(main())
