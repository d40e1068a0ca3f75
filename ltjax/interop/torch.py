"""Weights of the authors' PyTorch networks, as ltjax variables. Needs no PyTorch: a state_dict is {name: array}."""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ltjax.optim import flatten, unflatten
from ltjax.types import UserError, Variables

# (authors' name, ours), tried in order; the prefixes `module.` and `model.` are cut off first
_BLOCK = r"(?:layer(?P<stage>\d)|block(?P<wide_stage>\d)\.layer)\.(?P<block>\d+)\."  # the latter in wide ResNets
_RULES = (
    (r"conv1", "backbone/conv"),
    (r"bn1?", "backbone/norm"),  # after the first convolution; in pre-activation networks, after the last block
    (_BLOCK + r"conv(?P<n>\d)", "backbone/stage{stage}_block{block}/conv{n}"),
    (_BLOCK + r"bn(?P<n>\d)", "backbone/stage{stage}_block{block}/norm{n}"),
    (_BLOCK + r"(?:convShortcut|(?:shortcut|downsample)\.0)", "backbone/stage{stage}_block{block}/shortcut"),
    (_BLOCK + r"(?:shortcut|downsample)\.1", "backbone/stage{stage}_block{block}/shortcut_norm"),
    (r"BNH", "branches/norm1"),  # ResLT's head, medium and tail branch
    (r"BNM", "branches/norm2"),
    (r"BNT", "branches/norm3"),
    (r"(?:classifier\.)?(?:fc|linear)", "classifier"),
)
_LEAVES = {"weight": "kernel", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def import_state_dict(state_dict: Mapping[str, np.ndarray], model: nn.Module) -> Variables:
    """The variables of `model` with the weights of a PyTorch state_dict.

    Args:
      state_dict: {name: array} with PyTorch's names and layouts (convolutions OIHW, linear [out, in]); keys may begin
        with `module.` and `model.`. Understood: the authors' CIFAR ResNets of DRO-LT (`conv1`, `layer1.0.conv1`,
        `linear`), MiSLAS (`classifier.`, `lws_model.learned_norm`) and ResLT (`linear`, `BNH`, `BNM`, `BNT`); LBGAT's
        ResNet-18 (`layer2.0.shortcut.0`) and the wide ResNets of LBGAT and TRADES (`block1.layer.0.conv1`, `fc`);
        pre-activation ResNets (`bn` last). Passed over: `sub_block1`, which the class of those wide ResNets holds and
        never uses. Without a place: the margins that DRO-LT learns, which are its loss's, not the network's, and
        LBGAT's second network, to be given on its own, without `teacher.`.
      model: from `ltjax.models.create`.
    Returns: Variables with `params["net"]` and `stats["net"]`, float32, but float64 where both the state_dict and
      JAX_ENABLE_X64 say so. A `logit_scale` the state_dict does not have is 1.
    Raises: UserError naming every key that has no place or another shape, and every weight that no key gives.
    """
    shapes = jax.eval_shape(lambda rng: model.init(rng, jnp.zeros((1, 32, 32, 3))), jax.random.key(0))
    wanted = {name: flatten(shapes.get(name, {})) for name in ("params", "batch_stats")}
    found: dict[str, dict[str, jax.Array]] = {"params": {}, "batch_stats": {}}
    unplaced = []
    for key, value in state_dict.items():
        if key.endswith("num_batches_tracked"):
            continue  # PyTorch counts batches; nothing here depends on it
        value = np.asarray(value)
        name = re.sub(r"^(module\.)*(model\.)?", "", key)
        if name.startswith("sub_block1."):
            continue
        path = _path(name, value)
        kind = "batch_stats" if path and path.endswith(("/mean", "/var")) else "params"
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        elif path == "logit_scale":
            value = value.reshape(-1)
        elif value.ndim == 2:
            value = value.T
        if path not in wanted[kind]:
            unplaced.append(key)
        elif wanted[kind][path].shape != value.shape:
            unplaced.append(f"{key} (shape {value.shape}, the model has {wanted[kind][path].shape})")
        else:
            array = jnp.asarray(value)  # never float64 where JAX has it switched off
            found[kind][path] = array.astype(jnp.float64 if array.dtype == jnp.float64 else jnp.float32)
    if "logit_scale" in wanted["params"]:
        found["params"].setdefault("logit_scale", jnp.ones(wanted["params"]["logit_scale"].shape, jnp.float32))
    missing = [path for kind in wanted for path in wanted[kind] if path not in found[kind]]
    if unplaced or missing:
        raise UserError(f"state_dict does not fit the model: no place for {unplaced}; nothing for {missing}")
    return Variables({"net": unflatten(found["params"])}, {"net": unflatten(found["batch_stats"])}, {})


def _path(key: str, value: np.ndarray) -> str | None:
    """Our path of a PyTorch name, or None."""
    if key.removeprefix("lws_model.") == "learned_norm":
        return "logit_scale"
    name, _, leaf = key.rpartition(".")
    if leaf not in _LEAVES:
        return None
    for pattern, ours in _RULES:
        match = re.fullmatch(pattern, name)
        if match:
            parts = match.groupdict()
            if "block" in parts:
                parts["stage"] = parts["stage"] or parts["wide_stage"]
                parts["block"] = str(int(parts["block"]) + 1)  # ours count from 1
            leaf_name = "scale" if leaf == "weight" and value.ndim == 1 else _LEAVES[leaf]
            return f"{ours.format(**parts)}/{leaf_name}"
    return None
