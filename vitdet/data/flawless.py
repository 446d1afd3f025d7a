"""Vectorized check of a block of annotations: which have neither errors nor warnings.

In a typical file nearly all have none; `AnnotationValidator` checks the others one by one. A
flawless annotation passes all checks of `AnnotationValidator` without an error or warning.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Mapping, Set
from typing import NamedTuple

import numpy as np

from vitdet.data.annotation_file import Annotation, PolygonAnnotation
from vitdet.data.box_fit import ROUNDING

LARGEST = 2**32  # area in pixels; COCO's evaluation ignores objects above 1e10
# smallest and largest ratio of area to box, and a tolerance in pixels
LEAST_AREA, MOST_AREA, SPARE_AREA = 0.005, 1.1, 4


class ImageSizes:
    """Vectorized lookup of image sizes. sizes: (height, width) by id; None if invalid."""

    def __init__(self, sizes: Mapping[int, tuple[int, int] | None]) -> None:
        known = sorted((image_id, *size) for image_id, size in sizes.items() if size)
        # sentinel row
        table = np.array([*known, (2**63 - 1, 0, 0)], np.int64)
        self._ids, self._sides = table[:, 0].copy(), table[:, 1:].T.astype(np.float64)

    def of(self, image_ids: np.ndarray) -> np.ndarray:
        """Return heights and widths (2, N) for ids (N,) int64; 0 for unknown images."""
        place = np.searchsorted(self._ids, image_ids)
        return np.where(self._ids[place] == image_ids, self._sides[:, place], 0)


class Flawless(NamedTuple):
    """Flawless annotations: their ascending positions in the block and their ids."""

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
    """Find annotations with polygons inside their image, matching area and box, and known category.

    lvis: iscrowd may be missing. seen: ids of earlier annotations. Finds none if an entry of the
    block is not an `Annotation`, or an id is repeated or exceeds 64 bits."""
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
    """Return whether an area is plausible for an object in a box of `pixels`."""
    return (pixels * LEAST_AREA <= area) & (area <= MOST_AREA * pixels + SPARE_AREA)


def _fit(numbers: np.ndarray, points: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return (N,) bool: box, area and outline match each other and are inside the image.

    numbers (7, N): left, top, width, height, area, image height, image width; points (2, P): x and
    y of all outlines; counts (N,): points per outline."""
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
