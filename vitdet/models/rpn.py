"""Region proposal network: objectness and box deltas for every anchor, proposals, and losses.

Ren et al., Faster R-CNN (arXiv:1506.01497); hyperparameters as in Detectron2's ViTDet configs.
Notation: B images, C channels, h x w cells of a level, A anchors per cell, N anchors (h w A on
a level) or slots for proposals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vitdet.kernels.nms import nms
from vitdet.models.anchors import grid_anchors
from vitdet.models.assign import Choose, Match, Sampled, choose_randomly, sample
from vitdet.models.boxes import clip, decode, encode, iou_blocks, largest, nonempty, pick
from vitdet.models.layers import ConvNorm, init_predictor
from vitdet.models.losses import box_l1, objectness
from vitdet.types import Targets

WEIGHTS = (1.0, 1.0, 1.0, 1.0)  # weights of the box transform


class Anchored(NamedTuple):
    """For each level, the logits (B, N) and deltas (B, N, 4) of its anchors (N, 4)."""

    logits: list[Tensor]
    deltas: list[Tensor]
    anchors: list[Tensor]


class Proposals(NamedTuple):
    """Boxes (B, N, 4), sorted by descending logit (B, N); `filled` (B, N): slots with a box."""

    boxes: Tensor
    logits: Tensor
    filled: Tensor


class RPN(nn.Module):
    """Region proposal network over the levels of a pyramid.

    Args:
        strides: the levels' strides.
        anchor_scale: side of a square anchor, divided by the stride of its level.
        norm, eps: whether a LayerNorm follows each convolution, and the LayerNorms' epsilon.
        match: assigns ground truths to anchors.
        min_log_scale: lower bound of log(new side / old side) of a box.
        divide_by_sampled: divide the losses by the number of sampled anchors instead of `samples`
            per image.
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
        """Return the logits and deltas of every anchor on maps (B, C, h, w), finest first."""
        maps = [self.head(feature) for feature in features]
        grids = [(feature.shape[2], feature.shape[3]) for feature in features]
        layout = self.strides, self.anchor_scale, self.aspect_ratios
        return Anchored(
            [rearrange(logits, "b a h w -> b (h w a)") for logits, _ in maps],
            [rearrange(deltas, "b (a d) h w -> b (h w a) d", d=4) for _, deltas in maps],
            grid_anchors(grids, *layout, features[0].device),
        )

    def head(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Map one level (B, C, h, w) to logits (B, A, h, w) and deltas (B, 4 A, h, w).

        One matrix product, padded to a multiple of 8 outputs for tensor cores, computes both maps.
        """
        for block in self.convs:
            feature = F.relu(block(feature))
        both = (self.objectness, self.deltas)
        anchors, spare = len(self.aspect_ratios), -5 * len(self.aspect_ratios) % 8
        weight = F.pad(torch.cat([conv.weight.flatten(1) for conv in both]), (0, 0, 0, spare))
        bias = F.pad(torch.cat([conv.get_parameter("bias") for conv in both]), (0, spare))
        found = F.linear(feature.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
        return found[:, :anchors], found[:, anchors : 5 * anchors]

    @torch.no_grad()
    def propose(self, found: Anchored, sizes: Tensor, top: tuple[int, int]) -> Proposals:
        """Return each image's best boxes after level-wise NMS, clipped to the image.

        `sizes` (B, 2) are the images' (height, width) without padding. `top` are the maximum
        numbers of boxes per level before NMS, and per image after NMS.
        """
        pre_nms, post_nms = top
        boxes, scores = [], []
        for logits, deltas, anchors in zip(*found, strict=True):
            best, index = largest(logits.float(), min(pre_nms, logits.shape[1]))
            decoded = decode(anchors[index], pick(deltas, index), WEIGHTS, self.min_log_scale)
            decoded = clip(decoded, sizes)
            usable = decoded.isfinite().all(dim=2) & best.isfinite() & nonempty(decoded)
            spare = pre_nms - index.shape[1]  # number of slots that a small level leaves empty
            boxes.append(F.pad(torch.where(usable[..., None], decoded, 0.0), (0, 0, 0, spare)))
            scores.append(F.pad(best, (0, spare)))
        by_level = torch.stack(boxes, dim=1)
        kept = nms(by_level.flatten(0, 1), None, self.nms_iou, post_nms).view(len(sizes), -1)
        remaining = torch.where(kept, torch.cat(scores, dim=1), -math.inf)
        best, order = remaining.sort(dim=1, descending=True, stable=True)
        best, order = best[:, :post_nms], order[:, :post_nms]
        filled = best > -math.inf
        chosen = torch.where(filled[..., None], pick(by_level.flatten(1, 2), order), 0.0)
        return Proposals(chosen, best, filled)

    def sample(self, anchors: Tensor, targets: Targets) -> tuple[Tensor, Sampled]:
        """Return the ground truth (B, N) of every anchor (N, 4), and which anchors are sampled."""
        ious = iou_blocks(targets.boxes, anchors.expand(len(targets), -1, -1))
        matched = self.match(ious, self.iou_low, self.iou_high)
        return matched, sample(matched, self.samples, self.positive_fraction, self.choose)

    def losses(self, found: Anchored, targets: Targets) -> dict[str, Tensor]:
        """Return loss_rpn_cls (sampled anchors) and loss_rpn_loc (sampled foreground anchors)."""
        anchors = torch.cat(found.anchors)
        logits, deltas = torch.cat(found.logits, 1), torch.cat(found.deltas, 1)
        matched, sampled = self.sample(anchors, targets)
        number: int | Tensor = self.samples * len(targets)
        if self.divide_by_sampled:
            background = sampled.filled & ~sampled.foreground
            kinds = torch.stack([sampled.foreground.sum(1), background.sum(1)])
            number = kinds.clamp(min=1).sum()  # each count is at least 1, as in mmdet
        index, foreground = sampled.chosen[:, : sampled.most], sampled.foreground[:, : sampled.most]
        chosen = anchors[index]
        truth = pick(targets.boxes, matched.gather(1, index).clamp(min=0))
        wanted = encode(chosen, torch.where(foreground[..., None], truth, chosen), WEIGHTS)
        selected = logits.gather(1, sampled.chosen)
        return {
            "loss_rpn_cls": objectness(selected, sampled.foreground, number, sampled.filled),
            "loss_rpn_loc": box_l1(pick(deltas, index), wanted, number, foreground),
        }
