"""Confidence intervals of AP by resampling the images (bootstrap, Efron 1979), without matching again.

Detections are matched image by image, so a data set with resampled images has the same matches, each
as often as its image was drawn. AP is therefore computed with integer weights per image: detections
are sorted once by class and score; per resample, cumulative sums of the weights yield precision and
recall at the true positives, which are all that COCO's 101-point interpolation depends on.

Results are compared on the same resamples (paired): what both find hard cancels in the difference.
Letters: I images, N detections, K classes, T IoU thresholds, P true positives of all thresholds,
R resamples, M = 3 metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vitdet.evaluation.matches import IOUS, RECALLS, Matches

METRICS = ("ap", "ap50", "ap75")
RESAMPLES = 1000
CONFIDENCE = 0.95
# Images with objects: intervals from resamples of fewer are far too narrow (Hesterberg 2015,
# arXiv:1411.5279), of a single image they have no width.
MIN_IMAGES = 10


class WeightedAP:
    """AP of matched detections where image i counts weights[i] times.

    Equal to COCO's AP on a data set in which image i is contained weights[i] times with the same
    detections. Among detections of equal score those of an earlier image come first.
    """

    def __init__(self, matches: Matches) -> None:
        order = np.lexsort((matches.image, -matches.score, matches.category))
        image, category = matches.image[order], matches.category[order]
        self._classes = len(matches.category_ids)
        self._object_image = matches.object_image
        self._object_category = matches.object_category
        self._image = image
        first = np.searchsorted(category, np.arange(self._classes))  # detection of each class
        # true positives by threshold, then class, then score
        level, self._place = np.nonzero(matches.matched[order].T)
        self._true_image = image[self._place]
        self._first = first[category[self._place]]
        segment = level * self._classes + category[self._place]
        count = len(IOUS) * self._classes
        self._starts = np.searchsorted(segment, np.arange(count + 1))
        self._segment_start = self._starts[segment]
        # makes segments disjoint and falling, so that one accumulation does not mix them
        self._offset = 2.0 * (count - segment)
        ignored_level, ignored_place = np.nonzero(matches.ignored[order].T)
        self._ignored_image = image[ignored_place]
        keys, start = ignored_level * len(order) + ignored_place, level * len(order)
        self._ignored_before = np.searchsorted(keys, start + self._place)
        self._ignored_first = np.searchsorted(keys, start + self._first)

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """Return AP, AP50 and AP75 in percent, (M, 1 + K): the mean over classes, then each class.

        weights: (I,) integers. NaN for a class without objects, which is not part of the mean, as in COCO.
        """
        objects = np.bincount(
            self._object_category, weights[self._object_image], minlength=self._classes
        )
        detections = _cumulative(weights[self._image])
        ignored = _cumulative(weights[self._ignored_image])
        found = _cumulative(weights[self._true_image])
        counted = detections[self._place + 1] - detections[self._first]
        counted -= ignored[self._ignored_before] - ignored[self._ignored_first]
        true = found[1:] - found[self._segment_start]
        precision = true / np.maximum(counted, 1)
        envelope = np.maximum.accumulate((precision + self._offset)[::-1])[::-1] - self._offset
        # the true positive that reaches each recall, (T, K, 101)
        starts = self._starts[:-1].reshape(len(IOUS), self._classes, 1)
        ends = self._starts[1:].reshape(starts.shape)
        place = np.searchsorted(found[1:], found[starts] + _needed(objects))
        reached = place < ends
        curves = np.where(reached, np.append(envelope, 0.0)[np.where(reached, place, -1)], 0.0)
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
    """A difference of two results with its paired interval, and the two-sided bootstrap p-value.

    images: those with an object that counts.
    """

    p: float
    images: int

    @property
    def is_significant(self) -> bool | None:
        """Whether the interval excludes 0; None with fewer than MIN_IMAGES images with objects."""
        return None if self.images < MIN_IMAGES else not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Resampled:
    """AP, AP50 and AP75 of a result in percent: on the images, and on each resample.

    value (M, 1 + K) and resampled (R, M, 1 + K) as returned by `WeightedAP`. images (1 + K,): those
    with objects, of any class and of each.
    """

    class_names: tuple[str, ...]
    images: np.ndarray
    value: np.ndarray
    resampled: np.ndarray

    def interval(self, metric: str = "ap", class_index: int | None = None) -> Interval | None:
        """Return a metric with its interval, of one class or of all; None for a class without objects."""
        column = self._column(metric, class_index)
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
        """Return by how much this result is better than `first`; None for a class without objects.

        The interval is the percentile interval of the paired differences in the resamples with objects. p is twice the share of
        resamples without a difference of this sign (Davison & Hinkley 1997, eq. 4.11), at most 1.
        """
        column = self._column(metric, class_index)
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

    @staticmethod
    def _column(metric: str, class_index: int | None) -> tuple[int, int]:
        return METRICS.index(metric), 0 if class_index is None else 1 + class_index


def bootstrap(
    results: Sequence[Matches], resamples: int = RESAMPLES, seed: int = 0
) -> list[Resampled]:
    """Resample the images of results of the same validation data, all with the same resamples.

    Raises ValueError if they have other images, classes or objects.
    """
    for other in results[1:]:
        _check_same(results[0], other)
    measured = [WeightedAP(one) for one in results]
    every = np.ones(len(results[0].image_ids), np.int32)
    tables = [
        np.stack(table)
        for table in zip(
            *(
                [ap(weights) for ap in measured]
                for weights in _weights(len(every), resamples, seed)
            ),
            strict=True,
        )
    ]
    return [
        Resampled(one.class_names, _images(one), ap(every), table)
        for one, ap, table in zip(results, measured, tables, strict=True)
    ]


def _weights(images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is drawn in a resample of as many images."""
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        drawn = rng.integers(images, size=images)
        yield np.bincount(drawn, minlength=images).astype(np.int32)


