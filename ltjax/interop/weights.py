"""Weights on their own, apart from any run: a folder with `weights.safetensors` and `weights.json`.

`weights.safetensors` holds float32 arrays in our layouts (NHWC, HWIO) by path, `params/backbone/conv/kernel` and
`batch_stats/backbone/norm/mean`; `weights.json` what network they belong to, the order of its classes, and what file
they come from. `config.weights` of a run names such a folder, or one that `ltjax.archive` has written: that has the
run's `config.json` instead, and perhaps parameters of its method, `method/margins`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ltjax.optim import flatten, unflatten
from ltjax.system.paths import local
from ltjax.types import UserError, Variables

FORMAT = 1
ARRAYS, DESCRIPTION = "weights.safetensors", "weights.json"
OF_CLASSES = ("classifier", "logit_scale")  # parts whose arrays end in an axis of classes


class Weights(NamedTuple):
    """What a folder holds. `variables` (of the network "net" and perhaps of a "method", NumPy arrays) have the classes
    in the network's own order: output k is our class `class_order[k]`, or k where that is None."""

    variables: Variables
    settings: dict[str, Any]  # as for `ltjax.models.create`: its `name` and settings, without `num_classes`
    num_classes: int
    class_order: tuple[int, ...] | None = None


def save_weights(
    folder: str | Path,
    variables: Variables,
    settings: Mapping[str, Any],
    *,
    num_classes: int,
    class_order: Sequence[int] | None = None,
    source: Mapping[str, str] | None = None,
    net: str = "net",
) -> None:
    """Write a folder that `load_weights` reads.

    variables: of one replica. settings: `name` and settings for `ltjax.models.create`. class_order: [C], entry k is
    our class of the network's output k. source: {"file": name, "sha256": of the file they were made from}. net: which
    of the networks in `variables`.
    """
    if class_order is not None and sorted(class_order) != list(range(num_classes)):
        raise UserError(f"class_order: needs each class from 0 to {num_classes - 1} once")
    folder = local(folder)
    description = {
        "format": FORMAT,
        "model": {**settings, "num_classes": num_classes},
        "class_order": None if class_order is None else [int(c) for c in class_order],
        "source": dict(source) if source else None,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_arrays(folder, variables, net)
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write weights to {folder}: {error}; give another folder") from error


def save_arrays(folder: Path, variables: Variables, net: str = "net") -> None:
    """Write `weights.safetensors` alone: the arrays of one network, and those of the method that trained it."""
    arrays = {
        **_flat(variables, net),
        **{f"method/{k}": v for k, v in flatten(variables.params.get("method", {})).items()},
    }
    save_file(
        {path: np.ascontiguousarray(value, np.float32) for path, value in arrays.items()}, folder / f"{ARRAYS}.tmp"
    )
    (folder / f"{ARRAYS}.tmp").replace(folder / ARRAYS)


def _description(folder: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """weights.json or, of an archived run, what it would be."""
    if (folder / DESCRIPTION).is_file():
        return json.loads((folder / DESCRIPTION).read_text())
    model = json.loads((folder / "config.json").read_text())["model"]
    num_classes = arrays["params/classifier/kernel"].shape[-1]
    return {"format": FORMAT, "model": {**model, "num_classes": num_classes}, "class_order": None}


def load_weights(folder: str | Path) -> Weights:
    """Read what `save_weights` wrote, or `ltjax.archive`. Raises: UserError naming what is not there or understood."""
    folder = local(folder)
    archived = (folder / "config.json").is_file() and (folder / ARRAYS).is_file()
    if not (folder / DESCRIPTION).is_file() and not archived:
        raise UserError(
            f"{folder} holds no weights ({DESCRIPTION} is missing): make such a folder with "
            "`python -m ltjax.interop.torch` from a PyTorch checkpoint or `python -m ltjax.interop.export` from a run"
        )
    try:
        arrays: dict[str, Any] = load_file(folder / ARRAYS)
        description = _description(folder, arrays)
        if description["format"] != FORMAT:
            raise UserError(f"{folder} has format {description['format']}, this ltjax reads {FORMAT}: update ltjax")
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in description["model"].items()}
        num_classes, order = settings.pop("num_classes"), description["class_order"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"cannot read the weights in {folder} ({type(error).__name__}: {error}): make them anew"
        ) from error
    tree = unflatten(arrays)
    params = {"net": tree.get("params", {}), **({"method": tree["method"]} if "method" in tree else {})}
    variables = Variables(params, {"net": tree.get("batch_stats", {})}, {})
    return Weights(variables, settings, num_classes, None if order is None else tuple(order))


def in_our_order(weights: Weights) -> Weights:
    """The same network with its outputs in the order of our classes."""
    if weights.class_order is None:
        return weights
    output_of = np.argsort(weights.class_order)  # of each of our classes
    flat = {
        path: value[..., output_of] if _part(path) in OF_CLASSES else value
        for path, value in _flat(weights.variables, "net").items()
    }
    tree = unflatten(flat)
    variables = Variables({"net": tree["params"]}, {"net": tree.get("batch_stats", {})}, {})
    return weights._replace(variables=variables, class_order=None)


def surplus(variables: Variables, weights: Weights, net: str = "net") -> tuple[str, ...]:
    """Blocks of the weights' backbone that a new `block` of the network takes the place of: ("stage4_block3",), mostly
    none. They come right after the network's own last one, and the weights have no such `block`."""
    have, given = (side.params[key] for side, key in ((variables, net), (weights.variables, "net")))
    if "block" not in have or "block" in given:
        return ()
    blocks = [
        {path.split("/")[0] for path in flatten(side.get("backbone", {})) if re.match(r"stage\d+_block\d+/", path)}
        for side in (have, given)
    ]
    if not all(blocks) or not blocks[0] < blocks[1]:
        return ()
    more = sorted(blocks[1] - blocks[0], key=_numbers)
    return tuple(more) if _numbers(more[0]) > max(map(_numbers, blocks[0])) else ()


def _numbers(block: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", block)]


def into(variables: Variables, weights: Weights, parts: Sequence[str] = (), net: str = "net") -> Variables:
    """`variables` with those of one network replaced by `weights`, outputs in the order of our classes.

    Args:
      variables: newly initialised; of several replicas, with a leading axis, each gets the same weights.
      parts: which of the network's parts to take ("backbone", "branches", "block", "classifier", "logit_scale"); the
        others stay as they are. None: all, and then both sides must have the same. What is `surplus` is passed over.
      net: which of the networks in `variables`.
    Raises: UserError naming the arrays that only one side has or that have another shape, and what would fit.
    """
    have, given = _flat(variables, net), _flat(in_our_order(weights).variables, "net")
    unused = tuple(f"backbone/{block}/" for block in surplus(variables, weights, net))
    given = {path: value for path, value in given.items() if not path.partition("/")[2].startswith(unused or (" ",))}
    known = [sorted({_part(path) for path in side}) for side in (have, given)]
    for part in parts:
        if part not in known[0] or part not in known[1]:
            raise UserError(
                f"config.weights_parts names {part!r}: the network has {', '.join(known[0])}; "
                f"the weights have {', '.join(known[1])}"
            )
    chosen = tuple(parts) or tuple(dict.fromkeys((*known[0], *known[1])))
    wrong = {
        path: f"{path} (weights {_shape(given.get(path))}, network {_shape(have.get(path))})"
        for path in (*have, *(path for path in given if path not in have))
        if not _fits(given.get(path), have.get(path))
    }
    named = [text for path, text in wrong.items() if _part(path) in chosen]
    if named:
        raise UserError(_misfit(named, weights, [p for p in known[0] if p not in {_part(path) for path in wrong}]))
    for path, value in given.items():
        if _part(path) in chosen:
            leaf = have[path]
            value = np.broadcast_to(value.astype(leaf.dtype), leaf.shape)
            have[path] = jax.device_put(value, leaf.sharding) if isinstance(leaf, jax.Array) else value
    tree = unflatten(have)
    return variables._replace(
        params={**variables.params, net: tree["params"]}, stats={**variables.stats, net: tree.get("batch_stats", {})}
    )


def _misfit(named: list[str], weights: Weights, fitting: list[str]) -> str:
    more = f" and {len(named) - 6} more" if len(named) > 6 else ""
    do = f"set config.weights_parts={tuple(fitting)!r} to take what fits, or " if fitting else ""
    return (
        f"config.weights do not fit the network: {', '.join(named[:6])}{more}; {do}set config.model to what they are "
        f"for: {described(weights.settings, weights.num_classes)}"
    )


def described(settings: Mapping[str, Any], num_classes: int) -> str:
    """A network in words: "resnet_cifar(depth=32), 100 classes"."""
    given = ", ".join(f"{key}={value}" for key, value in settings.items() if key != "name")
    return f"{settings.get('name')}({given}), {num_classes} classes"


def _flat(variables: Variables, net: str) -> dict[str, Any]:
    """{"params/backbone/conv/kernel": array, "batch_stats/...": array} of one network."""
    return flatten({"params": variables.params[net], "batch_stats": variables.stats.get(net, {})})


def _part(path: str) -> str:
    return path.split("/")[1]


def _fits(value: Any, leaf: Any) -> bool:
    return value is not None and leaf is not None and value.shape in (leaf.shape, leaf.shape[1:])


def _shape(array: Any) -> str:
    return "none" if array is None else str(tuple(array.shape))
