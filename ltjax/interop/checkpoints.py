"""Read files of weights, and find the networks in them. Only PyTorch's own files need PyTorch."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ltjax.system import npz
from ltjax.system.wording import one_line
from ltjax.types import UserError

MISLAS = "state_dict_"  # + model, classifier, lws_model, block: the parts of one network
NOT_A_NETWORK = ("block",)  # prefixes with convolutions that are only a part of a network


def read(path: Path) -> dict[str, Any]:
    """Read a file, with tensors as NumPy arrays: {name: array}, or nested dicts that may also hold other values.

    .safetensors and .npz need no PyTorch. All other files are read as files of `torch.save`, with `weights_only`, which
    cannot run code.

    Raises:
      UserError: The file cannot be read.
    """
    if not path.is_file():
        raise UserError(f"no file {path}: give a checkpoint")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            return npz.read(path)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        # Safetensors has types, such as F8_E4M3, that NumPy lacks, and raises AttributeError then.
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    return _read_torch(path)


def _read_torch(path: Path) -> dict[str, Any]:
    try:
        import torch  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise UserError(
            f"{path} is a file of PyTorch, which is not installed: install torch, or convert it to .safetensors on a "
            "machine with torch"
        ) from error

    def array(value: Any, name: str) -> np.ndarray:
        dense = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not dense or value.dtype.is_complex:
            kind = f"{value.dtype} {value.layout} on {value.device}".replace("torch.", "")
            raise UserError(f"{path}: {name} is a tensor of {kind}: save dense tensors of real numbers on a CPU")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{path}: {name} repeats its numbers to {list(value.shape)}: save it as `.contiguous()`")
        value = value.detach().resolve_neg()
        small = value.dtype.is_floating_point and value.dtype not in (torch.float64, torch.float32, torch.float16)
        return (value.float() if small else value).numpy()  # NumPy lacks bfloat16 and float8

    def arrays(value: Any, name: str = "it") -> Any:
        if isinstance(value, torch.Tensor):
            return array(value, name)
        return (
            {str(key): arrays(each, str(key)) for key, each in value.items()} if isinstance(value, Mapping) else value
        )

    scalars = [(_NumpyKind, "numpy.dtype")]
    scalars += [(_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                npz.check_size(archive, path.stat().st_size)
        with torch.serialization.safe_globals(scalars):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # another format, a truncated file, or objects that could run code
        message = " ".join(str(error).split())
        refused = message.partition("GLOBAL ")[2].split(" ")[0].strip("`'")
        if refused:
            raise UserError(
                f"{path} is refused: it holds {refused}, and unpickling such objects can run code; if you trust its "
                "source, save only its state_dict, as .safetensors"
            ) from error
        raise UserError(f"{path} is not a file of torch.save, or is truncated: download it again") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state_dict")
    try:
        return arrays(content)
    except (RecursionError, RuntimeError, TypeError) as error:
        raise UserError(f"cannot read the tensors in {path}: {one_line(error)}") from error


class _NumpyKind:
    """Replacement for `numpy.dtype` while unpickling; MiSLAS saves its calibration error as a NumPy number."""

    def __init__(self, code: str, *_: Any):
        self.code = code

    def __setstate__(self, _: Any) -> None:
        pass


def _numpy_scalar(kind: _NumpyKind, data: bytes) -> float:
    """Replace the function that unpickles a NumPy number by one that can only make numbers."""
    if not isinstance(kind, _NumpyKind) or kind.code not in ("f2", "f4", "f8", "i4", "i8", "u1", "b1"):
        raise ValueError("a NumPy object that is not a number")
    return np.frombuffer(data, kind.code)[0].item()


def _is_state_dict(value: Any) -> bool:
    """Return whether a value is {name: array} with a convolution."""
    if not isinstance(value, Mapping) or not all(isinstance(each, np.ndarray) for each in value.values()):
        return False
    return any(array.ndim == 4 for array in value.values())


def network(content: Mapping[str, Any], net: str = "") -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Return the state_dict of one network in a file, and the names of everything else.

    The file may be a state_dict, hold one under any name ("state_dict", "model", "net"), or hold MiSLAS's
    `state_dict_model`, `state_dict_classifier`, `state_dict_lws_model` and `state_dict_block`.

    Args:
      content: From `read`.
      net: Which network, if there are several: the name it is saved under, or the prefix of its keys.

    Raises:
      UserError: There is no network, or there are several and `net` names none of them.
    """
    if any(key.startswith(MISLAS) for key in content):
        parts = {key.removeprefix(MISLAS): value for key, value in content.items() if key.startswith(MISLAS)}
        state_dict = {
            f"{name}.{_unwrapped(key)}": np.asarray(array)
            for name, part in parts.items()
            for key, array in part.items()
        }
        return _choose(state_dict, net, tuple(key for key in content if not key.startswith(MISLAS)))
    arrays = {key: value for key, value in content.items() if isinstance(value, np.ndarray)}
    if _is_state_dict(arrays):
        return _choose(arrays, net, tuple(key for key in content if key not in arrays))
    candidates = [key for key, value in content.items() if _is_state_dict(value)]
    if not candidates:
        raise UserError(f"no state_dict of a network: the file holds {', '.join(content) or 'nothing'}")
    if len(candidates) > 1 and net not in candidates:
        raise UserError(f"the file holds several networks: choose with --net={'|'.join(candidates)}")
    chosen = net if net in candidates else candidates[0]
    left_out = tuple(key for key in content if key != chosen)
    return _choose(content[chosen], "" if net in candidates else net, left_out)


def _choose(
    state_dict: Mapping[str, np.ndarray], net: str, left_out: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Choose a network of a state_dict by its prefix, such as `model.` and `teacher.`."""
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
    chosen = {key: value for key, value in state_dict.items() if _unwrapped(key).startswith(nets[net])}
    others = tuple(key for key in state_dict if key not in chosen)
    return {_unwrapped(key).removeprefix(nets[net]): value for key, value in chosen.items()}, (*left_out, *others)


def _unwrapped(key: str) -> str:
    """Remove leading `module.` and `_orig_mod.` from a name."""
    while key.startswith(("module.", "_orig_mod.")):
        key = key.partition(".")[2]
    return key
