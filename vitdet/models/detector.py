"""The detector, which maps images to detections, or images and targets to losses.

Notation: B images, S side of the square canvas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitdet.models.baselines.fpn import FPN
from vitdet.models.baselines.swin import Swin
from vitdet.models.baselines.vitaev2 import ViTAEv2
from vitdet.models.pyramid import SimpleFeaturePyramid
from vitdet.models.roi_heads import Found, RoIHeads, Scored
from vitdet.models.rpn import RPN, Anchored, Proposals
from vitdet.models.vit import ViT
from vitdet.models.vitae import ViTAESmall
from vitdet.types import Detections, Target, Targets

Plain = ViT | ViTAESmall  # backbones with one output map
Hierarchical = Swin | ViTAEv2  # backbones with four output maps
# mean and standard deviation of ImageNet's RGB values in 0..255, as in the published models
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


class Detector(nn.Module):
    """Backbone -> pyramid -> proposals -> boxes, classes and, with a mask head, masks."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        backbone: Plain | Hierarchical,
        pyramid: SimpleFeaturePyramid | FPN,
        rpn: RPN,
        roi_heads: RoIHeads,
    ) -> None:
        super().__init__()
        self.backbone, self.pyramid, self.rpn, self.roi_heads = backbone, pyramid, rpn, roi_heads
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)

    def forward(
        self,
        images: Tensor,
        targets: Targets | Sequence[Target] | None = None,
        sizes: Tensor | None = None,
    ) -> dict[str, Tensor] | list[Detections]:
        """Return losses or, without targets, each image's detections in canvas pixels.

        Args:
            images: (B, 3, S, S), RGB 0..255.
            targets: ground truth in canvas pixels, or None for detections.
            sizes: (B, 2) int, (height, width) of the image in each canvas's top-left corner;
                default: the whole canvas.
        """
        if sizes is None:
            sizes = torch.tensor([images.shape[-2:]] * len(images), device=images.device)
        if targets is None:
            return self.detect(images, sizes)
        features, found = self.features(images, sizes)
        if not isinstance(targets, Targets):
            targets = Targets.of(targets)
        proposals = self.rpn.propose(found, sizes, self.rpn.top_train)
        losses = self.roi_heads.losses(features, proposals, targets, sizes)
        return losses | self.rpn.losses(found, targets)

    def features(self, images: Tensor, sizes: Tensor) -> tuple[list[Tensor], Anchored]:
        """Return the pyramid's maps and the region proposal network's predictions."""
        features = self.pyramid(self.backbone(self.normalize(images, sizes)))
        return features, self.rpn(features)

    def propose(self, images: Tensor, sizes: Tensor) -> tuple[list[Tensor], Proposals]:
        """Return the pyramid's maps and the proposals for inference."""
        features, found = self.features(images, sizes)
        return features, self.rpn.propose(found, sizes, self.rpn.top_test)

    def detect(self, images: Tensor, sizes: Tensor) -> list[Detections]:
        """Return the detections of images (B, 3, S, S), sorted by score."""
        return self.roi_heads.finish(*self.find(images, sizes))

    def find(self, images: Tensor, sizes: Tensor) -> tuple[list[Tensor], Scored, Found]:
        """Return the arguments of `RoIHeads.finish`, without synchronizing with the GPU."""
        features, proposals = self.propose(images, sizes)
        return features, *self.roi_heads.find(features, proposals, sizes)

    def limits(self) -> tuple[float, ...]:
        """Return the current limits of detection: numbers of boxes, and thresholds."""
        rpn, heads = self.rpn, self.roi_heads
        most = (*rpn.top_test, heads.max_detections)
        return *most, rpn.nms_iou, heads.nms_iou, heads.score_threshold

    def normalize(self, images: Tensor, sizes: Tensor) -> Tensor:
        """Normalize with `mean` and `std`; the padding becomes 0, as in Detectron2."""
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=images.device) < sizes[:, :1]
        columns = torch.arange(width, device=images.device) < sizes[:, 1:]
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        return torch.where(inside, (images - self.mean) / self.std, 0.0)
