"""Region proposal network: objectness and box deltas for every anchor, the proposals, and the losses.

Ren et al., Faster R-CNN (1506.01497); numbers as in detectron2's ViTDet configs.
Letters: B images, L levels, A anchors a cell, N anchors of a level (h w A) or proposals, G ground truths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms

from vitdet.models.anchors import grid_anchors
from vitdet.models.assign import BACKGROUND, Choose, Match, choose_randomly, sample
from vitdet.models.boxes import clip, decode, encode, iou_blocks, nonempty
from vitdet.models.layers import ConvNorm, init_predictor
from vitdet.models.losses import box_l1, objectness
from vitdet.types import Target

WEIGHTS = (1.0, 1.0, 1.0, 1.0)  # of the box transform


class Anchored(NamedTuple):
    """The anchors (N, 4) of each level, and the predictions for them: logits (B, N), deltas (B, N, 4)."""

    logits: list[Tensor]
    deltas: list[Tensor]
    anchors: list[Tensor]


class Proposals(NamedTuple):
    """Boxes (N, 4) of one image, best first, and their objectness logits (N,)."""

    boxes: Tensor
    logits: Tensor


class RPN(nn.Module):
    """Region proposal network over the levels of a pyramid.

    `strides`: of the levels; the side of an anchor is `anchor_scale` times the stride of its level. `norm`, `eps`:
    whether an LN follows each convolution, and its epsilon. `match` assigns ground truths to anchors; `min_log_scale`
    limits how much a box shrinks. The losses are divided by samples * images, or with `divide_by_sampled` by the
    number of sampled anchors.
    """

    def __init__(
        self,
        *,
        channels: int,
        strides: Sequence[int],
        anchor_scale: float,
        aspect_ratios: Sequence[float],
        num_convs: int,
        norm: bool,
        eps: float,
        samples: int,
        positive_fraction: float,
        iou_low: float,
        iou_high: float,
        nms_iou: float,
        pre_nms_train: int,
        pre_nms_test: int,
        post_nms_train: int,
        post_nms_test: int,
        divide_by_sampled: bool,
        min_log_scale: float,
        match: Match,
        choose: Choose = choose_randomly,
    ) -> None:
        super().__init__()
        self.strides, self.aspect_ratios = list(strides), tuple(aspect_ratios)
        self.anchor_scale, self.min_log_scale = anchor_scale, min_log_scale
        self.samples, self.positive_fraction = samples, positive_fraction
        self.divide_by_sampled = divide_by_sampled
        self.match, self.choose = match, choose
        self.iou_low, self.iou_high, self.nms_iou = iou_low, iou_high, nms_iou
        self.top_train = (pre_nms_train, post_nms_train)
        self.top_test = (pre_nms_test, post_nms_test)
        blocks = [ConvNorm(channels, channels, 3, norm=norm, eps=eps) for _ in range(num_convs)]
        self.convs = nn.ModuleList(blocks)
        self.objectness = nn.Conv2d(channels, len(self.aspect_ratios), 1)
        self.deltas = nn.Conv2d(channels, 4 * len(self.aspect_ratios), 1)
        for conv in (*(block.conv for block in blocks), self.objectness, self.deltas):
            init_predictor(conv, std=0.01)

    def forward(self, features: Sequence[Tensor]) -> Anchored:
        """Maps (B, C, h, w), finest first -> logits and deltas of every anchor."""
        maps = [self.head(feature) for feature in features]
        grids = [(feature.shape[2], feature.shape[3]) for feature in features]
        return Anchored(
            [rearrange(logits, "b a h w -> b (h w a)") for logits, _ in maps],
            [rearrange(deltas, "b (a d) h w -> b (h w a) d", d=4) for _, deltas in maps],
            grid_anchors(
                grids, self.strides, self.anchor_scale, self.aspect_ratios, features[0].device
            ),
        )

    def head(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """One level's map (B, C, h, w) -> logits (B, A, h, w) and deltas (B, 4 A, h, w)."""
        for block in self.convs:
            feature = F.relu(block(feature))
        return self.objectness(feature), self.deltas(feature)

    @torch.no_grad()
    def propose(self, found: Anchored, sizes: Tensor, top: tuple[int, int]) -> list[Proposals]:
        """The best boxes of each image after NMS within levels, cut to its size.

        sizes (B, 2) unpadded (height, width); top = boxes a level that enter NMS, boxes an image that leave it.
        """
        pre_nms, post_nms = top
        boxes, scores, levels = [], [], []
        for level, (logits, deltas, anchors) in enumerate(zip(*found, strict=True)):
            best, index = logits.float().topk(min(pre_nms, logits.shape[1]), dim=1)
            chosen = deltas.gather(1, index[:, :, None].expand(-1, -1, 4))
            decoded = decode(
                anchors[index].flatten(0, 1), chosen.flatten(0, 1), WEIGHTS, self.min_log_scale
            )
            boxes.append(decoded.unflatten(0, index.shape))
            scores.append(best)
            levels.append(torch.full((index.shape[1],), level, device=index.device))
        level_of = torch.cat(levels)
        return [
            self._suppress(image_boxes, image_scores, level_of, size, post_nms)
            for image_boxes, image_scores, size in zip(
                torch.cat(boxes, 1), torch.cat(scores, 1), sizes, strict=True
            )
        ]

    def _suppress(
        self, boxes: Tensor, scores: Tensor, levels: Tensor, size: Tensor, post_nms: int
    ) -> Proposals:
        boxes = clip(boxes, size)
        usable = boxes.isfinite().all(dim=1) & scores.isfinite() & nonempty(boxes)
        boxes, scores, levels = boxes[usable], scores[usable], levels[usable]
        keep = batched_nms(boxes, scores, levels, self.nms_iou)[:post_nms]
        return Proposals(boxes[keep], scores[keep])

    def sample(self, anchors: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor]:
        """For one image: anchors' ground truths (N,), indices of the sampled foreground and background anchors."""
        matched = self.match(iou_blocks(target.boxes, anchors), self.iou_low, self.iou_high)
        return matched, *sample(matched, self.samples, self.positive_fraction, self.choose)

    def losses(self, found: Anchored, targets: Sequence[Target]) -> dict[str, Tensor]:
        """loss_rpn_cls over the sampled anchors, loss_rpn_loc over the foreground ones, both divided by one count."""
        anchors = torch.cat(found.anchors)
        all_logits, all_deltas = torch.cat(found.logits, 1), torch.cat(found.deltas, 1)
        logits, truth, deltas, delta_targets, sampled = [], [], [], [], 0
        for image, target in enumerate(targets):
            matched, positive, negative = self.sample(anchors, target)
            chosen = torch.cat([positive, negative])
            sampled += max(len(positive), 1) + max(len(negative), 1)  # mmdet: none counts as one
            logits.append(all_logits[image, chosen])
            truth.append(matched[chosen] > BACKGROUND)
            deltas.append(all_deltas[image, positive])
            delta_targets.append(
                encode(anchors[positive], target.boxes[matched[positive]], WEIGHTS)
            )
        count = sampled if self.divide_by_sampled else self.samples * len(targets)
        return {
            "loss_rpn_cls": objectness(torch.cat(logits), torch.cat(truth), count),
            "loss_rpn_loc": box_l1(torch.cat(deltas), torch.cat(delta_targets), count),
        }
