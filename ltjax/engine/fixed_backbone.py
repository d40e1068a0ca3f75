"""Compute the features of a fixed backbone once, instead of in every step.

If no stage trains the backbone, updates its batch norms, or crops or augments images at random, an image always has the
same features. The stages then train the classifier on them, as on images of one pixel (`ltjax.models.precomputed`).
Features are kept in a cache, so another run of the same backbone on the same images begins at once.
"""

import contextlib
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from ltjax import optim
from ltjax.config import RunConfig
from ltjax.data import identity, progress
from ltjax.data.augment import as_float
from ltjax.data.source import ImageFiles, Images, Stored
from ltjax.data.splits import Split
from ltjax.engine import feed
from ltjax.models.precomputed import FeaturesBackbone
from ltjax.system import locks, parallel, processes, xla
from ltjax.system.paths import cache_folder
from ltjax.types import UserError, Variables

BEFORE_FEATURES = ("backbone", "block", "branches")  # parts of a network that the features of an image depend on
DTYPE = np.dtype("<f2")


def is_fixed(run: RunConfig, params: Mapping[str, Any]) -> bool:
    """Return whether all stages see the same features of an image.

    Args:
      run: The backbone must come from `config.weights`.
      params: Of all networks, or their shapes.

    Raises:
      UserError: A stage's groups do not fit the parameters.
    """
    if run.data.min_area < 1 or not run.weights or set(params) != {"net"} or "branches" in params["net"]:
        return False
    if run.weights_parts and "backbone" not in run.weights_parts:
        return False
    for stage in run.stages.values():
        # Optional, because a method's parameters are not known here.
        groups = {name: {**group, "optional": True} for name, group in stage.groups.items()}
        trained = optim.assign_groups(list(optim.flatten(params)), groups) if stage.epochs else {}
        learns = [
            path for path, name in trained.items() if groups[name]["rate"] and path.split("/")[1] in BEFORE_FEATURES
        ]
        augmented = stage.views or any(value for name, value in stage.augment.items() if name != "mixup_alpha")
        if learns or augmented or stage.batch_norm != "eval":
            return False
    return True


def without_backbone(net: nn.Module) -> nn.Module:
    """Return the network without its backbone."""
    return net.clone(backbone=FeaturesBackbone(), block=None, mean=(0.0,), std=(1.0,))


def features(
    run: RunConfig, data: Stored, split: Split, net: nn.Module, variables: Variables | None, mesh: Mesh
) -> Images:
    """Compute the features of all images of a run, or read them from the cache.

    Args:
      split: Its training and held-out images.
      variables: Its variables, of one replica. None: return ones, to describe a run.

    Returns:
      Features float16 [N, 1, 1, D] in the place of images; those of images that the run does not use are 0.

    Raises:
      UserError: An image cannot be read, features are not finite, or another process fills the cache.
    """
    width = _width(net, run)
    if variables is None:
        ones = (np.ones((len(labels), 1, 1, width), DTYPE) for labels in (data.train_labels, data.test_labels))
        return Images(next(ones), data.train_labels, next(ones), data.test_labels, data.class_names)
    chosen = np.sort(np.concatenate([split.train, split.holdout]))
    parts = [(data.train_files, data.train_labels, chosen)]
    parts += [(data.test_files, data.test_labels, np.arange(len(data.test_labels)))]
    collections = {"params": variables.params["net"], "batch_stats": variables.stats["net"]}
    folder = cache_folder()
    cache = Cache(folder / f"features-{_key(run, collections)}.bin" if folder else None, width)
    placed = []
    with cache:
        for files, labels, order in parts:
            identities = [files.identity(int(i)) for i in order]
            first = dict(zip(reversed(identities), reversed(order.tolist()), strict=True))  # copies count once
            missing = np.sort([i for identity, i in first.items() if identity not in cache]).astype(np.int64)
            if len(missing):
                for rows in _forward(run, mesh, net, collections, files, labels, missing):
                    cache.add([files.identity(int(i)) for i in missing[: len(rows)]], rows)
                    missing = missing[len(rows) :]
            rows = np.zeros((len(labels), 1, 1, width), DTYPE)
            rows[order, 0, 0] = cache.rows(identities)
            placed.append(rows)
    return Images(placed[0], data.train_labels, placed[1], data.test_labels, data.class_names)


