"""Vectorized search for flawless annotations in a block of annotations.

A flawless annotation would pass all checks of `AnnotationValidator` without an error or warning. In
a typical file, nearly all annotations are flawless; `AnnotationValidator` checks the rest.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Mapping, Set
from itertools import compress
from typing import NamedTuple

import numpy as np

from vitdet.data.annotation_file import Annotation
from vitdet.data.segmentation import ROUNDING

LARGEST = 2**32  # maximum area in pixels; less than 1e10, the limit of COCO's evaluation
# minimum and maximum ratio of object area to box area, and a tolerance in pixels
LEAST_AREA, MOST_AREA, SPARE_AREA = 0.005, 1.1, 4


class Flawless(NamedTuple):
    """Flawless annotations of a block: ascending indices in the block, and ids."""

    rows: list[int]
    ids: list[int]
    image_ids: list[int]
    category_ids: list[int]


NONE = Flawless([], [], [], [])


def image_table(sizes: Mapping[int, tuple[int, int] | None]) -> np.ndarray:
    """Return sorted image ids, heights, widths (3, N + 1) int64; the last column is a sentinel."""
    known = sorted((image_id, *size) for image_id, size in sizes.items() if size)
    return np.array(list(zip(*known, (2**63 - 1, 0, 0), strict=True)))


def find_flawless(
    block: Iterable[object],
    images: np.ndarray,
    categories: Collection[int],
    lvis: bool,
    seen: Set[int],
) -> Flawless:
    """Find annotations with a known category, a plausible box and area, and matching polygons.

    `images` is the result of `image_table`; `seen` contains the ids of earlier annotations. With
    `lvis`, iscrowd may be missing. Returns `NONE` if an entry is not an `Annotation` or an id is
    repeated.
    """
    no_crowd = (0, None) if lvis else (0,)
    every: list[int] = []  # ids of the block
    rows: list[int] = []
    category_ids: list[int] = []
    ids, image_ids = array("q"), array("q")
    coordinates, numbers, lengths = array("d"), array("d"), array("q")
    for row, item in enumerate(block):
        if type(item) is not Annotation:
            return NONE
        every.append(item.id)
        parts = item.segmentation
        if type(parts) is not list or item.area is None:
            continue
        if item.iscrowd not in no_crowd or item.category_id not in categories:
            continue
        before = len(coordinates)
        try:
            for part in parts:
                if len(part) < 6 or len(part) % 2:
                    del coordinates[before:]
                    break
                coordinates.fromlist(part)
            if len(coordinates) > before:
                lengths.append(len(coordinates) - before)
                numbers.fromlist([*item.bbox, item.area])
                rows.append(row)
                ids.append(item.id)
                image_ids.append(item.image_id)
                category_ids.append(item.category_id)
        except OverflowError:  # a coordinate is too large for a float, or an id for int64
            return NONE
    if not rows or len(set(every)) < len(every) or not seen.isdisjoint(every):
        return NONE
    index = np.searchsorted(images[0], image_ids)
    sizes = np.where(images[0, index] == image_ids, images[1:, index], 0)
    found = _fit(
        np.concatenate([np.frombuffer(numbers).reshape(-1, 5).T, sizes]),
        np.frombuffer(coordinates).reshape(-1, 2).T,
        np.frombuffer(lengths, np.int64) // 2,
    )
    columns, passed = (rows, ids, image_ids, category_ids), found.tolist()
    return Flawless(*(list(compress(column, passed)) for column in columns))


def area_fits(area: float | np.ndarray, pixels: float | np.ndarray) -> bool | np.ndarray:
    """Return whether an area is plausible for an object in a box of area `pixels`."""
    return (pixels * LEAST_AREA <= area) & (area <= MOST_AREA * pixels + SPARE_AREA)


def _fit(numbers: np.ndarray, points: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return whether each box is in its image and matches its area and outline, (N,) bool.

    numbers (7, N) has the rows left, top, width, height, area, image height, image width. points
    (2, P) are the x and y of all outlines, counts (N,) the number of points per outline.
    """
    corner, sides, area, image = numbers[:2], numbers[2:4], numbers[4], numbers[:4:-1]
    starts = np.cumsum(counts) - counts
    low = np.minimum.reduceat(points, starts, axis=1)
    high = np.maximum.reduceat(points, starts, axis=1)
    longer = image.max(0)
    with np.errstate(invalid="ignore", over="ignore"):
        end = corner + sides
        is_box = (sides > 0).all(0) & (sides >= 1).any(0)
        is_inside = (corner >= 0).all(0) & (end <= image).all(0)
        is_area = (area >= 0) & (area <= LARGEST) & area_fits(area, sides[0] * sides[1])
        is_near = (low >= -longer).all(0) & (high <= 2 * longer).all(0) & (high > low).all(0)
        matches = (abs(corner - low) <= ROUNDING).all(0) & (abs(end - high) <= ROUNDING).all(0)
    return is_box & is_inside & is_area & is_near & matches
