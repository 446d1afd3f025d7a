"""Compare the stored results of a detector's golden case with the output of `detector`.

Every array of a file and every entry of a JSON file is compared, or skipped by name. Missing files are
skipped. Proposals and detections whose scores tie within the noise are compared as sets (`ties` states
the rule); everything else is compared in order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor

from tests.parity.case import load
from tests.parity.compare_inputs import BOXES, FLIPPED, compare_floors, compare_inputs
from tests.parity.detector import Computed
from tests.parity.report import Report
from tests.parity.ties import order_within_ties
from vitdet.evaluation.evaluator import detections_to_results
from vitdet.models.rpn import Proposals
from vitdet.predictor import to_image

# Absolute for features and logits, scores and probabilities; relative for losses and gradients.
FEATURES, SCORES, LOSSES, GRADIENTS = 1e-4, 1e-5, 1e-5, 1e-3
LOSSES64, GRADIENTS64 = (
    1e-6,
    1e-4,
)  # the shift that float32 box arithmetic on another machine may cause

Stored = Mapping[str, np.ndarray]


def compare(folder: Path, found: Computed, report: Report) -> None:
    """Compare the files of a case with the computed results; a case without stored results fails."""
    floors = {}
    if (folder / "noise_floor.json").exists():
        floors = json.loads((folder / "noise_floor.json").read_text())
    compare_floors(floors, report)
    compare_inputs(found.case, report)
    if (folder / "rpn.npz").exists():
        found = in_stored_order(found, load(folder / "rpn.npz"), report)
    compared = 0
    for file, check in (
        ("backbone.npz", compare_backbone),
        ("rpn.npz", compare_rpn),
        ("detections.npz", compare_detections),
        ("results.json", compare_results),
        ("train.npz", compare_training),
        ("losses.json", compare_losses),
    ):
        path = folder / file
        if not path.exists():
            report.skip(file, "this case does not hold the file")
            continue
        stored = load(path) if path.suffix == ".npz" else json.loads(path.read_text())
        check(stored, found, floors, report)
        compared += 1
    if not compared:
        report.out("the case", "it holds no stored result")


def in_stored_order(found: Computed, rpn: Stored, report: Report) -> Computed:
    """Return `found` with tied proposals, and every stage's rows, in the order of rpn.npz.

    train.npz stores positions in the list of proposals, so sampled proposals are compared strictly.
    """
    proposals, orders = {}, {}
    for mode, images in found.proposals.items():
        orders[mode], tolerance = [], {"boxes": BOXES, "logits": FEATURES}
        for i, image in enumerate(images):
            name, ours = f"{mode}_proposals{i}", {"boxes": image.boxes, "logits": image.logits}
            theirs = present(rpn, {"boxes": name, "logits": f"{mode}_proposal_logits{i}"})
            order = order_within_ties(f"rpn.{name}", ours, theirs, tolerance, "logits", report)
            orders[mode].append(order)
        proposals[mode] = [
            Proposals(image.boxes[order], image.logits[order], image.filled[order])
            for image, order in zip(images, orders[mode], strict=True)
        ]
    starts = np.cumsum([0, *map(len, orders["eval"])])
    moved = [order + start for order, start in zip(orders["eval"], starts, strict=False)]
    rows = torch.from_numpy(np.concatenate(moved))
    stages = [(logits[rows], deltas[rows]) for logits, deltas in found.stages]
    return replace(found, proposals=proposals, stages=stages)


def present(stored: Stored, columns: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Return the columns, {name: name in the file}, that the file contains."""
    return {name: stored[theirs] for name, theirs in columns.items() if theirs in stored}


def compare_backbone(stored: Stored, found: Computed, floors: Mapping, report: Report) -> None:
    """Compare backbone.npz."""
    maps = found.maps
    ours = {
        "pos_embed_resized": maps["pos_embed_resized"],
        "last_feat": maps["last_feat"],
        "patch_embed_image0_channels_0_5": maps["patch_embed"][0, :, :, [0, 5]],
        "p2_channels_0_7": maps["p2"][:, [0, 7]],
    }
    for name, block in maps.items():
        if name.startswith("block"):
            ours[f"{name}_out_image0"] = block[0]
            ours[f"{name}_out_image0_every4"] = block[0, ::4, ::4]
    for level in range(2, 7):
        feature = maps[f"p{level}"]
        ours |= {
            f"p{level}": feature,
            f"p{level}_mean": feature.mean(dim=(2, 3)),
            f"p{level}_std": feature.flatten(2).std(dim=2),
        }
    tolerance = {name: max(10 * floors.get(name.split("_")[0], 0.0), FEATURES) for name in ours}
    compare_table("backbone", stored, ours, tolerance, report)


