"""LVIS AP against the official package, and against a reference implementation on random sets."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.random_results import random_set
from vitdet.data.annotation_file import Annotation
from vitdet.evaluation import lvis
from vitdet.evaluation.evaluator import evaluate_results
from vitdet.evaluation.lvis import best, compare, compare_file, summary
from vitdet.evaluation.results import Truth, read_truth

GOLDEN = Path(__file__).parents[1] / "published" / "lvis_random"
NAMES = (
    "ap ap50 ap75 ap_small ap_medium ap_large ap_rare ap_common ap_frequent "
    "ar_300 ar_small ar_medium ar_large"
)


@pytest.mark.parametrize("of_package", [False, True])
def test_the_thirteen_metrics_equal_those_of_the_lvis_package(request, of_package):
    folder, files = GOLDEN, ("expected.json", "results.json", "truth.json")
    if of_package:
        folder = request.getfixturevalue("examples")
        files = "lvis_fake100_expected.json", "lvis_fake100_results.json", "lvis_val_100.json"
    expected, results, truth = (folder / name for name in files)
    expected = json.loads(expected.read_text())
    metrics = evaluate_results(results, truth, "lvis")
    assert list(metrics) == [f"{kind}_{name}" for kind in ("box", "mask") for name in NAMES.split()]
    values = [*expected["bbox"].values(), *expected["segm"].values()]
    assert [value / 100 for value in metrics.values()] == pytest.approx(values, abs=1e-6)


def truth_of(objects, negative=(), unsure=(), frequency="f"):
    image = {"id": 1, "height": 100, "width": 100, "neg_category_ids": list(negative)}
    image["not_exhaustive_category_ids"] = list(unsure)
    categories = {k: {"id": k, "name": str(k), "frequency": frequency} for k in (1, 2, 3)}
    annotations = [
        Annotation(number, 1, category, tuple(box), None, box[2] * box[3])
        for number, (category, box) in enumerate(objects)
    ]
    return Truth(Path("truth.json"), {1: image}, categories, annotations)


def found(*boxes, category=1, score=0.9):
    return [{"image_id": 1, "category_id": category, "bbox": box, "score": score} for box in boxes]


BOX, ELSEWHERE = [10, 10, 40, 40], [60, 60, 30, 30]


def ap(truth, results):
    return summary(compare(truth, results, ["bbox"]))["box_ap"]


def test_categories_neither_annotated_nor_negative_are_omitted():
    objects = [(1, BOX), (2, BOX)]
    good = found(BOX) + found(BOX, category=2, score=0.5)
    foreign = found(ELSEWHERE, category=3, score=1.0)
    assert ap(truth_of(objects), good) == pytest.approx(100)
    assert ap(truth_of(objects), good + foreign) == pytest.approx(100)
    # an absent category without objects has no AP; false positives of a present category are counted
    assert ap(truth_of(objects, negative=[3]), good + foreign) == pytest.approx(100)
    assert ap(truth_of(objects), good + found(ELSEWHERE, score=1.0)) == pytest.approx(75)


def test_false_positives_on_negative_images_reduce_the_ap():
    truth = truth_of([(1, BOX)])
    truth.images[2] = {**truth.images[1], "id": 2, "neg_category_ids": [1]}
    truth.images[3] = {**truth.images[1], "id": 3}
    wrong = found(ELSEWHERE, score=1.0)[0]
    assert ap(truth, found(BOX) + [wrong | {"image_id": 3}]) == pytest.approx(100)
    assert ap(truth, found(BOX) + [wrong | {"image_id": 2}]) == pytest.approx(50)


def test_false_positives_are_ignored_where_annotation_is_not_exhaustive():
    results = found(BOX) + found(ELSEWHERE, score=1.0)
    assert ap(truth_of([(1, BOX)]), results) == pytest.approx(50)
    assert ap(truth_of([(1, BOX)], unsure=[1]), results) == pytest.approx(100)


def test_the_300_best_per_image_are_used_and_ties_keep_their_order():
    results = [
        {"image_id": 1 + number % 2, "score": 0.5, "number": number} for number in range(700)
    ]
    results[699]["score"] = 0.9
    kept = best(results)
    numbers = {i: sorted(item["number"] for item in kept if item["image_id"] == i) for i in (1, 2)}
    assert numbers == {1: list(range(0, 600, 2)), 2: [*range(1, 599, 2), 699]}
    flood = found(*[ELSEWHERE] * 300, category=2, score=0.8)
    assert ap(truth_of([(1, BOX)]), found(BOX, score=0.7) + flood) == 0
    assert ap(truth_of([(1, BOX)]), found(BOX, score=0.7) + flood[1:]) == pytest.approx(100)


def test_objects_without_area_are_ignored():
    flat = [10, 10, 0, 40]
    results = found(BOX) + found(flat, score=1.0)
    assert ap(truth_of([(1, BOX), (1, flat)]), results) == pytest.approx(100)


def test_mask_sizes_follow_boxes_in_files_and_masks_in_detections():
    truth = truth_of([(1, BOX)])
    truth.objects[0].area = 400  # size class: small
    truth.objects[0].segmentation = [[10, 10, 30, 10, 30, 30, 10, 30]]
    square = {"size": [100, 100], "counts": [6060, 30, 3910]}
    # a false positive with a mask of 30 pixels and a medium box
    wrong = found([60, 60, 40, 40], score=1.0)[0] | {"segmentation": square}
    both = [wrong, found(BOX)[0] | {"segmentation": truth.objects[0].segmentation}]
    finished = compare_file(truth, both, ["bbox", "segm"])
    assert summary(finished)["mask_ap_small"] == pytest.approx(100)
    assert summary(compare(truth, both))["mask_ap_small"] == pytest.approx(50)
    alone = [{key: result[key] for key in result if key != "bbox"} for result in both]
    assert summary(compare_file(truth, alone, ["segm"]))["mask_ap_small"] == pytest.approx(50)


def test_lvis_ignores_the_crowd_flag():
    truth = truth_of([(1, BOX)])
    truth.objects[0].iscrowd = 1
    assert ap(truth, found(BOX)) == pytest.approx(100)


def test_groups_without_objects_have_no_metric():
    figures = summary(compare(truth_of([(1, BOX)], frequency="c"), found(BOX), ["bbox"]))
    assert figures["box_ap_common"] == pytest.approx(100)
    assert not {"box_ap_rare", "box_ap_frequent", "box_ap_large"} & set(figures)


def test_coco_annotations_are_refused_in_one_line(tmp_path):
    path, category = tmp_path / "coco.json", {"id": 1, "name": "a", "frequency": "r"}
    tree = {"images": [{"id": 4, "height": 9, "width": 9}], "annotations": []}
    path.write_text(json.dumps({**tree, "categories": [category]}))
    cause = "coco.json: image 4: image without 'neg_category_ids': .*set data.dataset=coco;"
    with pytest.raises(ValueError, match=cause):
        read_truth(path, lvis=True)
    cause = "coco.json: image 4 has no neg_category_ids.*dataset to coco$"
    with pytest.raises(ValueError, match=cause):
        compare(read_truth(path), [])


def slow_ap(truth, results, threshold):
    """Compute the mean box AP at one IoU threshold in a loop over detections, as defined in the paper."""
    known = {(annotation.image_id, annotation.category_id) for annotation in truth.objects}
    means = []
    for category in truth.categories:
        objects = [annotation for annotation in truth.objects if annotation.category_id == category]
        taken, hits = set(), []
        mine = [result for result in results if result["category_id"] == category]
        for result in sorted(mine, key=lambda result: (-result["score"], result["image_id"])):
            image, key = truth.images[result["image_id"]], (result["image_id"], category)
            if result["bbox"][2] * result["bbox"][3] == 0 or (
                key not in known and category not in image["neg_category_ids"]
            ):
                continue
            rivals = [
                (iou(result["bbox"], other.bbox), -number)
                for number, other in enumerate(objects)
                if other.image_id == result["image_id"] and number not in taken
            ]
            top, number = max(rivals, default=(0, 0), key=lambda pair: (pair[0], -pair[1]))
            if top >= threshold:
                taken.add(-number)
                hits.append(1)
            elif category not in image["not_exhaustive_category_ids"]:
                hits.append(0)
        if objects:
            right = np.cumsum(hits) if hits else np.zeros(0)
            recall, precision = right / len(objects), right / np.arange(1, len(hits) + 1)
            levels = np.linspace(0, 1, 101)
            means.append(np.mean([max(precision[recall >= level], default=0) for level in levels]))
    return 100 * np.mean(means)


def iou(a, b):
    sides = [max(0, min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
    inner = sides[0] * sides[1]
    return inner / (a[2] * a[3] + b[2] * b[3] - inner) if inner else 0.0


@pytest.mark.parametrize("seed", range(4))
def test_random_sets_have_the_ap_of_a_reference_implementation(seed):
    truth, results = random_set(seed, images=12, categories=5, lvis=True)
    finished = lvis.compare(truth, results, ["bbox"])
    for threshold in (0.5, 0.75):
        expected = slow_ap(truth, results, threshold)
        assert finished["bbox"].ap(threshold) == pytest.approx(expected, abs=1e-9)
