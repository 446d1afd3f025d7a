"""Values of an annotation file, of whatever type they are: what is wrong with them, and how to show them."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence

import numpy as np

NUMBERS = frozenset({int, float})
SIDE = (
    2**16
)  # pixels that no side of an image reaches: JPEG has none as long, and RLEs count pixels in 32 bits


def segmentation_problem(
    segmentation: object, size: tuple[int, int] | None
) -> tuple[str, str] | None:
    """(kind, text) of the first thing that is wrong with polygons or an RLE on an image of (height, width) `size`."""
    if isinstance(segmentation, dict):
        return _rle_problem(segmentation, size)
    if segmentation == []:
        return (
            "segmentation that is neither polygons nor RLE",
            "[] (where there is a box only, write its corners)",
        )
    if not isinstance(segmentation, list):
        return "segmentation that is neither polygons nor RLE", show(segmentation)
    for part in segmentation:
        if not isinstance(part, list):
            return "polygon that is not a list x, y, x, y, ...", show(part)
        if len(part) < 6 or len(part) % 2:
            return "polygon without x, y of at least 3 points", f"{len(part)} numbers"
        try:
            finite = math.isfinite(sum(part))
        except (TypeError, OverflowError):  # text, lists, nothing, or beyond any float
            finite = False
        if not finite:
            return "polygon with coordinates that are not finite numbers", show(part)
        if size is not None and reaches_far(
            part, size
        ):  # pycocotools draws all of it, pixel by pixel
            return "polygon far outside its image", f"{show(part)} on {size[1]} x {size[0]} pixels"
    return None


def _rle_problem(code: dict, size: tuple[int, int] | None) -> tuple[str, str] | None:
    shape, counts = code.get("size"), code.get("counts")
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or any(type(side) is not int or side <= 0 for side in shape)
    ):
        return "RLE without size [height, width]", show(shape)
    if size is not None and tuple(shape) != size:
        return (
            "RLE of another size than its image",
            f"{shape}, the image {list(size)} (height, width)",
        )
    runs = _run_lengths(counts)
    if runs is None:
        return "RLE whose counts are not run lengths", show(counts)
    if sum(runs) != shape[0] * shape[1]:
        return (
            "RLE whose counts do not fill its size",
            f"{sum(runs)} of {shape[0] * shape[1]} pixels",
        )
    return None


def _run_lengths(counts: object) -> list[int] | None:
    """Run lengths as they are, or out of COCO's compressed text: 5 bits a character, differences to two runs before."""
    if isinstance(counts, list):
        return (
            counts if {int}.issuperset(map(type, counts)) and min(counts, default=0) >= 0 else None
        )
    if not isinstance(counts, str) or not counts.isascii():
        return None
    codes = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    last = (codes & 32) == 0
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or not last[-1]:
        return None
    ends = np.flatnonzero(last)
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends - starts + 1
    if lengths.max() > 7:  # more than 35 bits are no run
        return None
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * place), starts)
    runs -= np.where(codes[ends] & 16, np.int64(1) << (5 * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs.tolist() if runs.min() >= 0 else None


def reaches_far(coordinates: Sequence[float], size: tuple[int, int]) -> bool:
    """Whether any of these numbers lies farther outside an image of (height, width) `size` than its longer side."""
    side = max(size)
    return min(coordinates) < -side or max(coordinates) > 2 * side


def is_line(value: object) -> bool:
    """Whether it is text of one line, or none, as the name of a file is."""
    return isinstance(value, str) and len(value.splitlines()) < 2 and "\0" not in value


def is_text(value: object) -> bool:
    """Whether it is text of one line that any file can hold: without half a surrogate pair."""
    return is_line(value) and (
        value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)
    )


def are_numbers(values: Sequence[object]) -> bool:
    """Whether all of them are finite numbers."""
    try:
        return math.isfinite(sum(values)) and NUMBERS.issuperset(map(type, values))
    except (TypeError, OverflowError):  # text, lists, nothing, or beyond any float
        return False


def show(value: object) -> str:
    """The value in a few characters of one line, whatever it is."""
    return reprlib.repr(value)
