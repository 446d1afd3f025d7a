"""The analysis of an evaluation that the report shows: curves, thresholds, errors, confused classes, images.

All values are plain Python values, so that an `Analysis` can be written as JSON with `dataclasses.asdict`.
AP, AR and dAP are in percent; scores, precision, recall and F1 are in 0..1. Unless stated otherwise
a detection is a true positive at IoU 0.5, all object sizes and the largest limit of detections count,
and what the rules of COCO or LVIS ignore (crowds, classes that are not exhaustively annotated) counts
neither as detection nor as object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vitdet.evaluation.coco import NAMES
from vitdet.evaluation.confusion import Confusion, confusion_of
from vitdet.evaluation.errors import SPECIAL, TYPES, Errors, errors_of
from vitdet.evaluation.matches import RECALLS, Matches
from vitdet.evaluation.matching import IOUS, Comparison
from vitdet.evaluation.overlaps import overlaps_of
from vitdet.evaluation.results import Truth
from vitdet.evaluation.thresholds import Threshold, best_threshold, threshold_table

WORST, BEST = 6, 4  # images


@dataclass(frozen=True)
class ClassResult:
    """One class. AP, AR and dAP are None or absent where the class has no object of that size.

    objects, images: objects to find, and images with at least one of them. detections: those that
    count, at any score.
    ap: mean over IoU 0.5, 0.55, ..., 0.95. ar: recall at any score, mean over the same IoUs.
    best_threshold: the score with the best F1 among the scores of the detections; precision, recall
    and f1 are those of the detections with at least that score. None without objects or detections.
    curve: precision at IoU 0.5 and recall 0, 0.01, ..., 1 (101 values, rounded to 3 digits, the precision at a
    recall is the best at that recall or above); empty without objects.
    errors: dAP of this class per error type, as `Analysis.errors`. main_error: the error type with
    the largest dAP among TIDE's six; None if no error type has a dAP above 0.
    error_counts: as `Analysis.error_counts`; missed objects by their class, the others by the class
    of the detection.
    """

    name: str
    objects: int
    images: int
    detections: int
    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar: float | None
    best_threshold: float | None
    precision: float | None
    recall: float | None
    f1: float | None
    curve: list[float]
    errors: dict[str, float]
    error_counts: dict[str, int]
    main_error: str | None


@dataclass(frozen=True)
class ImageResult:
    """One image at the best threshold of the analysis.

    f1: 2 TP / (2 TP + false positives + missed), the measure of best and worst images.
    objects, detections: those that count, detections at or above the threshold.
    missed: objects that were not found. false_positives: detections that match no object.
    """

    image_id: int
    file_name: str
    f1: float
    objects: int
    detections: int
    missed: int
    false_positives: int


@dataclass(frozen=True)
class Analysis:
    """The evaluation of boxes or of masks.

    kind: "box" or "mask".
    metrics: the AP family and AR of COCO or LVIS, by the names of metrics.json without the kind
    ("ap", "ap50", "ap_small", "ar_100", ...); those without an object are absent.
    classes: all classes of the annotation file, in its order.
    recalls: 0, 0.01, ..., 1. curves: precision at these recalls, mean over the classes with objects,
    keys "0.5", "0.75" (IoU) and "mean" (over all IoUs).
    thresholds: scores 0.01, 0.02, ..., 0.99, empty without objects. best_threshold: that with the
    best F1, the highest of equals; None without objects or true positives. The confusion matrix and
    the images are at this threshold, without one at 0.5: `confusion.score`.
    errors: dAP of each error type of TIDE (Bolya et al. 2020), the increase of AP50 when all errors
    of this type are fixed, each type alone: "classification", "localisation", "both", "duplicate",
    "background", "missed"; and "false_positive", "false_negative" for all false positives and all
    missed objects. See `vitdet.evaluation.errors`. error_counts: errors of the first six types.
    worst, best: up to 6 and 4 images. Worst: lowest F1 first, of equal F1 those with more errors.
    Best: highest F1 first, of equal F1 those with more objects. Images without objects and without
    detections above the threshold are in neither.
    """

    kind: str
    metrics: dict[str, float]
    classes: list[ClassResult]
    recalls: list[float]
    curves: dict[str, list[float]]
    thresholds: list[Threshold]
    best_threshold: float | None
    errors: dict[str, float]
    error_counts: dict[str, int]
    confusion: Confusion
    worst: list[ImageResult]
    best: list[ImageResult]


def analyse(
    kind: str, comparison: Comparison, metrics: Mapping[str, float], truth: Truth
) -> Analysis:
    """Return the analysis of a comparison of one kind, "bbox" or "segm".

    metrics: what `summary` returns of all kinds.
    """
    matches, prefix = comparison.matches, f"{NAMES[kind]}_"
    overlaps = overlaps_of(comparison)
    errors = errors_of(
        matches, overlaps, np.array([item["id"] for item in comparison.detections], int)
    )
    table = threshold_table(matches)
    best = max(table, key=lambda one: (one.f1, one.score), default=None)
    score = best.score if best and best.f1 > 0 else None
    shown = 0.5 if score is None else score
    worst_images, best_images = _images(matches, shown, truth)
    return Analysis(
        kind=NAMES[kind],
        metrics={
            name.removeprefix(prefix): value
            for name, value in metrics.items()
            if name.startswith(prefix)
        },
        classes=_classes(comparison, errors),
        recalls=RECALLS.round(2).tolist(),
        curves={name: one.round(4).tolist() for name, one in mean_curves(comparison).items()},
        thresholds=table,
        best_threshold=score,
        errors=errors.total,
        error_counts={name: int(errors.counts[name].sum()) for name in TYPES},
        confusion=confusion_of(matches, overlaps, shown),
        worst=worst_images,
        best=best_images,
    )


def _classes(comparison: Comparison, errors: Errors) -> list[ClassResult]:
    matches, rows = comparison.matches, []
    count = len(matches.category_ids)
    objects = np.bincount(matches.object_category, minlength=count)
    detections = np.bincount(matches.category[~matches.ignored[:, 0]], minlength=count)
    pairs = np.unique(np.stack([matches.object_category, matches.object_image]), axis=1)
    images = np.bincount(pairs[0], minlength=count)
    for place, name in enumerate(matches.class_names):
        best = best_threshold(matches, place)
        known = bool(objects[place])
        gains = {key: float(errors.gains[key][place]) for key in (*TYPES, *SPECIAL) if known}
        main = max(TYPES, key=lambda key: gains.get(key, 0.0))
        curve = comparison.precision[0, :, place, 0, -1]
        chosen = [place]
        rows.append(
            ClassResult(
                name=name,
                objects=int(objects[place]),
                images=int(images[place]),
                detections=int(detections[place]),
                ap=comparison.ap(chosen=chosen),
                ap50=comparison.ap(0.5, chosen=chosen),
                ap75=comparison.ap(0.75, chosen=chosen),
                ap_small=comparison.ap(size="small", chosen=chosen),
                ap_medium=comparison.ap(size="medium", chosen=chosen),
                ap_large=comparison.ap(size="large", chosen=chosen),
                ar=100 * float(comparison.recall[:, place, 0, -1].mean()) if known else None,
                best_threshold=best.score if best else None,
                precision=best.precision if best else None,
                recall=best.recall if best else None,
                f1=best.f1 if best else None,
                curve=curve.round(3).tolist() if known else [],
                errors=gains,
                error_counts={key: int(errors.counts[key][place]) for key in TYPES},
                main_error=main if gains.get(main, 0.0) > 0 else None,
            )
        )
    return rows


def mean_curves(comparison: Comparison) -> dict[str, np.ndarray]:
    """Return the curves of `Analysis`, (R,) each, not rounded; {} without objects."""
    precision = comparison.precision[:, :, :, 0, -1]
    known = (precision >= 0).all((0, 1))
    if not known.any():
        return {}
    mean = precision[:, :, known].mean(2)
    of_iou = {str(iou): mean[int(np.abs(IOUS - iou).argmin())] for iou in (0.5, 0.75)}
    return {**of_iou, "mean": mean.mean(0)}


def _images(
    matches: Matches, score: float, truth: Truth
) -> tuple[list[ImageResult], list[ImageResult]]:
    """The worst and the best images at this threshold."""
    count = len(matches.image_ids)
    shown = (matches.score >= score) & ~matches.ignored[:, 0]
    objects = np.bincount(matches.object_image, minlength=count)
    detections = np.bincount(matches.image[shown], minlength=count)
    hits = np.bincount(matches.image[shown & matches.matched[:, 0]], minlength=count)
    places = np.flatnonzero(objects + detections)
    f1 = np.zeros(count)
    f1[places] = 2 * hits[places] / (objects + detections)[places]
    wrong = objects + detections - 2 * hits
    worst = places[np.lexsort((-wrong[places], f1[places]))][:WORST]
    best = places[np.lexsort((-objects[places], -f1[places]))][:BEST]

    def result(place: int) -> ImageResult:
        image_id = int(matches.image_ids[place])
        return ImageResult(
            image_id=image_id,
            file_name=str(truth.images[image_id].get("file_name", image_id)),
            f1=float(f1[place]),
            objects=int(objects[place]),
            detections=int(detections[place]),
            missed=int((objects - hits)[place]),
            false_positives=int((detections - hits)[place]),
        )

    return [result(place) for place in worst], [result(place) for place in best]
