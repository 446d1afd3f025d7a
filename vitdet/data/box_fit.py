"""Comparison of an annotation's box with its outline.

Detectron2 trains on the box around the visible outline, COCO's evaluation uses `bbox`: if the two
differ, training and evaluation use different boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from vitdet.data.segmentation import Box

# Tolerance of each side of a fitting box: pixels, plus a share of the box's side
ROUNDING, SHARE = 1.5, 0.05
# Below this IoU, the outline belongs to another object or uses other coordinates.
LEAST_IOU = 0.5

Fit = Literal["fits", "differs", "elsewhere", "empty"]


def fit(bbox: Sequence[float], outline: Box | None, size: tuple[int, int]) -> Fit:
    """Compare a `bbox` (left, top, width, height) with the box around its outline.

    size: (height, width) of the image. Returns "empty" if the outline is outside the image,
    "elsewhere" if the IoU is below LEAST_IOU.
    """
    if outline is None:
        return "empty"
    x, y, width, height = bbox
    x0, y0, x1, y1 = outline
    if (  # nearly all objects
        x1 > x0
        and y1 > y0
        and -ROUNDING <= x - x0 <= ROUNDING
        and -ROUNDING <= y - y0 <= ROUNDING
        and -ROUNDING <= x + width - x1 <= ROUNDING
        and -ROUNDING <= y + height - y1 <= ROUNDING
    ):
        return "fits"
    seen, box = _inside(outline, size), _inside((x, y, x + width, y + height), size)
    if seen[0] >= seen[2] or seen[1] >= seen[3]:
        return "empty"
    rooms = (ROUNDING + SHARE * width, ROUNDING + SHARE * height) * 2
    if all(abs(a - b) <= room for a, b, room in zip(box, seen, rooms, strict=True)):
        return "fits"
    return "differs" if _iou(box, seen) >= LEAST_IOU else "elsewhere"


def are_corners(bbox: Sequence[float], outline: Box) -> bool:
    """Return whether a `bbox` that does not fit would fit if read as x0, y0, x1, y1."""
    x0, y0, x1, y1 = bbox
    return _iou((x0, y0, x1, y1), outline) >= LEAST_IOU


def _inside(box: Box, size: tuple[int, int]) -> Box:
    height, width = size
    return max(box[0], 0.0), max(box[1], 0.0), min(box[2], width), min(box[3], height)


def _iou(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return shared / (sum(areas) - shared) if shared else 0.0
