"""RoI heads: proposals -> class and box through one or several stages, then a mask.

Mask R-CNN is a cascade of one stage: a loop over stages serves both (He et al. 1703.06870; Cai & Vasconcelos
1712.00726); without the mask head they are Faster R-CNN and Cascade R-CNN. Numbers as in detectron2's ViTDet configs.
Letters: B images, R RoIs (of all images together), N boxes of one image, K classes, G ground truths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from vitdet.models.assign import BACKGROUND, Choose, Match, choose_randomly, sample
from vitdet.models.box_head import BINS as BOX_BINS
from vitdet.models.box_head import BoxHead
from vitdet.models.boxes import Weights, clip, decode, encode, iou_blocks, nonempty
from vitdet.models.layers import scale_gradient
from vitdet.models.losses import FederatedClassification, SoftmaxClassification, box_l1, mask_bce
from vitdet.models.mask_head import BINS as MASK_BINS
from vitdet.models.mask_head import MaskHead, mask_targets
from vitdet.models.roi_pool import pool
from vitdet.types import Detections, Polygons, Target

Classification = SoftmaxClassification | FederatedClassification

WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of the box transform of stage 0; stage s has s + 1 times these


class Assigned(NamedTuple):
    """Boxes (N, 4) of one image and the ground truth (N,) assigned to each, or BACKGROUND."""

    boxes: Tensor
    matched: Tensor


class RoIHeads(nn.Module):
    """`stages` refine the boxes one after another; in stage s a box is foreground from an IoU of `ious[s]`.

    `classification` computes the loss and the probabilities from logits; `strides` are those of the levels that RoIs
    are pooled from (p2..p5); `mask` is None for a detector without masks; `match` assigns ground truths to boxes; `min_log_scale` limits how much a box shrinks in
    one stage.
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
        x, y, width, height = WEIGHTS
        self.weights: list[Weights] = [
            (x * factor, y * factor, width * factor, height * factor)
            for factor in range(1, len(stages) + 1)
        ]

    def losses(
        self,
        features: Sequence[Tensor],
        proposals: Sequence[Tensor],
        targets: Sequence[Target],
        sizes: Tensor,
    ) -> dict[str, Tensor]:
        """loss_cls and loss_box_reg (of every stage, named _stage0.. if there are several); loss_mask with a mask head."""
        found = {}
        assigned = [
            self.sample(boxes, target) for boxes, target in zip(proposals, targets, strict=True)
        ]
        if self.mask is not None:
            found["loss_mask"] = self.mask_loss(features, assigned, targets)
        refined: Sequence[Tensor] = ()  # the boxes of the stage before
        for stage in range(len(self.stages)):
            if stage > 0:
                assigned = self.reassign(stage, refined, targets, sizes)
            logits, deltas = self.run_stage(stage, features, [image.boxes for image in assigned])
            suffix = f"_stage{stage}" if len(self.stages) > 1 else ""
            labels = torch.cat(
                [self.labels(a, target) for a, target in zip(assigned, targets, strict=True)]
            )
            found[f"loss_cls{suffix}"] = self.classification.loss(logits, labels)
            found[f"loss_box_reg{suffix}"] = self.box_loss(stage, deltas, labels, assigned, targets)
            counts = [len(image.boxes) for image in assigned]
            boxes = torch.cat([image.boxes for image in assigned])
            refined = self.decode(stage, boxes, deltas.detach()[:, 0]).split(counts)
        return found

    def detect(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Tensor
    ) -> list[Detections]:
        """Detections of every image, best first; boxes in pixels of the canvas, cut to sizes (B, 2)."""
        counts = [len(boxes) for boxes in proposals]
        boxes, scores = list(proposals), []
        for stage in range(len(self.stages)):
            logits, deltas = self.run_stage(stage, features, boxes)
            scores.append(self.classification.probabilities(logits))
            decoded = self.decode(stage, torch.cat(boxes), deltas).split(counts)
            clipped = [clip(image, size) for image, size in zip(decoded, sizes, strict=True)]
            boxes = [image[:, 0] for image in clipped]
        mean_scores = torch.stack(scores).mean(dim=0).split(counts)
        best = [self.select(b, s) for b, s in zip(clipped, mean_scores, strict=True)]
        return best if self.mask is None else self.with_masks(features, best)

    def run_stage(
        self, stage: int, features: Sequence[Tensor], boxes: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Logits (R, K + 1) and deltas (R, K or 1, 4) of all images' boxes."""
        pooled = pool(features, boxes, self.strides, BOX_BINS, self.sampling_ratio)
        if len(self.stages) > 1:
            pooled = scale_gradient(pooled, 1 / len(self.stages))
        return self.stages[stage](pooled)

    def decode(self, stage: int, boxes: Tensor, deltas: Tensor) -> Tensor:
        """What a stage makes of boxes (R, 4) by deltas (R, ..., 4): (R, ..., 4)."""
        return decode(boxes, deltas, self.weights[stage], self.min_log_scale)

    @torch.no_grad()
    def sample(self, proposals: Tensor, target: Target) -> Assigned:
        """Foreground first, then background, out of the proposals and the ground truths themselves."""
        boxes = torch.cat([proposals, target.boxes])
        # Match proposals and GT boxes separately; otherwise the best match of each GT is itself.
        ious = iou_blocks(target.boxes, proposals), iou_blocks(target.boxes, target.boxes)
        matched = torch.cat([self.match(iou, self.ious[0], self.ious[0]) for iou in ious])
        chosen = torch.cat(sample(matched, self.samples, self.positive_fraction, self.choose))
        return Assigned(boxes[chosen], matched[chosen])

    @torch.no_grad()
    def reassign(
        self, stage: int, refined: Sequence[Tensor], targets: Sequence[Target], sizes: Tensor
    ) -> list[Assigned]:
        """The previous stage's boxes, cut to the image, with the ground truth that suits this stage's IoU."""
        assigned = []
        for boxes, target, size in zip(refined, targets, sizes, strict=True):
            boxes = clip(boxes, size)
            boxes = boxes[nonempty(boxes)]
            iou = self.ious[stage]
            assigned.append(Assigned(boxes, self.match(iou_blocks(target.boxes, boxes), iou, iou)))
        return assigned

    def labels(self, assigned: Assigned, target: Target) -> Tensor:
        """(N,) class of each box; K for background."""
        background = target.labels.new_full((1,), self.classification.num_classes)
        return torch.cat([target.labels, background])[assigned.matched]

    def box_loss(
        self,
        stage: int,
        deltas: Tensor,
        labels: Tensor,
        assigned: Sequence[Assigned],
        targets: Sequence[Target],
    ) -> Tensor:
        """L1 of the foreground boxes' deltas (for their own class), divided by the number of all boxes."""
        foreground = torch.cat([image.matched for image in assigned]) > BACKGROUND
        boxes = torch.cat([image.boxes for image in assigned])[foreground]
        truth = torch.cat(
            [
                target.boxes[image.matched[image.matched > BACKGROUND]]
                for image, target in zip(assigned, targets, strict=True)
            ]
        )
        column = labels[foreground].clamp(max=deltas.shape[1] - 1)  # one column if class-agnostic
        return box_l1(
            deltas[foreground, column], encode(boxes, truth, self.weights[stage]), len(labels)
        )

    def mask_loss(
        self, features: Sequence[Tensor], assigned: Sequence[Assigned], targets: Sequence[Target]
    ) -> Tensor:
        """Mask cross-entropy over (at most `mask_samples` of) the foreground boxes of every image.

        Boxes of objects without an annotated outline take no part.
        """
        assert self.mask is not None
        boxes, labels, wanted = [], [], []
        for image, target in zip(assigned, targets, strict=True):
            usable = image.matched > BACKGROUND
            if target.has_mask is not None:
                usable &= torch.cat([target.has_mask, usable.new_zeros(1)])[image.matched]
            chosen = usable.nonzero().flatten()[: self.mask_samples]
            truth = image.matched[chosen]
            boxes.append(image.boxes[chosen])
            labels.append(target.labels[truth])
            wanted.append(self.mask_targets(target.masks[truth], image.boxes[chosen]))
        pooled = pool(features, boxes, self.strides, MASK_BINS, self.sampling_ratio)
        return mask_bce(self.mask(pooled, torch.cat(labels)), torch.cat(wanted))

    def mask_targets(self, masks: Polygons, boxes: Tensor) -> Tensor:
        """The target masks (R, 28, 28) bool of boxes (R, 4), one mask each."""
        return mask_targets(masks, boxes)

    def select(self, boxes: Tensor, scores: Tensor) -> Detections:
        """The best boxes of one image after NMS within classes: boxes (N, K or 1, 4), scores (N, K)."""
        finite = boxes.isfinite().all(dim=2).all(dim=1) & scores.isfinite().all(dim=1)
        boxes, scores = boxes[finite], scores[finite]
        row, label = (scores > self.score_threshold).nonzero().unbind(dim=1)
        boxes = boxes[row, label.clamp(max=boxes.shape[1] - 1)]
        scores = scores[row, label]
        keep = batched_nms(boxes, scores, label, self.nms_iou)[: self.max_detections]
        return Detections(boxes[keep], scores[keep], label[keep], masks=None)

    def with_masks(
        self, features: Sequence[Tensor], found: Sequence[Detections]
    ) -> list[Detections]:
        """The detections with the mask probabilities (N, 28, 28) inside their boxes."""
        assert self.mask is not None
        boxes = [image.boxes for image in found]
        pooled = pool(features, boxes, self.strides, MASK_BINS, self.sampling_ratio)
        logits = self.mask(pooled, torch.cat([image.labels for image in found]))
        masks = logits.float().sigmoid().split([len(b) for b in boxes])
        return [
            Detections(image.boxes, image.scores, image.labels, m)
            for image, m in zip(found, masks, strict=True)
        ]
