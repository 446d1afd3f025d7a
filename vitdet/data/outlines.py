"""Rasterization of polygons and polygonization of bitmaps.

Pixel (row i, column j) is the square from (j, i) to (j + 1, i + 1). A pixel is inside a polygon
if its center is inside (even-odd rule). Tracing follows the cracks between inside and outside
pixels and joins their midpoints, so that a staircase becomes a line, which is then simplified.
Notation: V vertices, P points, E cracks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def fill(vertices: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return a mask (height, width) bool of the pixels inside a polygon with vertices (V, 2) xy."""
    x0, y0 = vertices.T
    x1, y1 = following(vertices).T
    centers = np.arange(height)[:, None] + 0.5
    row, edge = np.nonzero((y0 <= centers) != (y1 <= centers))
    x = x0[edge] + (row + 0.5 - y0[edge]) * (x1[edge] - x0[edge]) / (y1[edge] - y0[edge])
    column = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
    flips = np.bincount(row * (width + 1) + column, minlength=height * (width + 1))
    return (np.cumsum(flips.reshape(height, width + 1), axis=1)[:, :width] & 1).astype(bool)


def trace(bitmaps: Sequence[np.ndarray], tolerance: float) -> list[list[np.ndarray]]:
    """Return the outer outlines (V, 2) xy of the 4-connected parts of each bitmap (H, W) bool.

    Outlines are clockwise on the screen; holes are filled. Lines are simplified with a
    maximum deviation of `tolerance` pixels.
    """
    loops = [[loop for loop in _crack_loops(bitmap) if signed_area(loop) > 0] for bitmap in bitmaps]
    outlines = iter(_simplify([loop for parts in loops for loop in parts], tolerance))
    return [[next(outlines) for _ in parts] for parts in loops]


def signed_area(points: np.ndarray) -> float:
    """Return the area of the polygon (P, 2) xy; negative if counterclockwise on the screen."""
    ahead = following(points)
    return 0.5 * float(points[:, 0] @ ahead[:, 1] - points[:, 1] @ ahead[:, 0])


def following(points: np.ndarray) -> np.ndarray:
    """Return the successor of each point of a closed polyline (P, 2)."""
    return np.concatenate([points[1:], points[:1]])


def _crack_loops(bitmap: np.ndarray) -> list[np.ndarray]:
    """Return closed loops of crack midpoints (E, 2), clockwise, or counterclockwise for holes."""
    inside = np.pad(bitmap, 1)
    core = inside[1:-1, 1:-1]
    pitch = bitmap.shape[1] + 1  # grid corners per row
    # directions along a pixel's sides: 0 right (top), 1 down (right), 2 left (bottom), 3 up (left)
    neighbors = (inside[:-2, 1:-1], inside[1:-1, 2:], inside[2:, 1:-1], inside[1:-1, :-2])
    starts, ends, midpoints, directions = [], [], [], []
    # (row, column) offset of the start of a crack in each direction
    corners = ((0, 0), (0, 1), (1, 1), (1, 0))
    for side, neighbor in enumerate(neighbors):
        row, column = np.nonzero(core & ~neighbor)
        (r0, c0), (r1, c1) = corners[side], corners[(side + 1) % 4]
        starts.append((row + r0) * pitch + column + c0)
        ends.append((row + r1) * pitch + column + c1)
        midpoints.append(np.stack([column + (c0 + c1) / 2, row + (r0 + r1) / 2], axis=1))
        directions.append(np.full(len(row), side))
    start, end, direction = np.concatenate(starts), np.concatenate(ends), np.concatenate(directions)
    midpoint = np.concatenate(midpoints)
    crack_at = np.full((bitmap.shape[0] + 1) * pitch * 4, -1)
    crack_at[start * 4 + direction] = np.arange(len(start))
    # prefer right turns, to separate pixels that touch only at a corner
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
    """Simplify loops (Douglas-Peucker): each round keeps the farthest point of every chord."""
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
        # unlike hypot, sqrt is correctly rounded, so that ties do not depend on the machine
        length = np.sqrt((along * along).sum(axis=1))
        away = np.abs(offset[:, 0] * along[:, 1] - offset[:, 1] * along[:, 0]) / np.maximum(
            length, 1e-9
        )
        # the chord of a closed loop has length 0
        away = np.where(length == 0, np.sqrt((offset * offset).sum(axis=1)), away)
        farthest = np.maximum.reduceat(away, knots)
        candidates = np.flatnonzero((away == farthest[segment]) & (away > tolerance))
        if not len(candidates):
            break
        owner = segment[candidates]
        keep[candidates[np.append(True, owner[1:] != owner[:-1])]] = True
    keep[last] = False
    return [points[a : b + 1][keep[a : b + 1]] for a, b in zip(first, last, strict=True)]
