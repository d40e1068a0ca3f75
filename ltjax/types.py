"""Types that methods, models and the training loop exchange, and the wording of error messages."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import jax  # only for annotations, so that commands that need only `UserError` start fast


class UserError(ValueError):
    """Error that the user can fix: `run.py` prints it as one line and exits with 2.

    The message names the thing, what is allowed, and what to do.
    """


def one_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def some(items: Sequence[str], separator: str = ", ") -> str:
    """Join up to 5 items and count the rest, for messages: "a, b, c, d, e and 3 more"."""
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return separator.join(items[:5]) + more


def nearest(name: str, names: Sequence[str]) -> str:
    """Name those of `names` that a misspelt one may mean, for messages: "the nearest are cat, cart"."""
    near = difflib.get_close_matches(name, names)
    return f"the nearest are {', '.join(near)}" if near else f"they are {some(names)}"


def plain(name: str) -> str:
    """Return a name in one Unicode form (NFC) with single spaces, to compare names that people write with others."""
    return unicodedata.normalize("NFC", " ".join(name.split()))


def form_only(names: Iterable[str], others: Iterable[str]) -> str:
    """Return a remark for messages if two lists of names differ in the Unicode form of accents only, else ""."""
    first, second = ([unicodedata.normalize("NFC", name) for name in each] for each in (names, others))
    same = first != [] and sorted(first) == sorted(second)
    return " (the names differ in Unicode form only: write their accents in one way, NFC or NFD)" if same else ""


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
