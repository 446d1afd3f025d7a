"""Runs a detector's golden case: from config, weights, inputs and ground truth to every intermediate result.

The stored results are read by `compare_detector`, after this. Losses and gradients are computed
twice, in float32 and in float64 (boxes stay float32, as in the reference), which leaves no rounding
to tolerate. A case without ground truth has neither.
Letters: B images, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.parity.case import Case
from vitdet.models.boxes import clip
from vitdet.models.detector import Detector
from vitdet.models.losses import FederatedClassification, federated_classes
from vitdet.models.rpn import Proposals
from vitdet.models.vit import resize_positions
from vitdet.types import Detections, Target


@dataclass
class Computed:
    """All that a case can be asked for. Maps and training arrays go by the names of backbone.npz and train.npz."""

    case: Case
    maps: dict[str, Tensor]
    heads: list[tuple[Tensor, Tensor]]
    proposals: dict[str, list[Proposals]]
    stages: list[tuple[Tensor, Tensor]]
    detections: list[Detections]
    training: dict[str, Tensor]
    losses: dict[str, dict[str, float]]
    gradients: dict[str, Tensor]
    losses64: dict[str, dict[str, float]]
    gradients64: dict[str, Tensor]


def compute(folder: Path) -> Computed:
    """Reads what `Case.read` reads and runs the case."""
    case = Case.read(folder)
    detector = case.detector.eval()
    with torch.no_grad():
        maps = run_backbone(case)
        features = [maps[f"p{level}"] for level in range(2, 7)]
        heads = [detector.rpn.head(feature) for feature in features]
        found = detector.rpn(features)
        proposals = {
            "eval": detector.rpn.propose(found, case.sizes, detector.rpn.top_test),
            "train": detector.rpn.propose(found, case.sizes, detector.rpn.top_train),
        }
        stages = run_stages(detector, features, [p.boxes for p in proposals["eval"]], case.sizes)
        detections = detector(case.images, None, case.sizes)
        training = {}
        if case.bitmaps:
            boxes = [p.boxes for p in proposals["train"]]
            training = run_training(case, found.anchors, boxes, features)
    losses, gradients = run_losses(case, detector)
    losses64, gradients64 = run_losses(case, copy.deepcopy(detector).double())
    return Computed(
        case=case,
        maps=maps,
        heads=heads,
        proposals=proposals,
        stages=stages,
        detections=detections,
        training=training,
        losses=losses,
        gradients=gradients,
        losses64=losses64,
        gradients64=gradients64,
    )


def run_backbone(case: Case) -> dict[str, Tensor]:
    """Everything up to the pyramid (whole maps; `compare_detector` cuts them)."""
    vit = case.detector.backbone
    tokens = vit.patch_embed(case.detector.normalize(case.images, case.sizes))
    found = {
        "patch_embed": tokens,
        "pos_embed_resized": resize_positions(vit.pos_embed, tuple(tokens.shape[1:3])),
    }
    x = tokens + found["pos_embed_resized"]
    for i, block in enumerate(vit.blocks):
        x = block(x)
        found[f"block{i}"] = x
    found["last_feat"] = x.permute(0, 3, 1, 2)
    for i, level in enumerate(case.detector.pyramid(found["last_feat"])):
        found[f"p{i + 2}"] = level
    return found


def run_stages(
    detector: Detector, features: Sequence[Tensor], boxes: Sequence[Tensor], sizes: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Logits and deltas of every stage on the test-mode proposals of all images."""
    found = []
    for stage in range(len(detector.roi_heads.stages)):
        logits, deltas = detector.roi_heads.run_stage(stage, features, boxes)
        found.append((logits, deltas.flatten(1)))
        decoded = detector.roi_heads.decode(stage, torch.cat(list(boxes)), deltas[:, 0])
        boxes = [
            clip(b, size)
            for b, size in zip(decoded.split([len(b) for b in boxes]), sizes, strict=True)
        ]
    return found


def run_training(
    case: Case, anchors: Sequence[Tensor], proposals: Sequence[Tensor], features: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Which anchors and boxes are sampled, and what each learns."""
    detector, heads, found = case.detector, case.detector.roi_heads, {}
    assigned = []
    for i, target in enumerate(case.bitmaps):
        _, positive, negative = detector.rpn.sample(torch.cat(list(anchors)), target)
        found[f"rpn_pos_idx{i}"], found[f"rpn_neg_idx{i}"] = positive, negative
        sampled = heads.sample(proposals[i], target)
        pool = torch.cat([proposals[i], target.boxes])
        index = (sampled.boxes[:, None] == pool).all(dim=2).int().argmax(dim=1)
        foreground = sampled.matched >= 0
        found[f"roi_pos_idx{i}"], found[f"roi_neg_idx{i}"] = index[foreground], index[~foreground]
        assigned.append(sampled)
        boxes, matched = sampled.boxes[foreground], sampled.matched[foreground]
        found[f"mask_targets_bitmask{i}"] = heads.mask_targets(target.masks[matched], boxes)
        if case.polygons:
            found[f"mask_targets_polygon{i}"] = heads.mask_targets(
                case.polygons[i].masks[matched], boxes
            )
    for stage in range(len(heads.stages)):
        name = "roi" if stage == 0 else f"stage{stage}"
        labels = [heads.labels(a, target) for a, target in zip(assigned, case.bitmaps, strict=True)]
        for i, (one, target) in enumerate(zip(assigned, case.bitmaps, strict=True)):
            found[f"{name}_boxes{i}"], found[f"{name}_gt_classes{i}"] = one.boxes, labels[i]
            found[f"{name}_gt_boxes{i}"] = torch.cat([target.boxes, target.boxes.new_zeros(1, 4)])[
                one.matched
            ]
        if isinstance(heads.classification, FederatedClassification):
            found[f"fed_classes_call{stage}"] = federated_classes(
                torch.cat(labels),
                heads.classification.class_weights,
                heads.classification.num,
                draw=False,
            )
        if stage + 1 < len(heads.stages):
            counts = [len(a.boxes) for a in assigned]
            boxes = [a.boxes for a in assigned]
            _, deltas = heads.run_stage(stage, features, boxes)
            refined = heads.decode(stage, torch.cat(boxes), deltas[:, 0]).split(counts)
            assigned = heads.reassign(stage + 1, refined, case.bitmaps, case.sizes)
    return found


def run_losses(
    case: Case, detector: Detector
) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """The losses of the three kinds that a case stores, and the gradients (by our names) of the bitmaps' sum."""
    kinds: dict[str, list[Target]] = {}
    if case.polygons:
        kinds["losses_polygon"] = case.polygons
    if case.bitmaps:
        kinds["losses_bitmask"] = case.bitmaps
    if len(case.bitmaps) > 1:
        kinds["losses_image1_without_gt"] = [
            case.bitmaps[0],
            case.bitmaps[1][:0],
            *case.bitmaps[2:],
        ]
    detector.train()
    losses, gradients = {}, {}
    for name, targets in kinds.items():
        with torch.set_grad_enabled(name == "losses_bitmask"):
            found = detector(case.images, targets, case.sizes)
        if name == "losses_bitmask":
            sum(found.values()).backward()
            gradients = {
                n: p.grad.detach() for n, p in detector.named_parameters() if p.grad is not None
            }
        losses[name] = {key: float(value.detach()) for key, value in found.items()}
    return losses, gradients
