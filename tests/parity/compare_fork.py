"""Compare the stored results of ViTAE-Transformer/ViTDet's golden detector with the output of `fork_detector`.

Proposals and detections whose scores tie within the noise are compared as sets (`ties` states the rule).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as rle

from tests.parity.case import load
from tests.parity.compare_detector import compare_table, overlap
from tests.parity.compare_inputs import FLIPPED
from tests.parity.fork_detector import INPUTS, Computed
from tests.parity.report import Report
from tests.parity.ties import order_within_ties

BOXES, SCORES, LOSSES = 1e-2, 1e-4, 1e-4  # in pixels, in probability, relative
# Values pooled in boxes move with the boxes, which the reference's float64 run moves by 3e-4 pixels.
LOGITS = 5e-4
OVERLAP = 0.99
NOTES = ("kind", "seed", "note", "float64")
SETTINGS = ("model", "meta")


def compare(folder: Path, found: Computed, report: Report) -> None:
    """Compare every array of io.npz, masks_rle.json, and the results in config.json."""
    stored = load(folder / "io.npz")
    for name in (name for name in INPUTS if name in stored):
        report.skip(f"io.{name}", "an input: it shows in the results")
    if not found.losses:
        report.skip("losses", "this case has no ground truth, so none are computed")
    found = in_stored_order(found, stored, report)
    ours = dict(found.arrays)
    if "proposals" in stored and stored["proposals"].ndim == 2:
        theirs = stored.pop("proposals")
        report.close("io.proposals boxes", ours["proposals"][:, :4], theirs[:, :4], BOXES)
        report.close("io.proposals scores", ours["proposals"][:, 4:], theirs[:, 4:], SCORES)
    if "det_mask_logits" in stored:  # stored for the first detections only
        ours["det_mask_logits"] = ours["det_mask_logits"][: len(stored["det_mask_logits"])]
    tolerance = {
        "det_boxes": BOXES,
        "det_scores": SCORES,
        "det_labels": 0.0,
        "roi_cls_score": LOGITS,
        "roi_bbox_pred": LOGITS,
        "det_mask_logits": LOGITS,
    }
    if not ours.keys() & stored.keys():
        report.out("io", "it holds no stored result")
    compare_table("io", stored, ours, tolerance, report)
    if (folder / "masks_rle.json").exists():
        compare_masks(json.loads((folder / "masks_rle.json").read_text()), found, report)
    else:
        report.skip("masks_rle.json", "this case does not hold the file")
    compare_config(json.loads((folder / "config.json").read_text()), found, report)


def in_stored_order(found: Computed, stored: Mapping[str, np.ndarray], report: Report) -> Computed:
    """Return `found` with tied proposals and detections, and arrays for them, in the stored order."""
    arrays = dict(found.arrays)
    proposals = {"boxes": arrays["proposals"][:, :4], "scores": arrays["proposals"][:, 4]}
    theirs = {}
    if "proposals" in stored and stored["proposals"].ndim == 2:
        theirs = {"boxes": stored["proposals"][:, :4], "scores": stored["proposals"][:, 4]}
    limits = {"boxes": BOXES, "scores": SCORES}
    order = order_within_ties("io.proposals", proposals, theirs, limits, "scores", report)
    for name in ("proposals", "roi_cls_score", "roi_bbox_pred"):
        arrays[name] = arrays[name][torch.from_numpy(order)]
    limits = {"det_boxes": BOXES, "det_scores": SCORES, "det_labels": 0.0}
    order = order_within_ties("io.det", arrays, stored, limits, "det_scores", report)
    for name in (*limits, "det_mask_logits"):
        arrays[name] = arrays[name][torch.from_numpy(order)]
    return replace(found, arrays=arrays, bitmaps=found.bitmaps[torch.from_numpy(order)])


def compare_masks(stored: list[dict], found: Computed, report: Report) -> None:
    """Compare masks_rle.json: one mask per detection, at the original image's size."""
    bitmaps = found.bitmaps.numpy()
    if len(stored) != len(bitmaps):
        report.out("masks_rle", f"{len(bitmaps)} masks, expected {len(stored)}")
        return
    overlaps = []
    for ours, code in zip(bitmaps, stored, strict=True):
        overlaps.append(overlap(ours, rle.decode(code).astype(bool)))
    name = f"masks_rle (IoU but for {FLIPPED} pixels)"
    report.at_least(name, min(overlaps, default=1.0), OVERLAP)
    for name in sorted({name for code in stored for name in code} - {"size", "counts"}):
        report.out(f"masks_rle.{name}", "not compared: this check does not know the quantity")


def compare_config(config: Mapping, found: Computed, report: Report) -> None:
    """Compare the results in config.json: counts, ranges, areas and training losses."""
    labels, scores = found.arrays["det_labels"].numpy(), found.arrays["det_scores"].numpy()
    areas = found.bitmaps.flatten(1).sum(dim=1)
    said = {
        "n_det": (len(labels), 0.0, 0.0),
        "n_proposals": (len(found.arrays["proposals"]), 0.0, 0.0),
        "labels_hist": (np.bincount(labels, minlength=found.num_classes), 0.0, 0.0),
        "score_range": (np.array([scores.min(initial=1.0), scores.max(initial=0.0)]), SCORES, 0.0),
        "mask_areas": (areas, FLIPPED, 1 - OVERLAP),
        "losses_total": (found.losses.get("total", np.nan), 0.0, LOSSES),
    }
    for name, value in config.items():
        if name in said:
            ours, absolute, relative = said[name]
            report.close(f"config.{name}", ours, np.array(value), absolute, relative)
        elif name in NOTES:
            report.skip(f"config.{name}", "a note")
        elif name in SETTINGS:
            report.skip(f"config.{name}", "settings: they show in the results")
        elif name == "losses":
            compare_losses(value, found, report)
        else:
            report.out(f"config.{name}", "not compared: this check does not know the entry")


def compare_losses(stored: Mapping, found: Computed, report: Report) -> None:
    """Compare the training losses; those of the RPN are compared per level and in total."""
    for name, theirs in stored.items():
        if name not in found.losses:
            report.out(f"config.losses.{name}", "not compared: this check does not know the loss")
            continue
        ours = np.array(found.losses[name])
        report.close(f"config.losses.{name}", ours, np.array(theirs), 0.0, LOSSES)
        if isinstance(theirs, list):
            whole = found.losses.get(f"sum of {name}", np.nan)
            report.close(f"config.losses.{name} in all", whole, sum(theirs), 0.0, LOSSES)
