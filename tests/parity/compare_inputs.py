"""Consistency of a detector case's inputs that are stored twice."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pycocotools import mask as rle

from tests.parity.case import Case
from tests.parity.report import Report

BOXES = 1e-3  # pixels
LARGEST_FLOOR = 1e-2  # larger noise would make the comparison meaningless
FLIPPED = 3  # tolerated pixels of a pasted mask: 1/2 within rounding
CHECKED = {"images", "outputs", "n_gt", "n_params", "image_counts"}
NOTES = {"case", "seed"}


def compare_floors(floors: Mapping, report: Report) -> None:
    """Check that noise_floor.json, which tolerances depend on, is within rounding."""
    for name, value in floors.items():
        if name == "pasted_mask_pixels_that_differ":
            report.skip(f"noise_floor.{name}", f"masks are compared but for {FLIPPED} pixels each")
        else:
            largest = max(value.values(), default=0.0) if isinstance(value, dict) else value
            report.close(f"noise_floor.{name}", largest, 0.0, LARGEST_FLOOR)


def compare_inputs(case: Case, report: Report) -> None:
    """Check that inputs that are stored twice agree."""
    config = case.config
    for name in config:
        if name not in CHECKED:
            report.skip(f"config.{name}", "a note" if name in NOTES else "a setting: an input")
    for i, size in enumerate(case.sizes):
        if "images" in config:
            report.equal(f"config.images.{i}", size, np.array(config["images"][i]))
        if "outputs" in config:
            outputs = np.array(config["outputs"][i])
            report.equal(f"config.outputs.{i}", np.array(case.outputs[i]), outputs)
        if "n_gt" in config and case.bitmaps:
            report.equal(f"config.n_gt.{i}", len(case.bitmaps[i]), np.array(config["n_gt"][i]))
    for i, truth in enumerate(case.truth):
        compare_truth(i, truth, case, report)
    if not case.bitmaps:
        report.skip("ground_truth", "this case has none: neither sampling nor losses are computed")
        report.skip("config.n_gt", "this case has no ground truth")
    if "n_params" in config:
        # count the reference's position embedding, which has a row for the unused class token
        count = sum(p.numel() for p in case.detector.parameters())
        count += case.weights["backbone.net.pos_embed"].size
        count -= case.detector.backbone.pos_embed.numel()
        report.equal("config.n_params", count, np.array(config["n_params"]))
    if config.get("image_counts") is not None:
        odds = np.asarray(config["image_counts"], np.float64) ** 0.5
        for name in (name for name in case.weights if name.endswith("fed_loss_cls_weights")):
            report.close(f"config.image_counts against {name}", case.weights[name], odds, 0.0, 1e-6)
    for name in sorted(case.inputs):
        known = name.rstrip("0123456789") in ("image", "gt_boxes", "gt_classes", "gt_masks")
        reason = "an input: it shows in the results" if known else "not known here: not used"
        report.skip(f"inputs.{name}", reason)


def compare_truth(i: int, truth: Mapping, case: Case, report: Report) -> None:
    """Compare an entry of ground_truth.json with the arrays of inputs.npz."""
    size = case.sizes[i]
    name = f"ground_truth.{i}"
    if "height" in truth:
        report.equal(f"{name}.size", size, np.array([truth["height"], truth["width"]]))
    if "classes" in truth:
        classes = np.asarray(truth["classes"], np.int64)
        report.equal(f"{name}.classes", case.bitmaps[i].labels, classes)
    if "boxes" in truth:
        boxes = np.asarray(truth["boxes"]).reshape(-1, 4)
        report.close(f"{name}.boxes", case.bitmaps[i].boxes, boxes, BOXES)
    if "polygons" in truth:
        height, width = size.tolist()
        codes = [rle.merge(rle.frPyObjects(part, height, width)) for part in truth["polygons"]]
        pixels = np.array([rle.decode(code) for code in codes]).reshape(-1, height, width)
        report.equal(f"{name}.polygons", case.bitmaps[i].masks.pixels, pixels)
    for entry in sorted(truth.keys() - {"classes", "boxes", "polygons", "height", "width"}):
        known = entry in ("out_height", "out_width")
        reason = "an input: it shows in post_boxes" if known else "not known here"
        report.skip(f"{name}.{entry}", reason)
