"""AutoAugment and RandAugment of whole batches on the device, and the 14 operations that they choose from."""

import functools

import jax
import jax.numpy as jnp

from ltjax.types import UserError

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


def _require_rgb(images: jax.Array, what: str = "auto_augment") -> None:
    if images.dtype != jnp.uint8:
        raise ValueError(f"augmentation starts from uint8 images, not {images.dtype}")
    if images.shape[-1] != 3:
        raise UserError(f"{what} needs RGB images, but these have {images.shape[-1]} channel(s): turn {what} off")


def _magnitude(name: str, level: float) -> float:
    low, high, _ = MAGNITUDES[name]
    magnitude = low + (high - low) * level / 9
    return float(round(magnitude)) if name == "posterize" else magnitude


@functools.partial(jax.jit, inline=True)  # one program, also for a caller without `jit`
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
