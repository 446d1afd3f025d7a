"""COCO's AP against pycocotools, and small cases."""

import copy
import json
import math

import msgspec
import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO as Index
from pycocotools.cocoeval import COCOeval

from tests.helpers.random_results import random_set
from vitdet.evaluation.bootstrap import WeightedAP
from vitdet.evaluation.coco import compare, summary
from vitdet.evaluation.report import class_rows, curve_rows
from vitdet.evaluation.results import read_truth

NAMES = "ap ap50 ap75 ap_small ap_medium ap_large ar_1 ar_10 ar_100 ar_small ar_medium ar_large"
OBJECT = {"id": 1, "image_id": 5, "category_id": 2, "bbox": [10, 10, 40, 40]}


@pytest.fixture
def truth_of(tmp_path):
    """Return a function that writes and reads annotations of two images of 100 x 100 pixels."""

    def read(*objects):
        images = [{"id": number, "height": 100, "width": 100} for number in (5, 6)]
        categories = [{"id": 2, "name": "thing"}, {"id": 3, "name": "other"}]
        tree = {"images": images, "annotations": objects, "categories": categories}
        (tmp_path / "truth.json").write_text(json.dumps(tree))
        return read_truth(tmp_path / "truth.json")

    return read


@pytest.fixture
def half():
    """Return a 40 x 40 box at (10, 10) whose mask is its left half, without area and iscrowd."""
    return {**OBJECT, "segmentation": [[10, 10, 30, 10, 30, 50, 10, 50]]}


def metrics_of(truth, results, kinds=("bbox", "segm"), image_ids=None):
    return summary(compare(truth, results, kinds, image_ids))


def result(box=(10, 10, 40, 40), score=0.9, image_id=5, category_id=2):
    mask = np.zeros((100, 100), np.uint8, order="F")
    mask[10:50, 10:30] = 1
    code = rle.encode(mask)
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(box),
        "score": score,
        "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
    }


@pytest.mark.parametrize(("kind", "prefix"), [("bbox", "box"), ("segm", "mask")])
def test_the_twelve_metrics_equal_those_of_pycocotools(examples, kind, prefix):
    expected = json.loads((examples / "coco_fake100_expected.json").read_text())[kind]
    results = json.loads((examples / f"instances_val2014_fake{kind}100_results.json").read_text())
    finished = compare(read_truth(examples / "instances_val2014_100.json"), results, [kind])
    metrics = summary(finished)
    assert list(metrics) == [f"{prefix}_{name}" for name in NAMES.split()]
    assert [ap / 100 for ap in metrics.values()] == pytest.approx([*expected.values()], abs=1e-6)
    rows = class_rows(finished)
    assert np.mean([row[f"{prefix}_ap"] for row in rows]) == pytest.approx(metrics[f"{prefix}_ap"])
    curve = [row[f"{prefix}_iou50"] for row in curve_rows(finished)]
    assert 100 * np.mean(curve) == pytest.approx(metrics[f"{prefix}_ap50"])
    matches = finished[kind].matches
    mean = WeightedAP(matches)(np.ones(len(matches.image_ids), int))[0, 0]
    assert mean == pytest.approx(metrics[f"{prefix}_ap"], abs=1e-9)


