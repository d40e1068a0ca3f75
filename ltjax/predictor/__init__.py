"""A trained network as a function of images.

Needs no data set, and nothing of the run but its folder:

    import ltjax

    model = ltjax.load("runs/quickstart-seed0")
    probabilities = model(images)  # [N, H, W, channels] -> [N, C]
    for found in model.predict("photos/"):
        print(found.file, found.classes[0], found.confidences[0])
"""

import hashlib
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
from ltjax.interop.weights import ARRAYS, DESCRIPTION, Weights, in_our_order, load_weights
from ltjax.runs.checkpoint import read_json
from ltjax.runs.trained import newest, weights_of
from ltjax.system import parallel, xla
from ltjax.system.paths import local
from ltjax.types import UserError

if TYPE_CHECKING:
    from ltjax.data.decode import View
    from ltjax.predictor.files import Prediction

FITTED = "fitted"
TEMPERATURE = "temperature.json"  # what `ltjax.modes.calibrate` leaves in a workdir
NAMED_IN = (
    "split.json",
    "results.json",
    "eval.json",
    TEMPERATURE,
)  # files of a workdir that may know the names of classes


class Model:
    """A network with its weights, compiled at its first call; batches are split over this machine's devices.

    Attributes:
      class_names: C names.
      image_size: side in pixels of the images it was trained on, None where nobody noted it.
      channels: of the images, 1 or 3.
      temperature: what logits are divided by on their way to probabilities.
      about: which checkpoint this is, in words.
      network: the network alone, images [B, H, W, channels] in [0, 1] -> logits [B, C], a pytree for `jit`, `grad` and
        `ltjax.attacks`.

    Examples:
      >>> network = dict(name="resnet_cifar", depth=8, width=2)
      >>> net = models.create(num_classes=3, **network)
      >>> made = net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))  # a run would have trained it
      >>> variables = Variables({"net": made["params"]}, {"net": made["batch_stats"]}, {})
      >>> model = predictor.Model(Weights(variables, network, 3), class_names=("a", "b", "c"))
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
        """weights: as `ltjax.interop.export.read` gives them. view: what becomes of image files."""
        weights = in_our_order(weights)
        settings: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in weights.settings.items()}
        net = models.create(settings.pop("name", ""), weights.num_classes, **settings)
        self.class_names = class_names or tuple(f"class {c}" for c in range(weights.num_classes))
        self.view, self.temperature, self.about = view, temperature, about
        self._mesh = parallel.make_mesh(jax.local_devices())
        self.batch_size = self._shared(batch_size)
        params, stats = weights.variables.params["net"], weights.variables.stats["net"]
        self.channels = int(params["backbone"]["conv"]["kernel"].shape[2])

        def logits(variables: dict[str, Any], images: jax.Array) -> jax.Array:
            outputs: Any = net.apply(variables, images, False)
            return outputs.logits

        variables = jax.device_put({"params": params, "batch_stats": stats}, parallel.replicated(self._mesh))
        self.network = Partial(logits, variables)

        @xla.jit
        def run(network: Partial, images: jax.Array) -> jax.Array:
            return network(images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images)

        self._run = run

    def __repr__(self) -> str:
        size = "" if self.image_size is None else f", images of {self.image_size} pixels"
        return f"<ltjax model: {self.about}, {len(self.class_names)} classes{size}>"

    @property
    def image_size(self) -> int | None:
        return None if self.view is None else self.view.size

    def __call__(self, images: Any) -> np.ndarray:
        """Probabilities float32 [N, C] of images [N, H, W, channels], uint8, or floats in [0, 1]; any N.

        Raises: UserError that says what was found, where it is something else.
        """
        return np.asarray(jax.nn.softmax(self.logits(images) / np.float32(self.temperature)))

    def logits(self, images: Any) -> np.ndarray:
        """Logits [N, C], before any temperature; otherwise as `__call__`."""
        images, found, waiting = self._checked(images), [], None
        for start in range(0, len(images), self.batch_size):
            part = self.start(images[start : start + self.batch_size])
            if waiting is not None:
                found.append(np.asarray(waiting[1])[: waiting[0]])
            waiting = min(self.batch_size, len(images) - start), part
        if waiting is None:
            return np.zeros((0, len(self.class_names)), np.float32)
        return np.concatenate([*found, np.asarray(waiting[1])[: waiting[0]]])

    def predict(
        self, images: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], *, top_k: int = 5
    ) -> Iterator["Prediction"]:
        """The most probable classes of image files, one `ltjax.predictor.files.Prediction` each, as they are decoded.

        images: a folder, which is searched whole, a pattern such as "photos/*.jpg", or files. Those that cannot be read
        come back with an `error`.
        """
        from ltjax.predictor import files as image_files  # its decoders are not for everybody

        if isinstance(images, (str, os.PathLike)):
            files = image_files.find(os.fspath(images))
        else:
            files = (os.fspath(file) for file in images)
        return itertools.chain.from_iterable(image_files.predictions(self, files, top_k=top_k))

    def start(self, images: np.ndarray) -> jax.Array:
        """Logits of at most `batch_size` images, and of black ones behind them: the device may still be at work.

        So few sizes of batches reach it that it compiles a few times at most.
        """
        size = min(self.batch_size, self._shared(1 << (len(images) - 1).bit_length()))
        padded = np.concatenate([images, np.zeros((size - len(images), *images.shape[1:]), images.dtype)])
        return self._run(self.network, jax.device_put(padded, parallel.split_batch(self._mesh)))

    def _shared(self, size: int) -> int:
        """A batch of about `size` with a share for each device."""
        devices = self._mesh.shape[parallel.BATCH_AXIS]
        return -(-max(1, size) // devices) * devices

    def _checked(self, images: Any) -> np.ndarray:
        images = np.asarray(images)
        found = f"images are {images.dtype} {list(images.shape)}"
        if images.ndim == 3 and images.shape[-1] == self.channels:
            raise UserError(f"{found}: one image is a batch of one, images[None]")
        if images.ndim != 4 or images.shape[-1] != self.channels:
            raise UserError(f"{found}: the network takes [N, H, W, {self.channels}]")
        if self.image_size not in (None, images.shape[1]) or self.image_size not in (None, images.shape[2]):
            raise UserError(
                f"{found}: the network was trained on {self.image_size} x {self.image_size} pixels; resize them, let "
                "model.predict(FILES) do it, or ltjax.load(..., image_size=) another size on purpose"
            )
        if images.dtype == np.uint8:
            return images
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(f"{found}: give uint8 from 0 to 255, or floats in [0, 1]")
        images = images.astype(np.float32)
        if images.size and not (images.min() >= 0 and images.max() <= 1):  # so that nan is found as well
            raise UserError(
                f"{found} from {images.min():g} to {images.max():g}: give floats in [0, 1], or uint8 from 0 to 255; "
                "the network normalises them itself"
            )
        return images


def load(
    source: str | Path,
    *,
    temperature: float | str = FITTED,
    image_size: int | None = None,
    net: str | None = None,
    replica: int = 0,
    batch_size: int = 256,
) -> Model:
    """The model that a run has come to, or of a folder of weights (see `ltjax.interop`). Needs no data set.

    Args:
      source: a run's workdir, whose newest checkpoint of the last stage it is; or a folder of weights.
      temperature: what logits are divided by. "fitted": as `--calibrate` has found, or 1 where it has not been asked.
      image_size: side of the images in pixels, where it shall be another than the run's, or weights do not say.
      net: "net", or "guide" where the run trains one; None: the one that the last stage is judged by.
      replica: which, of a run with several. batch_size: images that go to the devices together.
    Raises: UserError where there is nothing to load, or the temperature belongs to another checkpoint.
    """
    source = local(source)
    if (source / DESCRIPTION).is_file():
        weights, names, view, about, key = load_weights(source), (), None, f"weights {source}", None
    else:
        trained = newest(source)
        evaluated = trained.stage.evaluate_net
        weights = weights_of(source, trained, net=net or evaluated, replica=replica)
        names, view = class_names(source, weights.num_classes), view_of(trained.run)
        about = f"{trained.stage.title}, step {trained.step} of stage {trained.stage.name}"
        key = {"stage": trained.stage.name, "step": trained.step} if net in (None, evaluated) else None
    return Model(
        weights,
        class_names=names,
        view=_of_size(view, image_size),
        temperature=_temperature(source, key, replica, temperature),
        about=about,
        batch_size=batch_size,
    )


def load_as_configured(
    config: Mapping[str, Any], workdir: Path, *, temperature: float | str = FITTED, replica: int = 0
) -> Model:
    """What `--mode=eval` would judge: the run in a workdir or, where there is none, `config.weights`."""
    run = configs.parse(config)
    if (workdir / "config.json").exists() or not run.weights or run.weights_parts:
        return load(workdir, temperature=temperature, replica=replica, batch_size=run.eval_batch_size)
    weights = load_weights(run.weights)
    own = {key: run.model[key] for key in ("dtype", "platform", "remat") if key in run.model}
    return Model(
        weights._replace(settings={**weights.settings, **own}),
        class_names=class_names(workdir, weights.num_classes),
        view=view_of(run),
        temperature=_temperature(workdir, imported_key(run.weights), 0, temperature),
        about=f"Imported weights {run.weights}",
        batch_size=run.eval_batch_size,
    )


def imported_key(folder: str) -> dict[str, Any]:
    """What a temperature of imported weights belongs to: these arrays."""
    digest = hashlib.sha256((local(folder) / ARRAYS).read_bytes()).hexdigest()
    return {"stage": "imported", "step": 0, "weights_sha256": digest}


def view_of(run: configs.RunConfig) -> "View":
    """What becomes of an image file before the network sees it: as the run's own test images, or cut to a square."""
    from ltjax.data.decode import View

    side = data.SIDES.get(run.data.name)
    return View(run.data.size, run.data.resize) if side is None else View(side, side)