def compare_rpn(stored: Stored, found: Computed, floors: Mapping, report: Report) -> None:
    """Compare rpn.npz."""
    ours, tolerance = {}, {}
    for level, (logits, deltas) in enumerate(found.heads, start=2):
        ours |= {
            f"objectness_p{level}": logits,
            f"deltas_p{level}": deltas,
            f"deltas_p{level}_every4": deltas[:, :, ::4, ::4],
        }
    for mode, images in found.proposals.items():
        for i, image in enumerate(images):
            ours[f"{mode}_proposals{i}"] = image.boxes
            ours[f"{mode}_proposal_logits{i}"] = image.logits
            tolerance[f"{mode}_proposals{i}"] = BOXES
    compare_table("rpn", stored, ours, tolerance, report)


def compare_detections(stored: Stored, found: Computed, floors: Mapping, report: Report) -> None:
    """Compare detections.npz: on the canvas, and after rescaling to the output size."""
    ours, tolerance = {}, {}
    boxes = max(10 * floors.get("boxes", 0), BOXES)
    scores = max(10 * floors.get("scores", 0), SCORES)
    masks = max(10 * floors.get("mask_probs", 0), SCORES)
    for stage, (logits, deltas) in enumerate(found.stages):
        ours |= {f"cls_logits_stage{stage}": logits, f"box_deltas_stage{stage}": deltas}
    for i, image in enumerate(found.detections):
        columns = {"boxes": image.boxes, "scores": image.scores, "classes": image.labels}
        theirs = present(stored, {name: f"{name}{i}" for name in columns})
        limits = {"boxes": boxes, "scores": scores, "classes": 0.0}
        order = order_within_ties(f"detections.{i}", columns, theirs, limits, "scores", report)
        image = image[torch.from_numpy(order)]
        output = to_image(image, tuple(found.case.sizes[i].tolist()), found.case.outputs[i])
        for prefix, part in (("", image), ("post_", output)):
            columns = {"boxes": part.boxes, "scores": part.scores, "classes": part.labels}
            ours |= {f"{prefix}{name}{i}": column for name, column in columns.items()}
            tolerance |= {f"{prefix}{name}{i}": limits[name] for name in columns}
        ours[f"mask_probs_first20_{i}"] = image.masks[:20]
        ours[f"mask_probs_mean{i}"] = image.masks.mean(dim=(1, 2))
        tolerance |= {f"mask_probs_first20_{i}": masks, f"mask_probs_mean{i}": masks}
    compare_table("detections", stored, ours, tolerance, report)


def compare_table(
    title: str,
    stored: Stored,
    ours: Mapping[str, Tensor],
    tolerance: Mapping[str, float],
    report: Report,
) -> None:
    """Compare each stored array with ours of the same name; the default tolerance is FEATURES."""
    for name, theirs in stored.items():
        if name in ours:
            report.close(f"{title}.{name}", ours[name], theirs, tolerance.get(name, FEATURES))
    report.all_seen([f"{title}.{name}" for name in stored])


def compare_results(stored: list[dict], found: Computed, floors: Mapping, report: Report) -> None:
    """Compare results.json: the first 40 detections of an image as COCO results at output size."""
    columns = {
        "image": ("image_id", 0.0),
        "category": ("category_id", 0.0),
        "score": ("score", max(10 * floors.get("scores", 0), SCORES)),
        "bbox_xywh": ("bbox", max(10 * floors.get("boxes", 0), BOXES)),
    }
    tolerance = {name: absolute for name, (_, absolute) in columns.items()}
    ours = []
    for i, image in enumerate(found.detections):
        size = tuple(found.case.sizes[i].tolist())
        classes = range(found.case.config["num_classes"])
        mine = detections_to_results(image, size, found.case.outputs[i], i, classes)
        theirs = [row for row in stored if row.get("image") == i]
        lists = (
            {name: [result[key] for result in mine] for name, (key, _) in columns.items()},
            {name: [row[name] for row in theirs] for name in columns},
        )
        order = order_within_ties(f"results.{i}", *lists, tolerance, "score", report)
        ours += [mine[k] for k in order[:40]]
    if len(ours) != len(stored):
        report.out("results", f"{len(ours)} results, expected {len(stored)}")
        return
    for name, (key, absolute) in columns.items():
        mine, theirs = np.array([result[key] for result in ours]), [row[name] for row in stored]
        report.close(f"results.{name}", mine, np.array(theirs), absolute)
    mine, theirs = (
        [rle.decode(result["segmentation"]).astype(bool) for result in results]
        for results in (ours, stored)
    )
    least = min(map(overlap, mine, theirs), default=1.0)
    report.at_least(f"results.segmentation (IoU but for {FLIPPED} pixels)", least, 0.999)
    report.seen.add("results.segmentation")
    areas, stored_areas = np.array([mask.sum() for mask in mine]), [row["area"] for row in stored]
    report.close("results.area", areas, np.array(stored_areas), FLIPPED, 1e-3)
    report.all_seen(sorted({f"results.{name}" for row in stored for name in row}))


