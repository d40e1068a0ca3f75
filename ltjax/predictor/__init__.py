"""A trained network as a function of images. It needs only a run's folder, not the data set:

import ltjax

model = ltjax.load("runs/quickstart-seed0")
probabilities = model(images)  # [N, H, W, channels] -> [N, C]
for prediction in model.predict("photos/"):
    print(prediction.file, prediction.classes[0], prediction.confidences[0])
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ltjax import config as configs
from ltjax import data, models
from ltjax.predictor import priors
from ltjax.predictor.model import Model
from ltjax.predictor.priors import Prior
from ltjax.runs.trained import TEMPERATURE, Trained, as_computed, class_names, evaluates_weights, newest, weights_of
from ltjax.runs.weights import DESCRIPTION, Weights, check_classifier, hash_weights, load_weights
from ltjax.system.devices import start_devices
from ltjax.system.files import holding, read_json
from ltjax.system.paths import local
from ltjax.types import UserError

if TYPE_CHECKING:
    from ltjax.data.decode import View

FITTED = "fitted"


def load(
    source: str | Path,
    *,
    temperature: float | str = FITTED,
    image_size: int | None = None,
    net: str | None = None,
    replica: int = 0,
    batch_size: int = 256,
    target_prior: Prior | None = None,
    model_prior: Prior | None = None,
) -> Model:
    """Load the model of a run or of a folder of weights. Needs no data set.

    Args:
      source: A run's workdir, of which the newest checkpoint of the last stage is loaded; or a folder of
        `ltjax.runs.weights`.
      temperature: Divisor of the logits. "fitted": that of `--calibrate`, or 1 if there is none.
      image_size: Side of the images in pixels. Default: that of the run; unknown for a folder of weights.
      net: "net", or "guide" if the run trains one. Default: the one that the last stage evaluates.
      replica: Which one, if the run has several.
      batch_size: Images per batch, over all devices.
      target_prior: How frequent the classes are where the model is used: "uniform", "train" (as the training images), a
        CSV file with the columns class and probability (or count), {name: probability or count}, or C numbers. None:
        as the model was trained for.
      model_prior: The same for which the model was trained. None: what `ltjax.predictor.priors.of_run` finds.

    Raises:
      UserError: There is nothing to load, the temperature belongs to another checkpoint, a prior cannot be read, the
        prior that the model was trained for is unknown, or JAX_PLATFORMS names a platform that this machine does not
        have.
    """
    source = local(source)
    start_devices()
    if (source / DESCRIPTION).is_file():
        weights, names, view, about, key = load_weights(source), (), None, f"weights {source}", None
        trained = None
        _check_fit(weights, source)
    else:
        trained = newest(source)
        evaluated = trained.stage.evaluate_net
        weights = weights_of(source, trained, net=net or evaluated, replica=replica)
        names, view = class_names(source, weights.num_classes), view_of(trained.run)
        about = f"{trained.stage.title}, step {trained.step} of stage {trained.stage.name}"
        key = {"stage": trained.stage.name, "step": trained.step} if net in (None, evaluated) else None
    model = Model(
        weights,
        class_names=names,
        view=_of_size(view, image_size),
        temperature=_temperature(source, key, replica, temperature),
        about=about,
        batch_size=batch_size,
    )
    model.shift = _shift(source, trained if key else None, model.class_names, target_prior, model_prior)
    return model


def _shift(
    workdir: Path,
    trained: Trained | None,
    class_names: tuple[str, ...],
    target_prior: Prior | None,
    model_prior: Prior | None,
) -> np.ndarray | None:
    """Return `priors.shift`, or None if no prior is asked for. trained: None if no run evaluates this network."""
    if target_prior is None and model_prior is None:
        return None
    if target_prior is None:
        raise UserError("model_prior goes with target_prior, the prior of the place where the model is used")
    split = workdir / "split.json"
    counts = known = None
    if split.is_file():
        content = read_json(split)
        with holding(split):
            counts = np.asarray(content["class_counts"], np.float64)
            if counts.shape != (len(class_names),) or not (np.isfinite(counts) & (counts >= 0)).all():
                raise ValueError(f"class_counts of {len(class_names)} classes are needed")
    if trained is not None and counts is not None and model_prior is None:
        known = priors.of_run(trained.run, trained.stage, class_names, counts)
    return priors.shift(target_prior, model_prior, known, class_names, counts)


def _check_fit(weights: Weights, source: Path) -> None:
    """Raise UserError if the arrays of a folder of weights are not those of its network."""
    check_classifier(weights, str(source))
    settings = dict(weights.settings)
    net = models.create(settings.pop("name", ""), weights.num_classes, **settings)
    params, stats = weights.variables.params["net"], weights.variables.stats["net"]
    image = models.example(net, models.input_channels(params))
    expected = jax.eval_shape(net.init, jax.random.key(0), image)
    shapes = jax.tree.map(np.shape, {"params": params, **({"batch_stats": stats} if stats else {})})
    if shapes != jax.tree.map(np.shape, dict(expected)):
        raise UserError(f"the arrays in {source} are not those of its network, {weights.settings}: write it again")


def load_as_configured(
    config: Mapping[str, Any],
    workdir: Path,
    *,
    temperature: float | str = FITTED,
    replica: int = 0,
    target_prior: Prior | None = None,
    model_prior: Prior | None = None,
) -> Model:
    """Load the model that `--mode=eval` evaluates: the run in a workdir or, if there is none, `config.weights`.

    Other arguments: see `load`.
    """
    run = configs.parse(config)
    asked: dict[str, Any] = dict(target_prior=target_prior, model_prior=model_prior)
    if not evaluates_weights(run, workdir):
        return load(workdir, temperature=temperature, replica=replica, batch_size=run.eval_batch_size, **asked)
    weights = load_weights(run.weights, run.weights_sha256)
    model = Model(
        weights._replace(settings=as_computed(weights, run)),
        class_names=class_names(workdir, weights.num_classes),
        view=view_of(run),
        temperature=_temperature(workdir, imported_key(run.weights), 0, temperature),
        about=f"Imported weights {run.weights}",
        batch_size=run.eval_batch_size,
    )
    model.shift = _shift(workdir, None, model.class_names, **asked)
    return model


def imported_key(folder: str) -> dict[str, Any]:
    """Identify imported weights by the hash of their arrays, for their temperature."""
    return {"stage": "imported", "step": 0, "weights_sha256": hash_weights(folder)}


def view_of(run: configs.RunConfig) -> "View | None":
    """Return the turning, resizing and cropping of image files: that of the run's test images, or to a square."""
    from ltjax.data.decode import View

    if run.data.name == "features":
        return None
    side = data.SIDES.get(run.data.name)
    size, resize = (run.data.size, run.data.resize) if side is None else (side, side)
    return View(size, resize, upright=run.data.upright)


