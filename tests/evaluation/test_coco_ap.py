"""AP against pycocotools, and results that are dropped, rejected or completed."""

import copy
import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO as Index
from pycocotools.cocoeval import COCOeval

from tests.helpers.random_results import random_set
from vitdet.evaluation.coco import compare, summary
from vitdet.evaluation.report import class_rows, curve_rows
from vitdet.evaluation.results import read_truth

COCO = Path(__file__).parents[3] / "shared" / "data" / "coco-eval"


@pytest.fixture
def annotations(tmp_path):
    """One image of 100 x 100 with a box 40 x 40 at 10, 10, whose mask is its left half; area and iscrowd left out."""
    path = tmp_path / "truth.json"
    path.write_text(
        json.dumps(
            {
                "images": [
                    {"id": 5, "height": 100, "width": 100},
                    {"id": 6, "height": 100, "width": 100},
                ],
                "annotations": [
                    {
                        "id": 1,
                        "image_id": 5,
                        "category_id": 2,
                        "bbox": [10, 10, 40, 40],
                        "segmentation": [[10, 10, 30, 10, 30, 50, 10, 50]],
                    }
                ],
                "categories": [{"id": 2, "name": "thing"}, {"id": 3, "name": "other"}],
            }
        )
    )
    return path


def coco_ap(annotations, results, kinds=("bbox", "segm"), image_ids=None):
    return summary(compare(read_truth(annotations), results, kinds, image_ids))


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


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_twelve_figures_are_pycocotools_own(kind):
    if not COCO.is_dir():
        pytest.skip("needs ../shared")
    expected = json.loads((COCO / "coco_fake100_expected.json").read_text())[kind]
    results = json.loads((COCO / f"instances_val2014_fake{kind}100_results.json").read_text())
    finished = compare(read_truth(COCO / "instances_val2014_100.json"), results, [kind])
    figures = summary(finished)
    prefix = {"bbox": "box", "segm": "mask"}[kind]
    names = (
        "ap",
        "ap50",
        "ap75",
        "ap_small",
        "ap_medium",
        "ap_large",
        "ar_1",
        "ar_10",
        "ar_100",
        "ar_small",
        "ar_medium",
        "ar_large",
    )
    assert list(figures) == [f"{prefix}_{name}" for name in names]
    for name, value in zip(names, expected.values(), strict=True):
        assert figures[f"{prefix}_{name}"] / 100 == pytest.approx(value, abs=1e-6), name
    rows = class_rows(finished)
    assert np.mean([row[f"{prefix}_ap"] for row in rows]) == pytest.approx(figures[f"{prefix}_ap"])
    curve = [row[f"{prefix}_iou50"] for row in curve_rows(finished)]
    assert 100 * np.mean(curve) == pytest.approx(figures[f"{prefix}_ap50"])


def pycocotools_tables(truth, results, kind, image_ids):
    """precision (T, R, K, A, M) and recall (T, K, A, M) as pycocotools itself has them."""
    index = Index()
    index.dataset = copy.deepcopy(
        {
            "images": list(truth.images.values()),
            "annotations": [msgspec.to_builtins(one) for one in truth.objects],
            "categories": list(truth.categories.values()),
        }
    )
    index.createIndex()
    # alone: with both, masks would have their boxes' areas
    key = {"bbox": "bbox", "segm": "segmentation"}[kind]
    plain = [
        {name: one[name] for name in ("image_id", "category_id", "score", key)} for one in results
    ]
    work = COCOeval(index, index.loadRes(copy.deepcopy(plain)), kind)
    work.params.imgIds = image_ids
    work.evaluate()
    work.accumulate()
    return work.eval["precision"], work.eval["recall"]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(6))
def test_random_sets_have_pycocotools_tables(kind, seed):
    truth, results = random_set(seed, images=25 + 5 * seed, categories=1 + 2 * seed)
    assert any(one.iscrowd for one in truth.objects)
    image_ids = sorted(truth.images)[:: 1 + seed % 2]
    finished = compare(truth, results, [kind], image_ids)[kind]
    precision, recall = pycocotools_tables(truth, results, kind, image_ids)
    np.testing.assert_allclose(finished.precision, precision, rtol=0, atol=1e-12)
    np.testing.assert_allclose(finished.recall, recall, rtol=0, atol=1e-12)


def test_a_hundred_results_of_a_class_in_an_image_count():
    truth, results = random_set(0, images=2, categories=1)
    image_id = results[0]["image_id"]
    results = [one for one in results if one["image_id"] == image_id] * 12
    assert len(results) > 100
    precision, recall = pycocotools_tables(truth, results, "bbox", sorted(truth.images))
    finished = compare(truth, results, ["bbox"])["bbox"]
    np.testing.assert_allclose(finished.precision, precision, rtol=0, atol=1e-12)
    np.testing.assert_allclose(finished.recall, recall, rtol=0, atol=1e-12)


def test_an_object_with_id_0_can_be_found(annotations):
    text = annotations.read_text()
    assert '"id": 1, "image_id"' in text
    annotations.write_text(text.replace('"id": 1, "image_id"', '"id": 0, "image_id"'))
    assert coco_ap(annotations, [result()])["box_ap"] == pytest.approx(100)  # pycocotools: 0


