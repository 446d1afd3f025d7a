"""Run a detector's golden case: from config, weights, inputs and ground truth to every intermediate result.

`compare_detector` then reads the stored results. Losses and gradients are computed twice: in
float32, and in float64 for a smaller tolerance (boxes stay float32, as in the reference). A case
without ground truth has no losses or gradients.
Notation: B images, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.parity import kinks
from tests.parity.case import Case
from tests.parity.device import CPU, moved
from vitdet.models.boxes import clip, pick
from vitdet.models.detector import Detector
from vitdet.models.losses import FederatedClassification, federated_classes
from vitdet.models.rpn import Proposals
from vitdet.models.vit import resize_positions
from vitdet.types import Detections, Target, Targets


@dataclass
class Computed:
    """All results that a case may store. Maps and training arrays are named as in backbone.npz and train.npz."""

    case: Case
    maps: dict[str, Tensor]
    heads: list[tuple[Tensor, Tensor]]
    proposals: dict[str, list[Proposals]]  # per image, without empty slots
    stages: list[tuple[Tensor, Tensor]]
    detections: list[Detections]
    training: dict[str, Tensor]
    losses: dict[str, dict[str, float]]
    gradients: dict[str, Tensor]
    losses64: dict[str, dict[str, float]]
    gradients64: dict[str, Tensor]
    decided: int  # float32 ReLUs whose gradient follows float64 (see `kinks`)


def compute(folder: Path, device: torch.device = CPU) -> Computed:
    """Read the case with `Case.read` and run it on a device; the results stay there."""
    case = moved(Case.read(folder), device)
    detector = case.detector.eval()
    with torch.no_grad():
        maps = run_backbone(case)
        features = [maps[f"p{level}"] for level in range(2, 7)]
        heads = [detector.rpn.head(feature) for feature in features]
        found = detector.rpn(features)
        test = detector.rpn.propose(found, case.sizes, detector.rpn.top_test)
        train = detector.rpn.propose(found, case.sizes, detector.rpn.top_train)
        proposals = {"eval": by_image(test), "train": by_image(train)}
        stages = run_stages(detector, features, test, case.sizes)
        detections = detector(case.images, None, case.sizes)
        training = {}
        if case.bitmaps:
            training = run_training(case, found.anchors, train, features)
    with kinks.recorded() as sides:
        losses64, gradients64 = run_losses(case, copy.deepcopy(detector).double())
    with kinks.replayed(sides) as decided:
        losses, gradients = run_losses(case, detector)
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
        decided=sum(decided),
    )


def run_backbone(case: Case) -> dict[str, Tensor]:
    """Compute everything up to the pyramid (whole maps; `compare_detector` crops them)."""
    vit = case.detector.backbone
    tokens = vit.patch_embed(case.detector.normalize(case.images, case.sizes))
    positions = resize_positions(vit.pos_embed, tuple(tokens.shape[1:3]))
    found = {"patch_embed": tokens, "pos_embed_resized": positions}
    x = tokens + positions
    for i, block in enumerate(vit.blocks):
        x = block(x)
        found[f"block{i}"] = x
    found["last_feat"] = x.permute(0, 3, 1, 2)
    for i, level in enumerate(case.detector.pyramid(found["last_feat"])):
        found[f"p{i + 2}"] = level
    return found


def by_image(found: Proposals) -> list[Proposals]:
    """Return the filled slots of each image."""
    return [
        Proposals(boxes[filled], logits[filled], filled[filled])
        for boxes, logits, filled in zip(*found, strict=True)
    ]


def run_stages(
    detector: Detector, features: Sequence[Tensor], proposals: Proposals, sizes: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Compute logits and deltas of every stage on the test-mode proposals of all images."""
    found, boxes, filled = [], proposals.boxes, proposals.filled
    for stage in range(len(detector.roi_heads.stages)):
        logits, deltas = detector.roi_heads.run_stage(stage, features, boxes, filled)
        found.append((logits[filled], deltas[filled].flatten(1)))
        boxes = clip(detector.roi_heads.decode(stage, boxes, deltas[:, :, 0]), sizes)
    return found