def _width(net: nn.Module, run: RunConfig) -> int:
    image = jnp.zeros((1, run.data.size, run.data.size, 3))
    return jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), image)[0]).features.shape[-1]


def _key(run: RunConfig, collections: Mapping[str, Any]) -> str:
    """Hash the inputs of an image's features: backbone, its weights and settings, and the image's crop."""
    arrays = optim.flatten(collections)
    digest = hashlib.sha256()
    for path in sorted(path for path in arrays if path.split("/")[1] in BEFORE_FEATURES):
        digest.update(path.encode() + np.ascontiguousarray(arrays[path], np.float32).tobytes())
    head_only = ("classifier", "classifier_init", "cosine_scale", "logit_scale", "remat", "platform")
    settings = {key: value for key, value in run.model.items() if key not in head_only}
    view = {key: getattr(run.data, key) for key in ("name", "size", "resize", "upright")}
    digest.update(json.dumps([settings, view], sort_keys=True).encode())
    return digest.hexdigest()[:32]


def _forward(
    run: RunConfig, mesh: Mesh, net: nn.Module, collections: Any, files: ImageFiles, labels: np.ndarray, order: Any
) -> Iterator[np.ndarray]:
    """Compute the features of the images `order`, in that order: batches [B, D]."""
    platform, everywhere = mesh.devices.flat[0].platform, parallel.replicated(mesh)
    collections = jax.device_put(collections, everywhere)

    def of_batch(collections: Any, images: jax.Array) -> jax.Array:
        with xla.float32_products(platform):
            outputs: Any = net.apply(collections, as_float(images), False)
        return outputs.features.astype(DTYPE)

    compiled, left = xla.jit(of_batch, out_shardings=everywhere), len(order)
    with progress.bar(transient=True) as bar:
        task, running = bar.add_task("computing features", total=left), None
        for images, _ in itertools.chain(feed.in_order(run, mesh, files, labels, order).parts(), [(None, None)]):
            started = None if images is None else compiled(collections, images[0])
            if running is not None:  # while the devices compute the next batch
                done = np.asarray(running)[:left]
                left -= len(done)
                bar.update(task, advance=len(done))
                yield done
            running = started


class Cache:
    """Features by the identity of their image, in a file that only grows.

    A record is an identity, a CRC-32, and float16 [D]. A killed process leaves whole records and perhaps a part of one,
    which the next process cuts off. Damaged records are forgotten. Without a file, features are kept in memory; so are
    those of several processes, which have to compute the same images.
    """

    def __init__(self, file: Path | None, width: int):
        self._file = None if processes.several() else file
        self._record = np.dtype([("identity", f"V{identity.SIZE}"), ("crc", "<u4"), ("row", DTYPE, (width,))])
        self._known: dict[bytes, np.ndarray] = {}

    def __enter__(self) -> "Cache":
        if self._file is None:
            return self
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._opened = open(self._file, "ab")
        except OSError:  # then they are computed again next time
            self._file = None
            return self
        self._lock = locks.locked(self._file, f"another process computes the same features ({self._file}): wait for it")
        self._lock.__enter__()
        whole = self._file.stat().st_size // self._record.itemsize
        self._opened.truncate(whole * self._record.itemsize)
        for record in np.fromfile(self._file, self._record, whole):
            if zlib.crc32(record["row"].tobytes()) == record["crc"]:
                self._known[record["identity"].tobytes()] = record["row"]
        return self

    def __exit__(self, *error: Any) -> None:
        if self._file is not None:
            self._opened.close()
            self._lock.__exit__(*error)

    def __contains__(self, identity: bytes) -> bool:
        return identity in self._known

    def add(self, identities: list[bytes], rows: np.ndarray) -> None:
        """Add rows [B, D]. UserError if a number is not finite."""
        if not np.isfinite(rows).all():
            raise UserError(
                "features are not finite in float16: config.weights do not fit the network or its normalisation "
                "(config.model.mean and std)"
            )
        records = np.empty(len(rows), self._record)
        for record, name, row in zip(records, identities, rows, strict=True):
            record["identity"], record["crc"], record["row"] = np.void(name), zlib.crc32(row.tobytes()), row
            self._known[name] = row
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk: then they are computed again next time
                self._opened.write(records.tobytes())
                self._opened.flush()

    def rows(self, identities: list[bytes]) -> np.ndarray:
        """Return the features of images [B, D]."""
        return np.stack([self._known[name] for name in identities])