def _check_same(first: Matches, other: Matches) -> None:
    for what, ours, theirs in (
        ("images", first.image_ids, other.image_ids),
        ("classes", first.category_ids, other.category_ids),
        ("objects", _objects(first), _objects(other)),
    ):
        if not np.array_equal(ours, theirs):
            raise ValueError(
                f"the results are of different validation data: {len(ours)} and {len(theirs)} {what}"
                f"{'' if len(ours) != len(theirs) else ', not the same ones'}; evaluate them on the same data"
            )


def _objects(matches: Matches) -> np.ndarray:
    keys = matches.object_image.astype(np.int64) * len(matches.category_ids)
    return np.sort(keys + matches.object_category)


def _images(matches: Matches) -> np.ndarray:
    """The number of images with objects, of any class and of each, (1 + K,)."""
    classes = len(matches.category_ids)
    pairs = np.unique(_objects(matches))
    of_class = np.bincount(pairs % classes, minlength=classes)
    return np.append(len(np.unique(pairs // classes)), of_class)


def _cumulative(values: np.ndarray) -> np.ndarray:
    """Sums of the first 0, 1, 2, ... values."""
    sums = np.zeros(len(values) + 1, np.int32)
    np.cumsum(values, out=sums[1:])
    return sums


def _needed(objects: np.ndarray) -> np.ndarray:
    """True positives needed for each recall, (K, 101) int32, at least 1.

    The smallest number whose quotient, as computed by pycocotools in float64, reaches the recall.
    """
    count = np.maximum(objects, 1.0)[:, None]
    needed = np.ceil(RECALLS * count)
    needed -= (needed - 1) / count >= RECALLS
    needed += needed / count < RECALLS
    return np.maximum(needed, 1).astype(np.int32)


def _limits(samples: np.ndarray, confidence: float) -> tuple[float, float]:
    """The percentile interval of samples, of which some may be NaN."""
    known = samples[~np.isnan(samples)]
    if not len(known):  # a class whose few images no resample contains
        return -np.inf, np.inf
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(known, tails, method="weibull")  # too narrow otherwise with few samples
    return float(low), float(high)
