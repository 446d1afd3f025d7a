"""The confusion matrix of detections and objects at IoU 0.5."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitdet.evaluation.matches import Matches
from vitdet.evaluation.overlaps import Overlaps

SHOWN = 30  # classes at most
IOU = 0.5


@dataclass(frozen=True)
class Confusion:
    """Confusions of classes among the detections with at least this score.

    names: the classes shown, then "background". matrix[i][j]: objects of class i that were detected as
    class j; the last column counts missed objects, the last row detections without an object. The diagonal
    holds the true positives; the remaining detections and objects are paired across classes in
    descending order of their IoU, 0.5 at least, each at most once.
    classes: the number of all classes. With more than 30, `names` are the 30 classes with the most
    confusions with other classes, and the matrix counts only confusions among these and background.
    """

    score: float
    names: list[str]
    matrix: list[list[int]]
    classes: int


def confusion_of(matches: Matches, overlaps: Overlaps, score: float) -> Confusion:
    """Return the confusions of the detections with at least this score that are not ignored."""
    classes = len(matches.category_ids)
    shown = (matches.score >= score) & ~matches.ignored[:, 0]
    found = np.where(shown, matches.found, -1)
    # class of each detection's object, and of each object's detection; `classes` is background
    actual = np.full(len(found), classes)
    actual[found >= 0] = matches.object_category[found[found >= 0]]
    missed = np.ones(len(matches.object_image), bool)
    missed[found[found >= 0]] = False
    free = shown & (found < 0)
    pairs = np.flatnonzero(
        (overlaps.iou >= IOU) & free[overlaps.detection] & missed[overlaps.target]
    )
    for pair in pairs[np.argsort(-overlaps.iou[pairs], kind="stable")]:
        detection, target = overlaps.detection[pair], overlaps.target[pair]
        if free[detection] and missed[target]:
            free[detection] = missed[target] = False
            actual[detection] = matches.object_category[target]
    matrix = np.zeros((classes + 1, classes + 1), int)
    np.add.at(matrix, (actual[shown], matches.category[shown]), 1)
    matrix[:-1, -1] = np.bincount(matches.object_category[missed], minlength=classes)
    chosen = np.arange(classes)
    if classes > SHOWN:
        wrong = matrix[:-1, :-1] - np.diag(np.diag(matrix)[:-1])
        order = np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")
        chosen = np.sort(order[:SHOWN])
    kept = np.append(chosen, classes)
    return Confusion(
        score=score,
        names=[*(matches.class_names[place] for place in chosen), "background"],
        matrix=matrix[np.ix_(kept, kept)].tolist(),
        classes=classes,
    )
