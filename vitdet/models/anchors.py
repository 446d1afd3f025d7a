"""Anchor boxes of the levels of a pyramid.

As in detectron2 with offset 0: an anchor is centred on the top-left corner of its cell. Order: row, column, anchor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cell_anchors(side: float, aspect_ratios: Sequence[float]) -> Tensor:
    """Boxes (A, 4) xyxy around the origin with area side^2; aspect_ratios are height / width."""
    widths = torch.tensor(
        [(side**2 / ratio) ** 0.5 for ratio in aspect_ratios], dtype=torch.float64
    )
    heights = widths * torch.tensor(list(aspect_ratios), dtype=torch.float64)
    return (torch.stack([-widths, -heights, widths, heights], dim=1) / 2).float()


def grid_anchors(
    grids: Sequence[tuple[int, int]],
    strides: Sequence[int],
    scale: float,
    aspect_ratios: Sequence[float],
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Anchors (h w A, 4) of every level, pixels of the canvas; grids are the levels' (h, w)."""
    cells = torch.stack([cell_anchors(scale * stride, aspect_ratios) for stride in strides])
    cells = cells.to(device, non_blocking=True)  # one copy, which nothing waits for
    levels = []
    for (height, width), stride, cell in zip(grids, strides, cells, strict=True):
        y = torch.arange(0, height * stride, stride, dtype=torch.float32, device=device)
        x = torch.arange(0, width * stride, stride, dtype=torch.float32, device=device)
        y, x = torch.meshgrid(y, x, indexing="ij")
        corners = torch.stack([x, y, x, y], dim=-1)[:, :, None]
        levels.append((corners + cell).reshape(-1, 4))
    return levels
