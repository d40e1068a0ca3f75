"""The shapes that methods, models and the training loop pass to each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import jax  # for annotations alone: a command that needs but `UserError` starts at once


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend: `run.py` prints it as one line and exits with 2.

    The message names the thing, what was allowed, and what to do.
    """


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none, for use in another message."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


class Outputs(NamedTuple):
    """What a network returns for B images: `logits` is always the prediction."""

    logits: jax.Array  # [B, C]
    features: jax.Array  # [B, D], pooled output of the backbone; without branches, what the classifier sees
    branches: jax.Array | None = None  # [R, B, C], logits of each branch where the network has several
    layers: dict[str, jax.Array] | None = None  # {name: [B, D_l]}, pooled output of each stage of the backbone


class Variables(NamedTuple):
    """Everything a training step may read: trained parameters, batch-norm statistics, a method's own arrays.

    `params` and `stats` are keyed by network first (`net`), then by the network's own names; `params["method"]`
    holds what a method's `init` adds.
    """

    params: dict[str, Any]  # trained
    stats: dict[str, Any]  # of batch norm
    arrays: dict[str, Any]  # the method's own, not trained


class Batch(NamedTuple):
    """B augmented images in [0, 1] and their labels. With mixup, image i is `lam * own + (1 - lam) * partner`."""

    images: jax.Array  # [B, H, W, channels], float
    labels: jax.Array  # [B], int
    partner_labels: jax.Array | None = None  # [B], int
    lam: jax.Array | None = None  # scalar


# apply(variables, images, net="net", bn=None) -> (Outputs, variables with new batch-norm statistics)
Apply = Callable[..., Any]


class Method(NamedTuple):
    """A way to train, as pure functions.

    init: `rng -> (extra_params, extra_arrays)`, what the method adds to the network's variables.
    loss: `(apply, variables, batch, rng) -> (scalar, (variables, metrics))`.
    refresh: `(extra_arrays, class_means) -> extra_arrays`, called once an epoch when set; class_means [C, D] of the
      training images' features, or {layer: [C, D_l]} where `layers` names some.
    layers: names in `Outputs.layers` whose class means `refresh` wants; none: those of `Outputs.features`.
    per_class: `extra_params -> {title: [C]}`, what each class has of its own, learned or by its count, for the report.
      Parameters of several replicas have a leading axis, which stays: [..., C].
    attacks: whether the loss attacks its images, so that a step takes several times as long as others.
    """

    init: Callable[[jax.Array], tuple[dict[str, Any], dict[str, Any]]]
    loss: Callable[[Apply, Variables, Batch, jax.Array], tuple[jax.Array, tuple[Variables, dict[str, jax.Array]]]]
    refresh: Callable[[dict[str, Any], Any], dict[str, Any]] | None = None
    layers: tuple[str, ...] = ()
    per_class: Callable[[dict[str, Any]], dict[str, Any]] = lambda extra_params: {}
    attacks: bool = False
