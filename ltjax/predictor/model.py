"""A network with its weights, as a function of images."""

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ltjax import models
from ltjax.data.augment import as_float
from ltjax.runs.weights import Weights, check_classifier, in_our_order
from ltjax.system import parallel, xla
from ltjax.types import UserError

if TYPE_CHECKING:
    from ltjax.data.decode import View
    from ltjax.predictor.files import Prediction


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
      >>> collections = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))  # not trained
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
