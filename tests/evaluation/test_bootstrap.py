"""Confidence intervals of AP over resampled images: exact AP of each resample, and the stated error rates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.helpers.random_results import random_set
from vitdet.evaluation import coco, lvis
from vitdet.evaluation.bootstrap import METRICS, WeightedAP, bootstrap
from vitdet.evaluation.matches import IOUS, Matches, precisions


class World:
    """Images with objects of random difficulty, and detectors that differ by chance and quality."""

    def __init__(self, seed: int, images: int, classes: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.images, self.classes = images, classes
        self.object_image = np.repeat(np.arange(images), self.rng.poisson(7, images))
        share = 1 / np.arange(1, classes + 1) ** 0.7
        count = len(self.object_image)
        self.object_category = self.rng.choice(classes, count, p=share / share.sum())
        self.difficulty = self.rng.normal(0, 1, count)

    def detect(self, quality: float = 0.0, noise: float = 0.3) -> Matches:
        """Return a detection per object and about 10 false ones per image; quality 0.033 is 1 AP."""
        count = len(self.object_image)
        skill = quality - self.difficulty + self.rng.normal(0, noise, count)
        iou = 1 / (1 + np.exp(-(0.9 * skill + 1.2)))
        score = 1 / (1 + np.exp(-(skill + self.rng.normal(0, noise, count))))
        false_image = np.repeat(np.arange(self.images), self.rng.poisson(10, self.images))
        false = np.zeros((len(false_image), len(IOUS)), bool)
        matched = np.concatenate([iou[:, None] >= IOUS, false])
        false_category = self.rng.choice(self.classes, len(false))
        return Matches(
            kind="bbox",
            image_ids=np.arange(self.images),
            category_ids=np.arange(self.classes),
            class_names=tuple(f"class {place}" for place in range(self.classes)),
            image=np.concatenate([self.object_image, false_image]),
            category=np.concatenate([self.object_category, false_category]),
            score=np.concatenate([score, self.rng.beta(1, 6, len(false))]),
            matched=matched,
            ignored=np.zeros_like(matched),
            found=np.full(len(matched), -1),
            object_image=self.object_image,
            object_category=self.object_category,
        )


def plain_ap(matches: Matches, weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the AP of each class, (K,) in percent, NaN without objects, and the mean without NaN.

    `weights` (I,) contains the number of copies of each image.
    """
    objects = np.bincount(
        matches.object_category, weights[matches.object_image], len(matches.category_ids)
    )
    order = np.lexsort((-matches.score, matches.category))
    ends = np.searchsorted(matches.category[order], np.arange(len(objects) + 1))
    aps = np.full(len(objects), np.nan)
    for index in np.flatnonzero(objects):
        rows = order[ends[index] : ends[index + 1]]
        weight = weights[matches.image[rows], None]
        true = matches.matched[rows]
        false = ~true & ~matches.ignored[rows]
        aps[index] = 100 * precisions(true * weight, false * weight, objects[index]).mean()
    return aps, float(np.nanmean(aps)) if objects.any() else float("nan")


@pytest.mark.parametrize("rules", [coco, lvis])
@pytest.mark.parametrize("seed", range(3))
def test_each_resample_has_the_ap_of_its_images(rules, seed: int) -> None:
    truth, results = random_set(seed, 12, 1 + 3 * seed, rules is lvis)
    for comparison in rules.compare(truth, results).values():
        matches, rng = comparison.matches, np.random.default_rng(seed)
        fast, count = WeightedAP(matches), len(matches.image_ids)
        expected = [[comparison.ap(iou) for iou in (None, 0.5, 0.75)]]
        assert fast(np.ones(count, int))[:, :1].T == pytest.approx(np.array(expected), abs=1e-9)
        for _ in range(20):
            weights = np.bincount(rng.integers(count, size=count), minlength=count)
            by_class, mean = plain_ap(matches, weights)
            np.testing.assert_allclose(fast(weights)[0], [mean, *by_class], rtol=0, atol=1e-9)


