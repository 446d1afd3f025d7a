"""Anchor boxes for the levels of a feature pyramid.

As in Detectron2 with offset 0, anchors are centered on the top-left corners of the cells. They are
ordered by row, column and aspect ratio.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cell_anchors(side: float, aspect_ratios: Sequence[float]) -> list[tuple[float, ...]]:
    """Return boxes (A, 4) xyxy of area side^2 around the origin, one per ratio height / width."""
    boxes: list[tuple[float, ...]] = []
    for ratio in aspect_ratios:
        width = (side**2 / ratio) ** 0.5
        height = width * ratio
        boxes.append((-width / 2, -height / 2, width / 2, height / 2))
    return boxes


def grid_anchors(
    grids: Sequence[tuple[int, int]],
    strides: Sequence[int],
    scale: float,
    aspect_ratios: Sequence[float],
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Return each level's anchors (h w A, 4) in canvas pixels; `grids` are the levels' (h, w).

    Anchors are computed on the device, since CUDA graphs cannot record copies of pageable memory.
    """
    levels = []
    for (height, width), stride in zip(grids, strides, strict=True):
        y = torch.arange(0, height * stride, stride, dtype=torch.float32, device=device)
        x = torch.arange(0, width * stride, stride, dtype=torch.float32, device=device)
        y, x = torch.meshgrid(y, x, indexing="ij")
        cells = cell_anchors(scale * stride, aspect_ratios)
        boxes = [torch.stack([x + x0, y + y0, x + x1, y + y1], dim=-1) for x0, y0, x1, y1 in cells]
        levels.append(torch.stack(boxes, dim=2).reshape(-1, 4))
    return levels
