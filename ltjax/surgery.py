"""Change weights without training: at the start of a stage, or for its evaluation.

Functions of parameters take `{"classifier": {"kernel": [D, C], "bias": [C]}, ...}` and return a changed copy. All
arrays may have the same leading axes (replicas).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ltjax import losses
from ltjax.system import registry
from ltjax.types import UserError, Variables

Params = Mapping[str, Any]
DISTANCES = ("cosine", "euclidean")


class Context(NamedTuple):
    """Inputs of a surgery, in addition to the variables.

    Attributes:
      class_counts: [C].
      branches: Number of the network's branches, 0 for none.
      fresh: Returns a newly initialised network.
      class_means: Returns mean training features [C, D].
      holdout_accuracy: Returns the accuracy of every replica; None if there is no hold-out.
    """

    class_counts: np.ndarray
    branches: int
    fresh: Callable[[], Variables]
    class_means: Callable[[Variables], jax.Array]
    holdout_accuracy: Callable[[Variables], np.ndarray] | None


def tau_normalised(params: Params, *, tau: float | jax.Array, bias: bool = False) -> dict[str, Any]:
    """Divide each class's weight vector by its length to the power of tau.

    A learned logit scale is multiplied into the vector first, and becomes 1.

    Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, section 4.2.

    Args:
      params: Of a network with a linear classifier.
      tau: 0 changes nothing, 1 gives all classes the same length. A scalar, or one value for each replica.
      bias: Keep the bias. Tau-normalisation and ResLT's evaluation (its gamma is tau) set it to 0.

    Examples:
      >>> params = {"classifier": {"kernel": jnp.array([[3.0, 0.0], [4.0, 0.5]]), "bias": jnp.array([1.0, 0.0])}}
      >>> surgery.tau_normalised(params, tau=1.0)["classifier"]["kernel"]
      Array([[0.6, 0. ],
             [0.8, 1. ]], dtype=float32)
    """
    classifier, scale = dict(params["classifier"]), {}
    if "logit_scale" in params:
        logit_scale = params["logit_scale"]  # [..., C]
        classifier["kernel"] = classifier["kernel"] * logit_scale[..., None, :]
        if "bias" in classifier:
            classifier["bias"] = classifier["bias"] * logit_scale
        scale = {"logit_scale": jnp.ones_like(logit_scale)}
    length = jnp.sqrt(jnp.maximum(jnp.square(classifier["kernel"]).sum(-2, keepdims=True), 1e-12))  # [..., 1, C]
    power = jnp.asarray(tau, length.dtype)
    classifier["kernel"] = classifier["kernel"] / length ** power.reshape(power.shape + (1,) * (2 * (power.ndim > 0)))
    if not bias and "bias" in classifier:
        classifier["bias"] = jnp.zeros_like(classifier["bias"])
    return {**params, "classifier": classifier, **scale}


def nearest_mean(params: Params, class_means: jax.Array, *, metric: str = "cosine") -> dict[str, Any]:
    """Make a linear classifier that predicts the class with the nearest mean feature.

    A logit scale becomes 1. The logits have no meaningful scale, so confidences are not calibrated.

    Source: Kang et al., ICLR 2020, section 4.2.

    Args:
      params: Of a network with one linear classifier.
      class_means: m [C, D].
      metric: "cosine" compares the angles of features and means. "euclidean" gives logits `z m_c - |m_c|^2 / 2`.

    Examples:
      >>> params = {"classifier": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}}
      >>> params = surgery.nearest_mean(params, jnp.array([[3.0, 4.0], [0.0, 2.0]]))
      >>> params["classifier"]["kernel"]
      Array([[0.6, 0. ],
             [0.8, 1. ]], dtype=float32)
    """
    classifier = dict(params["classifier"])
    length = jnp.sqrt(jnp.maximum(jnp.square(class_means).sum(-1, keepdims=True), 1e-12))  # [..., C, 1]
    euclidean = metric == "euclidean"
    classifier["kernel"] = jnp.swapaxes(class_means if euclidean else class_means / length, -1, -2)
    if "bias" in classifier:
        bias = -jnp.square(class_means).sum(-1) / 2  # [..., C]
        classifier["bias"] = bias if euclidean else jnp.zeros_like(bias)
    scale = {"logit_scale": jnp.ones_like(params["logit_scale"])} if "logit_scale" in params else {}
    return {**params, "classifier": classifier, **scale}


def logit_shifted(params: Params, class_counts: np.ndarray, *, tau: float = 1.0, branches: int = 0) -> dict[str, Any]:
    """Subtract `tau * log prior` from each logit through the bias: post-hoc logit adjustment.

    Source: Menon et al., "Long-Tail Learning via Logit Adjustment", ICLR 2021, equation 9.

    Args:
      params: Of a network with a linear classifier.
      class_counts: [C].
      tau: Strength of the adjustment.
      branches: Number of the network's branches. Their logits are summed, so the bias is added once for each.

    Examples:
      >>> params = {"classifier": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}}
      >>> surgery.logit_shifted(params, np.array([90, 10]))["classifier"]["bias"]
      Array([0.105, 2.303], dtype=float32)
    """
    shift = tau * losses.log_prior(class_counts) / max(branches, 1)  # [C]
    if "logit_scale" in params:
        shift = shift / params["logit_scale"]  # logits are scale * (W z + b)
    classifier = dict(params["classifier"])
    classifier["bias"] = classifier["bias"] - shift
    return {**params, "classifier": classifier}


# A surgery maps (variables, context) to (variables, note). Its settings are keyword-only. The note goes into the
# results: {"tau": ...}, or {"calibrated": False} if confidences have no meaning.


def _changed(variables: Variables, params: Params) -> Variables:
    return variables._replace(params={**variables.params, "net": dict(params)})


def _new_head(variables: Variables, context: Context) -> tuple[Variables, dict[str, Any]]:
    net, fresh = variables.params["net"], context.fresh().params["net"]
    head = {name: fresh[name] for name in ("classifier", "logit_scale") if name in net}
    return _changed(variables, {**net, **head}), {}


def _tau_norm(
    variables: Variables, context: Context, *, taus: tuple[float, ...] = (1.0,), bias: bool = False
) -> tuple[Variables, dict[str, Any]]:
    params = variables.params["net"]
    if len(taus) == 1:
        return _changed(variables, tau_normalised(params, tau=taus[0], bias=bias)), {"tau": float(taus[0])}
    assert context.holdout_accuracy is not None  # `create` has checked
    candidates = [_changed(variables, tau_normalised(params, tau=tau, bias=bias)) for tau in taus]
    accuracy = np.stack([np.asarray(context.holdout_accuracy(c)) for c in candidates])  # [taus] or [taus, replicas]
    chosen = np.asarray(taus, np.float64)[accuracy.argmax(0)]  # [] or [replicas]
    note = {
        "tau": chosen.tolist(),
        "holdout_accuracy": {f"{t:g}": a.tolist() for t, a in zip(taus, accuracy, strict=True)},
    }
    return _changed(variables, tau_normalised(params, tau=chosen, bias=bias)), note


def _nearest_mean(
    variables: Variables, context: Context, *, metric: str = "cosine"
) -> tuple[Variables, dict[str, Any]]:
    means = context.class_means(variables)
    return _changed(variables, nearest_mean(variables.params["net"], means, metric=metric)), {"calibrated": False}


def _class_means(variables: Variables, context: Context) -> tuple[Variables, dict[str, Any]]:
    """Start a cosine classifier from the directions of the mean training features."""
    means = context.class_means(variables)
    return _changed(variables, nearest_mean(variables.params["net"], means)), {}


def _logit_shift(variables: Variables, context: Context, *, tau: float = 1.0) -> tuple[Variables, dict[str, Any]]:
    params = variables.params["net"]
    shifted = logit_shifted(params, context.class_counts, tau=tau, branches=context.branches)
    return _changed(variables, shifted), {}


def _teacher(variables: Variables, context: Context) -> tuple[Variables, dict[str, Any]]:
    """Make the network the guide, its own teacher, and begin a new one."""
    fresh = context.fresh()
    shapes = [jax.tree.map(np.shape, fresh.params.get(net)) for net in ("guide", "net")]
    if shapes[0] != shapes[1]:
        raise UserError("surgery 'teacher' copies the network to the guide: config.guide has to be config.model")
    params, stats = (
        {**old, "guide": old["net"], "net": new["net"]}
        for old, new in ((variables.params, fresh.params), (variables.stats, fresh.stats))
    )
    return variables._replace(params=params, stats=stats), {}


SURGERIES: dict[str, Callable] = {
    "new_head": _new_head,
    "tau_norm": _tau_norm,
    "nearest_mean": _nearest_mean,
    "class_means": _class_means,
    "teacher": _teacher,
    "logit_shift": _logit_shift,
}


def create(settings: Mapping[str, Any], params: Params, *, branches: int, holdout: bool) -> Callable:
    """Return the surgery of a stage's config: `(variables, context) -> (variables, note)`.

    Args:
      settings: `name`, one of `SURGERIES`, and its settings.
      params: The network's parameters, or their shapes.

    Raises:
      UserError: A name or setting is unknown, or the surgery does not apply to the network.
    """
    settings = dict(settings)
    name = settings.pop("name", "")
    function = registry.bind(f"surgery {name!r}", registry.choose("surgery", SURGERIES, name), settings)
    cosine = "bias" not in params["classifier"]
    if cosine and name in ("tau_norm", "logit_shift"):
        raise UserError(f"surgery {name!r} is for a linear classifier: model.classifier = 'cosine' has no such weights")
    if name == "class_means" and (branches or not cosine):
        raise UserError(
            "surgery 'class_means' is for a network with one cosine classifier: model.classifier = 'cosine'"
        )
    if name == "tau_norm":
        taus = settings.get("taus", (1.0,))
        if not taus:
            raise UserError(f"surgery 'tau_norm': taus = {taus!r}: a tuple of numbers, such as (0.5, 1.0)")
        if len(taus) > 1 and not holdout:
            raise UserError(
                "surgery 'tau_norm' chooses among taus on a hold-out: set config.data.holdout, or give one tau"
            )
    if name == "nearest_mean":
        metric = settings.get("metric", "cosine")
        registry.choose("metric of surgery 'nearest_mean'", DISTANCES, metric)
        if branches or (cosine and metric == "euclidean"):
            kind = "branches" if branches else "a cosine classifier"
            raise UserError(f"surgery 'nearest_mean' ({metric}) is for one linear classifier; the model has {kind}")
    return function
