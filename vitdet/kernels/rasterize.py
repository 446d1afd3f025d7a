"""Rasterization of outlines into boxes: the training targets of masks.

In plain torch (`vitdet.models.mask_head.rasterize`) the host synchronizes, and memory and launches
grow with the edges. The arithmetic is that of the plain version, operation by operation in float32
(IEEE division, no fused multiply-add), and directions are integers, so both mark the same cells.

Notation: R RoIs, E edges.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("vitdet::rasterize", mutates_args=())
def rasterize(edges: Tensor, spans: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Return which of the size x size cells of each RoI have their center inside its outline, i.e.
    have a winding number other than zero: (R, size, size) bool, on CUDA.

    Args:
        edges: (E, 4) float32, x0, y0, x1, y1 in pixels.
        spans: (R, 2) int64, the outline of a RoI is the edges from spans[:, 0] to spans[:, 1]
            (exclusive).
        boxes: (R, 4) float32 xyxy.
        size: cells per side.
    """
    from vitdet.kernels.rasterize_kernels import launch

    with torch.cuda.device_of(boxes):
        return launch(edges.contiguous(), spans.contiguous(), boxes.contiguous(), size)


@rasterize.register_fake
def _(edges: Tensor, spans: Tensor, boxes: Tensor, size: int) -> Tensor:
    return boxes.new_empty(boxes.shape[0], size, size, dtype=torch.bool)