def _of_size(view: "View | None", size: int | None) -> "View | None":
    from ltjax.data.decode import View

    if size is None:
        return view
    if size < 1:
        raise UserError(f"image_size = {size}: pixels, 1 or more")
    return View(size, size) if view is None else view._replace(size=size, resize=round(size * view.resize / view.size))


def _temperature(workdir: Path, key: Mapping[str, Any] | None, replica: int, asked: float | str) -> float:
    """Return the temperature `asked` or fitted. key: stage and step (and weights) of the model; None: not evaluated."""
    if asked != FITTED:
        if isinstance(asked, str) or not 0 < asked < math.inf:
            raise UserError(
                f"temperature = {asked!r}: {FITTED!r}, or a finite number above 0 (1.0: logits as they are)"
            )
        return float(asked)
    path = workdir / TEMPERATURE
    if key is None or not path.is_file():
        return 1.0
    content = read_json(path)
    try:
        if all(content[name] == value for name, value in key.items()):
            fitted = float(content["replicas"][replica]["temperature"])
            if not 0 < fitted < math.inf:
                raise ValueError(f"temperature {fitted}")
            return fitted
        checkpoint = f"step {content['step']} of stage {content['stage']}"
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"cannot read {path} ({type(error).__name__}: {error}): delete it, or calibrate again"
        ) from None
    raise UserError(
        f"{path} belongs to {checkpoint}, not to this checkpoint (step {key['step']} of stage {key['stage']}): fit it "
        "again with --mode=eval --calibrate, delete it, or ltjax.load(..., temperature=1.0)"
    )
