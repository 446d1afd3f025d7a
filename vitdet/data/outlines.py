"""Between outlines and pixels: fill a polygon, trace the polygons of a bitmap.

A pixel (row i, column j) is the square from (j, i) to (j + 1, i + 1); it is inside where its centre is (even-odd rule).
Tracing walks along the cracks between inside and outside and joins their midpoints, so that a slanted staircase becomes
a slanted line; then Douglas-Peucker drops the points that lie within a tolerance of the chord.
Letters: V vertices, P points, E cracks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def fill(vertices: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels (height, width) bool inside the polygon vertices (V, 2) xy; what lies outside the frame is cut off."""
    x0, y0 = vertices.T
    x1, y1 = following(vertices).T
    centres = np.arange(height)[:, None] + 0.5
    row, edge = np.nonzero((y0 <= centres) != (y1 <= centres))
    x = x0[edge] + (row + 0.5 - y0[edge]) * (x1[edge] - x0[edge]) / (y1[edge] - y0[edge])
    column = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
    flips = np.bincount(row * (width + 1) + column, minlength=height * (width + 1)).reshape(
        height, width + 1
    )
    return (np.cumsum(flips, axis=1)[:, :width] & 1).astype(bool)


def trace(bitmaps: Sequence[np.ndarray], tolerance: float) -> list[list[np.ndarray]]:
    """For each bitmap (H, W) bool the outer outlines (V, 2) xy of its 4-connected parts, clockwise on the screen.

    Holes are filled, as in polygons drawn by people. No pixels, no outlines. tolerance: pixels.
    """
    loops = [[loop for loop in _crack_loops(bitmap) if signed_area(loop) > 0] for bitmap in bitmaps]
    outlines = iter(_simplify([loop for parts in loops for loop in parts], tolerance))
    return [[next(outlines) for _ in parts] for parts in loops]


def signed_area(points: np.ndarray) -> float:
    """The area of the polygon points (P, 2) xy; negative where it runs counterclockwise on the screen."""
    ahead = following(points)
    return 0.5 * float(points[:, 0] @ ahead[:, 1] - points[:, 1] @ ahead[:, 0])


def following(points: np.ndarray) -> np.ndarray:
    """The successor of each point of a closed line (P, 2)."""
    return np.concatenate([points[1:], points[:1]])


def _crack_loops(bitmap: np.ndarray) -> list[np.ndarray]:
    """Closed loops of crack midpoints (E, 2), the inside on the right hand; holes run the other way round."""
    inside = np.pad(bitmap, 1)
    core = inside[1:-1, 1:-1]
    pitch = bitmap.shape[1] + 1  # grid corners a row
    # Directions 0..3: right along the top of a pixel, down its right side, left along its bottom, up its left side.
    neighbours = (inside[:-2, 1:-1], inside[1:-1, 2:], inside[2:, 1:-1], inside[1:-1, :-2])
    starts, ends, midpoints, directions = [], [], [], []
    # (row, column) offsets: where the crack of each direction starts
    corners = ((0, 0), (0, 1), (1, 1), (1, 0))
    for side, neighbour in enumerate(neighbours):
        row, column = np.nonzero(core & ~neighbour)
        (r0, c0), (r1, c1) = corners[side], corners[(side + 1) % 4]
        starts.append((row + r0) * pitch + column + c0)
        ends.append((row + r1) * pitch + column + c1)
        midpoints.append(np.stack([column + (c0 + c1) / 2, row + (r0 + r1) / 2], axis=1))
        directions.append(np.full(len(row), side))
    start, end, direction = np.concatenate(starts), np.concatenate(ends), np.concatenate(directions)
    midpoint = np.concatenate(midpoints)
    crack_at = np.full((bitmap.shape[0] + 1) * pitch * 4, -1)
    crack_at[start * 4 + direction] = np.arange(len(start))
    # a right turn first: pixels that touch at a corner stay apart
    follower = crack_at[end * 4 + (direction + 1) % 4]
    for turn in (0, 3):
        follower = np.where(follower < 0, crack_at[end * 4 + (direction + turn) % 4], follower)
    successors = follower.tolist()
    loops, seen = [], bytearray(len(successors))
    for first in range(len(successors)):
        if seen[first]:
            continue
        loop, crack = [], first
        while not seen[crack]:
            seen[crack] = 1
            loop.append(crack)
            crack = successors[crack]
        loops.append(midpoint[loop])
    return loops


def _simplify(loops: list[np.ndarray], tolerance: float) -> list[np.ndarray]:
    """Douglas-Peucker on all loops at once: every round adds to each chord the point that is farthest from it."""
    if not loops:
        return []
    lengths = np.array([len(loop) + 1 for loop in loops])
    last = np.cumsum(lengths) - 1
    first = last - lengths + 1
    points = np.concatenate([part for loop in loops for part in (loop, loop[:1])])
    keep = np.zeros(len(points), dtype=bool)
    keep[first] = keep[last] = True
    while True:
        knots = np.flatnonzero(keep)
        chord = np.diff(points[knots], axis=0, append=points[knots[-1:]])
        segment = np.cumsum(keep) - 1
        offset, along = points - points[knots[segment]], chord[segment]
        # exact where the root is, unlike some hypot: ties fall alike
        length = np.sqrt((along * along).sum(axis=1))
        away = np.abs(offset[:, 0] * along[:, 1] - offset[:, 1] * along[:, 0]) / np.maximum(
            length, 1e-9
        )
        # the chord of a whole loop
        away = np.where(length == 0, np.sqrt((offset * offset).sum(axis=1)), away)
        farthest = np.maximum.reduceat(away, knots)
        candidates = np.flatnonzero((away == farthest[segment]) & (away > tolerance))
        if not len(candidates):
            break
        owner = segment[candidates]
        keep[candidates[np.append(True, owner[1:] != owner[:-1])]] = True
    keep[last] = False
    return [points[a : b + 1][keep[a : b + 1]] for a, b in zip(first, last, strict=True)]
