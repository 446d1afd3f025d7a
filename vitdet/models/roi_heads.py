"""RoI heads: classify and refine proposals in one or more stages, then predict masks.

He et al. (arXiv:1703.06870); Cai & Vasconcelos (arXiv:1712.00726). Hyperparameters as in
Detectron2's ViTDet configs. Notation: B images, S slots for an image's boxes, R RoIs of all images,
N proposals, D detections, K classes, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitdet.kernels.nms import nms
from vitdet.models.assign import BACKGROUND, IGNORE, Choose, Match, choose_randomly, sample
from vitdet.models.box_head import BINS as BOX_BINS
from vitdet.models.box_head import BoxHead
from vitdet.models.boxes import clip, decode, encode, iou_blocks, largest, nonempty, pick
from vitdet.models.layers import scale_gradient
from vitdet.models.losses import FederatedClassification, SoftmaxClassification, box_l1, mask_bce
from vitdet.models.mask_head import BINS as MASK_BINS
from vitdet.models.mask_head import MaskHead, mask_targets
from vitdet.models.roi_pool import pool
from vitdet.models.rpn import Proposals
from vitdet.types import Detections, Polygons, Targets

Classification = SoftmaxClassification | FederatedClassification

WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # weights of the box transform; multiplied by s + 1 in stage s
# number of box-class pairs per image before NMS; increased if too few detections remain
CANDIDATES = 2000


class Assigned(NamedTuple):
    """Boxes, and the ground truths that are assigned to them."""

    boxes: Tensor  # (B, S, 4)
    matched: Tensor  # (B, S): index of the ground truth, BACKGROUND, or IGNORE in an empty slot
    most: int  # foreground boxes are in an image's first `most` slots

    @property
    def filled(self) -> Tensor:
        """Whether each slot contains a box: (B, S) bool."""
        return self.matched >= BACKGROUND


class Found(NamedTuple):
    """Slots for detections, sorted by score."""

    boxes: Tensor  # (B, D, 4)
    scores: Tensor  # (B, D)
    labels: Tensor  # (B, D)
    filled: Tensor  # (B, D) bool
    exact: Tensor  # (B,) bool: whether there were enough candidates


class Scored(NamedTuple):
    """Boxes and scores of the proposals after all stages."""

    boxes: Tensor  # (B, N, K or 1, 4), of the last stage
    scores: Tensor  # (B, N, K), mean over all stages
    filled: Tensor  # (B, N) bool


class RoIHeads(nn.Module):
    """RoI heads whose `stages` successively refine the boxes.

    Args:
        stages: box heads; in stage s, boxes with an IoU of at least `ious[s]` are foreground.
        classification: computes loss and probabilities from logits.
        strides: strides of the levels from which RoIs are pooled (p2..p5).
        mask: the mask head, or None.
        match: assigns ground truths to boxes.
        min_log_scale: lower bound of log(new side / old side) of a box in one stage.
    """

    def __init__(
        self,
        *,
        stages: Sequence[BoxHead],
        mask: MaskHead | None,
        classification: Classification,
        strides: Sequence[int],
        ious: Sequence[float],
        samples: int,
        positive_fraction: float,
        mask_samples: int,
        sampling_ratio: int,
        score_threshold: float,
        nms_iou: float,
        max_detections: int,
        min_log_scale: float,
        match: Match,
        choose: Choose = choose_randomly,
    ) -> None:
        super().__init__()
        self.stages, self.mask, self.classification = nn.ModuleList(stages), mask, classification
        self.strides, self.ious, self.sampling_ratio = list(strides), tuple(ious), sampling_ratio
        self.match, self.choose, self.min_log_scale = match, choose, min_log_scale
        self.samples, self.positive_fraction = samples, positive_fraction
        self.mask_samples, self.max_detections = mask_samples, max_detections
        self.score_threshold, self.nms_iou = score_threshold, nms_iou
        self.weights = [tuple(weight * (s + 1) for weight in WEIGHTS) for s in range(len(stages))]

    def losses(
        self, features: Sequence[Tensor], proposals: Proposals, targets: Targets, sizes: Tensor
    ) -> dict[str, Tensor]:
        """Return loss_cls, loss_box_reg and, with a mask head, loss_mask.

        With several stages, there is one loss_cls and loss_box_reg per stage, e.g. loss_cls_stage0.
        """
        found = {}
        assigned = self.sample(proposals.boxes, proposals.filled, targets)
        if self.mask is not None:
            found["loss_mask"] = self.mask_loss(features, assigned, targets)
        for stage in range(len(self.stages)):
            filled = assigned.filled
            logits, deltas = self.run_stage(stage, features, assigned.boxes, filled)
            suffix = f"_stage{stage}" if len(self.stages) > 1 else ""
            labels = self.labels(assigned, targets)
            flat = logits.flatten(0, 1), labels.flatten(), filled.flatten()
            found[f"loss_cls{suffix}"] = self.classification.loss(*flat)
            found[f"loss_box_reg{suffix}"] = self.box_loss(stage, deltas, labels, assigned, targets)
            if stage + 1 < len(self.stages):
                refined = self.decode(stage, assigned.boxes, deltas.detach()[:, :, 0])
                assigned = self.reassign(stage + 1, refined, filled, targets, sizes)
        return found

    def find(
        self, features: Sequence[Tensor], proposals: Proposals, sizes: Tensor
    ) -> tuple[Scored, Found]:
        """Return the scored proposals and the detections, without synchronizing with the GPU.

        The detections are selected from the CANDIDATES best box-class pairs. Boxes are in canvas
        pixels, clipped to sizes (B, 2).
        """
        scored = self.refine(features, proposals, sizes)
        return scored, self.select(*scored, CANDIDATES)

    def finish(self, features: Sequence[Tensor], scored: Scored, found: Found) -> list[Detections]:
        """Return the detections, sorted by score; select from more candidates if necessary."""
        candidates = CANDIDATES
        while not bool(found.exact.all()):
            candidates *= 8
            found = self.select(*scored, candidates)
        return detections(found, self.masks(features, found))

    def refine(self, features: Sequence[Tensor], proposals: Proposals, sizes: Tensor) -> Scored:
        """Return the boxes and scores of the proposals after all stages."""
        boxes, scores = proposals.boxes, []
        clipped = boxes[:, :, None]
        for stage in range(len(self.stages)):
            logits, deltas = self.run_stage(stage, features, boxes, proposals.filled)
            scores.append(self.classification.probabilities(logits))
            clipped = clip(self.decode(stage, boxes, deltas), sizes)
            boxes = clipped[:, :, 0]
        return Scored(clipped, torch.stack(scores).mean(dim=0), proposals.filled)

    def run_stage(
        self, stage: int, features: Sequence[Tensor], boxes: Tensor, filled: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return logits (B, S, K + 1) and deltas (B, S, K or 1, 4), undefined in empty slots."""
        slots = used(filled)
        pooled = self.pool(features, boxes, filled, slots, BOX_BINS)
        if len(self.stages) > 1:
            pooled = scale_gradient(pooled, 1 / len(self.stages))
        logits, deltas = self.stages[stage](pooled)
        return spread(logits, slots, filled), spread(deltas, slots, filled)

    def pool(
        self, features: Sequence[Tensor], boxes: Tensor, filled: Tensor, slots: Tensor, bins: int
    ) -> Tensor:
        """Return the features (R, C, bins, bins) of the boxes (B, S, 4) in the slots (R,)."""
        images = torch.arange(len(boxes), device=boxes.device)[:, None]
        image = torch.where(filled, images, -1).flatten()[slots]
        rows = boxes.flatten(0, 1)[slots]
        return pool(features, rows, image, self.strides, bins, self.sampling_ratio)

    def decode(self, stage: int, boxes: Tensor, deltas: Tensor) -> Tensor:
        """Apply a stage's deltas (..., 4) or (..., K, 4) to boxes (..., 4)."""
        return decode(boxes, deltas, self.weights[stage], self.min_log_scale)

    @torch.no_grad()
    def sample(self, proposals: Tensor, filled: Tensor, targets: Targets) -> Assigned:
        """Sample foreground and background boxes from proposals (B, N, 4) and ground truths."""
        boxes = torch.cat([proposals, targets.boxes], dim=1)
        # match ground-truth boxes separately: with low_quality=best, each object's best box would
        # otherwise be its own ground truth instead of a proposal
        ious = iou_blocks(targets.boxes, proposals), iou_blocks(targets.boxes, targets.boxes)
        matched = torch.cat([self.match(iou, self.ious[0], self.ious[0]) for iou in ious], dim=1)
        matched = torch.where(torch.cat([filled, targets.present], dim=1), matched, IGNORE)
        sampled = sample(matched, self.samples, self.positive_fraction, self.choose)
        matched = torch.where(sampled.filled, matched.gather(1, sampled.chosen), IGNORE)
        return Assigned(pick(boxes, sampled.chosen), matched, sampled.most)

    @torch.no_grad()
    def reassign(
        self, stage: int, refined: Tensor, filled: Tensor, targets: Targets, sizes: Tensor
    ) -> Assigned:
        """Clip the boxes of the previous stage; match them with the IoU threshold of `stage`."""
        boxes = clip(refined, sizes)
        filled = filled & nonempty(boxes)
        boxes = torch.where(filled[..., None], boxes, 0.0)
        matched = self.match(iou_blocks(targets.boxes, boxes), self.ious[stage], self.ious[stage])
        return Assigned(boxes, torch.where(filled, matched, IGNORE), boxes.shape[1])

    def labels(self, assigned: Assigned, targets: Targets) -> Tensor:
        """Return the class (B, S) of each box; K for background and empty slots."""
        own = targets.labels.gather(1, assigned.matched.clamp(min=0))
        return torch.where(assigned.matched > BACKGROUND, own, self.classification.num_classes)

    def box_loss(
        self, stage: int, deltas: Tensor, labels: Tensor, assigned: Assigned, targets: Targets
    ) -> Tensor:
        """Return the L1 loss of the foreground deltas, divided by the total number of boxes."""
        number, most = assigned.filled.sum(), assigned.most
        rows = assigned.boxes, assigned.matched, labels, deltas
        boxes, matched, labels, deltas = (row[:, :most] for row in rows)
        foreground = (matched > BACKGROUND)[..., None]
        unit = F.pad(torch.ones_like(boxes[..., :2]), (2, 0))  # dummy box for background
        truth = torch.where(foreground, pick(targets.boxes, matched.clamp(min=0)), unit)
        wanted = encode(torch.where(foreground, boxes, unit), truth, self.weights[stage])
        column = labels.clamp(max=deltas.shape[2] - 1)  # class-agnostic deltas have only column 0
        own = deltas.gather(2, column[:, :, None, None].expand(-1, -1, 1, 4))[:, :, 0]
        return box_l1(own, wanted, number, foreground[..., 0])

    def mask_loss(self, features: Sequence[Tensor], assigned: Assigned, targets: Targets) -> Tensor:
        """Return the mask loss over up to `mask_samples` foreground boxes per image.

        Only boxes whose objects have an annotated outline are used.
        """
        assert self.mask is not None
        boxes, matched = assigned.boxes[:, : assigned.most], assigned.matched[:, : assigned.most]
        truth = matched.clamp(min=0)
        usable = (matched > BACKGROUND) & targets.has_mask.gather(1, truth)
        # move usable boxes to the front, in their original order
        index = usable.to(torch.int8).sort(dim=1, descending=True, stable=True).indices
        index = index[:, : self.mask_samples]
        usable, truth, boxes = usable.gather(1, index), truth.gather(1, index), pick(boxes, index)
        slots = used(usable)
        first = torch.arange(len(truth), device=truth.device)[:, None] * targets.labels.shape[1]
        masks = targets.masks[(first + truth).flatten()[slots]]
        wanted = self.mask_targets(masks, boxes.flatten(0, 1)[slots])
        pooled = self.pool(features, boxes, usable, slots, MASK_BINS)
        logits = self.mask(pooled, targets.labels.gather(1, truth).flatten()[slots])
        return mask_bce(logits, wanted, usable.flatten()[slots])

    def mask_targets(self, masks: Polygons, boxes: Tensor) -> Tensor:
        """Return the training targets (R, 28, 28) bool of R masks in boxes (R, 4)."""
        return mask_targets(masks, boxes)

    def select(self, boxes: Tensor, scores: Tensor, filled: Tensor, candidates: int) -> Found:
        """Return detections after class-wise NMS of each image's `candidates` best box-class pairs.

        `boxes`, `scores` and `filled` are the fields of `Scored`.
        """
        finite = boxes.isfinite().flatten(2).all(dim=2) & scores.isfinite().all(dim=2)
        passed = (scores > self.score_threshold) & (finite & filled)[..., None]
        classes, sets = scores.shape[2], boxes.shape[2]
        ranked = torch.where(passed, scores, -1.0).flatten(1)
        best, index = largest(ranked, min(candidates, ranked.shape[1]))
        labels, valid = index % classes, best > self.score_threshold
        row = index // classes * sets + labels.clamp(max=sets - 1)
        found = torch.where(valid[..., None], pick(boxes.flatten(1, 2), row), 0.0)
        kept = nms(found, labels, self.nms_iou, self.max_detections)
        kept = (kept | ~nonempty(found)) & valid  # keep empty boxes, which NMS drops
        order = kept.to(torch.int8).sort(dim=1, descending=True, stable=True).indices
        order = order[:, : self.max_detections]
        complete = passed.flatten(1).sum(dim=1) <= best.shape[1]
        exact = complete | (kept.sum(dim=1) >= self.max_detections)
        scores, labels, kept = (rows.gather(1, order) for rows in (best, labels, kept))
        return Found(pick(found, order), scores, labels, kept, exact)

    def masks(self, features: Sequence[Tensor], found: Found) -> Tensor | None:
        """Return mask probabilities (B, D, 28, 28) inside the boxes; None without a mask head."""
        if self.mask is None:
            return None
        slots = used(found.filled)
        pooled = self.pool(features, found.boxes, found.filled, slots, MASK_BINS)
        logits = self.mask(pooled, found.labels.flatten()[slots])
        return spread(logits.float().sigmoid(), slots, found.filled)


def used(filled: Tensor) -> Tensor:
    """Return the slots (R,) to compute: filled slots on a CPU, all slots on a GPU (no sync)."""
    flat = filled.flatten()
    if filled.device.type == "cpu":
        return flat.nonzero().flatten()
    return torch.arange(len(flat), device=flat.device)


def spread(rows: Tensor, slots: Tensor, filled: Tensor) -> Tensor:
    """Scatter the rows (R, ...) of the slots (R,) to (B, S, ...), with zeros elsewhere."""
    if len(slots) < filled.numel():
        rows = rows.new_zeros(filled.numel(), *rows.shape[1:]).index_copy(0, slots, rows)
    return rows.unflatten(0, filled.shape)


def detections(found: Found, masks: Tensor | None) -> list[Detections]:
    """Return each image's detections, sorted by score; synchronizes with the GPU."""
    counts = found.filled.sum(dim=1).tolist()
    per_image = [None] * len(counts) if masks is None else masks
    return [
        Detections(boxes[:n], scores[:n], labels[:n], None if mask is None else mask[:n])
        for n, boxes, scores, labels, mask in zip(counts, *found[:3], per_image, strict=True)
    ]
