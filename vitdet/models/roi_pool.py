"""RoIAlign over a pyramid: each RoI is pooled from the level that matches its size.

He et al., Mask R-CNN (arXiv:1703.06870), aligned as in Detectron2. Levels are assigned as in FPN
(arXiv:1612.03144).
Notation: B images, R RoIs, C channels, s x s bins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision import ops

from vitdet.kernels import enabled
from vitdet.kernels.roi_align import roi_align
from vitdet.models.boxes import area
from vitdet.models.layers import at_least_float32


def assign_levels(boxes: Tensor, num_levels: int, finest_stride: int) -> Tensor:
    """Return each box's level (R,); 0 is the finest."""
    canonical = 56 * finest_stride  # smallest side, in pixels, of a square box on level 2
    # with the epsilon of Detectron2
    level = torch.floor(2 + torch.log2(area(boxes).sqrt() / canonical + 1e-8))
    return level.clamp(0, num_levels - 1).long()


def pool(
    features: Sequence[Tensor],
    boxes: Tensor,
    image: Tensor,
    strides: Sequence[int],
    bins: int,
    sampling_ratio: int,
) -> Tensor:
    """Pool features (R, C, bins, bins) of boxes (R, 4) from maps (B, C, h, w).

    `image` (R,): index of each box's image, or -1 for an empty slot, whose features are finite but
    undefined. `sampling_ratio`: points per bin and axis; 0: the bin's size in cells, rounded up.
    """
    features = features[: len(strides)]
    levels = assign_levels(boxes, len(features), strides[0])
    if enabled(*features):
        levels = torch.where(image < 0, -1, levels)
        return roi_align(features, boxes, image, levels, strides, bins, sampling_ratio)
    image = image.clamp(min=0)
    if sampling_ratio > 0:
        return _pool_by_products(features, boxes, image, levels, strides, bins, sampling_ratio)
    rois = torch.cat([image[:, None].to(boxes.dtype), boxes], dim=1)
    order = [(levels == level).nonzero().flatten() for level in range(len(features))]
    values = []
    for feature, chosen, stride in zip(features, order, strides, strict=True):
        # in bf16, coordinates near 1000 px have a resolution of only 4 px
        exact = at_least_float32(feature)
        given = rois[chosen].to(exact.dtype)
        found = ops.roi_align(exact, given, bins, 1 / stride, 0, aligned=True)
        values.append(found.to(features[0].dtype))
    return torch.cat(values)[torch.cat(order).argsort()]


def _pool_by_products(
    features: Sequence[Tensor],
    boxes: Tensor,
    image: Tensor,
    levels: Tensor,
    strides: Sequence[int],
    bins: int,
    ratio: int,
) -> Tensor:
    """Pool with `ratio` points per bin and axis, by two matrix products: RoIAlign is separable.

    The gradient consists of matrix products too; scattered additions would be slow on a CPU.
    """
    # unbind once: indexing a map by image would allocate a full-size gradient per image
    maps = [feature.permute(0, 2, 3, 1).unbind() for feature in features]
    values, order = [], []
    for level, (images, stride) in enumerate(zip(maps, strides, strict=True)):
        for number, pixels in enumerate(images):
            chosen = ((image == number) & (levels == level)).nonzero().flatten()
            if len(chosen) == 0:  # often, an image has no RoI on a level
                continue
            spans = boxes[chosen] / stride
            rows = interpolation(spans[:, 1::2], len(pixels), bins, ratio).to(pixels.dtype)
            columns = interpolation(spans[:, 0::2], pixels.shape[1], bins, ratio).to(pixels.dtype)
            lines = (rows.flatten(0, 1) @ pixels.flatten(1)).unflatten(0, rows.shape[:2])
            values.append(columns[:, None] @ lines.unflatten(2, pixels.shape[1:]))
            order.append(chosen)
    if not values:
        return features[0].new_zeros(0, features[0].shape[1], bins, bins)
    return torch.cat(values)[torch.cat(order).argsort()].permute(0, 3, 1, 2)


def interpolation(spans: Tensor, length: int, bins: int, ratio: int) -> Tensor:
    """Return the weights (R, bins, length) with which an axis's cells contribute to each bin.

    A bin is the mean of `ratio` points. `spans` (R, 2) are each RoI's start and end along the axis,
    in cells. Points more than one cell outside the map have the value 0, as in torchvision.
    """
    low, high = spans[:, :1] - 0.5, spans[:, 1:] - 0.5
    number = bins * ratio
    steps = (torch.arange(number, device=spans.device, dtype=spans.dtype) + 0.5) / number
    points = low + (high - low) * steps
    inside = ((points >= -1) & (points <= length)).to(spans.dtype)
    cells = torch.arange(length, device=spans.device, dtype=spans.dtype)
    distance = (points.clamp(0, length - 1)[:, :, None] - cells).abs()
    weights = (1 - distance).clamp(min=0) * inside[:, :, None]
    return weights.unflatten(1, (bins, ratio)).mean(dim=2)
