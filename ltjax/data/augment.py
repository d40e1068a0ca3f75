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

    Features of images (`ltjax.models.features`) are floats [B, 1, 1, D]: they can be mixed, and nothing else.

    UserError if a setting is out of range, if colour operations get images that are not RGB, or if an operation on
    pixels gets floats.
    """
    sizes = dict(crop_padding=crop_padding, cutout_size=cutout_size, mixup_alpha=mixup_alpha, color_jitter=color_jitter)
    _check_settings(rand_augment, auto_augment, sizes)
    check_cutmix(cutmix_alpha, cutmix_probability, cutmix_partner)
    _check_view(crop_area, crop_padding, dict(jitter_probability=jitter_probability, grey=grey, blur=blur), hue)
    if mixup_alpha and cutmix_alpha:
        raise UserError("augment has mixup_alpha and cutmix_alpha: turn one of them off")
    pixels: dict[str, Any] = dict(
        crop_padding=crop_padding, flip=flip, auto_augment=auto_augment, rand_augment=rand_augment
    )
    pixels = dict(pixels, color_jitter=color_jitter, cutout_size=cutout_size, crop_area=crop_area, hue=hue)
    pixels = dict(pixels, grey=grey, blur=blur)
    on = [name for name, value in dict(pixels, cutmix_alpha=cutmix_alpha).items() if value]
    pixels["jitter_probability"] = jitter_probability
    if images.dtype != jnp.uint8 and on:
        raise UserError(
            f"augment {on[0]} changes pixels, uint8; the data are {images.dtype}, as features are: turn it off"
        )
    crop_rng, policy_rng, cutout_rng, mixup_rng = jax.random.split(rng, 4)
    images = _one_by_one((crop_rng, policy_rng, cutout_rng), images, **pixels)
    if mixup_alpha:
        return random_mixup(mixup_rng, images, labels, alpha=mixup_alpha)
    if cutmix_alpha:
        if others is not None:
            others_rng = jax.random.fold_in(rng, 1)
            others = _one_by_one(tuple(jax.random.split(others_rng, 3)), others[0], **pixels), others[1]
        elif cutmix_partner != "batch":
            raise UserError(f"augment cutmix_partner = {cutmix_partner!r}: for images in memory; take 'batch'")
        return random_cutmix(mixup_rng, images, labels, others, alpha=cutmix_alpha, probability=cutmix_probability)
    return Batch(images, labels)


def _one_by_one(
    rngs: tuple[jax.Array, ...],
    images: jax.Array,
    *,
    crop_padding: int,
    flip: bool,
    auto_augment: bool,
    rand_augment: tuple[float, ...],
    color_jitter: float,
    cutout_size: int,
    crop_area: float,
    hue: float,
    jitter_probability: float,
    grey: float,
    blur: float,
) -> jax.Array:
    """Augment each image by itself, and convert to floats. Arguments: see `augment`."""
    crop_rng, policy_rng, cutout_rng = rngs
    key = partial(jax.random.fold_in, policy_rng)
    if crop_padding or flip:
        images = crop_flip(crop_rng, images, padding=crop_padding, flip=flip)
    if crop_area:
        images = random_window(jax.random.fold_in(crop_rng, 8), images, min_area=crop_area)
    if auto_augment:
        images = _auto_augment(policy_rng, images)
    if rand_augment:
        number, magnitude = rand_augment
        images = _rand_augment(policy_rng, images, num_operations=int(number), magnitude=magnitude)
    images = as_float(images)
    if color_jitter or hue:
        jittered = _color_jitter(key(1), images, strength=color_jitter, hue=hue)
        images = jittered if jitter_probability == 1 else _some(key(8), jitter_probability, jittered, images)
    if grey:
        images = _some(key(9), grey, jnp.broadcast_to(_luma(images), images.shape), images)
    if blur:
        images = _some(key(10), blur, gaussian_blur(key(11), images), images)
    if cutout_size:
        images = cutout(cutout_rng, images, size=cutout_size)
    return images


def _some(rng: jax.Array, share: float, changed: jax.Array, images: jax.Array) -> jax.Array:
    """Take the changed image with probability `share`, for each of the images [B, H, W, channels]."""
    return jnp.where(jax.random.bernoulli(rng, share, (len(images), 1, 1, 1)), changed, images)


VIEWS = 16  # tells the random numbers of further views from those of the batch


def with_views(augment: Callable[..., Batch], views: Sequence[Callable[..., Batch]]) -> Callable[..., Batch]:
    """Add further views of each image to the batches of `augment`: each of `views` augments the same images again.

    All are functions `(rng, images, labels, ...) -> Batch`, such as `augment` with its settings.
    """

    def augmented(rng: jax.Array, images: jax.Array, labels: jax.Array, *others: Any) -> Batch:
        keys = [jax.random.fold_in(rng, VIEWS + number) for number in range(len(views))]
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


# The 25 sub-policies for CIFAR-10: two operations each, as (operation, probability, level of magnitude 0 to 9).
CIFAR10_POLICY = (
    (("invert", 0.1, 7), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 8), ("equalize", 0.9, 2)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 5), ("equalize", 0.5, 1)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 7), ("autocontrast", 0.4, 8)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 3)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 8), ("equalize", 0.6, 4)),
    (("color", 0.9, 9), ("equalize", 0.6, 6)),
    (("autocontrast", 0.8, 4), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 3)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 2), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 8), ("invert", 0.1, 3)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 1)),
)

# {operation: (magnitude at level 0, magnitude at level 9, whether the sign is random)}
MAGNITUDES = {
    "shear_x": (0.0, 0.3, True),  # pixels along x per pixel along y
    "shear_y": (0.0, 0.3, True),
    "translate_x": (0.0, 150 / 331, True),  # share of the width
    "translate_y": (0.0, 150 / 331, True),  # share of the height
    "rotate": (0.0, 30.0, True),  # degrees, positive is anticlockwise
    "autocontrast": (0.0, 0.0, False),
    "equalize": (0.0, 0.0, False),
    "invert": (0.0, 0.0, False),
    "posterize": (8, 4, False),  # bits kept, a whole number
    "solarize": (256.0, 0.0, False),  # values from this grey level on are inverted
    "brightness": (0.0, 0.9, True),  # enhancement factor minus 1, also for the next three
    "color": (0.0, 0.9, True),
    "contrast": (0.0, 0.9, True),
    "sharpness": (0.0, 0.9, True),
}
_NAMES = tuple(MAGNITUDES)
_GEOMETRY = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
_POINTWISE = ("autocontrast", "equalize", "invert", "posterize", "solarize")
_ENHANCEMENT = ("brightness", "color", "contrast", "sharpness")
_NOTHING = -1  # operation number for "none"
_GREY = 128  # fills the pixels that geometry leaves empty


def auto_augment(rng: jax.Array, images: jax.Array) -> jax.Array:
    """Apply AutoAugment's CIFAR-10 policy to images [B, H, W, 3], uint8.

    Each image draws one of the 25 sub-policies and applies its two operations in turn (see `apply_operation`), each
    with its probability. Geometry and enhancements draw their sign. DRO-LT's code differs in geometry: it shears with
    bicubic interpolation and always rotates anticlockwise.

    UserError if the images are not RGB, ValueError if they are not uint8.
    Source: Cubuk et al. 2019, arXiv 1805.09501.
    """
    _require_rgb(images)
    policy_rng, probability_rng, sign_rng = jax.random.split(rng, 3)
    count = len(images)
    # [25, 2] each
    operations = jnp.array([[_NAMES.index(name) for name, _, _ in pair] for pair in CIFAR10_POLICY])
    probabilities = jnp.array([[probability for _, probability, _ in pair] for pair in CIFAR10_POLICY])
    magnitudes = jnp.array([[_magnitude(name, level) for name, _, level in pair] for pair in CIFAR10_POLICY])
    is_signed = jnp.array([[MAGNITUDES[name][2] for name, _, _ in pair] for pair in CIFAR10_POLICY])

    policy = jax.random.randint(policy_rng, (count,), 0, len(CIFAR10_POLICY))
    chosen = (policy[:, None] == jnp.arange(len(CIFAR10_POLICY)))[:, :, None]  # [B, 25, 1]
    operations, probabilities, magnitudes = (
        jnp.where(chosen, table, 0).sum(1) for table in (operations, probabilities, magnitudes)
    )
    applied = jax.random.uniform(probability_rng, (count, 2)) < probabilities
    negative = jax.random.bernoulli(sign_rng, 0.5, (count, 2)) & (chosen & is_signed).any(1)
    operations = jnp.where(applied, operations, _NOTHING)  # [B, 2]
    magnitudes = jnp.where(negative, -magnitudes, magnitudes)  # [B, 2]
    return _apply_in_turn(images, operations.T, magnitudes.T)


def rand_augment(rng: jax.Array, images: jax.Array, *, num_operations: int = 2, magnitude: float = 9.0) -> jax.Array:
    """Apply RandAugment to images [B, H, W, 3], uint8.

    Each image draws one of the 14 operations of `apply_operation`, and its sign, `num_operations` times. All operations
    have the same magnitude; 0 to 10 correspond to AutoAugment's levels 0 to 9.

    UserError if the images are not RGB, ValueError if they are not uint8.
    Source: Cubuk et al. 2020, arXiv 1909.13719.
    """
    _require_rgb(images, "rand_augment")
    choice_rng, sign_rng = jax.random.split(rng)
    shape = (num_operations, len(images))
    sizes = jnp.array([_magnitude(name, 0.9 * magnitude) for name in _NAMES])
    is_signed = jnp.array([signed for _, _, signed in MAGNITUDES.values()])
    operations = jax.random.randint(choice_rng, shape, 0, len(_NAMES))
    chosen = operations[..., None] == jnp.arange(len(_NAMES))  # [turn, B, 14]
    magnitudes = jnp.where(chosen, sizes, 0).sum(-1)
    negative = jax.random.bernoulli(sign_rng, 0.5, shape) & (chosen & is_signed).any(-1)
    magnitudes = jnp.where(negative, -magnitudes, magnitudes)
    return _apply_in_turn(images, operations, magnitudes)


def _apply_in_turn(images: jax.Array, operations: jax.Array, magnitudes: jax.Array) -> jax.Array:
    """Apply operations [turns, B] with magnitudes [turns, B] one turn after the other."""
    # A scan, because in straight code XLA on CPU would repeat the first operation for each use in the second.
    return jax.lax.scan(lambda images, turn: (_apply(images, *turn), None), images, (operations, magnitudes))[0]


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


# aliases, because arguments of `augment` have these names
_auto_augment, _rand_augment, _color_jitter = auto_augment, rand_augment, color_jitter


def apply_operation(name: str, images: jax.Array, magnitude: float | jax.Array = 0.0) -> jax.Array:
    """Apply one AutoAugment operation as Pillow computes it.

    Geometry takes the nearest pixel and fills with grey 128. The values equal Pillow's; autocontrast and the
    enhancements, which Pillow rounds in floating point, differ by one grey level in few pixels.

    Args:
      name: one of `MAGNITUDES`, else ValueError.
      images: [B, H, W, 3]; ValueError if they are not uint8, UserError if they are not RGB.
      magnitude: scalar or [B], in the units of `MAGNITUDES`, signed; unused by autocontrast, equalize and invert.
    """
    if name not in MAGNITUDES:
        raise ValueError(f"unknown operation {name!r}: choose one of {', '.join(MAGNITUDES)}")
    _require_rgb(images)
    magnitude = jnp.broadcast_to(jnp.asarray(magnitude, jnp.float32), len(images))
    return _apply(images, jnp.full(len(images), _NAMES.index(name)), magnitude)


def _require_uint8(images: jax.Array) -> None:
    if images.dtype != jnp.uint8:
        raise ValueError(f"augmentation starts from uint8 images, not {images.dtype}")


def _require_rgb(images: jax.Array, what: str = "auto_augment") -> None:
    _require_uint8(images)
    if images.shape[-1] != 3:
        raise UserError(f"{what} needs RGB images, but these have {images.shape[-1]} channel(s): turn {what} off")


def _magnitude(name: str, level: float) -> float:
    low, high, _ = MAGNITUDES[name]
    magnitude = low + (high - low) * level / 9
    return float(round(magnitude)) if name == "posterize" else magnitude


def _apply(images: jax.Array, operations: jax.Array, magnitudes: jax.Array) -> jax.Array:
    """Apply operation number `operations[i]` with `magnitudes[i]` to image i; both [B]."""
    # Under vmap a switch becomes a select, which computes all 14 branches for every image. They need only three
    # computations: a gather of pixels, a look-up in a table, and a blend with another image.

    def chosen(*names):
        return jnp.isin(operations, jnp.array([_NAMES.index(name) for name in names]))[:, None, None, None]

    cases = (
        (_GEOMETRY, _warp(images, operations, magnitudes)),
        (_POINTWISE, _look_up(images, operations, magnitudes)),
        (_ENHANCEMENT, _enhance(images, operations, magnitudes)),
    )
    return jnp.select([chosen(*names) for names, _ in cases], [changed for _, changed in cases], images)


def _warp(images: jax.Array, operations: jax.Array, magnitudes: jax.Array) -> jax.Array:
    """Move pixels: the output at (x, y) is the input's nearest pixel to (a x + b y + c, d x + e y + f)."""
    height, width = images.shape[1:3]

    def only(name, value):  # [B]; 0 for other operations
        return jnp.where(operations == _NAMES.index(name), value, 0.0)

    angle = only("rotate", jnp.radians(magnitudes))
    a = e = jnp.cos(angle)
    b = only("shear_x", magnitudes) - jnp.sin(angle)
    d = only("shear_y", magnitudes) + jnp.sin(angle)
    # Rotation is about the centre of the image, shear about its top left corner.
    c = only("translate_x", magnitudes * width) + only("rotate", (width - a * width - b * height) / 2)
    f = only("translate_y", magnitudes * height) + only("rotate", (height - d * width - e * height) / 2)

    def fixed(value):  # [B] -> [B, 1, 1]; Pillow's 16 fractional bits, so that all devices take the same pixel
        return jnp.floor(value * 65536 + 0.5).astype(jnp.int32)[:, None, None]

    x, y = jnp.arange(width), jnp.arange(height)[:, None]
    source_x = (fixed(a) * x + fixed(b) * y + fixed(c + (a + b) / 2)) >> 16  # [B, H, W]
    source_y = (fixed(d) * x + fixed(e) * y + fixed(f + (d + e) / 2)) >> 16
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    source_x, source_y = (jnp.where(inside, source, 0) for source in (source_x, source_y))
    forms = dict(default=_pixels_by_index)
    if height * width <= LARGEST_BY_PRODUCTS:
        forms["tpu"] = _pixels_by_products
    moved = jax.lax.platform_dependent(images, source_x, source_y, **forms)
    return jnp.where(inside[..., None], moved, jnp.uint8(_GREY))


