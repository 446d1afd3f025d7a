"""What a data set in another format says, in one form: the pictures of each split and the objects on them.

Boxes and outlines are pixels of the upright picture, x to the right and y down from its corner, as in COCO.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp"})
EMPTY = "objects without size left out"
BOX_ONLY = "objects have a box only and no mask (--boxes-as-masks makes one of each box)"


@dataclass(frozen=True)
class Thing:
    """An object: its class, left, top, width, height, COCO's polygons or RLE ([]: it has a box only), area in pixels.

    crowd: evaluation counts it neither way, and training leaves it out.
    """

    label: int
    box: tuple[float, float, float, float]
    segmentation: list[list[float]] | dict
    area: float
    crowd: bool = False


@dataclass(frozen=True)
class Picture:
    """An image file, its upright height and width, and its objects."""

    path: Path
    height: int
    width: int
    things: tuple[Thing, ...]


@dataclass
class Foreign:
    """A data set; label k is class_names[k]. Going through a split counts in `notes` what a person should know."""

    class_names: tuple[str, ...]
    splits: dict[str, Iterable[Picture]]
    notes: Counter[str] = field(default_factory=Counter)


def images_below(folder: Path) -> list[Path]:
    """All image files of a folder and its subfolders, in order of their paths; hidden ones are none."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.name[0] != "."
    )


def box_thing(
    label: int, corners: Sequence[float], size: tuple[int, int], crowd: bool = False
) -> Thing | None:
    """An object known by its box x0, y0, x1, y1 only, cut at the border of the picture (height, width); None: empty."""
    x0, y0, x1, y1 = corners
    found = polygon_thing(label, [x0, y0, x1, y0, x1, y1, x0, y1], size, crowd)
    return None if found is None else replace(found, segmentation=[])


def polygon_thing(
    label: int, points: Sequence[float], size: tuple[int, int], crowd: bool = False
) -> Thing | None:
    """An object known by its outline x, y, x, y, ...; points outside the picture move to its border; None: empty."""
    height, width = size
    x = [round(min(max(value, 0), width), 3) for value in points[0::2]]
    y = [round(min(max(value, 0), height), 3) for value in points[1::2]]
    box = (min(x), min(y), round(max(x) - min(x), 3), round(max(y) - min(y), 3))
    twice = sum(
        a * d - c * b for a, b, c, d in zip(x, y, x[1:] + x[:1], y[1:] + y[:1], strict=True)
    )
    if box[2] <= 0 or box[3] <= 0:
        return None
    return Thing(
        label,
        box,
        [[value for point in zip(x, y, strict=True) for value in point]],
        round(abs(twice) / 2, 3),
        crowd,
    )
