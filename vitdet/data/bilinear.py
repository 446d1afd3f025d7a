"""Bilinear resize without antialiasing, bit-exact to OpenCV's INTER_LINEAR on 8-bit images (mmdet).

Four neighbours per output pixel at any scale, half-pixel centres, border replication. Arithmetic of
OpenCV: 11-bit weights, columns first, then rows with products truncated to 16 bits.
"""

from __future__ import annotations

import numpy as np

ONE = 1 << 11  # a weight of 1
BLOCK = 16  # rows per block, to fit in the cache


def resize_bilinear(
    image: np.ndarray,
    scaled: tuple[int, int],
    offset: tuple[int, int] = (0, 0),
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Resize an image (H, W, 3) uint8 to `scaled` (height, width) and crop it.

    The crop of (height, width) `size` at `offset` (top, left) is the only part computed; None: all.
    """
    height, width = size or scaled
    top, bottom, down = _neighbours(image.shape[0], scaled[0], offset[0], height)
    left, right, along = _neighbours(image.shape[1], scaled[1], offset[1], width)
    first = top.min()
    rows = image[first : bottom.max() + 1]
    columns = rows[:, left] * (ONE - along)[:, None]
    columns += rows[:, right] * along[:, None]
    columns >>= 4
    seen = np.empty((height, width, 3), np.uint8)
    for start in range(0, height, BLOCK):
        block = slice(start, start + BLOCK)
        weight = down[block, None, None]
        above, below = columns[top[block] - first], columns[bottom[block] - first]
        above *= ONE - weight
        above >>= 16
        below *= weight
        below >>= 16
        above += below
        above += 2
        above >>= 2
        seen[block] = above
    return seen


def _neighbours(
    source: int, scaled: int, start: int, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For output pixels start..start+count-1 of an axis, return both neighbours (count,) and the
    int32 weight of the second one.
    """
    place = ((np.arange(start, start + count) + 0.5) * (source / scaled) - 0.5).astype(np.float32)
    low = np.floor(place)
    weight = np.rint((place - low) * np.float32(ONE)).astype(np.int32)
    low = low.astype(np.int64)
    return low.clip(0, source - 1), (low + 1).clip(0, source - 1), weight