def overlap(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the IoU of two masks, ignoring FLIPPED differing pixels; 0 for different shapes."""
    if ours.shape != theirs.shape:
        return 0.0
    return 1 - max((ours != theirs).sum() - FLIPPED, 0) / max((ours | theirs).sum(), 1)


def compare_training(stored: Stored, found: Computed, floors: Mapping, report: Report) -> None:
    """Compare train.npz: sampled anchors and boxes, their targets, and both forms of mask targets."""
    ours, num_classes = found.training, found.case.config["num_classes"]
    for name, theirs in stored.items():
        full, base = f"train.{name}", name.removesuffix("_packed").removesuffix("_shape")
        if name.endswith("_shape") and base in ours:
            report.equal(full, np.array(ours[base].shape), theirs)
        elif name.endswith("_packed") and base in ours:
            mine = ours[base].numpy()
            size = (mine.size + 7) // 8
            if theirs.shape != (size,):
                report.out(full, f"{theirs.size} bytes, expected {size} for {mine.shape} cells")
                continue
            wanted = np.unpackbits(theirs)[: mine.size].reshape(mine.shape).astype(bool)
            if "polygon" in base:
                union = (mine | wanted).sum(axis=(1, 2))
                shares = (mine & wanted).sum(axis=(1, 2)) / np.maximum(union, 1)
                shares[union == 0] = 1.0
                value = float(shares.mean()) if len(shares) else 1.0
                report.at_least(f"{full} (mean IoU)", value, 0.98)
                report.seen.add(full)
            else:
                report.close(full, float((mine != wanted).mean()) if mine.size else 0.0, 0.0, 2e-4)
        elif "_gt_boxes" in name and name in ours:
            foreground = ours[name.replace("gt_boxes", "gt_classes")] < num_classes
            if len(theirs) == len(foreground):
                theirs = theirs[foreground.numpy()]
            report.close(full, ours[name][foreground], theirs, BOXES)
            report.skip(f"{full} of background boxes", "no meaning: they learn no box")
        elif name.startswith("fed_") and name in ours:
            report.equal(full, ours[name].sort().values, np.sort(theirs))
        elif name in ours:
            report.close(full, ours[name], theirs, BOXES if "boxes" in name else 0.0)
    report.all_seen([f"train.{name}" for name in stored])


def compare_losses(stored: Mapping, found: Computed, floors: Mapping, report: Report) -> None:
    """Compare losses.json: losses with each kind of target, and norms and sums of gradients."""
    their_names = found.case.their_names()
    if found.decided:
        text = f"{found.decided} ReLUs take the side that they have in float64"
        report.inform("losses ties", text)
    floor = 10 * max([*floors.get("losses_rel", {}).values(), 0.0])
    for kind, theirs in stored.items():
        exact, base = kind.endswith("_float64"), kind.removesuffix("_float64")
        losses = found.losses64 if exact else found.losses
        if base in losses:
            report.names(f"losses.{kind} names", losses[base], theirs)
            for name in theirs.keys() & losses[base].keys():
                by_polygon = base == "losses_polygon" and name == "loss_mask"
                relative = 1e-2 if by_polygon else LOSSES64 if exact else max(floor, LOSSES)
                ours = losses[base][name]
                report.close(f"losses.{kind}.{name}", ours, theirs[name], 0.0, relative)
        elif base in ("grad_norms", "grad_sums"):
            exact = exact or base == "grad_sums"  # only the float64 sums are stored
            gradients = found.gradients64 if exact else found.gradients
            absolute, relative = 1e-6, GRADIENTS64
            if not exact:
                absolute = 1e-5
                relative = max(10 * floors.get("grad_norm_rel_max", 0.0), GRADIENTS)
            ours = {their_names[name]: gradient for name, gradient in gradients.items()}
            report.names(f"losses.{kind} names", ours, theirs)
            for name in (name for name in theirs if name in ours):
                value = ours[name].norm() if base == "grad_norms" else ours[name].sum()
                # the error of a sum of canceling terms is relative to the terms
                scale = float(ours[name].abs().sum()) if base == "grad_sums" else abs(theirs[name])
                tolerance = absolute + relative * scale
                report.close(f"losses.{kind}.{name}", value, theirs[name], tolerance)
        elif kind == "params_without_grad":
            without = [their_names[name] for name in their_names.keys() - found.gradients.keys()]
            report.names(f"losses.{kind}", without, theirs)
        else:
            continue
        report.seen.add(f"losses.{kind}")
    report.all_seen([f"losses.{kind}" for kind in stored])