def class_names(workdir: Path, num_classes: int) -> tuple[str, ...]:
    """As the run noted them; (), where it did not."""
    for file in NAMED_IN:
        if (workdir / file).is_file():
            names = read_json(workdir / file).get("class_names", ())
            if len(names) == num_classes:
                return tuple(names)
    return ()


def _of_size(view: "View | None", size: int | None) -> "View | None":
    from ltjax.data.decode import View

    if size is None:
        return view
    if size < 1:
        raise UserError(f"image_size = {size}: pixels, 1 or more")
    return View(size, size if view is None else round(size * view.resize / view.size))


def _temperature(workdir: Path, key: Mapping[str, Any] | None, replica: int, asked: float | str) -> float:
    """key: stage and step (and weights) of what is loaded; None: nothing that a temperature could belong to."""
    if asked != FITTED:
        if isinstance(asked, str) or not 0 < asked < math.inf:
            raise UserError(
                f"temperature = {asked!r}: {FITTED!r}, or a finite number above 0 (1.0: logits as they are)"
            )
        return float(asked)
    path = workdir / TEMPERATURE
    if key is None or not path.is_file():
        return 1.0
    kept = read_json(path)
    try:
        if all(kept[name] == value for name, value in key.items()):
            fitted = float(kept["replicas"][replica]["temperature"])
            if not 0 < fitted < math.inf:
                raise ValueError(f"temperature {fitted}")
            return fitted
        whose = f"step {kept['step']} of stage {kept['stage']}"
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"cannot read {path} ({type(error).__name__}: {error}): delete it, or calibrate anew") from None
    raise UserError(
        f"{path} belongs to {whose}, not to this checkpoint (step {key['step']} of stage {key['stage']}): fit it anew "
        "with --mode=eval --calibrate, delete it, or ltjax.load(..., temperature=1.0)"
    )
