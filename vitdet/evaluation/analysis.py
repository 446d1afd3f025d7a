"""Analysis of an evaluation for the report: curves, thresholds, errors, confusion matrix, images.

All values are plain Python values: `dataclasses.asdict` of an `Analysis` can be written as JSON.
AP, AR and dAP are in percent; scores, precision, recall and F1 are in 0..1. Unless stated
otherwise, detections are matched at IoU 0.5 with objects of all sizes, and the largest detection
limit applies. Ignored detections and objects are excluded (see `Matches`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vitdet.evaluation.coco import NAMES
from vitdet.evaluation.errors import SPECIAL, TYPES, Errors, Overlaps, errors_of, overlaps_of
from vitdet.evaluation.matches import IOUS, Matches
from vitdet.evaluation.matching import Comparison
from vitdet.evaluation.results import Truth

WORST, BEST = 6, 4  # maximum numbers of images in the report
SCORES = tuple(step / 100 for step in range(1, 100))
SHOWN = 30  # maximum number of classes in a confusion matrix


@dataclass(frozen=True)
class Threshold:
    """The results of the detections with a score of at least `score`.

    Without detections, the precision is 1. F1 is 2 * true positives / (detections + objects).
    """

    score: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class ClassResult:
    """The results of one class.

    A metric is None if the class has no objects (of the metric's object size). `curve` and `errors`
    are empty if the class has no objects.

    Attributes:
        objects: number of objects.
        images: number of images with at least one object.
        ap: mean over IoU thresholds 0.5, 0.55, ..., 0.95.
        ar: recall without a score threshold, averaged over the same IoU thresholds.
        best_threshold: score threshold with the best F1; None without objects or detections.
        curve: precision at IoU 0.5 and recall 0, 0.01, ..., 1, interpolated as for AP and rounded
            to 3 digits.
        errors, error_counts: see `Analysis`. dAP is the increase in AP50 of this class. In the
            counts, a missed object belongs to its class, any other error to that of the detection.
        main_error: the error type with the largest dAP; None if no dAP is above 0.
    """

    name: str
    objects: int
    images: int
    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar: float | None
    best_threshold: Threshold | None
    curve: list[float]
    errors: dict[str, float]
    error_counts: dict[str, int]
    main_error: str | None


@dataclass(frozen=True)
class ImageResult:
    """The results of one image; only detections at or above the score threshold are included.

    Attributes:
        f1: 2 TP / (2 TP + false_positives + missed).
        missed: number of objects that no detection matches.
        false_positives: number of detections that match no object.
    """

    image_id: int
    file_name: str
    f1: float
    objects: int
    detections: int
    missed: int
    false_positives: int


@dataclass(frozen=True)
class Confusion:
    """The confusion matrix of the detections with a score of at least `score`.

    True positives are on the diagonal. The remaining detections and objects with an IoU of at least
    0.5 are paired across classes in descending order of IoU, each in at most one pair. If
    there are more than 30 classes, the matrix is limited to background and the 30 classes that are
    confused most often with other classes.

    Attributes:
        names: the classes of the matrix, then "background".
        matrix: matrix[i][j] is the number of objects of class i that were detected as class j. The
            last column counts missed objects, the last row detections without an object.
        classes: total number of classes.
    """

    score: float
    names: list[str]
    matrix: list[list[int]]
    classes: int


@dataclass(frozen=True)
class Analysis:
    """The analysis of boxes or of masks.

    Attributes:
        kind: "box" or "mask".
        metrics: COCO's or LVIS's metrics, named as in metrics.json without "box_" or
            "mask_" ("ap", "ap_small", "ar_100", ...). Undefined metrics are omitted.
        classes: all classes of the annotation file, in order of category id.
        curves: precision at recall 0, 0.01, ..., 1, averaged over the classes with objects, for
            IoU "0.5", "0.75" and the "mean" over all IoU thresholds; empty without objects.
        thresholds: results pooled over all classes at scores 0.01, 0.02, ..., 0.99; empty without
            objects.
        best_threshold: the threshold with the best F1; in a tie, the highest; None without true
            positives. The confusion matrix and the images use this threshold (0.5 if None).
        errors: dAP of each error type (`vitdet.evaluation.errors`), including "false_positive" and
            "false_negative".
        error_counts: number of errors of each of the six types.
        worst: up to 6 images with the lowest F1; in a tie, images with more errors come first.
        best: up to 4 images with the highest F1; in a tie, images with more objects come first.
            `worst` and `best` exclude images that have no objects and no detections.
    """

    kind: str
    metrics: dict[str, float]
    classes: list[ClassResult]
    curves: dict[str, list[float]]
    thresholds: list[Threshold]
    best_threshold: Threshold | None
    errors: dict[str, float]
    error_counts: dict[str, int]
    confusion: Confusion
    worst: list[ImageResult]
    best: list[ImageResult]


def analyse(
    kind: str, comparison: Comparison, metrics: Mapping[str, float], truth: Truth
) -> Analysis:
    """Return the analysis of boxes ("bbox") or masks ("segm"). metrics: from `summary`."""
    matches, prefix = comparison.matches, f"{NAMES[kind]}_"
    overlaps = overlaps_of(comparison)
    rank = np.array([item["id"] for item in comparison.detections], int)
    errors = errors_of(matches, overlaps, rank)
    table = _thresholds(matches)
    best = max((row for row in table if row.f1), key=lambda row: (row.f1, row.score), default=None)
    score = best.score if best else 0.5
    worst_images, best_images = _images(matches, score, truth)
    return Analysis(
        kind=NAMES[kind],
        metrics={
            name.removeprefix(prefix): value
            for name, value in metrics.items()
            if name.startswith(prefix)
        },
        classes=_classes(comparison, errors),
        curves={name: curve.round(4).tolist() for name, curve in mean_curves(comparison).items()},
        thresholds=table,
        best_threshold=best,
        errors=errors.total,
        error_counts={name: int(errors.counts[name].sum()) for name in TYPES},
        confusion=_confusion(matches, overlaps, score),
        worst=worst_images,
        best=best_images,
    )


def mean_curves(comparison: Comparison) -> dict[str, np.ndarray]:
    """Return `Analysis.curves`, unrounded, as arrays (101,); {} if there are no objects."""
    precision = comparison.precision[:, :, :, 0, -1]
    known = (precision >= 0).all((0, 1))
    if not known.any():
        return {}
    mean = precision[:, :, known].mean(2)
    of_iou = {str(iou): mean[int(np.abs(IOUS - iou).argmin())] for iou in (0.5, 0.75)}
    return {**of_iou, "mean": mean.mean(0)}


def _thresholds(matches: Matches) -> list[Threshold]:
    """Return the results pooled over all classes at each of SCORES; [] if there are no objects."""
    objects = len(matches.object_image)
    counted = ~matches.ignored[:, 0]
    score, true = matches.score[counted], matches.matched[counted, 0]
    detections, hits = (
        len(values) - np.searchsorted(np.sort(values), SCORES) for values in (score, score[true])
    )
    rows = zip(SCORES, hits.tolist(), detections.tolist(), strict=True)
    return [_threshold(*row, objects) for row in rows if objects]


def _best_threshold(matches: Matches, category: int) -> Threshold | None:
    """Return the threshold with the best F1 of a class; in a tie, the highest.

    The candidates are the scores of the detections. Return None without objects or detections.
    """
    objects = int((matches.object_category == category).sum())
    rows = np.flatnonzero((matches.category == category) & ~matches.ignored[:, 0])
    if not objects or not len(rows):
        return None
    rows = rows[np.argsort(-matches.score[rows], kind="stable")]
    score = matches.score[rows]
    hits, counts = matches.matched[rows, 0].cumsum(), np.arange(1, len(rows) + 1)
    # a threshold includes either all or none of the detections with equal scores
    ends = np.flatnonzero(np.append(score[1:] != score[:-1], True))
    best = ends[np.argmax(2 * hits[ends] / (counts[ends] + objects))]
    return _threshold(float(score[best]), int(hits[best]), int(counts[best]), objects)


def _threshold(score: float, hits: int, detections: int, objects: int) -> Threshold:
    precision = hits / detections if detections else 1.0
    return Threshold(score, precision, hits / objects, 2 * hits / (detections + objects))


def _classes(comparison: Comparison, errors: Errors) -> list[ClassResult]:
    matches, rows = comparison.matches, []
    count = len(matches.category_ids)
    objects = np.bincount(matches.object_category, minlength=count).tolist()
    pairs = np.unique(np.stack([matches.object_category, matches.object_image]), axis=1)
    images = np.bincount(pairs[0], minlength=count).tolist()
    for index, name in enumerate(matches.class_names):
        known = bool(objects[index])
        gains = {key: float(errors.gains[key][index]) for key in (*TYPES, *SPECIAL) if known}
        main = max(TYPES, key=lambda key: gains.get(key, 0.0))
        curve = comparison.precision[0, :, index, 0, -1]
        rows.append(
            ClassResult(
                name=name,
                objects=objects[index],
                images=images[index],
                **comparison.aps([index]),
                ar=100 * float(comparison.recall[:, index, 0, -1].mean()) if known else None,
                best_threshold=_best_threshold(matches, index),
                curve=curve.round(3).tolist() if known else [],
                errors=gains,
                error_counts={key: int(errors.counts[key][index]) for key in TYPES},
                main_error=main if gains.get(main, 0.0) > 0 else None,
            )
        )
    return rows


def _images(
    matches: Matches, score: float, truth: Truth
) -> tuple[list[ImageResult], list[ImageResult]]:
    """Return the worst and the best images at the score threshold `score`."""
    count = len(matches.image_ids)
    shown = (matches.score >= score) & ~matches.ignored[:, 0]
    objects = np.bincount(matches.object_image, minlength=count)
    detections = np.bincount(matches.image[shown], minlength=count)
    hits = np.bincount(matches.image[shown & matches.matched[:, 0]], minlength=count)
    rated = np.flatnonzero(objects + detections)
    f1 = np.zeros(count)
    f1[rated] = 2 * hits[rated] / (objects + detections)[rated]
    wrong = objects + detections - 2 * hits
    worst = rated[np.lexsort((-wrong[rated], f1[rated]))][:WORST]
    best = rated[np.lexsort((-objects[rated], -f1[rated]))][:BEST]

    def result(index: int) -> ImageResult:
        image_id = int(matches.image_ids[index])
        return ImageResult(
            image_id=image_id,
            file_name=str(truth.images[image_id].get("file_name", image_id)),
            f1=float(f1[index]),
            objects=int(objects[index]),
            detections=int(detections[index]),
            missed=int((objects - hits)[index]),
            false_positives=int((detections - hits)[index]),
        )

    return [result(index) for index in worst], [result(index) for index in best]


def _confusion(matches: Matches, overlaps: Overlaps, score: float) -> Confusion:
    classes = len(matches.category_ids)  # also the matrix index of background
    shown = (matches.score >= score) & ~matches.ignored[:, 0]
    found = np.where(shown, matches.found, -1)
    actual = np.full(len(found), classes)  # the class of each detection's object
    actual[found >= 0] = matches.object_category[found[found >= 0]]
    missed = np.ones(len(matches.object_image), bool)
    missed[found[found >= 0]] = False
    free = shown & (found < 0)
    unpaired = free[overlaps.detection] & missed[overlaps.target]
    pairs = np.flatnonzero((overlaps.iou >= IOUS[0]) & unpaired)
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
    names = [*(matches.class_names[index] for index in chosen), "background"]
    return Confusion(score, names, matrix[np.ix_(kept, kept)].tolist(), classes)
