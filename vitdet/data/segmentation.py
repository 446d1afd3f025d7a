"""Validation of an annotation's outline, and comparison of the box around the outline with `bbox`.

COCO's formats are polygons (a list of flat x, y lists) and run lengths (RLE). As in Detectron2 and
mmdet, parts of fewer than 3 points or odd length are ignored. If no part remains, the object has no
outline. Detectron2's ViTDet trains on the box around the visible outline; COCO's evaluation uses
`bbox`. If they differ by more than the tolerances, training uses `bbox` (`Validated.own_box`).
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from pycocotools import mask as rle

# tolerance of each side of a box: pixels, plus a fraction of the side length
ROUNDING, SHARE = 1.5, 0.05
LEAST_IOU = 0.5  # below this IoU, outline and box are assumed to belong to different objects

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels
Fit = Literal["fits", "differs", "elsewhere", "empty"]
show = reprlib.repr  # abbreviates values in messages


class Outline(NamedTuple):
    """A validated segmentation.

    Attributes:
        shape: usable polygons or RLE, or None.
        left_out: number of ignored parts (fewer than 3 points or an odd length).
        box: box around the outline; None if not computed, or for an empty or invalid outline.
        problem: (kind, text) of an error, or None.
    """

    shape: list | dict | None
    left_out: int = 0
    box: Box | None = None
    problem: tuple[str, str] | None = None


def read_outline(segmentation: object, size: tuple[int, int] | None, boxed: bool = True) -> Outline:
    """Validate a segmentation.

    `size` is (height, width) of the image, None if unknown. `boxed` states whether to compute the
    box around an RLE, which is slow.
    """
    if segmentation is None:
        return Outline(None)
    if isinstance(segmentation, dict):
        return _read_rle(segmentation, size, boxed)
    if not isinstance(segmentation, list):
        return _problem("segmentation that is neither polygons nor RLE", show(segmentation))
    shape = []
    low_x = low_y = math.inf
    high_x = high_y = -math.inf
    for part in segmentation:
        if type(part) is not list:
            return _problem("polygon that is not a list [x, y, x, y, ...]", show(part))
        if (len(part) < 6 or len(part) % 2) and list not in map(type, part):
            continue
        try:
            finite = math.isfinite(sum(part))
            x, y = part[0::2], part[1::2]
            low_x, high_x = min(low_x, min(x)), max(high_x, max(x))
            low_y, high_y = min(low_y, min(y)), max(high_y, max(y))
        except (TypeError, OverflowError):  # e.g. text, None, or a number too large for a float
            finite = False
        if not finite:
            return _problem("polygon with coordinates that are not finite numbers", show(part))
        shape.append(part)
    left_out = len(segmentation) - len(shape)
    if not shape:
        return Outline(None, left_out)
    box = low_x, low_y, high_x, high_y
    # pycocotools would rasterize all of a huge polygon; `inside` is checked first for speed
    if size is not None and not inside(box, size) and reaches_far(box, size):
        text = f"{show(box)} on {size[1]} x {size[0]} pixels"
        return _problem("polygon far outside its image", text)
    return Outline(shape, left_out, box)


def _problem(kind: str, text: str) -> Outline:
    return Outline(None, problem=(kind, text))


def inside(box: Box, size: tuple[int, int]) -> bool:
    """Return whether a box is inside an image of (height, width) `size`."""
    x0, y0, x1, y1 = box
    return 0 <= x0 <= x1 <= size[1] and 0 <= y0 <= y1 <= size[0]


def reaches_far(coordinates: Sequence[float], size: tuple[int, int]) -> bool:
    """Return whether a coordinate is below -L or above 2 L, where L is the image's longer side."""
    side = max(size)
    return min(coordinates) < -side or max(coordinates) > 2 * side


def fit(bbox: Sequence[float], outline: Box | None, size: tuple[int, int]) -> Fit:
    """Compare a `bbox` (left, top, width, height) with the box around its outline.

    `size` is (height, width) of the image. Returns "fits" for a box within the tolerances, "empty"
    for an outline without area in the image, "elsewhere" for an IoU < LEAST_IOU, else "differs".
    """
    if outline is None:
        return "empty"
    x, y, width, height = bbox
    box = x, y, x + width, y + height
    if _area(outline) > 0 and _near(box, outline, (ROUNDING, ROUNDING)):
        return "fits"
    image = 0.0, 0.0, size[1], size[0]
    seen, box = _common(outline, image), _common(box, image)
    if seen[0] >= seen[2] or seen[1] >= seen[3]:
        return "empty"
    if _near(box, seen, (ROUNDING + SHARE * width, ROUNDING + SHARE * height)):
        return "fits"
    return "differs" if _iou(box, seen) >= LEAST_IOU else "elsewhere"


