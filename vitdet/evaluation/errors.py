"""The error types of TIDE (Bolya et al. 2020, arXiv:2008.08115) and their effect on AP50.

A detection that matches no object at IoU 0.5 has the first of these types that applies, with
t_f = 0.5 and t_b = 0.1:

- localization: its best IoU with an object of its class is in [t_b, t_f]
- classification: IoU >= t_f with an object of another class
- duplicate: IoU >= t_f with an object of its class that a detection of higher score matches
- background: IoU <= t_b with all objects
- both: all others, i.e. wrong class and IoU below t_f

missed: objects without a matching detection and without a localization or classification error.

dAP is the increase of AP50 when all errors of one type are fixed. A detection with a localization
or classification error becomes a true positive of its object, unless the object is matched or
another such detection of it has a higher score; then, as with other types, it is removed. Missed
objects are not counted as objects. false_positive: all true positives come before all false
positives. false_negative: no object without a true positive counts.

As in the package tidecv, detections that AP ignores can have localization and classification
errors, whose fix adds a true positive; they are not counted, and no other fix changes them.
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
# As in tidecv: some differ in the last bit from COCO's thresholds (np.linspace), so that a recall
# of exactly 0.07, for example, reaches one threshold but not the other.
RECALLS = np.arange(101) / 100


@dataclass(frozen=True)
class Overlaps:
    """Pairs (P,) of a detection and an object of any class in one image with IoU >= t_b.

    detection, target: indices as in `Matches`.
    """

    detection: np.ndarray
    target: np.ndarray
    iou: np.ndarray


@dataclass(frozen=True)
class Errors:
    """The errors of boxes or masks; notation as in `vitdet.evaluation.matches`.

    counts: errors of each type of `TYPES` per class (K,), of the detection or the missed object.
    gains: dAP of each type of `TYPES` and `SPECIAL` per class (K,) in percent, NaN for classes
    without objects; a class of which no object counts after the fix has AP 100.
    total: dAP of the mean of the classes. As in tidecv, a class without objects has AP 0 in this
    mean if it has detections that count; COCO's AP50 never includes it.
    """

    counts: dict[str, np.ndarray]
    gains: dict[str, np.ndarray]
    total: dict[str, float]


def overlaps_of(comparison: Comparison) -> Overlaps:
    """Return the overlaps of the boxes or masks that were compared."""
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
    """Return the errors; rank (N,): the order of detections of equal score."""
    classes = len(matches.category_ids)
    types, target = _types(matches, overlaps)
    counted, matched = ~matches.ignored[:, 0], matches.matched[:, 0]
    used = np.zeros(len(matches.object_image), bool)
    used[matches.found[matches.found >= 0]] = True
    # the detection that becomes the true positive of each object without one
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
        own = matches.category.copy()
        own[changed] = matches.object_category[target[changed]]
        after[name] = _ap50(own[kept], matches.score[kept], (matched | changed)[kept], objects)
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
    """Return the type (N,) of each detection as index into TYPES, -1 for none, and the object (N,)
    of a localization or classification error, else -1.
    """
    same = matches.category[overlaps.detection] == matches.object_category[overlaps.target]
    used = np.isin(overlaps.target, matches.found)
    count = len(matches.score)
    own, nearest = _best(overlaps, same, count)
    other, nearest_other = _best(overlaps, ~same, count)
    taken, _ = _best(overlaps, same & used, count)
    conditions = {
        "true": matches.matched[:, 0],
        "localization": (own >= BACKGROUND) & (own <= FOREGROUND),
        "classification": other >= FOREGROUND,
        "duplicate": taken >= FOREGROUND,
        "background": np.maximum(own, other) <= BACKGROUND,
    }
    numbers = [TYPES.index(name) if name in TYPES else -1 for name in conditions]
    types = np.select(list(conditions.values()), numbers, TYPES.index("both"))
    target = np.full(count, -1)
    for name, objects in (("localization", nearest), ("classification", nearest_other)):
        chosen = types == TYPES.index(name)
        target[chosen] = objects[chosen]
    return types, target


def _best(overlaps: Overlaps, chosen: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest IoU (N,) of each detection among the chosen pairs and the object of that
    pair; 0 and -1 without a pair.
    """
    detection, target = overlaps.detection[chosen], overlaps.target[chosen]
    iou = overlaps.iou[chosen]
    order = np.lexsort((target, -iou, detection))
    first, place = np.unique(detection[order], return_index=True)
    best, nearest = np.zeros(count), np.full(count, -1)
    best[first], nearest[first] = iou[order[place]], target[order[place]]
    return best, nearest


def _ap50(
    category: np.ndarray, score: np.ndarray, true: np.ndarray, objects: np.ndarray
) -> tuple[np.ndarray, float]:
    """Return AP50 of each class (K,) in percent, NaN without objects, and the mean as in
    `Errors.total`.

    category, score, true: of the detections that count. objects (K,): their number.
    """
    order = np.lexsort((-score, category))
    ends = np.searchsorted(category[order], np.arange(len(objects) + 1))
    aps = np.full(len(objects), np.nan)
    for one in np.flatnonzero(objects > 0):
        hits = true[order[ends[one] : ends[one + 1]], None]
        aps[one] = 100 * precisions(hits, ~hits, objects[one], RECALLS).mean()
    detected = np.bincount(category, minlength=len(objects)) > 0
    shown = np.where(np.isnan(aps) & detected, 0, aps)
    return aps, 0.0 if np.isnan(shown).all() else float(np.nanmean(shown))
