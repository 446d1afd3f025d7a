"""Which annotations of a block have no fault at all.

Nearly all annotations of a usual file are such. `AnnotationValidator` looks at each of the others by itself; what is
flawless here passes all of its checks without a word. Objects are dropped as soon as their numbers are in a few arrays:
what thousands of them hold would not fit in the processor's cache.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Mapping, Set
from typing import NamedTuple

import numpy as np

from vitdet.data.annotation_file import Annotation, PolygonAnnotation
from vitdet.data.box_fit import ROUNDING

LARGEST = 2**32  # pixels of an area; beyond 1e10 COCO's evaluation would pass over the object
# least and largest share of its box, and some pixels for the smallest
LEAST_AREA, MOST_AREA, SPARE_AREA = 0.005, 1.1, 4


class ImageSizes:
    """Height and width of each image by id, to look up those of many annotations at once.

    sizes: (height, width) by id; None where the file has no usable one.
    """

    def __init__(self, sizes: Mapping[int, tuple[int, int] | None]) -> None:
        known = sorted((image_id, *size) for image_id, size in sizes.items() if size)
        # a last row that no annotation refers to
        table = np.array([*known, (2**63 - 1, 0, 0)], np.int64)
        self._ids, self._sides = table[:, 0].copy(), table[:, 1:].T.astype(np.float64)

    def of(self, image_ids: np.ndarray) -> np.ndarray:
        """(2, N) heights and widths for the ids (N,) int64; 0, in which no box fits, for an unknown image."""
        place = np.searchsorted(self._ids, image_ids)
        return np.where(self._ids[place] == image_ids, self._sides[:, place], 0)


class Flawless(NamedTuple):
    """rows: places in the block, rising; ids, image_ids, category_ids: of these annotations."""

    rows: list[int]
    ids: list[int]
    image_ids: list[int]
    category_ids: list[int]


NONE = Flawless([], [], [], [])


def find_flawless(
    block: Iterable[object],
    images: ImageSizes,
    categories: Collection[int],
    lvis: bool,
    seen: Set[int],
) -> Flawless:
    """The objects with polygons, in their image, with area and box that fit these, in a known category.

    lvis: iscrowd may be missing. seen: ids of annotations before. None are found if something in the block is not an
    `Annotation`, or if an id is repeated or exceeds 64 bits.
    """
    no_crowd = (0, None) if lvis else (0,)
    every: list[int] = []  # ids of the block
    chosen = Flawless([], [], [], [])
    rows, ids, image_ids, category_ids = chosen
    numbers, coordinates, lengths = array("d"), array("d"), array("q")
    for row, one in enumerate(block):
        if not isinstance(one, Annotation):
            return NONE
        every.append(one.id)
        if type(one) is not PolygonAnnotation or one.area is None or not one.segmentation:
            continue
        if one.iscrowd not in no_crowd or one.category_id not in categories:
            continue
        before = len(coordinates)
        for part in one.segmentation:
            if len(part) < 6 or len(part) % 2:
                del coordinates[before:]
                break
            coordinates.fromlist(part)
        else:
            lengths.append(len(coordinates) - before)
            numbers.extend(one.bbox)
            numbers.append(one.area)
            rows.append(row)
            ids.append(one.id)
            image_ids.append(one.image_id)
            category_ids.append(one.category_id)
    if not rows or len(set(every)) < len(every) or not seen.isdisjoint(every):
        return NONE
    try:
        _, owners = np.array([ids, image_ids], np.int64)
    except OverflowError:
        return NONE
    found = _fit(
        np.concatenate([np.frombuffer(numbers).reshape(-1, 5).T, images.of(owners)]),
        np.frombuffer(coordinates).reshape(-1, 2).T,
        np.frombuffer(lengths, np.int64) // 2,
    )
    if found.all():
        return chosen
    places = np.flatnonzero(found).tolist()
    return Flawless(*([column[place] for place in places] for column in chosen))


def area_fits(area: float | np.ndarray, pixels: float | np.ndarray) -> bool | np.ndarray:
    """Whether an area can be that of an object in a box of so many pixels."""
    return (pixels * LEAST_AREA <= area) & (area <= MOST_AREA * pixels + SPARE_AREA)


def _fit(numbers: np.ndarray, points: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(N,) bool: box, area and outline of an object fit each other and their image.

    numbers (7, N): left, top, width, height, area, height and width of the image; points (2, P) x and y of all
    outlines, counts (N,) of each.
    """
    x, y, width, height, area, rows, columns = numbers
    starts = np.cumsum(counts) - counts
    x0, y0 = np.minimum.reduceat(points, starts, axis=1)
    x1, y1 = np.maximum.reduceat(points, starts, axis=1)
    side = np.maximum(rows, columns)
    with np.errstate(invalid="ignore", over="ignore"):
        right, low, pixels = x + width, y + height, width * height
        return (
            (width > 0)
            & (height > 0)
            & ((width >= 1) | (height >= 1))
            & (x >= 0)
            & (y >= 0)
            & (right <= columns)
            & (low <= rows)
            & (area >= 0)
            & (area <= LARGEST)
            & area_fits(area, pixels)
            & (np.minimum(x0, y0) >= -side)
            & (np.maximum(x1, y1) <= 2 * side)
            & (x1 > x0)
            & (y1 > y0)
            & (np.abs(x - x0) <= ROUNDING)
            & (np.abs(y - y0) <= ROUNDING)
            & (np.abs(right - x1) <= ROUNDING)
            & (np.abs(low - y1) <= ROUNDING)
        )
