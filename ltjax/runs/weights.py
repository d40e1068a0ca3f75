"""Weights without a run: a folder with `weights.safetensors` and `weights.json`.

`weights.safetensors` holds float32 or float16 arrays in our layouts (NHWC, HWIO) by path, `params/backbone/conv/kernel`
and `batch_stats/backbone/norm/mean`. `weights.json` holds their network, the order of its classes, the file they come
from, and perhaps the images that they expect and their licence. `config.weights` of a run names such a folder, or an
archive of `ltjax.runs.archive`, which has the run's `config.json` instead, and may have parameters of its method,
`method/margins`. `shipped` are the folders that come with ltjax.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ltjax.optim import flatten, unflatten
from ltjax.system.files import file_sha256, load_json, replacing, write_json
from ltjax.system.paths import cache_folder, local
from ltjax.system.wording import one_line
from ltjax.types import UserError, Variables

FORMAT = 1
SHIPPED = Path(__file__).parents[1] / "interop" / "shipped"
ARRAYS, DESCRIPTION = "weights.safetensors", "weights.json"
PROJECTION = "params/backbone/projection"  # of a vision transformer, its last layer
HUB = "hub:"  # begins the name of a repository of the Hugging Face Hub
OF_CLASSES = ("classifier", "logit_scale")  # parts whose arrays have classes as their last axis


class Weights(NamedTuple):
    """A network with its weights.

    Attributes:
      variables: NumPy arrays of the network "net", and perhaps of a "method".
      settings: Arguments of `ltjax.models.create`: `name` and others, without `num_classes`.
      num_classes: C. 0: there is no classifier, only other parts, to start training from.
      class_order: [C], our class of each output. None: output k is class k.
      images: How to make the images that the network was trained for: `size`, the side of a crop in pixels; `crop`, its
        share of the shorter side of the whole image; `interpolation`. {} if unknown. Mean and standard deviation are
        in `settings`.
      licence: An SPDX identifier, such as "Apache-2.0". "" if unknown.
    """

    variables: Variables
    settings: dict[str, Any]
    num_classes: int
    class_order: tuple[int, ...] | None = None
    images: Mapping[str, Any] = {}
    licence: str = ""


def save_weights(
    folder: str | Path,
    variables: Variables,
    settings: Mapping[str, Any],
    *,
    num_classes: int,
    class_order: Sequence[int] | None = None,
    source: Mapping[str, str] | None = None,
    images: Mapping[str, Any] | None = None,
    licence: str = "",
    net: str = "net",
) -> None:
    """Write a folder for `load_weights`. float16 arrays stay so, others become float32.

    Args:
      folder: To write.
      variables: Of one replica.
      settings: See `Weights`.
      num_classes: See `Weights`.
      class_order: See `Weights`.
      source: {"file": name, "sha256": digest} of the file that the weights come from, and what else there is to say.
      images: See `Weights`.
      licence: See `Weights`.
      net: Name of the network in `variables`.

    Raises:
      UserError: `class_order` is not a permutation of the classes, or the folder cannot be written.
    """
    if class_order is not None and sorted(class_order) != list(range(num_classes)):
        raise UserError(f"class_order: needs each class from 0 to {num_classes - 1} once")
    folder = local(folder)
    description = {
        "format": FORMAT,
        "model": {**settings, "num_classes": num_classes},
        "class_order": None if class_order is None else [int(c) for c in class_order],
        "source": dict(source) if source else None,
        **({"images": dict(images)} if images else {}),
        **({"licence": licence} if licence else {}),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DESCRIPTION).unlink(missing_ok=True)  # a folder without it holds no weights
        save_arrays(folder, variables, net)
        write_json(folder / DESCRIPTION, description)
    except OSError as error:
        raise UserError(f"cannot write weights to {folder}: {error}; give another folder") from error


def save_arrays(folder: Path, variables: Variables, net: str = "net") -> None:
    """Write `weights.safetensors`: the arrays of one network, and those of its method."""
    of_method = flatten(variables.params.get("method", {}))
    arrays = {**_flat(variables, net), **{f"method/{path}": value for path, value in of_method.items()}}
    with replacing(folder / ARRAYS) as file:
        save_safetensors({path: np.ascontiguousarray(value, _stored(value)) for path, value in arrays.items()}, file)


def _stored(value: Any) -> type:
    return np.float16 if value.dtype == np.float16 else np.float32


def save_safetensors(arrays: dict[str, np.ndarray], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a file of safetensors that others may read as any new file; one of `save_file` is its owner's alone."""
    file.write_bytes(save(arrays, metadata))


