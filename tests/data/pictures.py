"""Pictures for the tests of augmentation, and how far counts are from what is expected."""

import numpy as np


def chi_square(counts, expected):
    return np.sum((np.asarray(counts) - expected) ** 2 / expected)


def photos(height=32, width=32):
    """Return uint8 [40, height, width, 3]: noise, smooth ramps, low contrast, few values, one value."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (8, height, width, 3))
    ramp = np.linspace(0, 255, height)[:, None, None] + np.linspace(-60, 60, width)[:, None]
    smooth = ramp + random.normal(0, 20, (8, 1, 1, 3)) + random.normal(0, 3, (8, height, width, 3))
    dull = random.integers(0, 200, (8, 1, 1, 3)) + random.integers(0, 56, (8, height, width, 3))
    few = np.array([0, 17, 90, 255])[random.choice(4, (8, height, width, 3), p=[0.1, 0.2, 0.1, 0.6])]
    flat = np.broadcast_to(random.integers(0, 256, (8, 1, 1, 3)), noise.shape)
    return np.concatenate([noise, smooth, dull, few, flat]).clip(0, 255).astype(np.uint8)
