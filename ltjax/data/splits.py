"""Choose the images of a long-tailed training set by a seed, and describe the choice."""

import hashlib
from typing import Any, NamedTuple

import numpy as np

from ltjax.system import registry
from ltjax.system.hashing import hash32, shuffled
from ltjax.types import UserError

PROFILES = ("exp", "step")
NATURAL = "natural"  # keeps all images, with the class sizes of the source


def class_counts(num_classes: int, max_count: int, *, imbalance: float, profile: str = "exp") -> np.ndarray:
    """Compute the training images of each class, from `max_count` down to `max_count / imbalance`.

    Source: Cao et al., "Learning Imbalanced Datasets with LDAM", NeurIPS 2019.

    Args:
      num_classes: C.
      max_count: images of the largest class.
      imbalance: imbalance factor, largest over smallest count, at least 1.
      profile: "exp" falls exponentially with the class number, `int(max_count * f ** (k / (C - 1)))` with
        `f = 1 / imbalance`; "step" keeps `max_count` for the first C / 2 classes and `int(max_count * f)` for the rest.

    Returns:
      int64 [C].

    Raises:
      UserError: the profile is unknown, the imbalance is below 1, or a size is below 1.

    Examples:
      >>> splits.class_counts(5, 100, imbalance=100)
      array([100,  31,  10,   3,   1])
      >>> splits.class_counts(4, 100, imbalance=50, profile="step")
      array([100, 100,   2,   2])
    """
    registry.choose("imbalance profile", PROFILES, profile)
    if not imbalance >= 1:
        raise UserError(f"imbalance = {imbalance}: it is the largest class over the smallest, 1 (balanced) or more")
    if num_classes < 1 or max_count < 1:
        raise UserError(f"a split of {num_classes} classes with up to {max_count} images: both must be at least 1")
    smallest = 1 / imbalance
    if profile == "exp":
        counts = [int(max_count * smallest ** (k / max(num_classes - 1, 1))) for k in range(num_classes)]
    else:
        head = num_classes // 2
        counts = [max_count] * head + [int(max_count * smallest)] * (num_classes - head)
    return np.asarray(counts, np.int64)


class Split(NamedTuple):
    """Indices into a source's training images.

    Attributes:
      train: [N] int64, sorted by class, so that samplers need only the counts.
      holdout: [C * h] int64, h of each class, sorted by class.
      class_counts: [C] int64, images of each class in `train`.
    """

    train: np.ndarray
    holdout: np.ndarray
    class_counts: np.ndarray


def long_tailed_split(
    labels: np.ndarray,
    num_classes: int,
    *,
    imbalance: float,
    profile: str = "exp",
    max_count: int | None = None,
    holdout: int = 0,
    seed: int = 0,
    class_names: tuple[str, ...] = (),
) -> Split:
    """Keep a long-tailed part of balanced (or already long-tailed) training images.

    `seed` permutes each class. The first n_c images are kept, so the images at imbalance 100 are a subset of those at
    imbalance 10. The last `holdout` images form a class-balanced set for selection and tuning.

    Args:
      labels: [M], of all training images.
      num_classes: C.
      imbalance: see `class_counts`; 1 for the profile "natural".
      profile: see `class_counts`; or "natural", which keeps every image, at most `max_count` of each class.
      max_count: images of the largest class. None takes all images of the first class beyond the hold-out.
      holdout: images held out of each class.
      seed: of the permutations.
      class_names: C names, for messages.

    Raises:
      UserError: a class has fewer images than asked for, or would keep none.

    Examples:
      >>> labels = np.repeat(np.arange(3), 10)
      >>> split = splits.long_tailed_split(labels, 3, imbalance=4, holdout=2)
      >>> split.class_counts, len(split.train), len(split.holdout)
      (array([8, 4, 2]), 14, 6)
      >>> labels[split.train]
      array([0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
    """
    available = np.bincount(labels, minlength=num_classes)
    titles = [f"class {c}" + (f" ({class_names[c]})" if class_names else "") for c in range(num_classes)]
    if max_count is not None and max_count < 1:
        raise UserError(f"data.max_count = {max_count}: 1 image of the largest class or more")
    if profile == NATURAL:
        if imbalance != 1:
            raise UserError(f"data.imbalance = {imbalance:g}: profile {NATURAL!r} keeps classes as unequal as they are")
        if not 0 <= holdout < available.min():
            rarest = int(available.argmin())
            raise UserError(f"data.holdout = {holdout} images a class: {titles[rarest]} has {available[rarest]} in all")
        counts = available - holdout if max_count is None else np.minimum(available - holdout, max_count)
        return _choose(labels, available, counts, holdout, seed)
    if not 0 <= holdout < available.max():
        raise UserError(f"data.holdout = {holdout} images a class: there are {available.min()} to {available.max()}")
    if max_count is None:
        max_count = int(available[0]) - holdout
    counts = class_counts(num_classes, max_count, imbalance=imbalance, profile=profile)
    if (counts < 1).any():
        raise UserError(
            f"{titles[int(np.argmax(counts < 1))]} would keep no image (largest class {max_count}, imbalance "
            f"{imbalance:g}): lower data.imbalance or raise data.max_count"
        )
    if (lacking := counts + holdout > available).any():
        c = int(np.argmax(lacking))
        asked = f"{counts[c]} training" + (f" and {holdout} hold-out" if holdout else "")
        raise UserError(
            f"{titles[c]} has {available[c]} images, but {asked} images are asked for: "
            "lower data.max_count or data.holdout, or raise data.imbalance"
        )
    return _choose(labels, available, counts, holdout, seed)


def _choose(labels: np.ndarray, available: np.ndarray, counts: np.ndarray, holdout: int, seed: int) -> Split:
    """Permute each class by the seed; keep its first `counts[c]` images and hold out its last `holdout`."""
    order = np.argsort(labels, kind="stable")
    starts, classes = np.cumsum(available) - available, labels[order]
    place = np.arange(len(labels)) - starts[classes]  # of each image in its class
    keys = hash32(np.uint32(seed), np.arange(len(available), dtype=np.uint32))
    sizes = available.astype(np.uint32)
    # One call for all classes: 8,142 calls take 5 s.
    order = order[starts[classes] + shuffled(place.astype(np.uint32), sizes[classes], keys[classes])]
    train, held = order[place < counts[classes]], order[place >= (available - holdout)[classes]]
    return Split(train, held, np.asarray(counts, np.int64))


def describe(
    split: Split, *, seed: int, groups: dict[str, np.ndarray], class_names: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the content of `split.json`; its SHA-256 hashes are those of the indices as little-endian int64.

    Args:
      split: the split.
      seed: that of the split.
      groups: {name: [C] bool, whether a class belongs to the group}.
      class_names: C names.

    Examples:
      >>> split = splits.long_tailed_split(np.repeat(np.arange(2), 4), 2, imbalance=2)
      >>> description = splits.describe(split, seed=0, groups={"few": np.array([False, True])})
      >>> description["class_counts"], description["groups"], description["sha256"][:8]
      ([4, 2], {'few': [1]}, 'df2709fe')
    """

    def digest(indices):
        return hashlib.sha256(np.ascontiguousarray(indices, "<i8").tobytes()).hexdigest()

    return {
        "class_names": list(class_names),
        "class_counts": split.class_counts.tolist(),
        "num_train": len(split.train),
        "num_holdout": len(split.holdout),
        "seed": seed,
        "sha256": digest(split.train),
        "holdout_sha256": digest(split.holdout),
        "groups": {name: np.flatnonzero(member).tolist() for name, member in groups.items()},
    }
