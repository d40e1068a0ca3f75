"""Checks for models whose robust accuracy would be misleading, made before an attack."""

import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ltjax.attacks import objectives
from ltjax.system import xla

MAX_IMAGES = 64  # that are checked


@xla.jit
def _logits(predict: Partial, images: jax.Array) -> jax.Array:
    return predict(images)


@xla.jit
def _flat(predict: Partial, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return whether an image's gradient is 0 in every pixel, bool [B]: of the log-odds; of cross-entropy."""
    odds, back = jax.vjp(lambda x: objectives.log_odds(predict(x), labels), images)
    slope = jax.nn.sigmoid(odds)  # cross-entropy is the softplus of the log-odds

    def is_flat(gradient: jax.Array) -> jax.Array:
        return ~(jnp.nan_to_num(gradient) != 0).any(tuple(range(1, images.ndim)))

    return is_flat(back(jnp.ones_like(odds))[0]), is_flat(back(slope)[0])


def look_for_trouble(predict: Partial, images: np.ndarray, labels: np.ndarray, clean: np.ndarray) -> Iterator[str]:
    """Yield a warning for each problem of a model.

    Problems are random or stateful predictions, predictions that depend on the other images of the batch, logits that
    are not finite or look like probabilities, and images without a gradient. AutoAttack's own checks cover the first
    and the last.

    Args:
      images: [N, ...].
      labels: [N].
      clean: Logits of the images, [N, C].
    """
    sample = jnp.asarray(images[:MAX_IMAGES])
    tolerance = 1e-3 * float(np.ptp(np.nan_to_num(clean))) + 1e-6

    def differ(a, b) -> bool:
        return bool((np.abs(np.nan_to_num(np.asarray(a)) - np.nan_to_num(np.asarray(b))) > tolerance).any())

    logits = _logits(predict, sample)
    if differ(logits, _logits(predict, sample)) or _traces_differ(predict, sample):
        yield (
            "predict is random: the same images have different logits, so attacks follow noise and robust accuracy is "
            "overestimated; attack the mean over its random numbers (expectation over transformation)"
        )
    elif len(sample) > 1:
        half = len(sample) // 2
        changed = jnp.concatenate([sample[:half], jnp.broadcast_to(sample[-1:], sample[half:].shape)])
        if differ(logits[:half], _logits(predict, changed)[:half]):
            yield (
                "an image's logits change with the rest of the batch, as with batch norm in training mode: attack the "
                "model in evaluation mode"
            )
    if (bad := int((~np.isfinite(clean)).any(1).sum())) > 0:
        yield f"predict's logits are not finite for {bad} of {len(clean)} clean images; those with a nan count as wrong"
    elif (clean >= 0).all() and np.abs(clean.sum(1) - 1).max() < 1e-3:
        yield "predict seems to return probabilities: return logits, which the DLR loss and the margins need"
    flat, saturated = (int(np.asarray(zero).sum()) for zero in _flat(predict, sample, jnp.asarray(labels[:MAX_IMAGES])))
    if flat:
        yield (
            f"{flat} of {len(sample)} images have a gradient of exactly 0 in every pixel: attacks by gradient cannot "
            "work on them, and only Square tests such a model"
        )
    elif saturated:
        yield (
            f"cross-entropy has vanishing gradients, exactly 0 in every pixel, for {saturated} of {len(sample)} images "
            "with saturated logits: APGD here climbs the log-odds, which still have a gradient, but attacks elsewhere "
            "fail"
        )


def _traces_differ(predict: Partial, images: jax.Array) -> bool:
    """Return whether two traces of predict differ, as with random numbers drawn outside of JAX."""
    traces = [jax.make_jaxpr(lambda x: predict(x))(images) for _ in range(2)]
    first, second = (re.sub(r"0x[0-9a-f]+", "", str(trace.jaxpr)) for trace in traces)  # without memory addresses
    if first != second:
        return True
    pairs = zip(*(trace.consts for trace in traces), strict=True)
    return any(a is not b and not _equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a, b, equal_nan=jnp.issubdtype(a.dtype, jnp.inexact))
