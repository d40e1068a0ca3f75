"""Classifiers made without training, or made anew before it: what a stage does to a network's weights at its start.

The functions on parameters take a network's parameters, `{"classifier": {"kernel": [D, C], "bias": [C]}, ...}`, and
return them changed. Leading axes (replicas) are fine, the same in every array.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ltjax import losses, registry
from ltjax.types import UserError, Variables

Params = Mapping[str, Any]
METRICS = ("cosine", "euclidean")


class Context(NamedTuple):
    """What a surgery may ask for."""

    class_counts: np.ndarray  # [C]
    branches: int  # of the network, whose logits are summed; 0: it has none
    fresh: Callable[[], Variables]  # a newly initialised network
    class_means: Callable[[Variables], jax.Array]  # mean training features [C, D]
    holdout_accuracy: Callable[[Variables], np.ndarray] | None  # of every replica; None: there is no hold-out


def tau_normalised(params: Params, *, tau: float | jax.Array, bias: bool = False) -> dict[str, Any]:
    """The classifier with each class's weight vector divided by its length to the power of tau.

    A learned logit scale is a part of that vector, and becomes 1.
    tau: 0 changes nothing, 1 gives all classes the same length; a scalar, or an array that broadcasts against [..., 1].
    bias: keep the classifier's; tau-normalisation and ResLT's evaluation (its gamma is tau) drop it.
    Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, section 4.2.

    Examples:
      >>> params = {"classifier": {"kernel": jnp.array([[3.0, 0.0], [4.0, 0.5]]), "bias": jnp.array([1.0, 0.0])}}
      >>> surgery.tau_normalised(params, tau=1.0)["classifier"]["kernel"]
      Array([[0.6, 0. ],
             [0.8, 1. ]], dtype=float32)
    """
    classifier, scale = dict(params["classifier"]), {}
    if "logit_scale" in params:
        own = params["logit_scale"]  # [..., C]
        classifier["kernel"] = classifier["kernel"] * own[..., None, :]
        if "bias" in classifier:
            classifier["bias"] = classifier["bias"] * own
        scale = {"logit_scale": jnp.ones_like(own)}
    length = jnp.sqrt(jnp.maximum(jnp.square(classifier["kernel"]).sum(-2, keepdims=True), 1e-12))  # [..., 1, C]
    power = jnp.asarray(tau, length.dtype)
    classifier["kernel"] = classifier["kernel"] / length ** power.reshape(power.shape + (1,) * (2 * (power.ndim > 0)))
    if not bias and "bias" in classifier:
        classifier["bias"] = jnp.zeros_like(classifier["bias"])
    return {**params, "classifier": classifier, **scale}


def nearest_mean(params: Params, class_means: jax.Array, *, metric: str = "cosine") -> dict[str, Any]:
    """A linear classifier that picks the class whose mean feature is nearest.

    class_means: [C, D]. metric: "cosine", of the features' angle to the means; "euclidean", where the logits are
    `z m_c - |m_c|^2 / 2`. A logit scale becomes 1. The logits' size means nothing, so neither does their calibration.
    Source: Kang et al., ICLR 2020, section 4.2.

    Examples:
      >>> params = {"classifier": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}}
      >>> made = surgery.nearest_mean(params, jnp.array([[3.0, 4.0], [0.0, 2.0]]))
      >>> made["classifier"]["kernel"]
      Array([[0.6, 0. ],
             [0.8, 1. ]], dtype=float32)
    """
    classifier = dict(params["classifier"])
    length = jnp.sqrt(jnp.maximum(jnp.square(class_means).sum(-1, keepdims=True), 1e-12))  # [..., C, 1]
    euclidean = metric == "euclidean"
    classifier["kernel"] = jnp.swapaxes(class_means if euclidean else class_means / length, -1, -2)
    if "bias" in classifier:
        own = -jnp.square(class_means).sum(-1) / 2  # [..., C]
        classifier["bias"] = own if euclidean else jnp.zeros_like(own)
    scale = {"logit_scale": jnp.ones_like(params["logit_scale"])} if "logit_scale" in params else {}
    return {**params, "classifier": classifier, **scale}


def logit_shifted(params: Params, class_counts: np.ndarray, *, tau: float = 1.0, branches: int = 0) -> dict[str, Any]:
    """The classifier with `tau * log prior` taken off each logit: post-hoc logit adjustment.

    branches: how often the bias counts in the prediction, where the logits of several branches are summed.
    Source: Menon et al., "Long-Tail Learning via Logit Adjustment", ICLR 2021, equation 9.

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


# A surgery: (variables, context) -> variables, and what is worth noting: {"tau": ...}, or {"calibrated": False} where
# confidences mean nothing. Their settings are keyword-only.


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
    tried = [_changed(variables, tau_normalised(params, tau=tau, bias=bias)) for tau in taus]
    accuracy = np.stack([np.asarray(context.holdout_accuracy(each)) for each in tried])  # [taus] or [taus, replicas]
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


def _logit_shift(variables: Variables, context: Context, *, tau: float = 1.0) -> tuple[Variables, dict[str, Any]]:
    params = variables.params["net"]
    shifted = logit_shifted(params, context.class_counts, tau=tau, branches=context.branches)
    return _changed(variables, shifted), {}


SURGERIES: dict[str, Callable] = {
    "new_head": _new_head,
    "tau_norm": _tau_norm,
    "nearest_mean": _nearest_mean,
    "logit_shift": _logit_shift,
}


def create(settings: Mapping[str, Any], params: Params, *, branches: int, holdout: bool) -> Callable:
    """The surgery that a stage's config names: `(variables, context) -> (variables, note)`.

    params: the network's, or their shapes. holdout: whether there is one.
    Raises: UserError for a name or setting that is not known, or a network that the surgery is not for.
    """
    settings = dict(settings)
    name = settings.pop("name", "")
    function = registry.bind(f"surgery {name!r}", registry.choose("surgery", SURGERIES, name), settings)
    cosine = "bias" not in params["classifier"]
    if cosine and name in ("tau_norm", "logit_shift"):
        raise UserError(f"surgery {name!r} is for a linear classifier: model.classifier = 'cosine' has no such weights")
    if name == "tau_norm":
        taus = settings.get("taus", (1.0,))
        if isinstance(taus, (int, float)) or not len(taus):
            raise UserError(f"surgery 'tau_norm': taus = {taus!r}: a tuple of numbers, such as (0.5, 1.0)")
        if len(taus) > 1 and not holdout:
            raise UserError(
                "surgery 'tau_norm' chooses among taus on a hold-out: set config.data.holdout, or give one tau"
            )
    if name == "nearest_mean":
        metric = settings.get("metric", "cosine")
        registry.choose("metric of surgery 'nearest_mean'", dict.fromkeys(METRICS), metric)
        if branches or (cosine and metric == "euclidean"):
            kind = "branches" if branches else "a cosine classifier"
            raise UserError(f"surgery 'nearest_mean' ({metric}) is for one linear classifier; the model has {kind}")
    return function


def as_evaluated(variables: Variables, eval_classifier: Mapping[str, Any]) -> Variables:
    """Variables as a stage is evaluated with them: without its method's arrays, its classifier perhaps tau-normalised.

    eval_classifier: of the stage's config; {}: the classifier as it is.
    """
    variables = variables._replace(arrays={})
    if not eval_classifier:
        return variables
    net = tau_normalised(variables.params["net"], **eval_classifier)
    return variables._replace(params={**variables.params, "net": net})
