"""Replace the frequencies of classes that a model was trained for by those of the place where it is used.

A classifier that is right where classes have the prior p(y) is right for another prior q(y) after `log q(y) - log p(y)`
is added to its logits, if images of a class look the same in both places.
Source: Saerens et al., "Adjusting the Outputs of a Classifier to New a Priori Probabilities", Neural Computation 2002.
"""

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ltjax import methods
from ltjax.config import RunConfig, StageConfig
from ltjax.data import samplers, tables
from ltjax.system.paths import local
from ltjax.system.wording import nearest, plain, some
from ltjax.types import UserError

UNIFORM, TRAIN = "uniform", "train"
FORMS = f"{UNIFORM}, {TRAIN} (the training images), or a CSV file with the columns class and probability (or count)"
TOLERANCE = 0.01  # of the sum of probabilities in a file
Prior = str | os.PathLike[str] | Mapping[str, float] | Sequence[float] | np.ndarray


def shift(
    target: Prior, model: Prior | None, known: np.ndarray | None, class_names: Sequence[str], class_counts: Any = None
) -> np.ndarray:
    """Compute the shift of the logits, float32 [C]: `log target - log model`.

    Args:
      target: The prior where the model is used: "uniform", "train", a CSV file, {name: probability or count}, or C
        numbers. A class with 0 is never predicted.
      model: The prior that the model was trained for, likewise, without zeros. None: `known`.
      known: `of_run`, [C]. None: unknown.
      class_names: C names.
      class_counts: [C] training images. None: unknown.

    Raises:
      UserError: A prior cannot be read, or the one of the model is unknown.

    Examples:
      >>> priors.shift([0.9, 0.1], "uniform", None, ("zebra", "lion"))
      array([ 0.588, -1.609], dtype=float32)
    """
    new = _read("target_prior", target, class_names, class_counts)
    if model is None and known is None:
        raise UserError(f"it is unknown which prior the model was trained for, so --model_prior is needed: {FORMS}")
    old = known if model is None else _read("model_prior", model, class_names, class_counts)
    if not old.all():
        zeros = [name for name, share in zip(class_names, old, strict=True) if share == 0]
        raise UserError(f"model_prior: no probability for {some(zeros)}: above 0 for each class")
    with np.errstate(divide="ignore"):  # log 0 = -inf
        return (np.log(new) - np.log(old)).astype(np.float32)


def of_run(
    run: RunConfig, stage: StageConfig, class_names: Sequence[str], class_counts: np.ndarray
) -> np.ndarray | None:
    """Return the prior that a stage's network was trained for, [C] with sum 1; None if it is unknown.

    It is the frequency of the classes in the stage's batches times `ltjax.types.Method.prior`.
    """
    counts = np.asarray(class_counts, np.float64)
    changed = stage.eval_classifier and (stage.eval_classifier.get("tau") or not stage.eval_classifier.get("bias"))
    if stage.evaluate_net != "net" or changed or not counts.all():
        return None
    if not stage.epochs:
        shifted = stage.surgery.get("name") == "logit_shift" and stage.start_from in run.stages
        before = of_run(run, run.stages[stage.start_from], class_names, counts) if shifted else None
        return None if before is None else _normalised(before * counts ** -stage.surgery.get("tau", 1.0))
    if stage.augment.get("cutmix_alpha") and stage.augment.get("cutmix_partner") == "class_balanced":
        return None  # labels of partners are more often those of rare classes
    prior = methods.of_config(stage.method, run.class_weights, class_names, class_counts).prior
    if prior is None:
        return None
    return _normalised(samplers.frequencies(stage.sampler["name"], counts) * prior)


def _read(what: str, asked: Prior, class_names: Sequence[str], class_counts: Any) -> np.ndarray:
    """Return a prior [C] with sum 1."""
    if isinstance(asked, str) and asked == UNIFORM:
        return np.full(len(class_names), 1 / len(class_names))
    if isinstance(asked, str) and asked == TRAIN:
        if class_counts is None:
            raise UserError(f"{what} = {TRAIN}: the numbers of training images are unknown; give {UNIFORM} or a file")
        return _normalised(np.asarray(class_counts, np.float64))
    if isinstance(asked, (str, os.PathLike)):
        return _of_names(what, _in_file(what, local(asked)), class_names)
    if isinstance(asked, Mapping):
        return _of_names(what, asked, class_names)
    with contextlib.suppress(TypeError, ValueError):  # no numbers
        values = np.asarray(asked, np.float64)
        if values.shape == (len(class_names),) and (np.isfinite(values) & (values >= 0)).all() and values.any():
            return _normalised(values)
    raise UserError(f"{what}: {len(class_names)} numbers from 0 up, one for each class and not all 0; or {FORMS}")


def _in_file(what: str, path: Path) -> dict[str, float]:
    """Read {class: probability or count} from a table."""
    if not path.is_file():
        raise UserError(f"{what}: no file {path}; give {FORMS}")
    rows = tables.rows(path, ("class",), ("probability", "count"))
    columns = [name for name in rows[0][1] if name != "class"]
    if len(columns) != 1:
        raise UserError(f"{path} has {' and '.join(columns) or 'no numbers'}: needed: one column, probability or count")
    values: dict[str, float] = {}
    for line, row in rows:
        name = plain(row["class"])
        try:
            value = float(row[columns[0]])
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise UserError(f"{path}, line {line}: {columns[0]} = {row[columns[0]]!r}: a number from 0 up")
        if name in values:
            raise UserError(f"{path}, line {line}: class {name!r} has a row already")
        values[name] = value
    if columns == ["probability"] and abs(sum(values.values()) - 1) > TOLERANCE:
        raise UserError(
            f"the probabilities in {path} sum to {sum(values.values()):.4g}, not to 1: correct them, or name the "
            "column count if they are numbers of images"
        )
    return values


def _of_names(what: str, values: Mapping[str, float], class_names: Sequence[str]) -> np.ndarray:
    values, names = {plain(str(name)): value for name, value in values.items()}, list(map(plain, class_names))
    if unknown := [name for name in values if name not in names]:
        raise UserError(f"{what} names {unknown[0]!r}, none of the classes: {nearest(unknown[0], names)}")
    if missing := [name for name in names if name not in values]:
        raise UserError(f"{what} lacks {len(missing)} class(es), 0 if they do not occur: {some(missing)}")
    return _read(what, [values[name] for name in names], class_names, None)


def _normalised(values: np.ndarray) -> np.ndarray:
    return values / values.sum()
