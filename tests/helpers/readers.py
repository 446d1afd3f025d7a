"""Check that all readers of annotations agree on a file: `data check`, the report, training, evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vitdet.config import DataConfig
from vitdet.data.annotation_file import Annotation
from vitdet.data.check import Report, check
from vitdet.data.coco import ImageError
from vitdet.data.dataset import TrainData, ValData, read_split
from vitdet.data.segmentation import read_outline
from vitdet.datasets.report.page import write_page
from vitdet.evaluation.evaluator import evaluate_results
from vitdet.evaluation.results import Truth, read_truth

# errors about image files
FILES = {
    "missing image file",
    "image file that cannot be read",
    "truncated or invalid image file",
    "image size that differs from the annotations",
}
NAMES = {
    "image without 'file_name'",
    "file name that is not one line of text",
    "file name that points outside its folder",
}
EMPTY = "no objects"


def judged(data: DataConfig, content: bytes) -> Report:
    """Read the annotation file with all readers; return the report of `check`."""
    lvis, root = data.dataset == "lvis", Path(data.root)
    path = root / "annotations" / ("lvis_v1_val.json" if lvis else "instances_val.json")
    path.write_bytes(content)
    report = check(root)
    "\n".join(report.lines()).encode()
    page(root)
    kinds = {finding.kind for finding in report.errors}
    split = outcome(path, lambda: read_split(data, "val"))
    truth = outcome(path, lambda: read_truth(path, lvis))
    if not kinds:
        assert not isinstance(split, Exception) and not isinstance(truth, Exception), (split, truth)
        training = TrainData(split, data, seed=0)
        for position in range(2 * len(training.records)):
            (target,) = training[position].targets
            assert np.isfinite(target.boxes.numpy()).all()
            assert len(target.labels) == len(target.boxes)
        batch = ValData(split.records, 64, antialias=True).__getitems__(range(len(split.records)))
        assert batch.image_ids
        figures = evaluate_results(perfect(root, truth), path, data.dataset)
        assert all(0 <= value <= 100 + 1e-9 for value in figures.values())
    elif kinds <= FILES:
        assert not isinstance(truth, Exception), truth
        assert isinstance(outcome(path, lambda: opened(split)), Exception)
    else:
        assert isinstance(split, ValueError), kinds
        assert isinstance(truth, ValueError) or kinds <= FILES | NAMES | {EMPTY}, kinds
    return report


def outcome(path: Path, read: Callable[[], object]) -> object:
    """Return the function's result, or its one-line error, which must name a file."""
    try:
        return read()
    except (ValueError, FileNotFoundError) as error:
        assert type(error) in (ValueError, FileNotFoundError, ImageError), repr(error)
        assert str(path.parent.parent) in str(error) and "\n" not in str(error), repr(error)
        return error


def opened(split: object) -> None:
    """Read all images, as an evaluation does."""
    if isinstance(split, Exception):
        raise split
    for index in range(len(split.records)):
        ValData(split.records, 64, antialias=True)[index]


def perfect(root: Path, truth: Truth) -> Path:
    """Write a results file that detects every object."""
    results = [
        result(annotation, truth)
        for annotation in truth.objects
        if annotation.image_id in truth.images and annotation.category_id in truth.categories
    ]
    (root / "results.json").write_text(json.dumps(results))
    return root / "results.json"


def result(item: Annotation, truth: Truth) -> dict:
    """Return a result that detects the object."""
    shape = read_outline(item.segmentation, truth.sides(item.image_id)).shape
    x, y, width, height = item.bbox
    box = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    found = {"image_id": item.image_id, "category_id": item.category_id, "bbox": item.bbox}
    return {**found, "score": 0.5, "segmentation": box if shape is None else shape}


def page(root: Path) -> None:
    """Write the data set's report, which states what it cannot read."""
    try:
        write_page(root, root / "page.html")
    except FileNotFoundError as error:  # no image can be shown
        assert "\n" not in str(error)
