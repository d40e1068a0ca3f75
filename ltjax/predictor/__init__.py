"""A trained network as a function of images. It needs only a run's folder, not the data set:

import ltjax

model = ltjax.load("runs/quickstart-seed0")
probabilities = model(images)  # [N, H, W, channels] -> [N, C]
for prediction in model.predict("photos/"):
    print(prediction.file, prediction.classes[0], prediction.confidences[0])
"""

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ltjax import config as configs
from ltjax import data, models
from ltjax.data.augment import as_float
from ltjax.predictor import priors
from ltjax.predictor.priors import Prior
from ltjax.runs.trained import TEMPERATURE, Trained, as_computed, class_names, evaluates_weights, newest, weights_of
from ltjax.runs.weights import DESCRIPTION, Weights, check_classifier, hash_weights, in_our_order, load_weights
from ltjax.system import parallel, xla
from ltjax.system.devices import start_devices
from ltjax.system.files import holding, read_json
from ltjax.system.paths import local
from ltjax.types import UserError

if TYPE_CHECKING:
    from ltjax.data.decode import View
    from ltjax.predictor.files import Prediction

FITTED = "fitted"


class Model:
    """A network with its weights, compiled at its first call. Batches are split over this machine's devices.

    Attributes:
      class_names: C names.
      image_size: Side in pixels of its training images, None if unknown.
      channels: Of the images, 1 or 3; or the number of features.
      takes_features: Whether the network takes features [N, D] instead of images.
      temperature: Divisor of the logits before the softmax.
      shift: [C], added to the logits after the division, see `ltjax.predictor.priors.shift`. None: nothing.
      about: Description of the checkpoint.
      network: The network: images [B, H, W, channels] in [0, 1] -> logits [B, C], a pytree for `jit`, `grad` and
        `ltjax.attacks`.

    Examples:
      >>> settings = dict(name="resnet_cifar", depth=8, width=2)
      >>> net = models.create(num_classes=3, **settings)
      >>> collections = net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))  # not trained
      >>> variables = Variables({"net": collections["params"]}, {"net": collections["batch_stats"]}, {})
      >>> model = predictor.Model(Weights(variables, settings, 3), class_names=("a", "b", "c"))
      >>> model
      <ltjax model: weights, 3 classes>
      >>> probabilities = model(np.zeros((2, 8, 8, 1), np.uint8))
      >>> probabilities.shape, probabilities.sum(1).round(3)
      ((2, 3), array([1., 1.], dtype=float32))
    """

    def __init__(
        self,
        weights: Weights,
        *,
        class_names: tuple[str, ...] = (),
        view: "View | None" = None,
        temperature: float = 1.0,
        about: str = "weights",
        batch_size: int = 256,
    ):
        """Build a model.

        Args:
          weights: From `ltjax.interop.export.read`.
          class_names: C names. Default: "class 0", "class 1", ...
          view: Resizing and cropping of image files. None if unknown.
          batch_size: Images per batch, over all devices.
        """
        check_classifier(weights, about)
        weights = in_our_order(weights)
        settings: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in weights.settings.items()}
        net = models.create(settings.pop("name", ""), weights.num_classes, **settings)
        self.class_names = class_names or tuple(f"class {c}" for c in range(weights.num_classes))
        self.view, self.temperature, self.about = view, temperature, about
        self.shift: np.ndarray | None = None
        self._mesh = parallel.make_mesh(jax.local_devices())
        self.batch_size = self._divisible(batch_size)
        params, stats = weights.variables.params["net"], weights.variables.stats["net"]
        self.channels = models.input_channels(params)
        self.takes_features = "backbone" not in params

        def logits(variables: dict[str, Any], images: jax.Array) -> jax.Array:
            outputs: Any = net.apply(variables, images, False)
            return outputs.logits

        variables = jax.device_put({"params": params, "batch_stats": stats}, parallel.replicated(self._mesh))
        self.network = Partial(logits, variables)
        self._run = xla.jit(lambda network, images: network(as_float(images)))

    def __repr__(self) -> str:
        size = "" if self.image_size is None else f", images of {self.image_size} pixels"
        return f"<ltjax model: {self.about}, {len(self.class_names)} classes{size}>"

    @property
    def image_size(self) -> int | None:
        return None if self.view is None else self.view.size

    def __call__(self, images: Any) -> np.ndarray:
        """Compute probabilities, float32 [N, C].

        Args:
          images: [N, H, W, channels], uint8 or floats in [0, 1], for any N.

        Raises:
          UserError: Images have another shape, type or range.
        """
        return np.asarray(jax.nn.softmax(calibrated(self.logits(images), np.float32(self.temperature), self.shift)))

    def logits(self, images: Any) -> np.ndarray:
        """Compute logits [N, C], without temperature and shift. Arguments and errors: see `__call__`."""
        images = self._checked(images)
        batches: list[Any] = [np.zeros((0, len(self.class_names)), np.float32)]
        for start in range(0, len(images), self.batch_size):
            batches.append(self.start(images[start : start + self.batch_size]))
            batches[-2] = np.asarray(batches[-2])  # waits for the previous batch while the device runs this one
        return np.concatenate(batches)[: len(images)]

    def predict(
        self, images: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], *, top_k: int = 5
    ) -> Iterator["Prediction"]:
        """Predict the most probable classes of image files.

        Args:
          images: A folder, which is searched recursively, a pattern such as "photos/*.jpg", or files.
          top_k: Number of classes.

        Returns:
          A `ltjax.predictor.files.Prediction` for each file, with an `error` if the file cannot be read. The next files
            are decoded meanwhile.

        Raises:
          UserError: There are no such files, or their size or number of channels is unknown.
        """
        from ltjax.predictor import files as image_files  # imports image decoders

        if isinstance(images, (str, os.PathLike)):
            files = image_files.find(os.fspath(images))
        else:
            files = (os.fspath(file) for file in images)
        return itertools.chain.from_iterable(image_files.predictions(self, files, top_k=top_k))

    def start(self, images: np.ndarray) -> jax.Array:
        """Start computing logits of at most `batch_size` images, padded by black ones, and return without waiting.

        Padding to powers of 2 limits the number of compilations.
        """
        size = min(self.batch_size, self._divisible(1 << (len(images) - 1).bit_length()))
        if size > len(images):
            images = np.concatenate([images, np.zeros((size - len(images), *images.shape[1:]), images.dtype)])
        return self._run(self.network, jax.device_put(images, parallel.split_batch(self._mesh)))

    def _divisible(self, size: int) -> int:
        """Round up to a multiple of the number of devices."""
        devices = self._mesh.shape[parallel.BATCH_AXIS]
        return -(-max(1, size) // devices) * devices

    def _checked(self, images: Any) -> np.ndarray:
        images = np.asarray(images)
        what = f"images are {images.dtype} {list(images.shape)}"
        if self.takes_features:
            if images.shape[-1:] != (self.channels,) or images.dtype.kind != "f":
                raise UserError(f"{what}: the network takes features, floats [N, {self.channels}]")
            return images.astype(np.float32).reshape(-1, 1, 1, self.channels)
        if images.ndim == 3 and images.shape[-1] == self.channels:
            raise UserError(f"{what}: one image is a batch of one, images[None]")
        if images.ndim != 4 or images.shape[-1] != self.channels:
            raise UserError(f"{what}: the network takes [N, H, W, {self.channels}]")
        if self.image_size not in (None, images.shape[1]) or self.image_size not in (None, images.shape[2]):
            raise UserError(
                f"{what}: the network was trained on {self.image_size} x {self.image_size} pixels; resize them, use "
                "model.predict(FILES), or load another size on purpose with ltjax.load(..., image_size=)"
            )
        if images.dtype == np.uint8:
            return images
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(f"{what}: give uint8 from 0 to 255, or floats in [0, 1]")
        images = images.astype(np.float32)
        if images.size and not (images.min() >= 0 and images.max() <= 1):  # also catches nan
            raise UserError(
                f"{what} from {images.min():g} to {images.max():g}: give floats in [0, 1], or uint8 from 0 to 255; "
                "the network normalises them itself"
            )
        return images


def calibrated(logits: Any, temperature: np.float32, shift: np.ndarray | None) -> Any:
    """Divide logits by the temperature, and add `Model.shift`: scores [N, C], whose softmax are probabilities."""
    scores = logits / temperature
    return scores if shift is None else scores + shift


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
