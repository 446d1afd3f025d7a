"""Example images in a data set's report: small JPEGs with the objects drawn on top as SVG."""

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

SIDE = 560  # maximum length of the longer side in pixels
QUALITY = 84  # JPEG quality
TOLERANCE = 0.5  # maximum deviation in pixels of an outline traced from an RLE


class Shape(NamedTuple):
    """An object to draw, in pixel coordinates of the image."""

    color: str
    name: str
    path: str  # SVG path of the mask
    box: tuple[float, float, float, float]  # x, y, width, height
    label: tuple[float, float, float]  # x, y and width of the class name


class Portrait(NamedTuple):
    """An image with its objects, largest first; `error` is set if the image cannot be read."""

    title: str
    record: Record
    letter: float  # font size in image pixels
    source: str = ""  # data URI of the JPEG
    shapes: Sequence[Shape] = ()
    error: str = ""


def portrait(
    record: Record, class_names: Sequence[str], split: str, reading: Reading = DEFAULT
) -> Portrait:
    """Return the image of a record with its objects; the title contains `split`."""
    title, letter = f"{split}: {record.path.name}", max(record.width, record.height) / 34
    try:
        picture = read_image(record.path, (record.height, record.width), reading)
    except ValueError as error:
        return Portrait(title, record, letter, error=str(error))
    picture.thumbnail((SIDE, SIDE))
    order = np.argsort(-np.prod(record.boxes[:, 2:] - record.boxes[:, :2], axis=1))
    shapes = [_shape(record, index, class_names, letter) for index in order.tolist()]
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
    """Return the polygons (V, 2) of an object in image pixels."""
    segmentation = record.segmentations[index]
    if segmentation is None:
        return []
    if isinstance(segmentation, list):
        return [np.asarray(part, np.float64).reshape(-1, 2) for part in segmentation]
    return trace([decode(segmentation, record.height, record.width)], TOLERANCE)[0]
