"""Which images make up a batch, as pure functions of (seed, step).

Nothing is stored between steps, so a sampler resumes anywhere and draws the same on any number of devices. The training
images are sorted by class: image `starts[c] + i` is the i-th of class c. The same code serves device arrays inside a
compiled step and numpy arrays on a host.

    sampler(seed, step, batch_size=B, class_counts=[C]) -> int32 [B], indices into the sorted images
"""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import numpy as np

from ltjax import registry
from ltjax.hashing import hash32, shuffled
from ltjax.types import UserError


def instance_balanced(seed, step, *, batch_size: int, class_counts):
    """Every image once before any comes again, in a new order each time: the sampling of ordinary training.

    An epoch's last batch runs on into the next pass over the data, so every batch is full and no image is left out
    (PyTorch's loader ends an epoch with a smaller batch, or drops it).

    Examples:
      >>> sampler = samplers.create("instance_balanced")
      >>> sampler(np.uint32(0), np.uint32(0), batch_size=6, class_counts=[4, 2])
      array([2, 4, 1, 5, 0, 3], dtype=int32)
    """
    position, _, _ = _positions(seed, step, batch_size)
    size = np.uint32(np.sum(class_counts))
    return shuffled(position % size, size, hash32(seed, position // size)).astype(np.int32)


def class_balanced(seed, step, *, batch_size: int, class_counts):
    """Each draw: a class at random, then one of its images at random (Kang et al., ICLR 2020).

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
    """Cycle over the shuffled classes, `in_a_row` images of each; every class walks its own reshuffled images.

    Source: Shen et al., ECCV 2016, with the 4 in a row of MiSLAS's and DRO-LT's code.

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
    own = shuffled(draw % counts[chosen], counts[chosen], hash32(seed, np.uint32(2), chosen, draw // counts[chosen]))
    return (starts[chosen] + own).astype(np.int32)


SAMPLERS: dict[str, Callable] = {
    "instance_balanced": instance_balanced,
    "class_balanced": class_balanced,
    "class_aware": class_aware,
}


def create(name: str, **settings) -> Callable:
    """A sampler by its name in a config. Raises: UserError for an unknown name or setting.

    Examples:
      >>> sampler = samplers.create("class_aware", in_a_row=2)
      >>> sampler(np.uint32(0), np.uint32(1), batch_size=4, class_counts=[6, 2]).shape
      (4,)
    """
    sampler = registry.choose("sampler", SAMPLERS, name)
    trial = {"batch_size": 1, "class_counts": [1]}  # the caller's to fill in
    registry.bind(f"sampler {name!r}", sampler, {**trial, **settings})(np.uint32(0), np.uint32(0))
    return partial(sampler, **settings)


def _positions(seed, step, batch_size, class_counts=()):
    """Draws since the start [B], counts [C] and starts [C]: uint32, numpy or device arrays as `seed` and `step` are."""
    xp = np if isinstance(seed, np.generic) and isinstance(step, np.generic) else jnp
    counts = np.asarray(class_counts).astype(np.uint32)
    starts = (np.cumsum(counts) - counts).astype(np.uint32)
    position = xp.asarray(step).astype(np.uint32) * np.uint32(batch_size) + xp.arange(batch_size, dtype=np.uint32)
    return position, xp.asarray(counts), xp.asarray(starts)
