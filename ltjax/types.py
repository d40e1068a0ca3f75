"""Types that methods, models and the training loop exchange, and the error that a user can fix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import jax  # only for annotations, so that commands that need only `UserError` start fast


class UserError(ValueError):
    """Error that the user can fix: `run.py` prints it as one line and exits with 2.

    The message names the thing, what is allowed, and what to do.
    """


class Outputs(NamedTuple):
    """Outputs of a network for B images.

    Attributes:
      logits: [B, C], the prediction.
      features: [B, D], pooled output of the backbone. Without branches, it is the classifier's input.
      branches: [R, B, C], logits of each branch, if the network has branches.
      layers: {name: [B, D_l]}, pooled output of each stage of the backbone.
    """

    logits: jax.Array
    features: jax.Array
    branches: jax.Array | None = None
    layers: dict[str, jax.Array] | None = None


class Variables(NamedTuple):
    """All arrays that a training step may read.

    Attributes:
      params: Trained parameters, keyed by network (`net`), then by the network's names. `params["method"]` holds those
        of the method.
      stats: Batch-norm statistics, with the same keys.
      arrays: The method's untrained arrays.
    """

    params: dict[str, Any]
    stats: dict[str, Any]
    arrays: dict[str, Any]


class Batch(NamedTuple):
    """B augmented images and their labels. With mixup, an image is `lam * image + (1 - lam) * partner`.

    Attributes:
      images: [B, H, W, channels], floats in [0, 1].
      labels: [B], int.
      partner_labels: [B], int.
      lam: Scalar.
      progress: Scalar in [0, 1), the share of the stage's steps that are done, if the method reads it.
      views: [B, V, H, W, channels], V further augmentations of each image, not mixed, if the stage has `views`. B comes
        first, so that each device has all views of its images.
    """

    images: jax.Array
    labels: jax.Array
    partner_labels: jax.Array | None = None
    lam: jax.Array | None = None
    progress: jax.Array | None = None
    views: jax.Array | None = None


Settings = Mapping[str, Any]  # of a config


class Apply(Protocol):
    """Function that runs a network on images [B, H, W, channels].

    It returns `Outputs`, and the variables with new batch-norm statistics. bn: batch-norm mode, instead of the stage's.
    """

    def __call__(
        self, variables: Variables, images: jax.Array, *, net: str = "net", bn: str | None = None
    ) -> tuple[Any, Variables]: ...


class Method(NamedTuple):
    """A training method as pure functions.

    Attributes:
      init: `rng -> (extra_params, extra_arrays)`, which are added to the network's variables.
      loss: `(apply, variables, batch, rng) -> (scalar, (variables, metrics))`.
      refresh: `(extra_arrays, class_means) -> extra_arrays`, called before each epoch if set. class_means: [C, D], mean
        training features, or {layer: [C, D_l]} if `layers` is not empty.
      layers: Names in `Outputs.layers` whose class means `refresh` takes; empty means `Outputs.features`. None: no
        means are computed, and `refresh` takes None.
      per_class: `extra_params -> {title: [C]}`, values of each class for the report. A leading axis (replicas) stays.
      progress: Whether the loss reads `Batch.progress`.
      attacks: Whether the loss attacks its images, so that a step takes several times as long.
      prior: [C], the prior that the network's predictions assume, divided by the frequency of the classes in its
        batches: 1 for cross-entropy, 1 / n_c for balanced softmax; of any scale. None: unknown. Predictions for another
        prior need it (`ltjax.predictor.priors`).
    """

    init: Callable[[jax.Array], tuple[dict[str, Any], dict[str, Any]]]
    loss: Callable[[Apply, Variables, Batch, jax.Array], tuple[jax.Array, tuple[Variables, dict[str, jax.Array]]]]
    refresh: Callable[[dict[str, Any], Any], dict[str, Any]] | None = None
    layers: tuple[str, ...] | None = ()
    per_class: Callable[[dict[str, Any]], dict[str, Any]] = lambda extra_params: {}
    progress: bool = False
    attacks: bool = False
    prior: Any = None
