"""Validation of an annotation's segmentation, and the box around it.

COCO's formats are polygons (a list of flat x, y lists) and run lengths (RLE). As in Detectron2 and
mmdet, parts of fewer than 3 points are ignored; an object without other parts has no outline.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels
show = reprlib.repr  # any value, abbreviated, for messages


class Outline(NamedTuple):
    """A validated segmentation.

    shape: usable polygons or RLE, or None. left_out: number of parts of fewer than 3 points. box:
    around the outline; None if it is empty or invalid. problem: (kind, text) of an error, or None.
    """

    shape: list | dict | None
    left_out: int = 0
    box: Box | None = None
    problem: tuple[str, str] | None = None


def read_outline(segmentation: object, size: tuple[int, int] | None, boxed: bool = True) -> Outline:
    """Validate a segmentation. size: (height, width) of the image, None if unknown.

    boxed: compute the box around an RLE, which takes most of the time.
    """
    if segmentation is None:
        return Outline(None)
    if isinstance(segmentation, dict):
        return _read_rle(segmentation, size, boxed)
    if not isinstance(segmentation, list):
        problem = "segmentation that is neither polygons nor RLE", show(segmentation)
        return Outline(None, problem=problem)
    low_x = low_y = math.inf
    high_x = high_y = -math.inf
    left_out = 0
    for part in segmentation:
        if type(part) is not list:
            problem = "polygon that is not a list x, y, x, y, ...", show(part)
            return Outline(None, problem=problem)
        if len(part) < 6 or len(part) % 2:
            left_out += 1
            continue
        try:
            finite = math.isfinite(sum(part))
            x, y = part[0::2], part[1::2]
            low_x, high_x = min(low_x, min(x)), max(high_x, max(x))
            low_y, high_y = min(low_y, min(y)), max(high_y, max(y))
        except (TypeError, OverflowError):  # text, lists, nothing, or beyond any float
            finite = False
        if not finite:
            problem = "polygon with coordinates that are not finite numbers", show(part)
            return Outline(None, problem=problem)
    if left_out == len(segmentation):
        return Outline(None, left_out)
    box = low_x, low_y, high_x, high_y
    # pycocotools rasterizes all of it; the first comparison is for speed
    if size is not None and not inside(box, size) and reaches_far(box, size):
        problem = "polygon far outside its image", f"{show(box)} on {size[1]} x {size[0]} pixels"
        return Outline(None, problem=problem)
    shape = segmentation
    if left_out:
        shape = [part for part in segmentation if len(part) >= 6 and len(part) % 2 == 0]
    return Outline(shape, left_out, box)


def inside(box: Box, size: tuple[int, int]) -> bool:
    """Return whether a box is inside an image of (height, width) `size`."""
    x0, y0, x1, y1 = box
    return 0 <= x0 <= x1 <= size[1] and 0 <= y0 <= y1 <= size[0]


def reaches_far(coordinates: Sequence[float], size: tuple[int, int]) -> bool:
    """Return whether a coordinate exceeds an image of (height, width) `size` by its longer side."""
    side = max(size)
    return min(coordinates) < -side or max(coordinates) > 2 * side


def compressed(shape: list | dict, height: int, width: int) -> dict:
    """Convert a usable outline to pycocotools' RLE, with counts in bytes."""
    if isinstance(shape, list):
        return rle.merge(rle.frPyObjects(shape, height, width))
    if isinstance(shape["counts"], list):
        return rle.frPyObjects(shape, height, width)
    counts = shape["counts"]
    return {"size": shape["size"], "counts": counts.encode() if isinstance(counts, str) else counts}


def pixel_count(shape: list | dict, height: int, width: int) -> int:
    """Return the number of pixels of a usable outline, rasterized by pycocotools."""
    return int(rle.area(compressed(shape, height, width)))


def whole_number(value: object) -> int | None:
    """Return a whole number, also from 96.0 or "96"; None for any other value, such as true."""
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isascii() and value.removeprefix("-").isdecimal():
        return int(value) if len(value) < 20 else None
    return None


def _read_rle(code: dict, size: tuple[int, int] | None, boxed: bool) -> Outline:
    shape, counts = code.get("size"), code.get("counts")
    sides = [whole_number(side) for side in shape] if isinstance(shape, list) else []
    if len(sides) != 2 or any(side is None or side <= 0 for side in sides):
        return Outline(None, problem=("RLE without size [height, width]", show(shape)))
    height, width = (int(side or 0) for side in sides)
    if size is not None and (height, width) != size:
        text = f"{shape}, the image {list(size)} (height, width)"
        return Outline(None, problem=("RLE of another size than its image", text))
    runs = run_lengths(counts)
    if runs is None:
        return Outline(None, problem=("RLE whose counts are not run lengths", show(counts)))
    if sum(runs) != height * width:
        text = f"{sum(runs)} of {height * width} pixels"
        return Outline(None, problem=("RLE whose counts do not fill its size", text))
    whole = {"size": [height, width], "counts": runs if isinstance(counts, list) else counts}
    if size is None or not boxed:  # without size, the sides may be too long to decode
        return Outline(whole)
    x, y, wide, high = rle.toBbox(compressed(whole, height, width)).tolist()
    return Outline(whole, box=(x, y, x + wide, y + high) if wide and high else None)


def run_lengths(counts: object) -> list[int] | None:
    """Return run lengths from a list or COCO's compressed text; None if invalid.

    Compressed: 5 bits per character, values relative to the run two before.
    """
    if isinstance(counts, list):
        whole: list[Any] = counts
        types = set(map(type, counts))
        if float in types:
            whole = [whole_number(run) if type(run) is float else run for run in counts]
            types = set(map(type, whole))
        return whole if types <= {int} and min(whole, default=0) >= 0 else None
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
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * place), starts)
    runs -= np.where(codes[ends] & 16, np.int64(1) << (5 * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs.tolist() if runs.min() >= 0 else None
