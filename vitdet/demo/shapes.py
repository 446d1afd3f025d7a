"""Building blocks of the tiny data set's scenes: random numbers, colors, silhouettes, textures.

Notation: V vertices.
"""

from __future__ import annotations

import math

import numpy as np

SQUARE = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
TEXTURES = ("rings", "checks", "dots", "stripes", "blotches", "zigzag")
Color = tuple[float, float, float]


class Dice:
    """Random numbers from `Generator.random`, whose stream NumPy is least likely to change."""

    def __init__(self, seed: int, index: int) -> None:
        bits = np.random.PCG64(np.random.SeedSequence([seed, index]))
        self._generator = np.random.Generator(bits)

    def numbers(self, shape: int | tuple[int, int]) -> np.ndarray:
        """Return independent uniform numbers in [0, 1)."""
        return self._generator.random(shape)

    def uniform(self, low: float, high: float) -> float:
        """Return a uniformly distributed number from low to high."""
        return low + (high - low) * float(self.numbers(1)[0])

    def integer(self, low: int, high: int) -> int:
        """Return a random integer from low to high - 1."""
        return low + int(self.uniform(0, high - low))

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return self.uniform(0, 1) < probability


def random_color(dice: Dice, others: list[Color], apart: float, at_most: float = math.inf) -> Color:
    """Return a random RGB color whose distance from each of `others` is `apart` to `at_most`."""
    while True:
        color = tuple((20 + 225 * dice.numbers(3)).tolist())
        if all(apart <= math.dist(color, other) <= at_most for other in others):
            return color


def silhouette(kind: int, dice: Dice) -> np.ndarray:
    """Return a class's upright silhouette (V, 2) around the origin, of arbitrary size."""
    if kind == 0:  # disc
        angle = np.arange(28) * (2 * math.pi / 28)
        return np.stack([np.cos(angle), np.sin(angle) * dice.uniform(0.6, 1)], axis=1)
    if kind == 1:  # triangle
        angle = np.arange(3) * (2 * math.pi / 3)
        return np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.3 * (dice.numbers((3, 2)) - 0.5)
    if kind == 2:  # bar
        return SQUARE * [1, dice.uniform(0.4, 0.9)]
    if kind == 3:  # star
        angle = np.arange(10) * (2 * math.pi / 10)
        radius = np.array([1, dice.uniform(0.4, 0.5)] * 5)
        return np.stack([np.cos(angle) * radius, np.sin(angle) * radius], axis=1)
    if kind == 4:  # crescent: most of a circle, closed by half of an ellipse
        tip, depth = dice.uniform(0.7, 1.1), dice.uniform(0.25, 0.45)
        outer = tip + np.arange(21) / 20 * (2 * math.pi - 2 * tip)
        inner = (0.5 - np.arange(1, 14) / 14) * -math.pi
        x = math.cos(tip) - (math.cos(tip) + depth) * np.cos(inner)
        y = math.sin(tip) * np.sin(inner)
        return np.stack([np.append(np.cos(outer), x), np.append(np.sin(outer), y)], axis=1)
    arm = dice.uniform(0.28, 0.4)  # cross
    quarter = np.array([[arm, arm], [arm, 1], [-arm, 1]])
    turns = [quarter, quarter[:, ::-1] * [-1, 1], -quarter, quarter[:, ::-1] * [1, -1]]
    return np.concatenate(turns)


def placed(outline: np.ndarray, side: float, dice: Dice) -> np.ndarray:
    """Squeeze, bend and rotate a silhouette (V, 2) at random.

    The bounding box of the result has the given longer side and is centered at the origin.
    """
    squeezed = outline * [1, dice.uniform(0.8, 1)]
    outline = squeezed + 0.05 * (dice.numbers(2) - 0.5) * outline[:, ::-1] ** 2
    angle = dice.uniform(0, 2 * math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    outline = outline @ np.array([[cos, sin], [-sin, cos]])
    low, high = outline.min(axis=0), outline.max(axis=0)
    return (outline - (low + high) / 2) * (side / float((high - low).max()))


def texture(name: str, height: int, width: int, period: float, dice: Dice) -> np.ndarray:
    """Return a random binary pattern (height, width) bool; `period` is in pixels."""
    angle, shift = dice.uniform(0, 2 * math.pi), dice.numbers(2)
    y, x = np.arange(height)[:, None] - height / 2, np.arange(width) - width / 2
    u = (x * math.cos(angle) + y * math.sin(angle)) / period + shift[0]
    if name == "stripes":
        return _fraction(u) < 0.5
    if name == "rings":
        x, y = x + period * (shift[0] - 0.5), y + period * (shift[1] - 0.5)
        return _fraction(np.sqrt(x * x + y * y) / period) < 0.5
    v = (y * math.cos(angle) - x * math.sin(angle)) / period + shift[1]
    if name == "checks":
        return (_fraction(u) < 0.5) ^ (_fraction(v) < 0.5)
    if name == "dots":
        return (_fraction(u) - 0.5) ** 2 + (_fraction(v) - 0.5) ** 2 < 0.1
    if name == "zigzag":
        return _fraction(u + np.abs(_fraction(0.7 * v) - 0.5)) < 0.5
    # blotches: interpolated noise
    heights = dice.numbers((int(height / period) + 3, int(width / period) + 3))
    rows, columns = np.arange(height) / period + shift[0], np.arange(width) / period + shift[1]
    return _smooth(heights, rows, columns) < 0.5


def _fraction(values: np.ndarray) -> np.ndarray:
    return values - np.floor(values)


def _smooth(heights: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    i, j = rows.astype(np.int64), columns.astype(np.int64)
    a, b = ((at % 1) ** 2 * (3 - 2 * (at % 1)) for at in (rows, columns))
    across = heights[:, j] * (1 - b) + heights[:, j + 1] * b
    return across[i] * (1 - a[:, None]) + across[i + 1] * a[:, None]