def folder_of(name: str | Path) -> Path:
    """Return the folder of weights that `config.weights` names.

    Args:
      name: Of `shipped`; "hub:REPOSITORY@COMMIT", which `ltjax.interop.pretrained` has fetched; or a path.
    """
    text = str(name)
    if text in shipped():
        return shipped()[text]
    if not text.startswith(HUB):
        return local(name)
    cache = cache_folder()
    if cache is None:
        raise UserError(f"{text}: there is no folder for fetched weights: set XDG_CACHE_HOME, or HOME")
    return cache / "weights" / text.removeprefix(HUB).replace("/", "--")


def _description(folder: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Read weights.json, or make it up from an archive's config.json."""
    if (folder / DESCRIPTION).is_file():
        return load_json(folder / DESCRIPTION)
    model = load_json(folder / "config.json")["model"]
    num_classes = arrays["params/classifier/kernel"].shape[-1]
    return {"format": FORMAT, "model": {**model, "num_classes": num_classes}, "class_order": None}


def _check_sizes(settings: Mapping[str, Any], num_classes: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError if the settings are of a network that is larger than the arrays, and could take all memory."""
    head, most = arrays.get("params/classifier/kernel"), sum(array.size for array in arrays.values())
    outputs = 0 if head is None else head.shape[-1]
    if num_classes != outputs:
        raise ValueError(f"num_classes = {num_classes}, and the classifier has {outputs} outputs")
    for name, value in settings.items():
        size, limit = len(value) if isinstance(value, tuple) else value, most
        if name == "depth" or isinstance(value, tuple):  # a layer has an array at least
            limit = len(arrays)
        if isinstance(size, int) and size > limit:
            raise ValueError(f"{name} of {size} does not fit {len(arrays)} arrays with {most:,} numbers")


def _check_classes(num_classes: Any, order: Any) -> None:
    """Raise ValueError if the number of classes is no int, or `class_order` does not name each class once."""
    if not isinstance(num_classes, int) or isinstance(num_classes, bool):
        raise ValueError(f"num_classes = {num_classes!r}, which is no whole number")
    numbers = isinstance(order, list) and all(isinstance(c, int) and not isinstance(c, bool) for c in order)
    if order is not None and (not numbers or sorted(order) != list(range(num_classes))):
        raise ValueError(f"class_order does not name each class from 0 to {num_classes - 1} once")


def _tree(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Unflatten arrays. ValueError if a path is not one that `save_arrays` writes."""
    for path in arrays:
        if path.split("/")[0] not in ("params", "batch_stats", "method") or not all(path.split("/")[1:] or [""]):
            raise ValueError(f"an array is called {path!r}")
        if any(path[:end] in arrays for end, sign in enumerate(path) if sign == "/"):
            raise ValueError(f"an array is called {path!r}, and another one like its folder")
    return unflatten(arrays)


def load_weights(name: str | Path, sha256: str = "") -> Weights:
    """Read weights of `save_weights` or `ltjax.runs.archive`. float16 arrays become float32.

    Args:
      name: See `folder_of`.
      sha256: What `hash_weights` has to return; "": anything.

    Raises:
      UserError: The folder holds no weights, or others than those, or they cannot be read.
    """
    folder = folder_of(name)
    if str(name).startswith(HUB) and not is_weights(name):
        raise UserError(f"{name} is not on this machine: fetch it with `python -m ltjax.interop.pretrained {name}`")
    archived = (folder / "config.json").is_file() and (folder / ARRAYS).is_file()
    if not (folder / DESCRIPTION).is_file() and not archived:
        raise UserError(
            f"{folder} holds no weights ({DESCRIPTION} is missing): make such a folder with "
            "`python -m ltjax.interop.torch` from a PyTorch checkpoint or `python -m ltjax.interop.export` from a run"
        )
    if sha256 and is_weights(name) and hash_weights(name) != sha256:
        raise UserError(f"{name} holds other weights than those of config.weights_sha256: fetch or convert them again")
    try:
        arrays: dict[str, Any] = {path: _single(value) for path, value in load_file(folder / ARRAYS).items()}
        description = _description(folder, arrays)
        if description["format"] != FORMAT:
            raise UserError(f"{folder} has format {description['format']}, this ltjax reads {FORMAT}: update ltjax")
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in description["model"].items()}
        num_classes, order = settings.pop("num_classes"), description["class_order"]
        _check_classes(num_classes, order)
        images, licence = dict(description.get("images", {})), str(description.get("licence", ""))
        _check_sizes(settings, num_classes, arrays)
        tree = _tree(arrays)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"cannot read the weights in {folder} ({type(error).__name__}: {one_line(error)}): write them again"
        ) from error
    params = {"net": tree.get("params", {}), **({"method": tree["method"]} if "method" in tree else {})}
    variables = Variables(params, {"net": tree.get("batch_stats", {})}, {})
    return Weights(variables, settings, num_classes, None if order is None else tuple(order), images, licence)


