"""Mix pairs of images: mixup and CutMix. Every loss of a batch takes the labels of both, see `ltjax.losses.mixed`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ltjax.types import Batch, UserError

PARTNERS = ("batch", "class_balanced")  # where CutMix takes its boxes from


def mixup(images: jax.Array, labels: jax.Array, lam: float | jax.Array, permutation: jax.Array) -> Batch:
    """Mix float images [B, H, W, channels]: `lam * images[i] + (1 - lam) * images[permutation[i]]`, lam in [0, 1].

    The batch holds the labels [B] unchanged and the partners' labels. ValueError if the images are not float.
    Source: Zhang et al. 2018, arXiv 1710.09412.
    """
    return _mixed(images, labels, lam, lambda x: x[permutation])


def random_mixup(rng: jax.Array, images: jax.Array, labels: jax.Array, *, alpha: float) -> Batch:
    """Mix a batch with one share from Beta(alpha, alpha) and the pairs of `partners`.

    The authors' code draws a permutation of the batch. On several devices, that would send every image to every device,
    more bytes than the gradients. Samplers draw batches in random order, so fixed positions pair random images as well.
    """
    return _mixed(images, labels, symmetric_beta(rng, alpha), partners)


TRIES = 16  # candidates for each gamma draw: all are rejected once in 1e20 draws


def symmetric_beta(rng: jax.Array, alpha: float) -> jax.Array:
    """Draw once from Beta(alpha, alpha), alpha > 0: float32 [].

    `jax.random.beta` samples by rejection in a while loop, and on a GPU the host waits at each iteration. This function
    draws all candidates at once and takes the first accepted one. A beta is g / (g + h) with g, h ~ Gamma(alpha), and
    Gamma(alpha) is Gamma(alpha + 1) times u^(1 / alpha), u uniform. Logarithms avoid underflow for small alpha.

    Source: Marsaglia & Tsang, "A Simple Method for Generating Gamma Variables", 2000.
    """
    if alpha == 1:
        return jax.random.uniform(rng, dtype=jnp.float32)
    normal_rng, accept_rng, power_rng = jax.random.split(rng, 3)
    shape = alpha + 2 / 3  # that of Gamma(alpha + 1), minus 1/3
    x = jax.random.normal(normal_rng, (TRIES, 2), jnp.float32)
    cube = (1 + x / (9 * shape) ** 0.5) ** 3
    log_cube = jnp.log(jnp.maximum(cube, 1e-30))
    log_uniform = -jax.random.exponential(accept_rng, (TRIES, 2), jnp.float32)
    accepted = (cube > 0) & (log_uniform < x**2 / 2 + shape * (1 - cube + log_cube))
    first = jnp.argmax(accepted, axis=0, keepdims=True)  # [1, 2]
    log_gamma = jnp.take_along_axis(log_cube, first, axis=0)[0]  # [2], log(gamma / shape)
    log_gamma -= jax.random.exponential(power_rng, (2,), jnp.float32) / alpha
    return jax.nn.sigmoid(log_gamma[0] - log_gamma[1])


def partners(x: jax.Array) -> jax.Array:
    """Reorder the rows of x [B, ...] for mixup: row i of the result belongs to the partner of image i.

    The batch is cut into groups of 8 neighbours, or of the next larger number that divides B. Each group is rolled by 4
    rows, or by half a group if B < 8. So each image is a partner once, and never of itself unless B is 1. The pairs do
    not depend on the number of devices, and devices that hold whole groups exchange no images. The class-aware sampler
    draws 4 images of a class in a row, so each image is mixed with one of the previous or next class.
    """
    count = len(x)
    size = next((size for size in range(8, count) if count % size == 0), count)
    groups = x.reshape(count // size, size, *x.shape[1:])
    return jnp.roll(groups, -min(4, size // 2), axis=1).reshape(x.shape)


def _mixed(images: jax.Array, labels: jax.Array, lam: float | jax.Array, partners_of: Callable) -> Batch:
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"mixup needs float images, not {images.dtype}")
    lam = jnp.asarray(lam, images.dtype)
    mixed = lam * images + (1 - lam) * partners_of(images)
    return Batch(mixed, labels, partner_labels=partners_of(labels), lam=lam)


def cutmix_box(lam: jax.Array, row: jax.Array, column: jax.Array, height: int, width: int) -> tuple[jax.Array, ...]:
    """Return CutMix's box around a centre: its first row, end row, first column, end column.

    Its sides are `sqrt(1 - lam)` of the image's, rounded down to even numbers, and it is clipped at the border.
    """
    bounds = []
    for centre, size in ((row, height), (column, width)):
        half = jnp.floor(size * jnp.sqrt(1 - lam)).astype(jnp.int32) // 2
        bounds += [jnp.clip(centre - half, 0, size), jnp.clip(centre + half, 0, size)]
    return tuple(bounds)


def cutmix(
    images: jax.Array, labels: jax.Array, partners: tuple[jax.Array, jax.Array], box: tuple[jax.Array, ...]
) -> Batch:
    """Replace a box of each image by that of its partner; lam is the share of the image that stays.

    Source: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV
    2019, arXiv 1905.04899.

    Args:
      images: Floats [B, H, W, channels].
      labels: [B].
      partners: Images and labels.
      box: From `cutmix_box`.
    """
    height, width = images.shape[1:3]
    top, bottom, left, right = box
    rows, columns = jnp.arange(height), jnp.arange(width)
    inside = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))  # [H, W]
    mixed = jnp.where(inside[None, :, :, None], partners[0], images)
    lam = 1 - ((bottom - top) * (right - left)).astype(images.dtype) / (height * width)
    return Batch(mixed, labels, partner_labels=partners[1], lam=lam)


def random_cutmix(
    rng: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    others: tuple[jax.Array, jax.Array] | None = None,
    *,
    alpha: float,
    probability: float,
) -> Batch:
    """Mix a batch by one box, whose area is drawn from Beta(alpha, alpha).

    Args:
      others: Images and labels to take the box from. None: the pairs of `partners`.
      alpha: Above 0.
      probability: Of a batch to be mixed; the others keep their images, with lam 1.
    """
    lam_rng, use_rng, row_rng, column_rng = jax.random.split(rng, 4)
    height, width = images.shape[1:3]
    lam = symmetric_beta(lam_rng, alpha)
    lam = jnp.where(jax.random.bernoulli(use_rng, probability), lam, 1.0)
    row, column = jax.random.randint(row_rng, (), 0, height), jax.random.randint(column_rng, (), 0, width)
    box = cutmix_box(lam, row, column, height, width)
    return cutmix(images, labels, others or (partners(images), partners(labels)), box)


def check_cutmix(alpha: float, probability: float, partner: str) -> None:
    """Raise UserError if a setting of CutMix is out of range."""
    if not alpha >= 0 or not 0 <= probability <= 1:
        raise UserError(
            f"augment cutmix_alpha = {alpha}, cutmix_probability = {probability}: alpha from 0 (off), a probability"
        )
    if partner not in PARTNERS:
        raise UserError(f"augment cutmix_partner = {partner!r}; allowed: {', '.join(PARTNERS)}")
