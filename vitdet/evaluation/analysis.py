"""What an evaluation found, as the report shows it: curves, thresholds, errors, confused classes, images.

All values are plain Python values, so that an `Analysis` can be written as JSON with `dataclasses.asdict`.
AP, AR and dAP are in percent; scores, precision, recall and F1 are in 0..1. Unless stated otherwise
a detection is a true positive at IoU 0.5, all object sizes and the largest limit of detections count,
and what the rules of COCO or LVIS ignore (crowds, classes that are not exhaustively annotated) counts
neither as detection nor as object.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClassResult:
    """One class. AP, AR and dAP are None or absent where the class has no object of that size.

    objects, images: objects to find, and images with at least one of them. detections: those that
    count, at any score.
    ap: mean over IoU 0.5, 0.55, ..., 0.95. ar: recall at any score, mean over the same IoUs.
    best_threshold: the score with the best F1 among the scores of the detections; precision, recall
    and f1 are those of the detections with at least that score. None without objects or detections.
    curve: precision at recall 0, 0.01, ..., 1 (101 values, rounded to 3 digits, the precision at a
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
class Threshold:
    """The detections of all classes with at least this score (counted together: micro average).

    precision: true positives / detections (1 without any detection). recall: true positives /
    objects. f1: the harmonic mean of both.
    """

    score: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Confusion:
    """Which class is found as which, at `score` and above.

    names: the classes shown, then "background". matrix[i][j]: objects of class i that were detected as
    class j; the last column counts missed objects, the last row detections of no object. The diagonal
    holds the true positives; the remaining detections and objects are paired across classes in
    descending order of their IoU, 0.5 at least, each at most once.
    classes: the number of all classes. With more than 30, `names` are the 30 classes with the most
    confusions with other classes, and the matrix counts only confusions among these.
    """

    score: float
    names: list[str]
    matrix: list[list[int]]
    classes: int


@dataclass(frozen=True)
class ImageResult:
    """One image at the threshold of the best F1 over all classes.

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
    thresholds: scores 0.01, 0.02, ..., 0.99. best_threshold: that with the best F1; None without
    objects or detections.
    errors: dAP of each error type of TIDE (Bolya et al. 2020), the increase of AP50 when all errors
    of this type are fixed, each type alone: "classification", "localisation", "both", "duplicate",
    "background", "missed"; and "false_positive", "false_negative" for all false positives and all
    missed objects. See `vitdet.evaluation.errors`. error_counts: errors of the first six types.
    worst, best: up to 12 images each. Worst: lowest F1 first, of equal F1 those with more errors.
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
