"""Evaluation analysis: metrics agree with AP, and with the expected values of small cases."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from tests.evaluation.test_errors import detection, scene
from tests.helpers.random_results import random_set
from vitdet.evaluation import coco, lvis
from vitdet.evaluation.analysis import Threshold, analyse
from vitdet.evaluation.results import Truth

CAT, DOG = (1, [10, 10, 20, 20]), (2, [60, 60, 20, 20])


def analysed(truth, results, kind="bbox", rules=coco):
    comparison = rules.compare(truth, results, [kind])
    return analyse(kind, comparison[kind], rules.summary(comparison), truth)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("rules", [coco, lvis])
def test_an_analysis_of_random_results_is_consistent(kind, rules):
    truth, results = random_set(2, lvis=rules is lvis)
    found = analysed(truth, results, kind, rules)
    known = [row for row in found.classes if row.objects]
    for name in ("ap", "ap50", "ap75"):
        assert np.mean([getattr(row, name) for row in known]) == pytest.approx(found.metrics[name])
    assert 100 * np.mean(found.curves["0.5"]) == pytest.approx(found.metrics["ap50"], abs=0.01)
    assert 100 * np.mean(found.curves["mean"]) == pytest.approx(found.metrics["ap"], abs=0.01)
    assert all(100 * np.mean(row.curve) == pytest.approx(row.ap50, abs=0.06) for row in known)
    assert sum(row.error_counts["missed"] for row in known) == found.error_counts["missed"]
    best = found.best_threshold
    assert best in found.thresholds and best.f1 == max(row.f1 for row in found.thresholds)
    matrix = np.array(found.confusion.matrix)
    assert matrix[:-1].sum() == sum(row.objects for row in found.classes)
    assert found.confusion.names[-1] == "background" and matrix[-1, -1] == 0
    assert np.trace(matrix) == pytest.approx(best.recall * matrix[:-1].sum())
    assert np.trace(matrix) == pytest.approx(best.precision * matrix[:, :-1].sum())
    assert [row.f1 for row in found.worst] == sorted(row.f1 for row in found.worst)
    assert found.best[0].f1 == max(row.f1 for row in found.best) > found.worst[0].f1
    json.dumps(asdict(found), allow_nan=False)


def test_thresholds_and_images_count_true_positives():
    truth = scene(CAT, DOG)
    results = [detection(1, CAT[1], 0.8), detection(1, [10, 60, 20, 20], 0.6)]
    results += [detection(2, DOG[1], 0.4), detection(2, [60, 10, 20, 20], 0.2)]
    found = analysed(truth, results)
    cat, dog = found.classes
    assert cat.best_threshold == Threshold(0.8, 1, 1, 1)
    assert (dog.best_threshold, dog.images) == (Threshold(0.4, 1, 1, 1), 1)
    at = {row.score: (row.precision, row.recall) for row in found.thresholds}
    assert at[0.9] == (1, 0) and at[0.7] == (1, 0.5) and at[0.6] == (0.5, 0.5)
    assert at[0.3] == (2 / 3, 1) and at[0.1] == (0.5, 1)
    assert found.best_threshold.score == 0.4
    assert found.worst == found.best
    image = found.worst[0]
    assert (image.objects, image.detections, image.missed, image.false_positives) == (2, 3, 0, 1)
    assert image.f1 == pytest.approx(0.8)


def test_the_confusion_matrix_matches_boxes_across_classes():
    found = analysed(scene(CAT, DOG), [detection(1, CAT[1], 0.9), detection(1, DOG[1], 0.9)])
    assert found.confusion.names == ["cat", "dog", "background"]
    assert found.confusion.matrix == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert found.classes[1].main_error == "classification"


def test_the_most_confused_of_many_classes_are_shown():
    truth = scene((1, CAT[1]), (40, DOG[1]))
    names = {number: {"id": number, "name": f"class {number}"} for number in range(1, 51)}
    truth = Truth(truth.path, truth.images, names, truth.objects)
    confusion = analysed(truth, [detection(45, DOG[1], 0.9), detection(1, CAT[1], 0.9)]).confusion
    assert confusion.classes == 50 and len(confusion.names) == 31
    assert {"class 40", "class 45"} <= set(confusion.names)
    assert np.sum(confusion.matrix) == 2


@pytest.mark.parametrize(
    ("objects", "results"), [((), []), ((CAT,), []), ((), [detection(1, CAT[1], 0.9)])]
)
def test_an_analysis_without_matches_has_no_best_threshold(objects, results):
    found = analysed(scene(*objects), results)
    assert found.best_threshold is None and found.classes[0].best_threshold is None
    assert bool(found.thresholds) == bool(objects) and bool(found.curves) == bool(objects)
    assert found.classes[0].main_error == ("missed" if objects else None)
    json.dumps(asdict(found), allow_nan=False)