def _single(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32) if value.dtype == np.float16 else value


def shipped() -> dict[str, Path]:
    """Return the folders of weights that come with ltjax, for `load_weights`: {name: folder}.

    Examples:
      >>> list(weights.shipped())
      ['efficientnet_lite0']
      >>> weights.load_weights(weights.shipped()["efficientnet_lite0"]).images["size"]
      224
    """
    folders = sorted(SHIPPED.iterdir())
    return {folder.name: folder for folder in folders if (folder / DESCRIPTION).is_file()}


def is_weights(name: str | Path) -> bool:
    """Return whether a name of `folder_of` stands for arrays of weights."""
    return bool(name) and (folder_of(name) / ARRAYS).is_file()


def hash_weights(name: str | Path) -> str:
    """Hash arrays of weights: SHA-256, hexadecimal. name: see `folder_of`."""
    return file_sha256(folder_of(name) / ARRAYS)


def check_classifier(weights: Weights, about: str) -> None:
    """Raise UserError if weights have no classifier. about: for the message."""
    if not weights.num_classes:
        raise UserError(f"{about}: no classifier is among these weights; start training from them (config.weights)")


def in_our_order(weights: Weights) -> Weights:
    """Reorder the network's outputs to the order of our classes."""
    if weights.class_order is None:
        return weights
    output_of = np.argsort(weights.class_order)  # output of each class
    flat = {
        path: value[..., output_of] if _part(path) in OF_CLASSES else value
        for path, value in _flat(weights.variables, "net").items()
    }
    tree = unflatten(flat)
    variables = Variables({"net": tree["params"]}, {"net": tree.get("batch_stats", {})}, {})
    return weights._replace(variables=variables, class_order=None)


def surplus(variables: Variables, weights: Weights, net: str = "net") -> tuple[str, ...]:
    """Return the last blocks of the weights' backbone that the network's extra `block` replaces: ("stage4_block3",).

    It is empty unless the network has a `block`, the weights have none, and the network's backbone ends earlier.
    """
    network, imported = variables.params[net], weights.variables.params["net"]
    if "block" not in network or "block" in imported:
        return ()
    blocks, imported_blocks = (
        {path.split("/")[0] for path in flatten(side.get("backbone", {})) if re.match(r"stage\d+_block\d+/", path)}
        for side in (network, imported)
    )
    if not blocks or not blocks < imported_blocks:
        return ()
    replaced = sorted(imported_blocks - blocks, key=_numbers)
    return tuple(replaced) if _numbers(replaced[0]) > max(map(_numbers, blocks)) else ()