def test_a_perfect_result_has_full_marks_and_missing_size_classes_are_left_out(annotations):
    figures = coco_ap(annotations, [result()])
    assert figures["box_ap"] == figures["mask_ap"] == pytest.approx(100)
    # without an area in the file it is that of the mask, 20 x 40: small
    assert figures["box_ap_small"] == figures["mask_ap_small"] == pytest.approx(100)
    assert not {"box_ap_medium", "box_ap_large", "mask_ap_medium", "mask_ap_large"} & set(figures)
    assert all(math.isfinite(value) for value in json.loads(json.dumps(figures)).values())


def test_a_detection_is_as_large_as_its_box_or_its_mask(annotations):
    # false ones of higher score, whose boxes are medium (40 x 40) and whose masks are small (20 x 40)
    tree = json.loads(annotations.read_text())
    tree["annotations"][0]["area"] = 800
    annotations.write_text(json.dumps(tree))
    figures = coco_ap(
        annotations, [result(), result([50, 50, 40, 40], score=0.95) | {"image_id": 6}]
    )
    assert figures["box_ap_small"] == pytest.approx(100)
    assert figures["mask_ap_small"] == pytest.approx(50)


def test_three_hundred_objects_are_all_found_with_a_limit_of_as_many(tmp_path):
    boxes = [[3 * (i % 20), 3 * (i // 20), 2, 2] for i in range(300)]
    tree = {
        "images": [{"id": 5, "height": 100, "width": 100}],
        "categories": [{"id": 2, "name": "thing"}],
        "annotations": [
            {"id": i + 1, "image_id": 5, "category_id": 2, "bbox": box, "area": 4, "iscrowd": 0}
            for i, box in enumerate(boxes)
        ],
    }
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(tree))
    truth, found = read_truth(path), [result(box) for box in boxes]
    assert summary(compare(truth, found, ["bbox"]))["box_ap"] == pytest.approx(100 * 34 / 101)
    figures = summary(compare(truth, found, ["bbox"], most=300))
    assert figures["box_ap"] == figures["box_ar_300"] == pytest.approx(100)
    assert figures["box_ar_10"] == pytest.approx(10 / 3) and "box_ar_100" not in figures


def test_nothing_found_is_an_ap_of_zero(annotations):
    figures = coco_ap(annotations, [])
    assert figures["box_ap"] == figures["mask_ap"] == figures["box_ar_100"] == 0


def test_without_objects_there_are_no_figures(annotations):
    finished = compare(read_truth(annotations), [result(image_id=6)], image_ids=[6])
    assert summary(finished) == {}
    assert class_rows(finished) == curve_rows(finished) == []


def test_only_the_chosen_images_count(annotations):
    good, bad = result(score=0.5), result(image_id=6, score=0.9)
    assert coco_ap(annotations, [good, bad], ["bbox"])["box_ap"] == pytest.approx(50, abs=1)
    assert coco_ap(annotations, [good, bad], ["bbox"], image_ids=[5])["box_ap"] == pytest.approx(
        100
    )


def test_only_classes_with_objects_have_a_row(annotations):
    rows = class_rows(compare(read_truth(annotations), [result(), result(category_id=3)]))
    assert [row["class"] for row in rows] == ["thing"]
    assert rows[0]["mask_ap50"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"image_id": 77}, "no image 77"), ({"category_id": 88}, "no category 88")],
)
def test_results_of_something_else_are_refused_in_one_line(annotations, wrong, message):
    with pytest.raises(ValueError, match=message) as caught:
        coco_ap(annotations, [result(), result(**wrong)])
    assert "\n" not in str(caught.value)


def test_bad_annotation_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.json"):
        coco_ap(tmp_path / "absent.json", [])
    for text in ("{", "[]", '{"images": []}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="bad.json"):
            coco_ap(tmp_path / "bad.json", [])


def test_evaluating_prints_nothing(annotations, capsys):
    coco_ap(annotations, [result()])
    assert capsys.readouterr() == ("", "")


def test_what_lies_in_a_crowd_region_is_neither_right_nor_wrong(annotations):
    tree = json.loads(annotations.read_text())
    crowd = {
        "id": 2,
        "image_id": 5,
        "category_id": 2,
        "bbox": [60, 0, 40, 100],
        "iscrowd": 1,
        "segmentation": {"size": [100, 100], "counts": [6000, 4000]},
    }
    inside = result([65, 20, 10, 10], score=0.99)
    inside["segmentation"] = {"size": [100, 100], "counts": [6520, 10, 3470]}
    inside["segmentation"] = rle.frPyObjects(inside["segmentation"], 100, 100)
    alone = coco_ap(annotations, [result(), inside])
    assert alone["box_ap"] == alone["mask_ap"] == pytest.approx(50, abs=1)
    annotations.write_text(json.dumps({**tree, "annotations": [*tree["annotations"], crowd]}))
    figures = coco_ap(annotations, [result(), inside])
    assert figures["box_ap"] == figures["mask_ap"] == pytest.approx(100)
