"""Training methods, one file each: `create(class_counts [C], *, hyper-parameters) -> ltjax.types.Method`.

A method with layers of its own on the features of the network takes their number: `create(class_counts, num_features,
*, hyper-parameters)`.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ltjax.methods import criteria
from ltjax.system import registry
from ltjax.types import Method, Settings, UserError

METHODS = {
    name: f"ltjax.methods.{name}"
    for name in (
        *("erm", "mislas", "drolt", "reslt", "distil", "proco", "bcl"),
        *("pgd_at", "trades", "alp", "bgat", "lbgat", "gkl_at"),
    )
}
# Why the losses of other methods cannot be multiplied by weights of their images' classes.
UNWEIGHTED = {
    "reslt": "its branches divide the classes among themselves",
    "bgat": "its network learns from another one's logits, not from labels",
    "lbgat": "its network learns from another one's logits, not from labels",
}


def of_config(
    settings: Settings,
    asked: Mapping[str, float] | str,
    class_names: Sequence[str],
    class_counts: np.ndarray,
    num_features: int | None = None,
) -> Method:
    """Create the method of a stage with the class weights of its run.

    Args:
      settings: The stage's `method`: its name and hyper-parameters. Its own `class_weights` come first.
      asked: `config.class_weights`, see `ltjax.methods.criteria.weights_by_name`.
      class_names: C names.
      class_counts: [C] training images.
      num_features: See `create`.

    Examples:
      >>> method = methods.of_config({"name": "erm"}, {"owl": 2.0}, ("cat", "owl"), np.array([90, 10]))
      >>> method.per_class({})["Class weight"]
      Array([1., 2.], dtype=float32)
    """
    settings, weights = dict(settings), criteria.weights_by_name(asked, class_names, class_counts)
    if weights is not None:
        settings.setdefault("class_weights", weights)
    return create(settings.pop("name", ""), class_counts, num_features, **settings)


def create(name: str, class_counts: np.ndarray, num_features: int | None = None, **settings: Any) -> Method:
    """Create the method of a stage.

    Args:
      name: One of `METHODS`.
      class_counts: [C] training images.
      num_features: D of `Outputs.features`, for methods that have layers on them.
      **settings: Hyper-parameters, as in a config. `class_weights`: C factors, see `ltjax.methods.criteria.create`.

    Raises:
      UserError: The name or a hyper-parameter is unknown, a value is invalid, or `num_features` is needed.

    Examples:
      >>> method = methods.create("mislas", np.array([100, 10, 1]), head=0.4, tail=0.1)
      >>> method.per_class({})["Label smoothing"]
      Array([0.4  , 0.143, 0.1  ], dtype=float32)
    """
    function = registry.load("method", METHODS, name, "create")
    if "class_weights" in settings and name in UNWEIGHTED:
        weighable = ", ".join(other for other in METHODS if other not in UNWEIGHTED)
        raise UserError(f"method {name!r} takes no class weights: {UNWEIGHTED[name]}; these take them: {weighable}")
    arguments: tuple[Any, ...] = (class_counts,)
    if "num_features" in inspect.signature(function).parameters:
        if num_features is None:
            raise UserError(f"method {name!r} needs num_features, the number of the network's features")
        arguments += (num_features,)
    try:
        return registry.bind(f"method {name!r}", function, settings)(*arguments)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"method {name!r}: {error}") from error