def assert_pycocotools_tables(truth, results, kind, image_ids):
    """Compare precision (T, R, K, A, M) and recall (T, K, A, M) with pycocotools."""
    index = Index()
    index.dataset = {
        "images": list(truth.images.values()),
        "annotations": [msgspec.to_builtins(annotation) for annotation in truth.objects],
        "categories": list(truth.categories.values()),
    }
    index.dataset = copy.deepcopy(index.dataset)
    index.createIndex()
    # only boxes or only masks: with both, pycocotools uses the areas of the boxes for the masks
    other = {"bbox": "segmentation", "segm": "bbox"}[kind]
    plain = [{name: result[name] for name in result if name != other} for result in results]
    work = COCOeval(index, index.loadRes(copy.deepcopy(plain)), kind)
    work.params.imgIds = image_ids
    work.evaluate()
    work.accumulate()
    finished = compare(truth, results, [kind], image_ids)[kind]
    np.testing.assert_allclose(finished.precision, work.eval["precision"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(finished.recall, work.eval["recall"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(6))
def test_random_sets_have_the_tables_of_pycocotools(kind, seed):
    truth, results = random_set(seed, images=25 + 5 * seed, categories=1 + 2 * seed)
    assert any(annotation.iscrowd for annotation in truth.objects)
    assert_pycocotools_tables(truth, results, kind, sorted(truth.images)[:: 1 + seed % 2])


def test_at_most_a_hundred_results_per_class_and_image_are_used():
    truth, results = random_set(0, images=2, categories=1)
    image_id = results[0]["image_id"]
    results = [result for result in results if result["image_id"] == image_id] * 12
    assert len(results) > 100
    assert_pycocotools_tables(truth, results, "bbox", sorted(truth.images))


def test_an_object_with_id_0_can_be_matched(truth_of, half):
    metrics = metrics_of(truth_of({**half, "id": 0}), [result()])
    assert metrics["box_ap"] == pytest.approx(100)  # pycocotools returns 0


def test_perfect_results_score_100_and_empty_size_classes_are_omitted(truth_of, half):
    metrics = metrics_of(truth_of(half), [result()])
    assert metrics["box_ap"] == metrics["mask_ap"] == pytest.approx(100)
    # without an area in the file, the mask's area of 20 x 40 is used: small
    assert metrics["box_ap_small"] == metrics["mask_ap_small"] == pytest.approx(100)
    assert not {"box_ap_medium", "box_ap_large", "mask_ap_medium", "mask_ap_large"} & set(metrics)
    assert all(math.isfinite(value) for value in json.loads(json.dumps(metrics)).values())


def test_a_detection_s_size_is_that_of_its_box_or_mask(truth_of, half):
    # false positives of higher score, with medium boxes (40 x 40) and small masks (20 x 40)
    wrong = result([50, 50, 40, 40], 0.95, image_id=6)
    metrics = metrics_of(truth_of({**half, "area": 800}), [result(), wrong])
    assert metrics["box_ap_small"] == pytest.approx(100)
    assert metrics["mask_ap_small"] == pytest.approx(50)


def test_a_limit_of_300_detections_allows_300_matches(truth_of):
    boxes = [[3 * (i % 20), 3 * (i // 20), 2, 2] for i in range(300)]
    truth = truth_of(*({**OBJECT, "id": i, "bbox": box} for i, box in enumerate(boxes, 1)))
    found = [result(box) for box in boxes]
    assert metrics_of(truth, found, ["bbox"])["box_ap"] == pytest.approx(100 * 34 / 101)
    metrics = summary(compare(truth, found, ["bbox"], most=300))
    assert metrics["box_ap"] == metrics["box_ar_300"] == pytest.approx(100)
    assert metrics["box_ar_10"] == pytest.approx(10 / 3) and "box_ar_100" not in metrics


def test_ap_is_0_without_detections_and_omitted_without_objects(truth_of, half):
    metrics = metrics_of(truth_of(half), [])
    assert metrics["box_ap"] == metrics["mask_ap"] == metrics["box_ar_100"] == 0
    finished = compare(truth_of(half), [result(image_id=6)], image_ids=[6])
    assert summary(finished) == {}
    assert class_rows(finished) == curve_rows(finished) == []


def test_only_the_given_images_are_evaluated(truth_of, half):
    truth, results = truth_of(half), [result(score=0.5), result(image_id=6, score=0.9)]
    assert metrics_of(truth, results, ["bbox"])["box_ap"] == pytest.approx(50, abs=1)
    assert metrics_of(truth, results, ["bbox"], [5])["box_ap"] == pytest.approx(100)


def test_only_classes_with_objects_have_an_ap(truth_of, half):
    (row,) = class_rows(compare(truth_of(half), [result(), result(category_id=3)]))
    assert row["class"] == "thing" and row["mask_ap50"] == pytest.approx(100)


def test_detections_in_a_crowd_are_ignored(truth_of, half):
    whole = {"size": [100, 100], "counts": [6000, 4000]}
    crowd = {**OBJECT, "id": 2, "bbox": [60, 0, 40, 100], "iscrowd": 1, "segmentation": whole}
    inside = result([65, 20, 10, 10], score=0.99)
    runs = {"size": [100, 100], "counts": [6520, 10, 3470]}
    inside["segmentation"] = rle.frPyObjects(runs, 100, 100)
    alone = metrics_of(truth_of(half), [result(), inside])
    assert alone["box_ap"] == alone["mask_ap"] == pytest.approx(50, abs=1)
    metrics = metrics_of(truth_of(half, crowd), [result(), inside])
    assert metrics["box_ap"] == metrics["mask_ap"] == pytest.approx(100)
