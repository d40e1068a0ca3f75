"""Choose the images of a batch, as pure functions of (seed, step).

A sampler stores nothing between steps, so it resumes anywhere and draws the same on any number of devices. The training
images are sorted by class: image `starts[c] + i` is the i-th of class c. The same code works on device arrays inside a
compiled step and on numpy arrays.

    sampler(seed, step, batch_size=B, class_counts=[C]) -> int32 [B], indices into the sorted images
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from ltjax.system import registry
from ltjax.system.hashing import hash32, shuffled
from ltjax.types import UserError


def instance_balanced(seed, step, *, batch_size: int, class_counts):
    """Draw every image once per pass, each pass in a new order: ordinary training.

    A pass may end in the middle of a batch; the next pass fills the rest, so every batch is full and no image is left
    out. PyTorch's loader ends an epoch with a smaller batch, or drops it.

    Examples:
      >>> sampler = samplers.create("instance_balanced")
      >>> sampler(np.uint32(0), np.uint32(0), batch_size=6, class_counts=[4, 2])
      array([2, 4, 1, 5, 0, 3], dtype=int32)
    """
    position, _, _ = _positions(seed, step, batch_size)
    size = np.uint32(np.sum(class_counts))
    return shuffled(position % size, size, hash32(seed, position // size)).astype(np.int32)


def class_balanced(seed, step, *, batch_size: int, class_counts):
    """Draw a class at random, then one of its images at random.

    Source: Kang et al., ICLR 2020.

    Examples:
      >>> sampler = samplers.create("class_balanced")
      >>> picked = sampler(np.uint32(0), np.uint32(0), batch_size=1000, class_counts=[900, 100])
      >>> int((picked >= 900).sum())  # of the rare class
      495
    """
    position, counts, starts = _positions(seed, step, batch_size, class_counts)
    chosen = hash32(seed, np.uint32(1), position) % np.uint32(len(class_counts))
    return (starts[chosen] + hash32(seed, np.uint32(2), position) % counts[chosen]).astype(np.int32)


def class_aware(seed, step, *, batch_size: int, class_counts, in_a_row: int = 4):
    """Cycle over the shuffled classes and draw `in_a_row` images of each; a class reshuffles its images after a pass.

    Source: Shen et al., ECCV 2016, with 4 in a row as in MiSLAS's and DRO-LT's code.

    Examples:
      >>> sampler = samplers.create("class_aware", in_a_row=2)
      >>> sampler(np.uint32(0), np.uint32(0), batch_size=8, class_counts=[6, 2])
      array([6, 7, 4, 2, 7, 6, 1, 0], dtype=int32)
    """
    if not isinstance(in_a_row, int) or in_a_row < 1:
        raise UserError(f"sampler class_aware: in_a_row = {in_a_row}: a whole number of images, at least 1")
    position, counts, starts = _positions(seed, step, batch_size, class_counts)
    num_classes, row = np.uint32(len(class_counts)), np.uint32(in_a_row)
    turn = position // row
    cycle = turn // num_classes
    chosen = shuffled(turn % num_classes, num_classes, hash32(seed, np.uint32(1), cycle))  # [B] classes
    draw = cycle * row + position % row  # how often the class was drawn before
    key = hash32(seed, np.uint32(2), chosen, draw // counts[chosen])
    return (starts[chosen] + shuffled(draw % counts[chosen], counts[chosen], key)).astype(np.int32)


SAMPLERS: dict[str, Callable] = {
    "instance_balanced": instance_balanced,
    "class_balanced": class_balanced,
    "class_aware": class_aware,
}


def frequencies(name: str, class_counts: np.ndarray) -> np.ndarray:
    """Return the frequency of each class in the batches of the sampler that a config names: [C], with sum 1.

    Examples:
      >>> samplers.frequencies("instance_balanced", np.array([6, 2]))
      array([0.75, 0.25])
      >>> samplers.frequencies("class_aware", np.array([6, 2]))
      array([0.5, 0.5])
    """
    registry.choose("sampler", SAMPLERS, name)
    weights = np.asarray(class_counts) if name == "instance_balanced" else np.ones(len(class_counts))
    return weights / weights.sum()


def create(name: str, **settings: Any) -> Callable:
    """Return the sampler that a config names.

    Args:
      name: one of `SAMPLERS`.
      **settings: further arguments of the sampler, such as `in_a_row`.

    Raises:
      UserError: the name or a setting is unknown.

    Examples:
      >>> sampler = samplers.create("class_aware", in_a_row=2)
      >>> sampler(np.uint32(0), np.uint32(1), batch_size=4, class_counts=[6, 2]).shape
      (4,)
    """
    sampler = registry.choose("sampler", SAMPLERS, name)
    trial = {"batch_size": 1, "class_counts": [1]}  # the training loop passes these
    registry.bind(f"sampler {name!r}", sampler, {**trial, **settings})(np.uint32(0), np.uint32(0))
    return partial(sampler, **settings)


def _positions(seed, step, batch_size, class_counts=()):
    """Return the number of each draw [B], counts [C] and starts [C]: uint32, in numpy if seed and step are numpy's."""
    xp = np if isinstance(seed, np.generic) and isinstance(step, np.generic) else jnp
    counts = np.asarray(class_counts).astype(np.uint32)
    if not counts.all():
        raise UserError(f"class {int(np.argmin(counts))} has no training images: a sampler by class needs 1 or more")
    starts = (np.cumsum(counts) - counts).astype(np.uint32)
    position = xp.asarray(step).astype(np.uint32) * np.uint32(batch_size) + xp.arange(batch_size, dtype=np.uint32)
    return position, xp.asarray(counts), xp.asarray(starts)
