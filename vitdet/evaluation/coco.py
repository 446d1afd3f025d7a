"""Average precision as COCO measures it (Lin et al. 2014, cocodataset.org/#detection-eval): pycocotools is the arbiter.

`compare` matches results with the annotations once; `summary`, `class_rows` and `curve_rows` are views of its findings.
Boxes and masks are compared apart: a detection's size is that of its box in one and of its mask in the other, as
Detectron2 does it. Figures are percent. A figure for which the annotations hold no object (AP of small objects where
there are none) is left out of the views, so every number is finite and fit for JSON.
Letters of pycocotools' precision table: T IoU thresholds, R recalls, K classes, A size ranges, M limits of detections.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vitdet.data.masks import decode

NAMES = {"bbox": "box", "segm": "mask"}
FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
           "ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large")  # the order of COCOeval.stats


def coco_ap(annotations: Path, results: Sequence[dict], kinds: Sequence[str] = ("bbox", "segm"),
            image_ids: Iterable[int] | None = None) -> dict[str, float]:
    """COCO's twelve figures a kind in percent: box_ap, box_ap50, ..., box_ar_large, mask_ap, ..., mask_ar_large.

    results are COCO results (image_id, category_id, score, bbox xywh and/or segmentation RLE); image_ids limits the
    comparison to these images (default: all of the file). A figure without any object to find is left out.
    Raises ValueError for results of an image or category that the annotations do not know.
    """
    return summary(compare(annotations, results, kinds, image_ids))


def compare(annotations: Path, results: Sequence[dict], kinds: Sequence[str] = ("bbox", "segm"),
            image_ids: Iterable[int] | None = None) -> dict[str, COCOeval]:
    """The finished comparison of each kind; arguments and errors as of `coco_ap`."""
    tree = read_annotations(annotations)
    chosen = sorted({image["id"] for image in tree["images"]} if image_ids is None else set(image_ids))
    _check(tree, results, chosen, annotations)
    finished = {}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = _index(tree, _objects(tree))
        for kind in kinds:
            found = _index(tree, _results(results, kind))
            finished[kind] = COCOeval(truth, found, kind)
            finished[kind].params.imgIds = chosen
            finished[kind].evaluate()
            finished[kind].accumulate()
            finished[kind].summarize()
    return finished


def summary(finished: Mapping[str, COCOeval]) -> dict[str, float]:
    """The twelve figures of each kind in percent, under the keys that `coco_ap` names."""
    return {f"{NAMES[kind]}_{figure}": 100 * float(value)
            for kind, comparison in finished.items()
            for figure, value in zip(FIGURES, comparison.stats, strict=True) if value >= 0}


def class_rows(finished: Mapping[str, COCOeval]) -> list[dict[str, str | float]]:
    """AP of each class that has objects, as rows {class, box_ap, box_ap50, mask_ap, mask_ap50} in percent."""
    rows: dict[str, dict[str, str | float]] = {}
    for kind, comparison in finished.items():
        precision = comparison.eval["precision"][:, :, :, 0, -1]  # (T, R, K) of all sizes, most detections
        for column, category in enumerate(comparison.params.catIds):
            if (precision[:, :, column] < 0).all():
                continue
            name = comparison.cocoGt.cats[category]["name"]
            row = rows.setdefault(name, {"class": name})
            row[f"{NAMES[kind]}_ap"] = 100 * float(precision[:, :, column].mean())
            row[f"{NAMES[kind]}_ap50"] = 100 * float(precision[0, :, column].mean())
    return list(rows.values())


def curve_rows(finished: Mapping[str, COCOeval], ious: Sequence[float] = (0.5, 0.75)) -> list[dict[str, str | float]]:
    """Precision over recall, mean of the classes, as rows {curve: 'box IoU 0.5', recall, precision} in 0..1."""
    rows = []
    for kind, comparison in finished.items():
        precision = comparison.eval["precision"][:, :, :, 0, -1]
        known = (precision >= 0).all((0, 1))
        for iou in ious if known.any() else ():
            at = int(np.abs(comparison.params.iouThrs - iou).argmin())
            means = precision[at][:, known].mean(1)
            rows += [{"curve": f"{NAMES[kind]} IoU {iou}", "recall": round(float(recall), 4), "precision": float(mean)}
                     for recall, mean in zip(comparison.params.recThrs, means, strict=True)]
    return rows


def read_annotations(path: Path) -> dict:
    """The tree of an annotation file. Raises FileNotFoundError or ValueError with one line that names the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such annotation file")
    try:
        tree = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    missing = [key for key in ("images", "annotations", "categories") if key not in tree]
    if missing:
        raise ValueError(f"{path}: expected COCO annotations, but {', '.join(missing)} is missing")
    return tree


def _check(tree: dict, results: Sequence[dict], chosen: Sequence[int], path: Path) -> None:
    known = {image["id"] for image in tree["images"]}
    categories = {category["id"] for category in tree["categories"]}
    strangers = sorted({image for image in chosen if image not in known})
    strangers += sorted({item["image_id"] for item in results if item["image_id"] not in known})
    if strangers:
        raise ValueError(f"{path}: holds no image {strangers[0]}, which has results ({len(strangers)} such images); "
                         "are the results of another data set?")
    strangers = sorted({item["category_id"] for item in results if item["category_id"] not in categories})
    if strangers:
        raise ValueError(f"{path}: holds no category {strangers[0]}, which has results ({len(strangers)} such "
                         "categories); are the results of another data set?")


def _index(tree: dict, items: list[dict]) -> COCO:
    coco = COCO()
    coco.dataset = {"images": tree["images"], "categories": tree["categories"], "annotations": items}
    coco.createIndex()
    return coco


def _objects(tree: dict) -> list[dict]:
    # own data sets often leave out the two keys that pycocotools cannot do without; it also writes into the items
    sides = {image["id"]: (image["height"], image["width"]) for image in tree["images"]}
    objects = []
    for item in tree["annotations"]:
        item = {"iscrowd": 0, **item}
        if "area" not in item:
            item["area"] = int(decode(item["segmentation"], *sides[item["image_id"]]).sum())
        objects.append(item)
    return objects


def _results(results: Sequence[dict], kind: str) -> list[dict]:
    items = []
    for number, item in enumerate(results, start=1):
        plain = {"id": number, "image_id": item["image_id"], "category_id": item["category_id"],
                 "score": item["score"], "iscrowd": 0}
        if kind == "bbox":
            items.append({**plain, "bbox": item["bbox"], "area": item["bbox"][2] * item["bbox"][3]})
        else:
            items.append({**plain, "segmentation": item["segmentation"],
                          "area": float(rle.area(item["segmentation"]))})
    return items
