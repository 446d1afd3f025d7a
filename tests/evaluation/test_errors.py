"""TIDE's error types, against values of tidecv 1.0.1 and in small cases."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.random_results import random_set
from vitdet.data.annotation_file import Annotation
from vitdet.evaluation import coco
from vitdet.evaluation.errors import SPECIAL, TYPES, errors_of, overlaps_of
from vitdet.evaluation.results import Truth, read_truth

# TIDE(mode=...).evaluate(...) of tidecv 1.0.1: get_main_errors() and get_special_errors() in the order of TYPES and
# SPECIAL, count_errors() in the order of TYPES. Scores are made distinct as in `distinct`, because tidecv's order of
# equal scores changes when an error is fixed.
TIDECV = {
    "bbox": (22.24976, 0.23015, 0.0, 0.01897, 0.0, 8.52595, 6.82159, 17.68773),
    "segm": (16.19295, 11.60070, 1.01801, 0.0, 0.27320, 7.78443, 8.66035, 23.75437),
}
COUNTS = {"bbox": (83, 1, 0, 1, 0, 97), "segm": (76, 82, 7, 0, 4, 109)}
# values of random_set(0, images=30, categories=5), which has crowds
TIDECV_RANDOM = {
    "bbox": (0.44311, 7.86229, 1.13263, 2.64665, 12.56040, 9.79062, 35.91610, 14.78200),
    "segm": (0.42880, 11.72800, 1.03905, 2.38479, 11.30404, 8.50197, 35.07223, 16.00311),
}


def errors(truth, results, kind="bbox"):
    comparison = coco.compare(truth, results, [kind])[kind]
    rank = np.array([detection["id"] for detection in comparison.detections], int)
    return errors_of(comparison.matches, overlaps_of(comparison), rank)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_coco_example_has_the_errors_of_tidecv(examples, kind):
    path = examples / f"instances_val2014_fake{kind}100_results.json"
    results = json.loads(path.read_text())
    truth = read_truth(examples / "instances_val2014_100.json")
    distinct = [
        item | {"score": item["score"] - 1e-7 * place} for place, item in enumerate(results)
    ]
    found = errors(truth, distinct, kind)
    gains = [found.total[name] for name in (*TYPES, *SPECIAL)]
    assert gains == pytest.approx(TIDECV[kind], abs=1e-5)
    assert tuple(found.counts[name].sum() for name in TYPES) == COUNTS[kind]
    as_stored = errors(truth, results, kind)
    assert list(as_stored.total.values()) == pytest.approx(TIDECV[kind], abs=0.01)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_random_results_with_crowds_have_the_errors_of_tidecv(kind):
    truth, results = random_set(0, images=30, categories=5)
    results = [result | {"score": 1 / (2 + place)} for place, result in enumerate(results)]
    found = errors(truth, results, kind)
    gains = [found.total[name] for name in (*TYPES, *SPECIAL)]
    assert gains == pytest.approx(TIDECV_RANDOM[kind], abs=1e-5)


def scene(*objects):
    """Return one image with these objects (class, box) of classes 1 and 2."""
    return Truth(
        Path("scene.json"),
        {1: {"id": 1, "height": 100, "width": 100}},
        {1: {"id": 1, "name": "cat"}, 2: {"id": 2, "name": "dog"}},
        [
            Annotation(number, 1, category, box, None, box[2] * box[3], 0)
            for number, (category, box) in enumerate(objects, start=1)
        ],
    )


def detection(category, box, score):
    return {"image_id": 1, "category_id": category, "bbox": box, "score": score}


CAT = (1, [10, 10, 20, 20])


@pytest.mark.parametrize(
    ("kind", "category", "box"),
    [
        ("localization", 1, [10, 22, 20, 20]),  # IoU 0.25
        ("classification", 2, [10, 10, 20, 20]),
        ("both", 2, [10, 22, 20, 20]),
        ("background", 1, [60, 60, 20, 20]),
    ],
)
def test_each_wrong_detection_has_one_error(kind, category, box):
    found = errors(scene(CAT), [detection(category, box, 0.9)])
    counts = {name: int(value.sum()) for name, value in found.counts.items() if value.sum()}
    fixable = kind in ("localization", "classification")
    assert counts == ({kind: 1} if fixable else {kind: 1, "missed": 1})
    assert found.counts[kind][category - 1] == 1
    if fixable:
        assert found.gains[kind][0] == pytest.approx(100)


def test_a_second_detection_of_an_object_is_a_duplicate():
    other = [60, 60, 20, 20]
    boxes = {0.9: CAT[1], 0.8: [10, 10, 20, 21], 0.7: other}
    results = [detection(1, box, score) for score, box in boxes.items()]
    found = errors(scene(CAT, (1, other)), results)
    assert found.counts["duplicate"].tolist() == [1, 0]
    # precision at recalls above 0.5: 2/3 before, 1 after
    assert found.total["duplicate"] == pytest.approx(100 / 3 * 50 / 101)
    assert found.gains["missed"][0] == 0 and np.isnan(found.gains["missed"][1])


def test_the_better_of_two_fixable_detections_is_fixed():
    both = [detection(1, [10, 22, 20, 20], 0.9), detection(2, [10, 10, 20, 20], 0.8)]
    found = errors(scene(CAT), both)
    # the classification error is only removed: its object is assigned to the localization error
    assert found.gains["localization"][0] == pytest.approx(100)
    assert found.gains["classification"][0] == 0


def test_a_class_without_detections_can_gain_100_ap():
    found = errors(scene(CAT), [])
    assert found.gains["missed"][0] == found.gains["false_negative"][0] == 100
    assert found.counts["missed"].tolist() == [1, 0]


def test_there_is_no_gain_without_objects():
    found = errors(scene(), [detection(1, [10, 10, 20, 20], 0.9)])
    assert set(found.total.values()) == {0.0}
    assert found.counts["background"].tolist() == [1, 0]
