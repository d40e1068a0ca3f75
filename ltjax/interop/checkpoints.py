"""Files of weights, and the containers that authors put them in. PyTorch is asked for only by its own files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ltjax.types import UserError, one_line

MISLAS = "state_dict_"  # + model, classifier, lws_model, block: a state_dict each, one network together
NOT_A_NETWORK = ("block",)  # parts with convolutions that belong to another part's network


def read(path: Path) -> dict[str, Any]:
    """What a file holds, its tensors as NumPy arrays: {name: array}, or nested dicts beside whatever else was saved.

    .safetensors and .npz need no PyTorch. Everything else is taken for a file of `torch.save` and read with
    `weights_only`, which builds tensors, numbers, text and containers of them, and nothing that could run.
    Raises: UserError where the file cannot be read so.
    """
    if not path.is_file():
        raise UserError(f"no file {path}: give a checkpoint")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    return _read_torch(path)


def _read_torch(path: Path) -> dict[str, Any]:
    try:
        import torch  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise UserError(
            f"{path} is a file of PyTorch, which is not installed: install torch, or convert it to .safetensors where "
            "torch is"
        ) from error

    def arrays(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = value.detach()
            return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        return {str(key): arrays(each) for key, each in value.items()} if isinstance(value, Mapping) else value

    scalars = [(_NumpyKind, "numpy.dtype")]
    scalars += [(_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals(scalars):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # not a file of PyTorch's, cut short, or one that holds what could run
        what = " ".join(str(error).split())
        refused = what.partition("GLOBAL ")[2].split(" ")[0].strip("`'")
        if refused:
            raise UserError(
                f"{path} is refused: it holds {refused}, and unpickling such objects can run code; where you trust its "
                "source, save its state_dict alone, as .safetensors"
            ) from error
        raise UserError(f"{path} is no file of torch.save, or not a whole one: download it again") from error
    if not isinstance(held, Mapping):
        raise UserError(f"{path} holds a {type(held).__name__}, no state_dict")
    return arrays(held)


class _NumpyKind:
    """Stands in for `numpy.dtype` while unpickling: MiSLAS saves its calibration error as a NumPy number."""

    def __init__(self, code: str, *_: Any):
        self.code = code

    def __setstate__(self, _: Any) -> None:
        pass


def _numpy_scalar(kind: _NumpyKind, data: bytes) -> float:
    """Stands in for what unpickles a NumPy number; makes numbers and nothing else."""
    if not isinstance(kind, _NumpyKind) or kind.code not in ("f2", "f4", "f8", "i4", "i8", "u1", "b1"):
        raise ValueError("a NumPy object that is no number")
    return np.frombuffer(data, kind.code)[0].item()


def _is_state_dict(value: Any) -> bool:
    """Whether it is {name: array} with a convolution in it."""
    if not isinstance(value, Mapping) or not value:
        return False
    arrays = [each for each in value.values() if isinstance(each, np.ndarray)]
    return len(arrays) == len(value) and any(array.ndim == 4 for array in arrays)


def network(held: Mapping[str, Any], net: str = "") -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The state_dict of one network in what `read` found, and the names of all that is left out.

    Known: a state_dict itself; one under any name ("state_dict", "model", "net"); MiSLAS's `state_dict_model`,
    `state_dict_classifier`, `state_dict_lws_model` and `state_dict_block` together. net: which network, where there are
    several, by the name it is saved under or by the prefix of its keys.
    Raises: UserError where there is none, or more than one to choose from.
    """
    if any(key.startswith(MISLAS) for key in held):
        parts = {key.removeprefix(MISLAS): value for key, value in held.items() if key.startswith(MISLAS)}
        state_dict = {
            f"{part}.{_unwrapped(key)}": np.asarray(array)
            for part, each in parts.items()
            for key, array in each.items()
        }
        return _choose(state_dict, net, tuple(key for key in held if not key.startswith(MISLAS)))
    arrays = {key: value for key, value in held.items() if isinstance(value, np.ndarray)}
    if _is_state_dict(arrays):
        return _choose(arrays, net, tuple(key for key in held if key not in arrays))
    found = [key for key, value in held.items() if _is_state_dict(value)]
    if not found:
        raise UserError(f"no state_dict of a network: the file holds {', '.join(held) or 'nothing'}")
    if len(found) > 1 and net not in found:
        raise UserError(f"the file holds several networks: choose with --net={'|'.join(found)}")
    chosen = net if net in found else found[0]
    left_out = tuple(key for key in held if key != chosen)
    return _choose(held[chosen], "" if net in found else net, left_out)


def _choose(state_dict: Mapping[str, np.ndarray], net: str, left_out: tuple[str, ...]):
    """One of the networks that a state_dict holds under prefixes, such as `model.` and `teacher.`."""
    nets = {}
    for key in state_dict:
        prefix, inside, _ = _unwrapped(key).partition("conv1.weight")
        if inside and prefix.count(".") <= 1 and prefix.rstrip(".") not in NOT_A_NETWORK:
            nets[prefix.rstrip(".")] = prefix
    if not net and len(nets) > 1:
        raise UserError(f"the state_dict holds several networks: choose with --net={'|'.join(nets)}")
    if not net:
        return dict(state_dict), left_out
    if net not in nets:
        raise UserError(f"--net={net}: the file holds {', '.join(filter(None, nets)) or 'one network, without a name'}")
    own = {key: value for key, value in state_dict.items() if _unwrapped(key).startswith(nets[net])}
    others = tuple(key for key in state_dict if key not in own)
    return {_unwrapped(key).removeprefix(nets[net]): value for key, value in own.items()}, (*left_out, *others)


def _unwrapped(key: str) -> str:
    """A name without `module.` and `_orig_mod.` in front."""
    while key.startswith(("module.", "_orig_mod.")):
        key = key.partition(".")[2]
    return key
