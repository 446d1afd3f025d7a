"""Rasterization of outlines into boxes: the training targets of the mask head.

In plain torch (`vitdet.models.mask_head.rasterize`), the host synchronizes, and the number of
launches grows with the number of edges. The kernel repeats the plain version's float32 arithmetic,
operation by operation (IEEE division, no fused multiply-add), so that both versions mark the same
cells.

Notation: R RoIs, E edges.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("vitdet::rasterize", mutates_args=())
def rasterize(edges: Tensor, spans: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Return which cells of each RoI have their center inside the outline: (R, size, size) bool.

    Inside means that the winding number is not 0. The tensors are on a GPU.

    Args:
        edges: (E, 4) float32, x0, y0, x1, y1 in pixels.
        spans: (R, 2) int64; RoI r's outline is edges[spans[r, 0] : spans[r, 1]].
        boxes: (R, 4) float32 xyxy.
        size: cells per side.
    """
    from vitdet.kernels.rasterize_kernels import launch

    with torch.cuda.device_of(boxes):
        return launch(edges.contiguous(), spans.contiguous(), boxes.contiguous(), size)


@rasterize.register_fake
def _(edges: Tensor, spans: Tensor, boxes: Tensor, size: int) -> Tensor:
    return boxes.new_empty(boxes.shape[0], size, size, dtype=torch.bool)