# A TPU gathers and scatters one element at a time, and a GPU scatters in any order. Products with one-hot vectors give
# the same numbers, because integers up to 256 are exact in bfloat16. On a CPU they take 6 to 200 times as long.
LARGEST_BY_PRODUCTS = 64 * 64  # pixels of an image; for 224 x 224 pixels the products would take 67 MB


def _one_hot(index: jax.Array, size: int) -> jax.Array:
    return jax.nn.one_hot(index, size, dtype=jnp.bfloat16)


def _pixels_by_index(images: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Take the pixels at x, y [B, H, W] from images [B, H, W, channels], uint8."""
    count, height, width, channels = images.shape
    position = (y * width + x).reshape(count, height * width, 1)
    return jnp.take_along_axis(images.reshape(count, height * width, channels), position, axis=1).reshape(images.shape)


def _pixels_by_products(images: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    height, width = images.shape[1:3]
    columns = jnp.einsum("bijx,byxc->bijyc", _one_hot(x, width), images.astype(jnp.bfloat16))
    return jnp.where((y[..., None] == jnp.arange(height))[..., None], columns, 0).sum(3).astype(jnp.uint8)


def _entries_by_index(table: jax.Array, values: jax.Array) -> jax.Array:
    """Look values [B, P, channels] up in a table [B, 256, channels], uint8."""
    return jnp.take_along_axis(table, values, axis=1)


def _entries_by_products(table: jax.Array, values: jax.Array) -> jax.Array:
    count, _, channels = table.shape
    rows = table.astype(jnp.bfloat16).reshape(count, 16, 16, channels)  # an entry's upper and lower four bits
    row = jnp.einsum("bpch,bhlc->bpcl", _one_hot(values >> 4, 16), rows)
    return jnp.where((values & 15)[..., None] == jnp.arange(16), row, 0).sum(-1).astype(jnp.uint8)


def _counts_by_index(values: jax.Array) -> jax.Array:
    """Count each of 0 to 255 in values [B, P, channels]: int32 [B, 256, channels]."""
    channels = values.shape[-1]
    return jax.vmap(lambda x: jnp.zeros((256, channels), jnp.int32).at[x, jnp.arange(channels)].add(1))(values)


def _counts_by_products(values: jax.Array) -> jax.Array:
    count, _, channels = values.shape
    high, low = _one_hot(values >> 4, 16), _one_hot(values & 15, 16)
    counts = jnp.einsum("bpch,bpcl->bhlc", high, low, preferred_element_type=jnp.float32)
    return counts.reshape(count, 256, channels).astype(jnp.int32)


def _look_up(images: jax.Array, operations: jax.Array, magnitudes: jax.Array) -> jax.Array:
    """Replace each value by an entry of its image's and channel's table."""
    count, height, width, channels = images.shape
    pixels = images.reshape(count, height * width, channels).astype(jnp.int32)
    operations, magnitudes = operations[:, None, None], magnitudes[:, None, None]
    values = jnp.arange(256)[:, None]  # [256, 1]
    low = jnp.min(pixels, axis=1, keepdims=True)  # [B, 1, channels]
    high = jnp.max(pixels, axis=1, keepdims=True)

    stretched = (values - low) * 255 // jnp.maximum(high - low, 1)
    tables = {
        "autocontrast": jnp.where(high > low, jnp.clip(stretched, 0, 255), values),
        "equalize": _equalizing_table(pixels, high),
        "invert": 255 - values,
        "posterize": values & (256 - (1 << (8 - magnitudes.astype(jnp.int32)))),
        "solarize": jnp.where(values.astype(jnp.float32) < magnitudes, values, 255 - values),
    }
    table = values
    for name, candidate in tables.items():
        table = jnp.where(operations == _NAMES.index(name), candidate, table)  # [B, 256, channels]
    forms = dict(tpu=_entries_by_products, default=_entries_by_index)
    return jax.lax.platform_dependent(table.astype(jnp.uint8), pixels, **forms).reshape(images.shape)


def _equalizing_table(pixels: jax.Array, high: jax.Array) -> jax.Array:
    """Make the [B, 256, channels] table that flattens the histogram of `pixels` [B, H W, channels], maximum `high`."""
    num_pixels, values = pixels.shape[1], jnp.arange(256)[:, None]
    counts = jax.lax.platform_dependent(pixels, cpu=_counts_by_index, default=_counts_by_products)
    brightest = jnp.where(values == high, counts, 0).sum(1, keepdims=True)
    step = (num_pixels - brightest) // 255  # [B, 1, channels]
    below = jnp.cumsum(counts, axis=1) - counts
    table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, table, values)


def _enhance(images: jax.Array, operations: jax.Array, magnitudes: jax.Array) -> jax.Array:
    """Move each image away from (magnitude > 0) or towards (< 0) black, its grey, its mean grey, or its blur."""
    operations = operations[:, None, None, None]
    values = images.astype(jnp.int32)
    red, green, blue = values[..., :1], values[..., 1:2], values[..., 2:]
    grey = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16  # [B, H, W, 1], ITU-R 601 luma
    num_pixels = grey.shape[1] * grey.shape[2]
    mean_grey = (2 * jnp.sum(grey, axis=(1, 2), keepdims=True) + num_pixels) // (2 * num_pixels)  # [B, 1, 1, 1]

    rows = values[:, :-2] + values[:, 1:-1] + values[:, 2:]
    neighbourhood = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * values[:, 1:-1, 1:-1]
    inner = (2 * neighbourhood + 13) // 26  # weights 1 and 5 of 13
    blurred = jax.lax.dynamic_update_slice(values, inner, (0, 1, 1, 0))  # without the border

    origins = {"brightness": 0, "color": grey, "contrast": mean_grey, "sharpness": blurred}
    origin = values
    for name, candidate in origins.items():
        origin = jnp.where(operations == _NAMES.index(name), candidate, origin)
    origin = origin.astype(jnp.float32)
    factor = 1 + magnitudes[:, None, None, None]
    return jnp.clip(origin + factor * (values.astype(jnp.float32) - origin), 0, 255).astype(jnp.uint8)
