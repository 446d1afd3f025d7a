"""Compare single functions with stored values: pooling levels and RoIAlign, anchors, box transform, matcher."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.parity.case import as_tensors, load
from tests.parity.device import CPU, moved
from tests.parity.report import Report
from vitdet.models.anchors import grid_anchors
from vitdet.models.assign import BACKGROUND, IGNORE, match, match_keeping_own
from vitdet.models.boxes import decode, encode
from vitdet.models.roi_pool import assign_levels, pool

STRIDES = (4, 8, 16, 32, 64)
MAPS = tuple(f"pool_feat_p{level}" for level in range(2, 6))
INPUTS = ("pool_boxes", *MAPS, "bt_src", "bt_tgt", "bt_deltas_in", "match_iou")


def compute(folder: Path, device: torch.device = CPU) -> dict[str, Tensor]:
    """Compute our functions' results from the inputs in unit.npz."""
    inputs = moved(as_tensors(load(folder / "unit.npz", INPUTS.__contains__)), device)
    boxes = inputs["pool_boxes"]
    features = [inputs[name] for name in MAPS]
    ours = {"pool_levels_minus2": assign_levels(boxes, 4, STRIDES[0])}
    first = torch.zeros(len(boxes), dtype=torch.int64, device=device)  # all in one image
    for bins in (7, 14):
        ours[f"pool_out_{bins}"] = pool(features, boxes, first, STRIDES[:4], bins, sampling_ratio=0)
    grids = [(1024 // stride, 1024 // stride) for stride in STRIDES]
    for level, anchors in enumerate(
        grid_anchors(grids, STRIDES, 8.0, (0.5, 1.0, 2.0), device), start=2
    ):
        ours |= {
            f"anchors1024_p{level}_first6": anchors[:6],
            f"anchors1024_p{level}_last3": anchors[-3:],
            f"anchors1024_p{level}_count": torch.tensor(len(anchors)),
        }
    source, target, deltas = inputs["bt_src"], inputs["bt_tgt"], inputs["bt_deltas_in"]
    for factor, weights in (
        (1, (1.0, 1.0, 1.0, 1.0)),
        (10, (10.0, 10.0, 5.0, 5.0)),
        (30, (30.0, 30.0, 15.0, 15.0)),
    ):
        ours[f"bt_get_w{factor}"] = encode(source, target, weights)
        applied = decode(source, deltas.unflatten(1, (-1, 4)), weights, -math.inf)
        ours[f"bt_apply_w{factor}"] = applied.flatten(1)
    for name, low, high, matching in (
        ("rpn", 0.3, 0.7, match_keeping_own),
        ("roi", 0.5, 0.5, match),
    ):
        matched = matching([inputs["match_iou"]], low, high)
        labels = torch.where(matched == BACKGROUND, 0, 1)
        ours[f"match_{name}_label"] = torch.where(matched == IGNORE, -1, labels)
        # The reference also stores a ground truth for ignored boxes.
        best = inputs["match_iou"].argmax(dim=0)
        ours[f"match_{name}_idx"] = torch.where(matched >= 0, matched, best)
    return ours


def compare(folder: Path, found: dict[str, Tensor], report: Report) -> None:
    """Compare every array of unit.npz."""
    stored = load(folder / "unit.npz")
    for name in INPUTS:
        report.skip(f"unit.{name}", "an input: it shows in what is computed from it")

    def tolerance(name: str) -> float:
        if not found[name].is_floating_point():
            return 0.0
        return 1e-5 + 1e-6 * float(np.abs(stored[name]).max(initial=0.0))

    report.table("unit", found, stored, tolerance)
