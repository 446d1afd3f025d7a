"""Confidence intervals of AP by the bootstrap (Efron 1979).

A resample consists of I images, drawn with replacement from the I evaluated images. The spread of
AP over many resamples shows how much AP depends on the choice of images. Detections are matched
within images, so a resample needs no new matching: it only changes the images' weights.
`WeightedAP` computes AP for given weights, `bootstrap` for random resamples.

Several results are evaluated on the same resamples (paired bootstrap). Images that are difficult
for all detectors lower the AP of each detector but hardly change the differences between detectors,
which therefore have narrower intervals.

Notation: I images, N detections, K classes, T IoU thresholds, P true positives over all thresholds,
R resamples, M = 3 metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vitdet.evaluation.matches import IOUS, RECALLS, Matches

METRICS = ("ap", "ap50", "ap75")
RESAMPLES = 1000
CONFIDENCE = 0.95
# Minimum number of images with objects for a significance test: with fewer, the intervals are far
# too narrow (Hesterberg 2015, arXiv:1411.5279); with a single image, they have zero width.
MIN_IMAGES = 10


class WeightedAP:
    """Compute AP with a weight per image.

    The result is COCO's AP on a data set that contains image i and its detections weights[i] times;
    detections of equal score are sorted by image.

    The detections are sorted once, by class and descending score. For given weights, the precision
    at a detection is TP / (TP + FP), where TP and FP are the total weights of the true and false
    positives of its class up to this detection. COCO's interpolation uses the highest precision at
    each recall or above, which always occurs at a true positive. Precision is therefore computed
    only at true positives, in arrays (P,) with a segment for each IoU threshold and class.
    """

    def __init__(self, matches: Matches) -> None:
        order = np.lexsort((matches.image, -matches.score, matches.category))
        category = matches.category[order]
        self._classes = len(matches.category_ids)
        self._object_image = matches.object_image
        self._object_category = matches.object_category
        self._image = matches.image[order]
        # for each true positive: its detection, image, first detection of the class, and segment
        level, self._detection = np.nonzero(matches.matched[order].T)
        self._true_image = self._image[self._detection]
        true_category = category[self._detection]
        self._first = np.searchsorted(category, np.arange(self._classes))[true_category]
        segment = level * self._classes + true_category
        segments = len(IOUS) * self._classes
        self._starts = np.searchsorted(segment, np.arange(segments + 1))
        self._segment_start = self._starts[segment]
        # added to precision, so that one maximum.accumulate processes all segments separately
        self._offset = 2.0 * (segments - segment)
        # ignored detections: their images, and how many precede each true positive and its `_first`
        ignored_level, ignored = np.nonzero(matches.ignored[order].T)
        self._ignored_image = self._image[ignored]
        keys, start = ignored_level * len(order) + ignored, level * len(order)
        self._ignored_before = np.searchsorted(keys, start + self._detection)
        self._ignored_first = np.searchsorted(keys, start + self._first)

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """Return AP, AP50 and AP75 in percent, (M, 1 + K): the mean over classes, then each class.

        weights: (I,) integers. As in COCO, the mean excludes classes without objects; their AP is
        NaN.
        """
        objects = np.bincount(
            self._object_category, weights[self._object_image], minlength=self._classes
        )
        detections = _cumulative(weights[self._image])
        ignored = _cumulative(weights[self._ignored_image])
        found = _cumulative(weights[self._true_image])
        counted = detections[self._detection + 1] - detections[self._first]
        counted -= ignored[self._ignored_before] - ignored[self._ignored_first]
        precision = (found[1:] - found[self._segment_start]) / np.maximum(counted, 1)
        envelope = np.maximum.accumulate((precision + self._offset)[::-1])[::-1] - self._offset
        # index of the first true positive that reaches each recall, (T, K, 101)
        starts = self._starts[:-1].reshape(len(IOUS), self._classes, 1)
        ends = self._starts[1:].reshape(starts.shape)
        index = np.searchsorted(found[1:], found[starts] + _needed(objects))
        reached = index < ends
        curves = np.where(reached, np.append(envelope, 0.0)[np.where(reached, index, -1)], 0.0)
        by_class = 100 * curves.mean(2)
        by_class[:, objects == 0] = np.nan
        chosen = np.stack([by_class.mean(0), by_class[0], by_class[IOUS.tolist().index(0.75)]])
        mean = chosen[:, objects > 0].mean(1, keepdims=True) if objects.any() else chosen[:, :1]
        return np.concatenate([mean, chosen], axis=1)


@dataclass(frozen=True)
class Interval:
    """A value and its confidence interval, in percent."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """A difference between two results, its paired interval and two-sided bootstrap p-value.

    images: number of images with objects (of the class, if only one class is compared).
    """

    p: float
    images: int

    @property
    def is_significant(self) -> bool | None:
        """Whether the interval excludes 0; None if fewer than MIN_IMAGES images have objects."""
        return None if self.images < MIN_IMAGES else not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Resampled:
    """AP, AP50 and AP75 of a result in percent.

    Attributes:
        images: (1 + K,), number of images with objects of any class, then of each class.
        value: (M, 1 + K), metrics on the original images, as returned by `WeightedAP`.
        resampled: (R, M, 1 + K), metrics on each resample.
    """

    class_names: tuple[str, ...]
    images: np.ndarray
    value: np.ndarray
    resampled: np.ndarray

    def interval(self, metric: str = "ap", class_index: int | None = None) -> Interval | None:
        """Return a metric and its interval, by default for all classes; None without objects."""
        column = _column(metric, class_index)
        if np.isnan(self.value[column]):
            return None
        return Interval(float(self.value[column]), *_limits(self.resampled[:, *column], CONFIDENCE))

    def difference(
        self,
        first: Resampled,
        metric: str = "ap",
        class_index: int | None = None,
        *,
        confidence: float = CONFIDENCE,
    ) -> Difference | None:
        """Return the metric of this result minus that of `first`; None without objects.

        The interval is the percentile interval of the paired differences, over the resamples with
        objects. For d differences, p = min(1, 2 (n + 1) / (d + 1)), where n is the smaller of the
        numbers of differences <= 0 and >= 0 (Davison & Hinkley 1997, eq. 4.11).
        """
        column = _column(metric, class_index)
        if np.isnan(self.value[column]):
            return None
        differences = (self.resampled - first.resampled)[:, *column]
        differences = differences[~np.isnan(differences)]
        rarer = min((differences <= 0).sum(), (differences >= 0).sum())
        return Difference(
            float(self.value[column] - first.value[column]),
            *_limits(differences, confidence),
            p=min(1.0, 2 * float(rarer + 1) / (len(differences) + 1)),
            images=int(self.images[column[1]]),
        )


def bootstrap(
    results: Sequence[Matches], resamples: int = RESAMPLES, seed: int = 0
) -> list[Resampled]:
    """Return each result's AP on the same random resamples of the validation images.

    Raises ValueError if the images, classes or objects of the results differ.
    """
    for other in results[1:]:
        _check_same(results[0], other)
    weighted_aps = [WeightedAP(result) for result in results]
    images = len(results[0].image_ids)
    tables: list[list[np.ndarray]] = [[] for _ in results]
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        drawn = rng.integers(images, size=images)
        weights = np.bincount(drawn, minlength=images).astype(np.int32)
        for table, weighted_ap in zip(tables, weighted_aps, strict=True):
            table.append(weighted_ap(weights))
    ones = np.ones(images, np.int32)
    return [
        Resampled(result.class_names, _images(result), weighted_ap(ones), np.stack(table))
        for result, weighted_ap, table in zip(results, weighted_aps, tables, strict=True)
    ]


def _check_same(first: Matches, other: Matches) -> None:
    for what, ours, theirs in (
        ("images", first.image_ids, other.image_ids),
        ("classes", first.category_ids, other.category_ids),
        ("objects", _objects(first), _objects(other)),
    ):
        if not np.array_equal(ours, theirs):
            which = ", which differ" if len(ours) == len(theirs) else ""
            raise ValueError(
                f"the results are from different validation data: {len(ours)} and {len(theirs)} "
                f"{what}{which}; evaluate all results on the same data"
            )


def _objects(matches: Matches) -> np.ndarray:
    """Return the sorted keys image * K + class of all objects."""
    keys = matches.object_image.astype(np.int64) * len(matches.category_ids)
    return np.sort(keys + matches.object_category)


def _images(matches: Matches) -> np.ndarray:
    """Return the number of images with objects of any class, then of each class, (1 + K,)."""
    classes = len(matches.category_ids)
    pairs = np.unique(_objects(matches))
    of_class = np.bincount(pairs % classes, minlength=classes)
    return np.append(len(np.unique(pairs // classes)), of_class)


def _cumulative(values: np.ndarray) -> np.ndarray:
    """Return the sums of the first 0, 1, 2, ... values."""
    sums = np.zeros(len(values) + 1, np.int32)
    np.cumsum(values, out=sums[1:])
    return sums


def _needed(objects: np.ndarray) -> np.ndarray:
    """Return the number of true positives needed for each recall, (K, 101) int32, at least 1.

    It is the smallest n for which n / objects, in float64 as in pycocotools, reaches the recall.
    """
    count = np.maximum(objects, 1.0)[:, None]
    needed = np.ceil(RECALLS * count)
    needed -= (needed - 1) / count >= RECALLS
    needed += needed / count < RECALLS
    return np.maximum(needed, 1).astype(np.int32)


def _column(metric: str, class_index: int | None) -> tuple[int, int]:
    return METRICS.index(metric), 0 if class_index is None else 1 + class_index


def _limits(samples: np.ndarray, confidence: float) -> tuple[float, float]:
    """Return the percentile interval of the samples, ignoring NaN."""
    known = samples[~np.isnan(samples)]
    if not len(known):  # no resample contains an image with objects of the class
        return -np.inf, np.inf
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    # with few samples, the intervals of numpy's default method are too narrow
    low, high = np.quantile(known, tails, method="weibull")
    return float(low), float(high)
