"""The weights that a stage is evaluated with: their moving average if the stage keeps one, then tau-normalised."""

from collections.abc import Mapping
from typing import Any

from ltjax.surgery import tau_normalised
from ltjax.types import Variables

EMA = "ema"  # beside "net" in a stage's variables: the moving average of its weights


def with_ema(variables: Variables) -> Variables:
    """Return the variables with the moving average as "net", if the stage keeps one."""
    if EMA not in variables.params:
        return variables
    params, stats = ({**part, "net": part[EMA]} for part in (variables.params, variables.stats))
    del params[EMA], stats[EMA]
    return variables._replace(params=params, stats=stats)


def as_evaluated(variables: Variables, eval_classifier: Mapping[str, Any]) -> Variables:
    """Return the variables that a stage is evaluated with: averaged, then tau-normalised, without the method's arrays.

    Args:
      variables: Of the trained network.
      eval_classifier: Arguments of `ltjax.surgery.tau_normalised` from the stage's config; {} leaves the classifier
        unchanged.
    """
    variables = with_ema(variables._replace(arrays={}))
    if not eval_classifier:
        return variables
    net = tau_normalised(variables.params["net"], **eval_classifier)
    return variables._replace(params={**variables.params, "net": net})
