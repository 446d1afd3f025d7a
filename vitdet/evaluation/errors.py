"""Why AP50 is not 100: the error types of TIDE (Bolya et al. 2020, arXiv:2008.08115) and what each of them costs.

A detection that matches no object at IoU 0.5 has the first of these errors that applies (t_f = 0.5, t_b = 0.1):
localisation: its best IoU with an object of its class is in [t_b, t_f]; classification: it has IoU >= t_f with an
object of another class; duplicate: it has IoU >= t_f with an object of its class that a detection of higher score
matches; background: its IoU with all objects is at most t_b; both: the rest, of the wrong class and badly placed.
missed: objects that no detection matches and that no localisation or classification error is about.

dAP is the increase of AP50 when all errors of one type are fixed. Fixed, a detection with a localisation or
classification error becomes a true positive of its object, if that is not found yet and if no other such detection of
the object has a higher score; otherwise, and with another error, it is removed. Missed objects are taken out of the
count of objects. false_positive: all true positives come before all false positives; false_negative: all objects that
are not found are taken out of the count.
What is ignored in AP takes part as in the package tidecv: it can be a localisation or classification error, whose fix
adds a true positive, but it is not counted and no other fix changes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vitdet.evaluation.matches import Matches, precisions
from vitdet.evaluation.overlaps import Overlaps

FOREGROUND, BACKGROUND = 0.5, 0.1  # t_f, t_b
TYPES = ("classification", "localisation", "both", "duplicate", "background", "missed")
SPECIAL = ("false_positive", "false_negative")
# As in tidecv: some differ from COCO's, of np.linspace, in the last bit, so that a recall of exactly 0.07 or the
# like reaches one and not the other.
RECALLS = np.arange(101) / 100


@dataclass(frozen=True)
class Errors:
    """The errors of one kind; the letters as of `vitdet.evaluation.matches`.

    counts: per type of `TYPES`, errors per class (K,): of the class of the detection, or of the missed object.
    gains: per type of `TYPES` and `SPECIAL`, dAP per class (K,) in percent, NaN for classes without objects. A class
    of which every object is taken out of the count has AP 100 after the fix.
    total: the same for the mean of the classes. As in tidecv a class without objects has AP 0 in this mean if it has
    detections that count, before or after the fix, and is not part of it otherwise; COCO's AP50 never counts it.
    """

    counts: dict[str, np.ndarray]
    gains: dict[str, np.ndarray]
    total: dict[str, float]


@dataclass(frozen=True)
class _Rows:
    """Detections that count, with the number of objects per class (K,); AP50 follows from it."""

    category: np.ndarray
    score: np.ndarray
    true: np.ndarray
    objects: np.ndarray

    def aps(self) -> np.ndarray:
        """AP50 of each class in percent, NaN without objects."""
        order = np.lexsort((-self.score, self.category))
        ends = np.searchsorted(self.category[order], np.arange(len(self.objects) + 1))
        aps = np.full(len(self.objects), np.nan)
        for one in np.flatnonzero(self.objects > 0):
            true = self.true[order[ends[one] : ends[one + 1]], None]
            aps[one] = 100 * precisions(true, ~true, self.objects[one], RECALLS).mean()
        return aps


def errors_of(matches: Matches, overlaps: Overlaps, rank: np.ndarray) -> Errors:
    """Return the errors of these matches. rank (N,): which of two detections of equal score comes first."""
    classes = len(matches.category_ids)
    types, target = _types(matches, overlaps)
    counted = ~matches.ignored[:, 0]
    used = np.zeros(len(matches.object_image), bool)
    used[matches.found[matches.found >= 0]] = True
    # the detection that becomes the true positive of each object that is not used
    open_ = np.flatnonzero(target >= 0)
    open_ = open_[~used[target[open_]]]
    order = open_[np.lexsort((rank[open_], -matches.score[open_], target[open_]))]
    reachable, first = np.unique(target[order], return_index=True)
    fixed = np.zeros(len(target), bool)
    fixed[order[first]] = True
    missed = ~used
    missed[reachable] = False

    objects = np.bincount(matches.object_category, minlength=classes)
    rows = _Rows(
        matches.category[counted], matches.score[counted], matches.matched[counted, 0], objects
    )
    after = {}
    for number, name in enumerate(TYPES[:-1]):
        wrong = types == number
        kept = (counted & ~wrong) | (wrong & fixed)
        category = matches.category.copy()
        changed = wrong & fixed
        category[changed] = matches.object_category[target[changed]]
        true = matches.matched[:, 0] | changed
        after[name] = _Rows(category[kept], matches.score[kept], true[kept], objects)
    for name, taken in (("missed", missed), ("false_negative", ~used)):
        left = objects - np.bincount(matches.object_category[taken], minlength=classes)
        after[name] = _Rows(rows.category, rows.score, rows.true, left)
    after["false_positive"] = _Rows(rows.category, rows.true.astype(float), rows.true, objects)

    counts = {
        name: np.bincount(matches.category[(types == number) & counted], minlength=classes)
        for number, name in enumerate(TYPES[:-1])
    }
    counts["missed"] = np.bincount(matches.object_category[missed], minlength=classes)
    return Errors(counts, *_gains(rows, after))


def _types(matches: Matches, overlaps: Overlaps) -> tuple[np.ndarray, np.ndarray]:
    """The type (N,) of each detection as index into TYPES, -1 without an error; and the object (N,) that a
    localisation or classification error is about, otherwise -1.
    """
    same = matches.category[overlaps.detection] == matches.object_category[overlaps.target]
    used = np.isin(overlaps.target, matches.found)
    count = len(matches.score)
    own, nearest = _best(overlaps, same, count)
    other, nearest_other = _best(overlaps, ~same, count)
    taken, _ = _best(overlaps, same & used, count)
    conditions = {
        "true": matches.matched[:, 0],
        "localisation": (own >= BACKGROUND) & (own <= FOREGROUND),
        "classification": other >= FOREGROUND,
        "duplicate": taken >= FOREGROUND,
        "background": np.maximum(own, other) <= BACKGROUND,
    }
    numbers = [TYPES.index(name) if name in TYPES else -1 for name in conditions]
    types = np.select(list(conditions.values()), numbers, TYPES.index("both"))
    target = np.full(count, -1)
    for name, objects in (("localisation", nearest), ("classification", nearest_other)):
        chosen = types == TYPES.index(name)
        target[chosen] = objects[chosen]
    return types, target


def _best(overlaps: Overlaps, chosen: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest IoU (N,) of each detection among the chosen pairs, 0 without one, and its object, -1."""
    detection, target, iou = (
        overlaps.detection[chosen],
        overlaps.target[chosen],
        overlaps.iou[chosen],
    )
    order = np.lexsort((target, -iou, detection))
    first, place = np.unique(detection[order], return_index=True)
    best, nearest = np.zeros(count), np.full(count, -1)
    best[first], nearest[first] = iou[order[place]], target[order[place]]
    return best, nearest


def _gains(
    rows: _Rows, after: Mapping[str, _Rows]
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    before, start = rows.aps(), _mean(rows)
    gains, total = {}, {}
    for name in (*TYPES, *SPECIAL):
        aps = after[name].aps()
        emptied = np.isnan(aps) & ~np.isnan(before)
        gains[name] = np.maximum(np.where(emptied, 100.0, aps) - before, 0)
        total[name] = max(_mean(after[name]) - start, 0.0)
    return gains, total


def _mean(rows: _Rows) -> float:
    aps, detections = rows.aps(), np.bincount(rows.category, minlength=len(rows.objects))
    aps[np.isnan(aps) & (detections > 0)] = 0
    return 0.0 if np.isnan(aps).all() else float(np.nanmean(aps))
