"""Precision, recall and F1 at IoU 0.5 as functions of the score threshold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitdet.evaluation.matches import Matches

SCORES = tuple(step / 100 for step in range(1, 100))


@dataclass(frozen=True)
class Threshold:
    """The detections with at least this score.

    precision: true positives / detections (1 without any detection). recall: true positives / objects. f1: the
    harmonic mean of both, 2 true positives / (detections + objects).
    """

    score: float
    precision: float
    recall: float
    f1: float


def threshold_table(matches: Matches) -> list[Threshold]:
    """The detections and objects of all classes counted together, at each of `SCORES`; [] without objects."""
    objects = len(matches.object_image)
    counted = ~matches.ignored[:, 0]
    score, true = matches.score[counted], matches.matched[counted, 0]
    detections, hits = (
        len(values) - np.searchsorted(np.sort(values), SCORES) for values in (score, score[true])
    )
    return [
        _threshold(at, int(hit), int(count), objects)
        for at, hit, count in zip(SCORES, hits, detections, strict=True)
        if objects
    ]


def best_threshold(matches: Matches, category: int) -> Threshold | None:
    """The score of a detection of the class (index) with the best F1, the highest of equals; None without objects or
    detections.
    """
    objects = int((matches.object_category == category).sum())
    rows = np.flatnonzero((matches.category == category) & ~matches.ignored[:, 0])
    if not objects or not len(rows):
        return None
    rows = rows[np.argsort(-matches.score[rows], kind="stable")]
    score = matches.score[rows]
    hits, counts = matches.matched[rows, 0].cumsum(), np.arange(1, len(rows) + 1)
    ends = np.flatnonzero(np.append(score[1:] != score[:-1], True))  # equal scores count together
    best = ends[np.argmax(2 * hits[ends] / (counts[ends] + objects))]
    return _threshold(float(score[best]), int(hits[best]), int(counts[best]), objects)


def _threshold(score: float, hits: int, detections: int, objects: int) -> Threshold:
    return Threshold(
        score=score,
        precision=hits / detections if detections else 1.0,
        recall=hits / objects,
        f1=2 * hits / (detections + objects),
    )
