"""An image of a data set for its report: a small JPEG, and outlines of its objects on top of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vitdet.data.coco import read_image
from vitdet.data.images import DEFAULT, Reading
from vitdet.data.masks import decode
from vitdet.data.outlines import trace
from vitdet.data.records import Record
from vitdet.pages import data_uri
from vitdet.visualize import class_color

SIDE = 560  # pixels of the longer side
QUALITY = 84  # of JPEG
TOLERANCE = 0.5  # pixels by which the outline of an RLE may differ from its pixels


class Shape(NamedTuple):
    """An object in pixels of its image: SVG path of its mask, box (x, y, width, height).

    label: x, y and width of the field with the class name; its height is 1.25 letters.
    """

    color: str
    name: str
    path: str
    box: tuple[float, float, float, float]
    label: tuple[float, float, float]


class Portrait(NamedTuple):
    """An image with its objects, small ones last.

    letter: the size of a letter in pixels of the image. error: why it cannot be read, which leaves
    `source` and `shapes` empty.
    """

    title: str
    record: Record
    letter: float
    source: str = ""
    shapes: Sequence[Shape] = ()
    error: str = ""


def portrait(
    record: Record, class_names: Sequence[str], split: str, reading: Reading = DEFAULT
) -> Portrait:
    """Return an image of a split with its objects."""
    title, letter = f"{split}: {record.path.name}", max(record.width, record.height) / 34
    try:
        picture = read_image(record.path, (record.height, record.width), reading)
    except ValueError as error:
        return Portrait(title, record, letter, error=str(error))
    picture.thumbnail((SIDE, SIDE))
    order = np.argsort(-np.prod(record.boxes[:, 2:] - record.boxes[:, :2], axis=1))
    shapes = [_shape(record, int(one), class_names, letter) for one in order]
    return Portrait(title, record, letter, data_uri(picture, QUALITY), shapes)


def _shape(record: Record, index: int, class_names: Sequence[str], letter: float) -> Shape:
    label = int(record.labels[index])
    name = class_names[label]
    x0, y0, x1, y1 = record.boxes[index].tolist()
    parts = (" ".join(f"{x:.1f},{y:.1f}" for x, y in part) for part in _outlines(record, index))
    width = letter * (0.62 * len(name) + 0.6)
    field = (max(min(x0, record.width - width), 0), max(y0 - 1.25 * letter, 0), width)
    path = "".join(f"M{points}Z" for points in parts)
    return Shape(f"rgb{class_color(label)}", name, path, (x0, y0, x1 - x0, y1 - y0), field)


def _outlines(record: Record, index: int) -> list[np.ndarray]:
    """Return the polygons (V, 2) of an object in pixels of its image."""
    segmentation = record.segmentations[index]
    if segmentation is None:
        return []
    if isinstance(segmentation, list):
        return [np.asarray(part, np.float64).reshape(-1, 2) for part in segmentation]
    return trace([decode(segmentation, record.height, record.width)], TOLERANCE)[0]
