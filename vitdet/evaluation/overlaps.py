"""The overlaps of all detections with all objects of their image, regardless of class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pycocotools import mask as rle

from vitdet.evaluation.matching import Comparison

LEAST = 0.1  # IoU from which a pair is listed


@dataclass(frozen=True)
class Overlaps:
    """Pairs (P,) of a detection and an object, as indices into the columns of Matches, with IoU >= `LEAST`."""

    detection: np.ndarray
    target: np.ndarray
    iou: np.ndarray


def overlaps_of(comparison: Comparison) -> Overlaps:
    """Return the overlaps of boxes or masks of a comparison, by whichever it compared."""
    matches = comparison.matches
    if matches.kind == "bbox":
        found, targets = (
            np.array([item["bbox"] for item in side], float).reshape(-1, 4)
            for side in (comparison.detections, comparison.objects)
        )
    else:
        found, targets = (
            np.array([item["rle"] for item in side], object)
            for side in (comparison.detections, comparison.objects)
        )
    rows, starts = _by_image(matches.image, len(matches.image_ids))
    columns, firsts = _by_image(matches.object_image, len(matches.image_ids))
    pairs = [(np.zeros(0, int), np.zeros(0, int), np.zeros(0))]
    for image in np.flatnonzero((np.diff(starts) > 0) & (np.diff(firsts) > 0)):
        row = rows[starts[image] : starts[image + 1]]
        column = columns[firsts[image] : firsts[image + 1]]
        sides = found[row], targets[column]
        if matches.kind == "segm":
            sides = sides[0].tolist(), sides[1].tolist()
        ious = np.asarray(rle.iou(*sides, [0] * len(column)))
        here, there = np.nonzero(ious >= LEAST)
        pairs.append((row[here], column[there], ious[here, there]))
    return Overlaps(*(np.concatenate(parts) for parts in zip(*pairs, strict=True)))


def _by_image(image: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices sorted by image, and where those of each image begin, (count + 1,)."""
    order = np.argsort(image, kind="stable")
    return order, np.searchsorted(image[order], np.arange(count + 1))
