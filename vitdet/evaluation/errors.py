"""The error types of TIDE (Bolya et al. 2020, arXiv:2008.08115) and their effect on AP50.

A detection that matches no object at IoU 0.5 is assigned the first of these types that applies,
with t_f = 0.5 and t_b = 0.1:

- localization: its best IoU with an object of its class is in [t_b, t_f]
- classification: its IoU with an object of another class is at least t_f
- duplicate: its IoU with an object of its class is at least t_f, but a detection of higher score
  matches this object
- background: its IoU with every object is at most t_b
- both: none of the above, i.e. wrong class and IoU below t_f

An object is missed if it has no match and no localization or classification error refers to it.

dAP is the increase in AP50 if all errors of one type are fixed. Fixing a localization or
classification error makes the detection a true positive of the object with the highest IoU among
the objects of its class or of other classes, respectively. If this object is already matched, or
would also be matched by fixing a detection with a higher score, the detection is removed. Fixing an
error of another type removes the detection or the missed object. Fixing false_positive ranks all
true positives above all false positives; fixing false_negative removes all unmatched objects.

As in the tidecv package, detections that AP ignores can have localization and classification
errors. These errors are not counted, but fixing them can add true positives. Fixing errors of
other types does not change ignored detections.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pycocotools import mask as rle

from vitdet.evaluation.matches import Matches, precisions
from vitdet.evaluation.matching import Comparison

FOREGROUND, BACKGROUND = 0.5, 0.1  # t_f, t_b
TYPES = ("classification", "localization", "both", "duplicate", "background", "missed")
SPECIAL = ("false_positive", "false_negative")
# As in tidecv. Some values differ in the last bit from COCO's thresholds (np.linspace), so that a
# recall of exactly 0.35, for example, reaches one threshold but not the other.
RECALLS = np.arange(101) / 100


@dataclass(frozen=True)
class Overlaps:
    """P pairs of a detection and an object of any classes in the same image, with IoU >= 0.1.

    All arrays are (P,); `detection` and `target` index the detections and objects of `Matches`.
    """

    detection: np.ndarray
    target: np.ndarray
    iou: np.ndarray


@dataclass(frozen=True)
class Errors:
    """The errors of boxes or masks; notation as in `vitdet.evaluation.matches`.

    Attributes:
        counts: number of errors per class (K,) by type in `TYPES`. The class of an error is the
            class of the detection or of the missed object.
        gains: dAP per class (K,) in percent, by type in `TYPES` and `SPECIAL`; NaN for classes
            without objects. The AP of a class is 100 if the fix removes all its objects.
        total: dAP of the mean over classes, by type. As in tidecv, the mean includes classes that
            have detections but no objects, with an AP of 0; COCO's AP50 excludes such classes.
    """

    counts: dict[str, np.ndarray]
    gains: dict[str, np.ndarray]
    total: dict[str, float]


def overlaps_of(comparison: Comparison) -> Overlaps:
    """Return the overlaps of all detections and objects of a comparison."""
    matches = comparison.matches
    images = np.arange(len(matches.image_ids) + 1)
    sides = []
    for items, image in (
        (comparison.detections, matches.image),
        (comparison.objects, matches.object_image),
    ):
        if matches.kind == "bbox":
            forms = np.array([item["bbox"] for item in items], float).reshape(-1, 4)
        else:
            forms = np.array([item["rle"] for item in items], object)
        order = np.argsort(image, kind="stable")
        sides.append((forms, order, np.searchsorted(image[order], images)))
    pairs = [(np.zeros(0, int), np.zeros(0, int), np.zeros(0))]
    for image in images[:-1]:
        rows, columns = (order[starts[image] : starts[image + 1]] for _, order, starts in sides)
        if len(rows) and len(columns):
            found, targets = sides[0][0][rows], sides[1][0][columns]
            if matches.kind == "segm":
                found, targets = found.tolist(), targets.tolist()
            ious = np.asarray(rle.iou(found, targets, [0] * len(columns)))
            here, there = np.nonzero(ious >= BACKGROUND)
            pairs.append((rows[here], columns[there], ious[here, there]))
    return Overlaps(*(np.concatenate(parts) for parts in zip(*pairs, strict=True)))


def errors_of(matches: Matches, overlaps: Overlaps, rank: np.ndarray) -> Errors:
    """Return the errors; detections of equal score are sorted by ascending `rank` (N,)."""
    classes = len(matches.category_ids)
    types, target = _types(matches, overlaps)
    counted, matched = ~matches.ignored[:, 0], matches.matched[:, 0]
    used = np.zeros(len(matches.object_image), bool)
    used[matches.found[matches.found >= 0]] = True
    # for each unmatched object, the detection that, if corrected, would become its true positive
    fixable = np.flatnonzero(target >= 0)
    fixable = fixable[~used[target[fixable]]]
    order = fixable[np.lexsort((rank[fixable], -matches.score[fixable], target[fixable]))]
    reachable, first = np.unique(target[order], return_index=True)
    fixed = np.zeros(len(target), bool)
    fixed[order[first]] = True
    missed = ~used
    missed[reachable] = False

    def per_class(category: np.ndarray) -> np.ndarray:
        return np.bincount(category, minlength=classes)

    objects = per_class(matches.object_category)
    category, score, true = matches.category[counted], matches.score[counted], matched[counted]
    before, mean = _ap50(category, score, true, objects)
    counts, after = {}, {}
    for number, name in enumerate(TYPES[:-1]):
        wrong = types == number
        counts[name] = per_class(matches.category[wrong & counted])
        changed = wrong & fixed
        kept = (counted & ~wrong) | changed
        new_category = matches.category.copy()
        new_category[changed] = matches.object_category[target[changed]]
        true_after, score_after = (matched | changed)[kept], matches.score[kept]
        after[name] = _ap50(new_category[kept], score_after, true_after, objects)
    counts["missed"] = per_class(matches.object_category[missed])
    for name, removed in (("missed", missed), ("false_negative", ~used)):
        left = objects - per_class(matches.object_category[removed])
        after[name] = _ap50(category, score, true, left)
    after["false_positive"] = _ap50(category, true.astype(float), true, objects)
    gains, total = {}, {}
    for name in (*TYPES, *SPECIAL):
        aps, mean_after = after[name]
        emptied = np.isnan(aps) & ~np.isnan(before)
        gains[name] = np.maximum(np.where(emptied, 100.0, aps) - before, 0)
        total[name] = max(mean_after - mean, 0.0)
    return Errors(counts, gains, total)


def _types(matches: Matches, overlaps: Overlaps) -> tuple[np.ndarray, np.ndarray]:
    """Return each detection's error type (N,) as an index into TYPES, and the object (N,) of a
    localization or classification error; -1 means no error or no object, respectively.
    """
    same = matches.category[overlaps.detection] == matches.object_category[overlaps.target]
    used = np.isin(overlaps.target, matches.found)
    count = len(matches.score)
    same_iou, nearest_same = _best(overlaps, same, count)
    other_iou, nearest_other = _best(overlaps, ~same, count)
    used_iou, _ = _best(overlaps, same & used, count)
    conditions = {
        "true": matches.matched[:, 0],
        "localization": (same_iou >= BACKGROUND) & (same_iou <= FOREGROUND),
        "classification": other_iou >= FOREGROUND,
        "duplicate": used_iou >= FOREGROUND,
        "background": np.maximum(same_iou, other_iou) <= BACKGROUND,
    }
    numbers = [TYPES.index(name) if name in TYPES else -1 for name in conditions]
    types = np.select(list(conditions.values()), numbers, TYPES.index("both"))
    target = np.full(count, -1)
    for name, objects in (("localization", nearest_same), ("classification", nearest_other)):
        chosen = types == TYPES.index(name)
        target[chosen] = objects[chosen]
    return types, target


def _best(overlaps: Overlaps, chosen: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each detection's largest IoU (N,) among the chosen pairs, and the object (N,) of that
    pair; 0 and -1 if there is no pair.
    """
    detection, target = overlaps.detection[chosen], overlaps.target[chosen]
    iou = overlaps.iou[chosen]
    order = np.lexsort((target, -iou, detection))
    paired, start = np.unique(detection[order], return_index=True)
    best, nearest = np.zeros(count), np.full(count, -1)
    best[paired], nearest[paired] = iou[order[start]], target[order[start]]
    return best, nearest


def _ap50(
    category: np.ndarray, score: np.ndarray, true: np.ndarray, objects: np.ndarray
) -> tuple[np.ndarray, float]:
    """Return AP50 of each class (K,) in percent, NaN without objects, and the mean over classes as
    described in `Errors.total`.

    Args:
        category, score, true: each detection's class, score, and whether it is a true positive.
        objects: (K,), number of objects of each class.
    """
    order = np.lexsort((-score, category))
    ends = np.searchsorted(category[order], np.arange(len(objects) + 1))
    aps = np.full(len(objects), np.nan)
    for index in np.flatnonzero(objects > 0):
        hits = true[order[ends[index] : ends[index + 1]], None]
        aps[index] = 100 * precisions(hits, ~hits, objects[index], RECALLS).mean()
    detected = np.bincount(category, minlength=len(objects)) > 0
    shown = np.where(np.isnan(aps) & detected, 0, aps)
    return aps, 0.0 if np.isnan(shown).all() else float(np.nanmean(shown))
