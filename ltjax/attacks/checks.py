"""What would make a robust accuracy mean less than it says, looked for before an attack begins."""

import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ltjax.attacks import objectives
from ltjax.system import xla

MOST = 64  # images that are looked at


@xla.jit
def _logits(predict: Partial, images: jax.Array) -> jax.Array:
    return predict(images)


@xla.jit
def _flat(predict: Partial, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether no pixel of an image has a gradient, bool [B]: of the log-odds; of cross-entropy."""
    odds, back = jax.vjp(lambda x: objectives.log_odds(predict(x), labels), images)
    slope = jax.nn.sigmoid(odds)  # of cross-entropy, the softplus of the log-odds

    def is_flat(gradient: jax.Array) -> jax.Array:
        return ~(jnp.nan_to_num(gradient) != 0).any(tuple(range(1, images.ndim)))

    return is_flat(back(jnp.ones_like(odds))[0]), is_flat(back(slope)[0])


def look_for_trouble(predict: Partial, images: np.ndarray, labels: np.ndarray, clean: np.ndarray) -> Iterator[str]:
    """A sentence for each thing found.

    Random or stateful predictions; predictions that depend on the other images of the batch; logits that are not
    finite, or look like probabilities; images without a gradient. The first and the last are what AutoAttack's own
    checks flag, too.

    Args: images [N, ...], labels [N], clean: their logits [N, C].
    """
    some, own = jnp.asarray(images[:MOST]), jnp.asarray(labels[:MOST])
    scale = 1e-3 * float(np.ptp(np.nan_to_num(clean))) + 1e-6

    def differ(a, b) -> bool:
        return bool((np.abs(np.nan_to_num(np.asarray(a)) - np.nan_to_num(np.asarray(b))) > scale).any())

    first = _logits(predict, some)
    if differ(first, _logits(predict, some)) or _traces_differ(predict, some):
        yield (
            "predict is random: it gives the same images different logits, so attacks follow noise and robust accuracy "
            "is overestimated; attack the mean over its random numbers (expectation over transformation)"
        )
    elif len(some) > 1:
        half = len(some) // 2
        crowd = jnp.concatenate([some[:half], jnp.broadcast_to(some[-1:], some[half:].shape)])
        if differ(first[:half], _logits(predict, crowd)[:half]):
            yield (
                "predict gives an image other logits in other company, as batch norm does in training mode: attack the "
                "model in evaluation mode"
            )
    if (bad := int((~np.isfinite(clean)).any(1).sum())) > 0:
        yield f"predict's logits are not finite for {bad} of {len(clean)} clean images; one with a nan counts as wrong"
    elif (clean >= 0).all() and np.abs(clean.sum(1) - 1).max() < 1e-3:
        yield "predict seems to return probabilities: give logits, which the DLR loss and the margins are made for"
    flat, saturated = (int(np.asarray(zero).sum()) for zero in _flat(predict, some, own))
    if flat:
        yield (
            f"{flat} of {len(some)} images have a gradient of exactly 0 in every pixel: the attacks that need one are "
            "blind there, and only Square says something about such a model"
        )
    elif saturated:
        yield (
            f"cross-entropy has vanishing gradients, exactly 0 in every pixel, for {saturated} of {len(some)} images, "
            "whose logits saturate: APGD here climbs the log-odds, which go on, but attacks elsewhere are blind"
        )


def _traces_differ(predict: Partial, images: jax.Array) -> bool:
    """Whether Python makes another program of predict each time, as with random numbers drawn outside of JAX."""
    one, two = (jax.make_jaxpr(lambda x: predict(x))(images) for _ in range(2))
    programs = [re.sub(r"0x[0-9a-f]+", "", str(traced.jaxpr)) for traced in (one, two)]  # without memory addresses
    if programs[0] != programs[1]:
        return True
    pairs = zip(one.consts, two.consts, strict=True)
    return any(a is not b and not _equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a, b, equal_nan=jnp.issubdtype(a.dtype, jnp.inexact))