def test_a_resample_without_objects_has_no_ap() -> None:
    truth, results = random_set(0, images=4)
    matches = coco.compare(truth, results, ["bbox"])["bbox"].matches
    assert np.isnan(WeightedAP(matches)(np.zeros(4, int))).all()


@pytest.mark.parametrize(("images", "real"), [(1, None), (9, None), (10, True)])
def test_a_class_in_few_images_has_no_verdict(images: int, real: bool | None) -> None:
    """All resamples of a single image have the same difference, so the interval's width is 0."""
    places, none = np.arange(images), np.zeros((images, len(IOUS)), bool)
    worse = replace(
        World(0, 200, 2).detect(),
        image=places,
        category=np.ones(images, int),
        score=np.full(images, 0.9),
        matched=none,
        ignored=none,
        found=np.full(images, -1),
        object_image=np.concatenate([np.arange(200), places]),
        object_category=np.repeat([0, 1], [200, images]),
    )
    first, other = bootstrap([worse, replace(worse, matched=~worse.matched)], resamples=100)
    difference = other.difference(first, "ap", 1)
    assert (difference.value, difference.images) == (100.0, images)
    assert difference.is_significant is real
    assert other.difference(first).images == 200


def test_the_difference_of_equal_results_is_0() -> None:
    matches = World(0, 40, 3).detect()
    first, other = bootstrap([matches, matches], resamples=20)
    difference = other.difference(first)
    assert (difference.value, difference.low, difference.high, difference.p) == (0, 0, 0, 1)
    assert not difference.is_significant
    interval = first.interval()
    assert interval.low < interval.value < interval.high
    assert bootstrap([matches], resamples=20)[0].interval() == interval  # the seed is fixed


def test_only_the_better_class_is_significant() -> None:
    world = World(1, 300, 3)
    worse = world.detect()
    lost = (worse.category == 1) & (np.arange(len(worse.category)) % 4 == 0)
    better, worse = worse, replace(worse, matched=worse.matched & ~lost[:, None])
    first, other = bootstrap([worse, better], resamples=100)
    real = [other.difference(first, "ap50", place).is_significant for place in range(3)]
    assert real == [False, True, False]
    difference = other.difference(first)
    assert difference.is_significant and difference.value > 0
    assert difference.p == pytest.approx(2 / 101)
    assert len(METRICS) == len(other.value)


def test_a_class_without_objects_has_no_interval() -> None:
    world = World(2, 20, 2)
    world.object_category[:] = 0
    first, other = bootstrap([world.detect(), world.detect()], resamples=10)
    assert first.interval("ap", 1) is None and other.difference(first, "ap", 1) is None
    assert first.interval() == first.interval("ap", 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("image_ids", "20 and 20 images, which differ"),
        ("category_ids", "2 and 2 classes, which differ"),
        ("object_image", "objects, which differ"),
    ],
)
def test_results_of_other_data_are_refused(name: str, message: str) -> None:
    matches = World(3, 20, 2).detect()
    other = replace(matches, **{name: getattr(matches, name)[::-1] + (name != "object_image")})
    if name == "object_image":
        other = replace(matches, object_image=np.zeros_like(matches.object_image))
    with pytest.raises(ValueError, match=message):
        bootstrap([matches, other], resamples=1)


@pytest.mark.slow
def test_noise_is_not_significant_but_one_ap_is_significant() -> None:
    equal = found = 0
    for seed in range(100):
        world = World(seed, 200, 5)
        first, other = bootstrap([world.detect(), world.detect()], resamples=100, seed=seed)
        equal += not other.difference(first).is_significant
    for seed in range(10):
        world = World(seed, 1500, 5)
        first, other = bootstrap([world.detect(), world.detect(0.033)], resamples=100, seed=seed)
        found += other.difference(first).is_significant and other.difference(first).low > 0
    assert equal >= 90, equal
    assert found == 10, found
