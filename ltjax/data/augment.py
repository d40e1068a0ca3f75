"""Augmentation of whole batches on the device, as pure functions of a key and images [B, H, W, channels].

They run inside a compiled step, also in `lax.scan` and on a batch sharded over devices. The number of devices changes
at most the last bit of mixup's sum. Each image draws its own random numbers; mixup draws one share for the batch.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ltjax.data import auto_augment as policies
from ltjax.data.mixing import check_cutmix, random_cutmix, random_mixup
from ltjax.types import Batch, UserError


def augment(
    rng: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    others: tuple[jax.Array, jax.Array] | None = None,
    *,
    crop_padding: int = 4,
    flip: bool = True,
    auto_augment: bool = False,
    rand_augment: tuple[float, ...] = (),
    color_jitter: float = 0.0,
    cutout_size: int = 0,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    cutmix_probability: float = 0.5,
    cutmix_partner: str = "batch",
    crop_area: float = 0.0,
    hue: float = 0.0,
    jitter_probability: float = 1.0,
    grey: float = 0.0,
    blur: float = 0.0,
) -> Batch:
    """Augment uint8 images [B, H, W, channels] and labels [B] for a training step; return float32 images in [0, 1].

    The order is that of the long-tail papers: `crop_flip`, `auto_augment` or `rand_augment` (number of operations,
    magnitude), division by 255, `color_jitter`, `cutout`, `random_mixup` or `random_cutmix`. Each keyword is a setting
    of that part in a config. Zero, False or () turns a part off and leaves the random numbers of the others unchanged.

    Contrastive views (SimAugment) have a `crop_area`, the smallest of a `random_window`, in place of padding. Their
    jitter has a `hue`, and changes a share `jitter_probability` of the images. After it, shares `grey` and `blur` of
    them become grey or blurred.

    `others`, uint8 images and labels, are a second batch to take CutMix's boxes from, which gets an augmentation of its
    own. It has to be there if `cutmix_partner` is "class_balanced".

    Features of images (`ltjax.models.precomputed`) are floats [B, 1, 1, D]: they can be mixed, and nothing else.

    UserError if a setting is out of range, if colour operations get images that are not RGB, or if an operation on
    pixels gets floats.
    """
    sizes = dict(crop_padding=crop_padding, cutout_size=cutout_size, mixup_alpha=mixup_alpha, color_jitter=color_jitter)
    _check_settings(rand_augment, auto_augment, sizes)
    check_cutmix(cutmix_alpha, cutmix_probability, cutmix_partner)
    _check_view(crop_area, crop_padding, dict(jitter_probability=jitter_probability, grey=grey, blur=blur), hue)
    if mixup_alpha and cutmix_alpha:
        raise UserError("augment has mixup_alpha and cutmix_alpha: turn one of them off")
    pixels = dict[str, Any](crop_padding=crop_padding, flip=flip, auto_augment=auto_augment, rand_augment=rand_augment)
    pixels |= dict(color_jitter=color_jitter, cutout_size=cutout_size, crop_area=crop_area, hue=hue)
    pixels |= dict(grey=grey, blur=blur, cutmix_alpha=cutmix_alpha)
    on = [name for name, value in pixels.items() if value]
    if images.dtype != jnp.uint8 and on:
        raise UserError(
            f"augment {on[0]} changes pixels, uint8; the data are {images.dtype}, as features are: turn it off"
        )

    def one_by_one(rngs: Any, images: jax.Array) -> jax.Array:
        """Augment each image by itself, with three keys, and convert to floats."""
        crop_rng, policy_rng, cutout_rng = rngs
        key = partial(jax.random.fold_in, policy_rng)
        if crop_padding or flip:
            images = crop_flip(crop_rng, images, padding=crop_padding, flip=flip)
        if crop_area:
            images = random_window(jax.random.fold_in(crop_rng, 8), images, min_area=crop_area)
        if auto_augment:
            images = policies.auto_augment(policy_rng, images)
        if rand_augment:
            number, magnitude = rand_augment
            images = policies.rand_augment(policy_rng, images, num_operations=int(number), magnitude=magnitude)
        images = as_float(images)
        if color_jitter or hue:
            jittered = _color_jitter(key(1), images, strength=color_jitter, hue=hue)
            images = jittered if jitter_probability == 1 else _some(key(8), jitter_probability, jittered, images)
        if grey:
            images = _some(key(9), grey, jnp.broadcast_to(_luma(images), images.shape), images)
        if blur:
            images = _some(key(10), blur, gaussian_blur(key(11), images), images)
        return cutout(cutout_rng, images, size=cutout_size) if cutout_size else images

    *rngs, mixup_rng = jax.random.split(rng, 4)
    images = one_by_one(rngs, images)
    if mixup_alpha:
        return random_mixup(mixup_rng, images, labels, alpha=mixup_alpha)
    if not cutmix_alpha:
        return Batch(images, labels)
    if others is not None:
        others = one_by_one(jax.random.split(jax.random.fold_in(rng, 1), 3), others[0]), others[1]
    elif cutmix_partner != "batch":
        raise UserError(f"augment cutmix_partner = {cutmix_partner!r}: for images in memory; take 'batch'")
    return random_cutmix(mixup_rng, images, labels, others, alpha=cutmix_alpha, probability=cutmix_probability)


def _some(rng: jax.Array, share: float, changed: jax.Array, images: jax.Array) -> jax.Array:
    """Take the changed image with probability `share`, for each of the images [B, H, W, channels]."""
    return jnp.where(jax.random.bernoulli(rng, share, (len(images), 1, 1, 1)), changed, images)


FIRST_VIEW_KEY = 16  # number of the random key of the first further view


def with_views(augment: Callable[..., Batch], views: Sequence[Callable[..., Batch]]) -> Callable[..., Batch]:
    """Add further views of each image to the batches of `augment`: each of `views` augments the same images again.

    All are functions `(rng, images, labels, ...) -> Batch`, such as `augment` with its settings.
    """

    def augmented(rng: jax.Array, images: jax.Array, labels: jax.Array, *others: Any) -> Batch:
        keys = [jax.random.fold_in(rng, FIRST_VIEW_KEY + number) for number in range(len(views))]
        more = [view(key, images, labels).images for key, view in zip(keys, views, strict=True)]
        return augment(rng, images, labels, *others)._replace(views=jnp.stack(more, 1))

    return augmented


def as_float(images: jax.Array) -> jax.Array:
    """Convert images, uint8 from 0 to 255, to float32 in [0, 1]. Features, which are floats, keep their values."""
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images.astype(jnp.float32)


def _check_settings(rand_augment: tuple[float, ...], auto_augment: bool, sizes: dict[str, float]) -> None:
    for name, value in sizes.items():
        if not value >= 0:
            raise UserError(f"augment {name} = {value}: 0 turns it off, else above 0")
    if (value := sizes["color_jitter"]) > 1:
        raise UserError(f"augment color_jitter = {value}: factors from 1 - it to 1 + it, so at most 1")
    if rand_augment and (len(rand_augment) != 2 or rand_augment[0] < 1 or not 0 <= rand_augment[1] <= 10):
        raise UserError(f"augment rand_augment = {rand_augment}: (operations, magnitude from 0 to 10), as (2, 9.0)")
    if rand_augment and auto_augment:
        raise UserError("augment has auto_augment and rand_augment: turn one of them off")


def _check_view(crop_area: float, crop_padding: int, shares: dict[str, float], hue: float) -> None:
    if not 0 <= crop_area <= 1 or not 0 <= hue <= 0.5:
        raise UserError(f"augment crop_area = {crop_area}, hue = {hue}: an area from 0 (off) to 1, a hue up to 0.5")
    if crop_area and crop_padding:
        raise UserError("augment has crop_area and crop_padding: turn one of them off")
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise UserError(f"augment {name} = {share}: a share of the images, from 0 to 1")


def crop_flip(rng: jax.Array, images: jax.Array, *, padding: int = 4, flip: bool = True) -> jax.Array:
    """Pad each image with `padding` zeros on each side, cut a random window of its size, and flip half of the images.

    The window is uniform over all (2 padding + 1)^2 positions. Without `flip`, no image is flipped. Shape and dtype
    stay; any dtype will do.
    """
    count, height, width, channels = images.shape
    crop_rng, flip_rng = jax.random.split(rng)
    if flip:  # before the crop: the distribution is the same, but after it XLA on CPU takes ten times as long in a loop
        mirrored = jax.random.bernoulli(flip_rng, 0.5, (count, 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    offsets = jax.random.randint(crop_rng, (count, 2), 0, 2 * padding + 1)

    def crop(image, offset):
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (height, width, channels))

    return jax.vmap(crop)(padded, offsets)


ATTEMPTS = 10  # at a window that lies in the image


def random_window(rng: jax.Array, images: jax.Array, *, min_area: float = 0.08) -> jax.Array:
    """Cut a random window of each image [B, H, W, channels], uint8, and enlarge it to the size of the image.

    The window has a share of the area, uniform from `min_area` to 1, and an aspect ratio from 3/4 to 4/3, uniform in
    its logarithm. Sizes that do not fit are drawn again, ten times in all; the last resort is the whole image. Pixels
    are interpolated linearly and rounded, as by Pillow.
    Source: Szegedy et al. 2015, in the form of torchvision's RandomResizedCrop.
    """
    count, height, width, _ = images.shape
    area_rng, ratio_rng, row_rng, column_rng = jax.random.split(rng, 4)
    area = height * width * jax.random.uniform(area_rng, (ATTEMPTS, count), jnp.float32, min_area, 1)
    limit = math.log(4 / 3)
    ratio = jnp.exp(jax.random.uniform(ratio_rng, (ATTEMPTS, count), jnp.float32, -limit, limit))
    rows, columns = jnp.round(jnp.sqrt(area / ratio)), jnp.round(jnp.sqrt(area * ratio))
    fits = (rows >= 1) & (rows <= height) & (columns >= 1) & (columns <= width)  # [ATTEMPTS, B]
    first = jnp.argmax(fits, axis=0, keepdims=True)

    def chosen(sizes: jax.Array, whole: int) -> jax.Array:  # [B]
        return jnp.where(fits.any(0), jnp.take_along_axis(sizes, first, axis=0)[0], whole)

    def weights(rng: jax.Array, size: jax.Array, whole: int) -> jax.Array:  # [B, output pixel, input pixel]
        start = jnp.floor(jax.random.uniform(rng, (count,), jnp.float32) * (whole - size + 1))
        start = jnp.minimum(start, whole - size)
        pixels = jnp.arange(whole, dtype=jnp.float32)
        inside = jnp.clip((pixels + 0.5) * (size / whole)[:, None] - 0.5, 0, size[:, None] - 1)
        return jnp.maximum(1 - jnp.abs((start[:, None] + inside)[..., None] - pixels), 0)

    rows, columns = weights(row_rng, chosen(rows, height), height), weights(column_rng, chosen(columns, width), width)
    pixels = _by_rows_and_columns(rows, columns, images.astype(jnp.float32))
    return jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)


def _by_rows_and_columns(rows: jax.Array, columns: jax.Array, images: jax.Array) -> jax.Array:
    """Sum each image's pixels with weights of rows [B, H', H] and of columns [B, W', W]: [B, H', W', channels]."""
    images = jnp.einsum("bih,bhwc->biwc", rows, images, precision="highest")
    return jnp.einsum("bjw,biwc->bijc", columns, images, precision="highest")


def gaussian_blur(rng: jax.Array, images: jax.Array, *, sigma: tuple[float, float] = (0.1, 2.0)) -> jax.Array:
    """Blur each of the images [B, H, W, channels], floats, by a Gaussian whose width is uniform in `sigma`, in pixels.

    Pixels outside are those of the border. SimCLR's code takes Pillow's blur, three box filters of nearly this shape.
    Source: Chen et al. 2020, arXiv 2002.05709.
    """
    count, height, width, _ = images.shape
    sigmas = jax.random.uniform(rng, (count, 1, 1), jnp.float32, *sigma)
    reach = math.ceil(3 * sigma[1])

    def weights(size: int) -> jax.Array:  # [B, size, size]
        taps = jnp.arange(-reach, size + reach)
        distances = (taps - jnp.arange(size)[:, None]).astype(jnp.float32)
        gaussian = jnp.exp(-jnp.square(distances / sigmas) / 2)
        kernel = jnp.where(jnp.abs(distances) <= reach, gaussian, 0)  # [B, size, size + 2 reach]
        pixel = jnp.clip(taps, 0, size - 1)[:, None] == jnp.arange(size)
        return (kernel / kernel.sum(-1, keepdims=True)) @ pixel.astype(kernel.dtype)

    return _by_rows_and_columns(weights(height), weights(width), images)


def cutout(
    rng: jax.Array, images: jax.Array, *, size: int = 16, fill: float | tuple[float, ...] | jax.Array = 0.0
) -> jax.Array:
    """Fill one square of `size` x `size` pixels in each of the images [B, H, W, channels], of any dtype.

    The square's centre is uniform over the image's pixels; the square is clipped at the border. It spans the rows from
    `centre - size // 2` up to, but not including, `centre - size // 2 + size`.

    `fill` is a scalar or [channels], in the units of `images`. The default is black, as in DRO-LT's code, which cuts
    before normalisation. The authors' code cuts after it; the equivalent is `fill=mean`, the data set's mean.
    Source: DeVries & Taylor 2017, arXiv 1708.04552.
    """
    count, height, width, _ = images.shape
    row_rng, column_rng = jax.random.split(rng)
    top = jax.random.randint(row_rng, (count, 1), 0, height) - size // 2
    left = jax.random.randint(column_rng, (count, 1), 0, width) - size // 2
    rows, columns = jnp.arange(height), jnp.arange(width)
    in_rows = (rows >= top) & (rows < top + size)  # [B, H]
    in_columns = (columns >= left) & (columns < left + size)  # [B, W]
    square = in_rows[:, :, None, None] & in_columns[:, None, :, None]  # [B, H, W, 1]
    return jnp.where(square, jnp.asarray(fill, images.dtype), images)


def color_jitter(rng: jax.Array, images: jax.Array, *, strength: float = 0.4, hue: float = 0.0) -> jax.Array:
    """Scale brightness, contrast and saturation of images [B, H, W, 3], float in [0, 1], each image in a random order.

    The factors are uniform in [1 - strength, 1 + strength], strength at most 1. With `hue`, at most 0.5, a shift of the
    hue by up to that part of the circle is a fourth step. Values are clipped to [0, 1] after each step and not rounded;
    torchvision rounds, because it works on 8-bit images. UserError if the images are not RGB.
    Source: Krizhevsky et al. 2012, in the form of torchvision's transform.
    """
    if images.shape[-1] != 3:
        raise UserError(f"color_jitter needs RGB images, but these have {images.shape[-1]} channel(s): set it to 0")
    order_rng, factor_rng = jax.random.split(rng)
    steps = 4 if hue else 3
    order = jnp.argsort(jax.random.uniform(order_rng, (steps, len(images))), axis=0)  # [turn, B]
    factors = jax.random.uniform(factor_rng, (steps, len(images)), images.dtype, 1 - strength, 1 + strength)
    if hue:
        shifts = jax.random.uniform(jax.random.fold_in(rng, 2), (len(images), 1, 1), images.dtype, -hue, hue)

    def scale_one(images, turn):
        kind, factor = (x[:, None, None, None] for x in turn)
        grey = _luma(images)
        mean = grey.mean((1, 2), keepdims=True)
        origin = jnp.where(kind == 0, 0, jnp.where(kind == 1, mean, grey)).astype(images.dtype)
        scaled = jnp.clip(origin + factor * (images - origin), 0, 1)
        return (jnp.where(kind == 3, _shifted_hue(images, shifts), scaled) if hue else scaled), None

    return jax.lax.scan(scale_one, images, (order, factors))[0]


def _luma(images: jax.Array) -> jax.Array:
    return (images * jnp.asarray(_LUMA, images.dtype)).sum(-1, keepdims=True)


_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601


def _shifted_hue(images: jax.Array, shift: jax.Array) -> jax.Array:
    """Turn the hue of images [B, H, W, 3] by a part of the circle, with value and saturation of HSV unchanged."""
    red, green, blue = images[..., 0], images[..., 1], images[..., 2]
    value, chroma = images.max(-1), images.max(-1) - images.min(-1)
    by_chroma = 1 / jnp.where(chroma > 0, chroma, 1)
    sixths = jnp.where(value == green, (blue - red) * by_chroma + 2, (red - green) * by_chroma + 4)
    sixths = jnp.where(value == red, (green - blue) * by_chroma, sixths) + 6 * shift
    channels = []
    for offset in (5, 3, 1):  # red, green, blue
        distance = (offset + sixths) % 6
        channels.append(value - chroma * jnp.clip(jnp.minimum(distance, 4 - distance), 0, 1))
    return jnp.stack(channels, -1)


_color_jitter = color_jitter  # because an argument of `augment` has this name
