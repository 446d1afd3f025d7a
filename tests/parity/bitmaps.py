"""Ground-truth masks as bitmaps, as in Detectron2 and mmdet, instead of our polygons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from vitdet.models.mask_head import SIZE, mask_targets
from vitdet.models.roi_heads import RoIHeads
from vitdet.types import Polygons


@dataclass(frozen=True)
class Bitmaps:
    """Masks of G objects as pixels (G, H, W) bool on the canvas."""

    pixels: Tensor

    @classmethod
    def batch(cls, images: Sequence[Bitmaps], slots: int) -> Bitmaps:
        """Batch the masks of several images: `slots` objects per image, padded to the largest size."""
        sides = [max(image.pixels.shape[axis] for image in images) for axis in (1, 2)]

        def padded(image: Bitmaps) -> Tensor:
            below, right = (sides[axis] - image.pixels.shape[axis + 1] for axis in (0, 1))
            return F.pad(image.pixels, (0, right, 0, below, 0, slots - len(image)))

        return cls(torch.cat([padded(image) for image in images]))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: Tensor | slice) -> Bitmaps:
        return Bitmaps(self.pixels[index])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Bitmaps:
        return replace(self, pixels=self.pixels.to(device, non_blocking=non_blocking))


class BitmapRoIHeads(RoIHeads):
    """RoI heads whose ground truth may have bitmaps."""

    def mask_targets(self, masks: Polygons | Bitmaps, boxes: Tensor) -> Tensor:
        """Return the target masks (R, 28, 28) bool of boxes (R, 4), one mask per box."""
        if isinstance(masks, Bitmaps):
            return crop_bitmaps(masks.pixels, boxes, SIZE)
        return mask_targets(masks, boxes)


def crop_bitmaps(pixels: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crop bitmaps (R, H, W) to boxes (R, 4) as Detectron2 does: RoIAlign >= 1/2, (R, size, size)."""
    index = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)
    rois = torch.cat([index[:, None], boxes], dim=1).float()
    return roi_align(pixels[:, None].float(), rois, size, 1.0, 0, aligned=True)[:, 0] >= 0.5
