"""Square Attack: random search with square windows, which uses only the logits."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ltjax.attacks import ball, objectives
from ltjax.attacks.slots import Task

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # proposals after which the windows' share is halved


class State(NamedTuple):
    """State for B images.

    Attributes:
      adversarial: [B, H, W, channels], the best point so far.
      fooled: bool [B].
      done: bool [B].
      margin: [B], of `adversarial`; infinite before its evaluation.
      query: int32 [B], evaluations so far.
    """

    adversarial: jax.Array
    fooled: jax.Array
    done: jax.Array
    margin: jax.Array
    query: jax.Array


class Square(NamedTuple):
    """Square Attack on the margin z_y - max_{c != y} z_c.

    The schedule of `HALVINGS` does not depend on num_queries, as in AutoAttack's standard suite. Windows never end at
    the last row or column, as in the authors' code and AutoAttack's; the paper allows it. Random numbers depend only on
    the image's key and its number of queries.

    Source: Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random search",
    ECCV 2020, algorithms 1 to 3.

    Attributes:
      epsilon: Radius in [0, 1] pixel units.
      norm: "linf" or "l2".
      num_queries: Evaluations, including the start (the authors' code does one more).
      p_init: Share of the image that the first windows cover.
    """

    epsilon: float
    norm: str = "linf"
    num_queries: int = 5000
    p_init: float = 0.8
    evaluations_a_step = 1

    def init(self, task: Task) -> State:
        ball.check_norm(self.norm)
        batch, shape, dtype = task.images.shape[0], task.images.shape[1:], task.images.dtype
        start = stripes if self.norm == "linf" else grid_of_windows
        delta = jax.vmap(lambda key: start(jax.random.fold_in(key, 0), shape, dtype))(task.keys)
        none = jnp.zeros(batch, bool)
        return State(
            adversarial=self._perturbed(task.images, delta),
            fooled=none,
            done=none | (self.num_queries < 1),
            margin=jnp.full(batch, jnp.inf, dtype),
            query=jnp.zeros(batch, jnp.int32),
        )

    def step(self, predict: Any, task: Task, state: State) -> State:
        first = ball.per_image(state.query == 0, task.images)
        x = jnp.where(first, state.adversarial, self.proposal(task, state))
        logits = predict(x)  # [B, C]
        is_label = jax.nn.one_hot(task.labels, logits.shape[-1], dtype=bool)
        margin = jnp.where(is_label, logits, 0).sum(-1) - jnp.where(is_label, -jnp.inf, logits).max(-1)
        margin = margin.astype(state.margin.dtype)
        wrong = objectives.fooled(logits, task.labels)
        accepted = (margin < state.margin) | wrong
        query = state.query + 1
        return State(
            adversarial=jnp.where(ball.per_image(accepted, x), x, state.adversarial),
            fooled=state.fooled | wrong,
            done=state.done | (query >= self.num_queries),
            margin=jnp.where(accepted, margin, state.margin),
            query=query,
        )

    def proposal(self, task: Task, state: State) -> jax.Array:
        """Change one window of the best point, for query 1, 2, ... -> [B, H, W, channels]."""
        shape = task.images.shape[1:]
        sides = window_sides(shape[0], shape[1], p_init=self.p_init, norm=self.norm)
        stage = (state.query[:, None] - 1 > jnp.array(HALVINGS, jnp.int32)).sum(-1, dtype=jnp.int32)  # [B]
        keys = jax.vmap(jax.random.fold_in)(task.keys, state.query)
        if self.norm == "linf":
            change = jax.vmap(lambda key, stage: _square(key, stage, sides, shape, task.images.dtype))(keys, stage)
            moved = state.adversarial + 2 * self.epsilon * change
            return ball.project(moved, task.images, epsilon=self.epsilon, norm="linf")
        redraw = functools.partial(_move_mass, sides=sides, epsilon=self.epsilon)
        return self._perturbed(task.images, jax.vmap(redraw)(keys, stage, state.adversarial - task.images))

    def _perturbed(self, images: jax.Array, delta: jax.Array) -> jax.Array:
        """Add delta, scaled to the full radius, to the images and clip."""
        moved = images + self.epsilon * ball.direction(delta, norm=self.norm)
        return ball.project(moved, images, epsilon=self.epsilon, norm=self.norm)


def window_sides(height: int, width: int, *, p_init: float, norm: str) -> tuple[int, ...]:
    """Compute the side of the windows at first and after each of `HALVINGS`: sqrt(share * height * width) pixels.

    It is at least 1 for l-inf, odd and at least 3 for l2, and at most the image's.
    """
    largest = min(height, width)
    sides = [round(math.sqrt(p_init / 2**k * height * width)) for k in range(len(HALVINGS) + 1)]
    if norm == "linf":
        return tuple(min(max(side, 1), largest) for side in sides)
    return tuple(min(max(side, 3) // 2 * 2 + 1, (largest - 1) // 2 * 2 + 1) for side in sides)


def stripes(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Draw the l-inf start, a sign for each column and channel -> [H, W, channels]."""
    _, width, channels = shape
    return jnp.broadcast_to(_signs(jax.random.uniform(key, (1, width, channels)), dtype), shape)


def grid_of_windows(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Draw the l2 start, 5 x 5 windows of eta, randomly transposed and signed -> [H, W, channels]."""
    height, width, channels = shape
    side = max(min(height, width) // 5, 1)
    rows, columns = height // side, width // side
    draws = jax.random.uniform(key, (rows, 1, columns, 1, channels + 1))
    transposed, signs = draws[..., :1] < 0.5, _signs(draws[..., 1:], dtype)
    pixels = jnp.arange(side, dtype=jnp.int32)
    window = eta(pixels[:, None], pixels[None, :], side, jnp.array(pyramids(side), dtype))
    grid = jnp.where(transposed, window.T[None, :, None, :, None], window[None, :, None, :, None]) * signs
    grid = grid.reshape(rows * side, columns * side, channels)
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    return jnp.pad(grid, ((top, height - rows * side - top), (left, width - columns * side - left), (0, 0)))


def eta(row: jax.Array, column: jax.Array, side: Any, heights: jax.Array) -> jax.Array:
    """Compute the l2 window [H, W]: a pyramid in the upper half, a negative one in the lower half, of length 1 in all.

    Values outside the window have no meaning.

    Source: section 4.2 of the paper.

    Args:
      row: Pixels from the window's corner. Broadcasts with `column` to [H, W].
      column: See `row`.
      side: Of the window.
      heights: From `pyramids(side)`.
    """
    half = side // 2
    lower = row >= half
    middle = jnp.where(lower, half + (side - half) // 2, half // 2)
    distance = jnp.maximum(jnp.abs(row - middle), jnp.abs(column - half))
    return heights[lower.astype(jnp.int32), jnp.minimum(distance, heights.shape[1] - 1)]


@functools.cache
def pyramids(side: int, pad_to: int = 1) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute eta's upper and lower half at distance m = 0, 1, ... from the half's centre: sum_{j > m} 1 / j^2.

    The distance is the larger of rows and columns. Both halves have the same l2 length, unless one is empty (side 1),
    and together length 1. Zeros pad to `pad_to` values.
    """
    half = side // 2
    heights = [sum(1 / j**2 for j in range(m + 1, half + 2)) for m in range(half + 1)]
    lengths = []
    for rows in (half, side - half):
        distances = (max(abs(i - rows // 2), abs(j - half)) for i in range(rows) for j in range(side))
        lengths.append(math.sqrt(sum(heights[m] ** 2 for m in distances)))
    parts = math.sqrt(sum(length > 0 for length in lengths))
    zeros = (0.0,) * (pad_to - len(heights))
    upper, lower = (tuple(h / (length * parts) if length else 0.0 for h in heights) + zeros for length in lengths)
    return upper, tuple(-h for h in lower)


# A step draws all its random numbers in one call, because XLA takes seconds to compile each call for a CPU.


def _square(key, stage, sides, shape, dtype):
    """Draw a window with one sign for each channel, 0 outside -> [H, W, channels]."""
    draws = jax.random.uniform(key, (2 + shape[2],))
    inside = _window(draws[:2], stage, sides, shape)[0]
    return jnp.where(inside, _signs(draws[2:], dtype), 0)


def _move_mass(key, stage, delta, *, sides, epsilon):
    """Set one window of delta [H, W, channels] to 0, and rebuild another with its mass and what epsilon leaves unused.

    Source: algorithm 3 of the paper.
    """
    channels, dtype = delta.shape[2], delta.dtype
    draws = jax.random.uniform(key, (5 + channels,))
    rebuilt, row, column = _window(draws[:2], stage, sides, delta.shape)
    emptied = _window(draws[2:4], stage, sides, delta.shape)[0]
    transposed = draws[4] < 0.5
    row, column = jnp.where(transposed, column, row), jnp.where(transposed, row, column)  # [H, W] each
    tables = jnp.array([pyramids(side, max(sides)) for side in sides], dtype)  # [stages, 2, distances]
    bump = eta(row, column, jnp.array(sides, jnp.int32)[stage], tables[stage])[..., None]  # [H, W, 1]
    new = jnp.where(rebuilt, bump * _signs(draws[5:], dtype), 0) + _unit(jnp.where(rebuilt, delta, 0))
    unused = jnp.maximum(epsilon**2 - jnp.square(delta).sum(), 0)
    squared = jnp.square(jnp.where(rebuilt | emptied, delta, 0)).sum((0, 1)) + unused / channels  # [channels]
    return jnp.where(rebuilt, _unit(new) * jnp.sqrt(squared), jnp.where(emptied, 0, delta))


def _unit(x):
    """Scale each channel of x [H, W, channels] to length 1; zeros stay."""
    size = jnp.sqrt(jnp.square(x).sum((0, 1)))
    return x / jnp.where(size > 0, size, 1)


def _window(draws, stage, sides, shape):
    """Place a window by two draws: its mask [H, W, 1], and each pixel's row [H, 1] and column [1, W] in the window."""
    height, width, _ = shape
    side = jnp.array(sides, jnp.int32)[stage]
    last = jnp.maximum(jnp.array([height, width], jnp.int32) - side - 1, 0)  # largest corner
    corner = jnp.minimum((draws * (last + 1).astype(draws.dtype)).astype(jnp.int32), last)
    row = jnp.arange(height, dtype=jnp.int32)[:, None] - corner[0]
    column = jnp.arange(width, dtype=jnp.int32)[None, :] - corner[1]
    inside = (row >= 0) & (row < side) & (column >= 0) & (column < side)
    return inside[..., None], row, column


def _signs(draws, dtype):
    return jnp.where(draws < 0.5, -1, 1).astype(dtype)