def _numbers(block: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", block)]


def with_weights(variables: Variables, weights: Weights, parts: Sequence[str] = (), net: str = "net") -> Variables:
    """Replace the variables of one network by weights, with outputs in the order of our classes.

    Args:
      variables: Newly initialised. Each of several replicas (leading axis) gets the same weights.
      weights: To take. Blocks that are `surplus` are ignored, and CLIP's projection if the network has none. Adapters
        that they lack stay as they are.
      parts: Parts of the network to replace ("backbone", "branches", "block", "classifier", "logit_scale"). Empty: all,
        and both sides must then have the same parts; or if the weights have no classifier, the parts that they have.
      net: Name of the network in `variables`.

    Raises:
      UserError: An array is missing on one side, or shapes differ. The message names the parts that fit.
    """
    network, imported = _flat(variables, net), _flat(in_our_order(weights).variables, "net")
    for block in surplus(variables, weights, net):
        imported = {path: value for path, value in imported.items() if f"/backbone/{block}/" not in path}
    if PROJECTION not in network:
        imported.pop(PROJECTION, None)
    network_parts, imported_parts = (sorted({_part(path) for path in side}) for side in (network, imported))
    for part in parts:
        if part not in network_parts or part not in imported_parts:
            raise UserError(
                f"config.weights_parts names {part!r}: the network has {', '.join(network_parts)}; "
                f"the weights have {', '.join(imported_parts)}"
            )
    chosen = set(parts or (*(network_parts if weights.num_classes else ()), *imported_parts))
    mismatches = {
        path: f"{path} (weights {_shape(imported.get(path))}, network {_shape(network.get(path))})"
        for path in dict.fromkeys((*network, *imported))
        if not _fits(imported.get(path), network.get(path)) and not ("/adapter/" in path and path not in imported)
    }
    in_the_way = [text for path, text in mismatches.items() if _part(path) in chosen]
    if in_the_way:
        unfit = {_part(path) for path in mismatches}
        raise UserError(_misfit(in_the_way, weights, [part for part in network_parts if part not in unfit]))
    for path, value in imported.items():
        if _part(path) in chosen:
            leaf = network[path]
            value = np.broadcast_to(value.astype(leaf.dtype), leaf.shape)
            network[path] = jax.device_put(value, leaf.sharding) if isinstance(leaf, jax.Array) else value
    return _replaced(variables, network, net)


def taken(weights: Weights, parts: Sequence[str] = ()) -> frozenset[str]:
    """Return the paths of all arrays that `into` would take, if they fit: {"params/backbone/conv/kernel", ...}."""
    return frozenset(path for path in _flat(weights.variables, "net") if not parts or _part(path) in parts)


def with_zeros(variables: Variables, paths: Collection[str], net: str = "net") -> Variables:
    """Replace arrays of one network by zeros, so that XLA need not compute them. paths: see `taken`."""
    flat = {path: jnp.zeros_like(leaf) if path in paths else leaf for path, leaf in _flat(variables, net).items()}
    return _replaced(variables, flat, net)


def _replaced(variables: Variables, flat: Mapping[str, Any], net: str) -> Variables:
    tree = unflatten(flat)
    return variables._replace(
        params={**variables.params, net: tree["params"]}, stats={**variables.stats, net: tree.get("batch_stats", {})}
    )


def _misfit(mismatches: list[str], weights: Weights, fitting: list[str]) -> str:
    more = f" and {len(mismatches) - 6} more" if len(mismatches) > 6 else ""
    advice = f"set config.weights_parts={tuple(fitting)!r} to take what fits, or " if fitting else ""
    return (
        f"config.weights do not fit the network: {', '.join(mismatches[:6])}{more}; {advice}set config.model to their "
        f"network: {described(weights.settings, weights.num_classes)}"
    )


def described(settings: Mapping[str, Any], num_classes: int) -> str:
    """Describe a network: "resnet_cifar(depth=32), 100 classes"."""
    arguments = ", ".join(f"{key}={value}" for key, value in settings.items() if key != "name")
    return f"{settings.get('name')}({arguments}), {f'{num_classes} classes' if num_classes else 'no classifier'}"


def _flat(variables: Variables, net: str) -> dict[str, Any]:
    """Flatten one network to {"params/backbone/conv/kernel": array, "batch_stats/...": array}."""
    return flatten({"params": variables.params[net], "batch_stats": variables.stats.get(net, {})})


def _part(path: str) -> str:
    return path.split("/")[1]


def _fits(value: Any, leaf: Any) -> bool:
    return value is not None and leaf is not None and value.shape in (leaf.shape, leaf.shape[1:])


def _shape(array: Any) -> str:
    return "none" if array is None else str(tuple(array.shape))