def run_training(
    case: Case, anchors: Sequence[Tensor], proposals: Proposals, features: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Compute which anchors and boxes are sampled, and their targets."""
    detector, heads, found = case.detector, case.detector.roi_heads, {}
    targets = Targets.of(case.bitmaps)
    _, sampled = detector.rpn.sample(torch.cat(list(anchors)), targets)
    assigned = heads.sample(proposals.boxes, proposals.filled, targets)
    for i, target in enumerate(case.bitmaps):
        background = sampled.filled[i] & ~sampled.foreground[i]
        found[f"rpn_pos_idx{i}"] = sampled.chosen[i][sampled.foreground[i]]
        found[f"rpn_neg_idx{i}"] = sampled.chosen[i][background]
        boxes, matched = assigned.boxes[i][assigned.filled[i]], assigned.matched[i]
        matched = matched[assigned.filled[i]]
        pool = torch.cat([proposals.boxes[i][proposals.filled[i]], target.boxes])
        index = (boxes[:, None] == pool).all(dim=2).int().argmax(dim=1)
        foreground = matched >= 0
        found[f"roi_pos_idx{i}"], found[f"roi_neg_idx{i}"] = index[foreground], index[~foreground]
        boxes, matched = boxes[foreground], matched[foreground]
        found[f"mask_targets_bitmask{i}"] = heads.mask_targets(target.masks[matched], boxes)
        if case.polygons:
            outlines = case.polygons[i].masks[matched]
            found[f"mask_targets_polygon{i}"] = heads.mask_targets(outlines, boxes)
    for stage in range(len(heads.stages)):
        name = "roi" if stage == 0 else f"stage{stage}"
        labels, filled = heads.labels(assigned, targets), assigned.filled
        truth = pick(targets.boxes, assigned.matched.clamp(min=0))
        for i, used in enumerate(filled):
            found[f"{name}_boxes{i}"] = assigned.boxes[i][used]
            found[f"{name}_gt_classes{i}"] = labels[i][used]
            found[f"{name}_gt_boxes{i}"] = truth[i][used]
        if isinstance(heads.classification, FederatedClassification):
            odds, num = heads.classification.class_weights, heads.classification.num
            classes = federated_classes(labels[filled], odds, num, draw=False)
            found[f"fed_classes_call{stage}"] = classes.nonzero().flatten()
        if stage + 1 < len(heads.stages):
            _, deltas = heads.run_stage(stage, features, assigned.boxes, filled)
            refined = heads.decode(stage, assigned.boxes, deltas[:, :, 0])
            assigned = heads.reassign(stage + 1, refined, filled, targets, case.sizes)
    return found


def run_losses(
    case: Case, detector: Detector
) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """Compute the losses for each kind of target, and the gradients (by our names) for bitmaps."""
    kinds: dict[str, list[Target]] = {}
    if case.polygons:
        kinds["losses_polygon"] = case.polygons
    if case.bitmaps:
        kinds["losses_bitmask"] = case.bitmaps
    if len(case.bitmaps) > 1:
        first, second, *others = case.bitmaps
        kinds["losses_image1_without_gt"] = [first, second[:0], *others]
    detector.train()
    losses, gradients = {}, {}
    for name, targets in kinds.items():
        with torch.set_grad_enabled(name == "losses_bitmask"):
            found = detector(case.images, targets, case.sizes)
        if name == "losses_bitmask":
            sum(found.values()).backward()
            trained = ((n, p) for n, p in detector.named_parameters() if p.grad is not None)
            gradients = {name: parameter.grad.detach() for name, parameter in trained}
        losses[name] = {key: float(value.detach()) for key, value in found.items()}
    return losses, gradients
