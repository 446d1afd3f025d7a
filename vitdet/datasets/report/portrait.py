"""A record as a picture in a page: a small JPEG inside the HTML, boxes and masks above it as SVG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np

from vitdet.data.coco import read_image
from vitdet.data.images import DEFAULT, Reading
from vitdet.data.masks import decode
from vitdet.data.outlines import trace
from vitdet.data.records import Record
from vitdet.datasets.report.charts import text
from vitdet.visualize import class_color

SIDE = 560  # pixels of the longer side
TOLERANCE = 0.5  # pixels by which the outline of an RLE may leave its pixels


def portrait(
    record: Record, class_names: Sequence[str], split: str, reading: Reading = DEFAULT
) -> str:
    """The picture of a record with its objects as an HTML figure; in place of one that cannot be read, why."""
    title = f"{split}: {record.path.name}"
    try:
        picture = read_image(record.path, (record.height, record.width), reading)
    except ValueError as error:
        return (
            f'<figure class="photo"><p class="error">{text(error)}</p><figcaption>{text(title)}</figcaption>'
            "</figure>"
        )
    picture.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=84)
    coded = base64.b64encode(content.getvalue()).decode("ascii")
    # small ones lie on top
    order = np.argsort(-np.prod(record.boxes[:, 2:] - record.boxes[:, :2], axis=1))
    things = "".join(_thing(record, int(one), class_names) for one in order)
    width, height = record.width, record.height
    counts = f"{len(record)} {'object' if len(record) == 1 else 'objects'}, {width} x {height}"
    return (
        f'<figure class="photo"><div><img alt="" src="data:image/jpeg;base64,{coded}">'
        f'<svg viewBox="0 0 {width} {height}" style="font-size:{max(width, height) / 34:.1f}px">{things}</svg>'
        f"</div><figcaption>{text(title)} <small>{counts}</small></figcaption></figure>"
    )


def _thing(record: Record, index: int, class_names: Sequence[str]) -> str:
    label = int(record.labels[index])
    name = text(class_names[label])
    x0, y0, x1, y1 = record.boxes[index].tolist()
    path = "".join(
        "M" + " ".join(f"{x:.1f},{y:.1f}" for x, y in part) + "Z"
        for part in _outlines(record, index)
    )
    side = max(record.width, record.height) / 34  # of a letter
    wide, low = side * (0.62 * len(class_names[label]) + 0.6), max(y0, 1.25 * side)
    left = max(min(x0, record.width - wide), 0)
    return (
        f'<g style="--c:rgb{class_color(label)}"><title>{name}</title>'
        f'<path class="mask" d="{path}"/>'
        f'<rect class="box" x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}"/>'
        f'<g class="name"><rect x="{left:.1f}" y="{low - 1.25 * side:.1f}" width="{wide:.1f}" '
        f'height="{1.25 * side:.1f}"/><text x="{left + 0.3 * side:.1f}" y="{low - 0.33 * side:.1f}" '
        f'textLength="{wide - 0.6 * side:.1f}" lengthAdjust="spacingAndGlyphs">{name}</text></g></g>'
    )


def _outlines(record: Record, index: int) -> list[np.ndarray]:
    """The polygons (V, 2) of an object in pixels of its image."""
    segmentation = record.segmentations[index]
    if segmentation is None:
        return []
    if isinstance(segmentation, list):
        return [np.asarray(part, np.float64).reshape(-1, 2) for part in segmentation]
    return trace([decode(segmentation, record.height, record.width)], TOLERANCE)[0]