def are_corners(bbox: Sequence[float], outline: Box) -> bool:
    """Return whether a `bbox` fits its outline if interpreted as x0, y0, x1, y1."""
    x0, y0, x1, y1 = bbox
    return _iou((x0, y0, x1, y1), outline) >= LEAST_IOU


def _near(first: Box, second: Box, limits: tuple[float, float]) -> bool:
    return all(abs(a - b) <= limit for a, b, limit in zip(first, second, limits * 2, strict=True))


def _common(first: Box, second: Box) -> Box:
    (a0, b0, a1, b1), (c0, d0, c1, d1) = first, second
    return max(a0, c0), max(b0, d0), min(a1, c1), min(b1, d1)


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def _iou(first: Box, second: Box) -> float:
    shared = _area(_common(first, second))
    return shared / (_area(first) + _area(second) - shared) if shared else 0.0


def compressed(shape: list | dict, height: int, width: int) -> dict:
    """Convert usable polygons or a usable RLE to pycocotools' RLE, with counts of type bytes."""
    if isinstance(shape, list):
        return rle.merge(rle.frPyObjects(shape, height, width))
    counts = shape["counts"]
    if isinstance(counts, list):
        return rle.frPyObjects(shape, height, width)
    return {"size": shape["size"], "counts": counts.encode() if isinstance(counts, str) else counts}


def pixel_count(shape: list | dict, height: int, width: int) -> int:
    """Return the number of pixels of a usable outline, rasterized by pycocotools."""
    return int(rle.area(compressed(shape, height, width)))


def whole_number(value: object) -> int | None:
    """Convert a whole number, e.g. 96, 96.0 or "96", to int; return None for other values."""
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isascii() and value.removeprefix("-").isdecimal():
        return int(value) if len(value) < 20 else None
    return None


def _read_rle(code: dict, size: tuple[int, int] | None, boxed: bool) -> Outline:
    shape, counts = code.get("size"), code.get("counts")
    sides = [whole_number(side) or 0 for side in shape] if isinstance(shape, list) else []
    if len(sides) != 2 or min(sides) <= 0:
        return _problem("RLE without size [height, width]", show(shape))
    height, width = sides
    if size is not None and (height, width) != size:
        text = f"{shape} instead of {list(size)} (height, width)"
        return _problem("RLE whose size differs from the image size", text)
    runs = run_lengths(counts)
    if runs is None:
        return _problem("RLE whose counts are not run lengths", show(counts))
    if sum(runs) != height * width:
        text = f"{sum(runs)} instead of {height * width} pixels"
        return _problem("RLE whose counts do not add up to its size", text)
    whole = {"size": sides, "counts": runs if isinstance(counts, list) else counts}
    if size is None or not boxed:  # an RLE of unknown image size may be too large to decode
        return Outline(whole)
    x, y, wide, high = rle.toBbox(compressed(whole, height, width)).tolist()
    return Outline(whole, box=(x, y, x + wide, y + high) if wide and high else None)


def run_lengths(counts: object) -> list[int] | None:
    """Return the run lengths of an RLE's counts (list or compressed text); None if invalid.

    Compressed text has 5 bits per character; run k > 2 (0-based) is stored relative to run k - 2.
    """
    if isinstance(counts, list):
        types = set(map(type, counts))
        if float in types:
            return run_lengths([whole_number(run) if type(run) is float else run for run in counts])
        return counts if types <= {int} and min(counts, default=0) >= 0 else None
    if not isinstance(counts, str) or not counts.isascii():
        return None
    codes = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    last = (codes & 32) == 0
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or not last[-1]:
        return None
    ends = np.flatnonzero(last)
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends - starts + 1
    if lengths.max() > 7:  # more than 35 bits
        return None
    digit = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * digit), starts)
    runs -= np.where(codes[ends] & 16, np.int64(1) << (5 * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs.tolist() if runs.min() >= 0 else None
