"""Rasterization of outlines into boxes: the training targets of masks.

In plain torch (`vitdet.models.mask_head.rasterize`) the pairs of RoIs and edges are processed in
blocks, whose number must be known: the host synchronizes, and memory and launches grow with the
edges. Here each row of a RoI is a program that iterates over its outline's edges.

The arithmetic is that of the plain version, operation by operation in float32 (IEEE division, no
fused multiply-add), and directions are integers, so both mark the same cells.

Letters: R RoIs, E edges.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rasterize(edges: Tensor, spans: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Return which of the size x size cells of each RoI have their centre inside its outline: (R,
    size, size) bool, on CUDA.

    Args:
        edges: (E, 4) float32, x0, y0, x1, y1 in pixels.
        spans: (R, 2) int64, the outline of a RoI is the edges from spans[:, 0] to spans[:, 1]
            (exclusive).
        boxes: (R, 4) float32 xyxy.
        size: cells per side.

    A point is inside if the winding number is not zero. Raises ValueError for other shapes or
    dtypes.
    """
    for name, tensor, columns, kind in (
        ("edges", edges, 4, torch.float32),
        ("spans", spans, 2, torch.int64),
        ("boxes", boxes, 4, torch.float32),
    ):
        if tensor.shape != (len(tensor), columns) or tensor.dtype != kind:
            raise ValueError(
                f"{name} must be (., {columns}) {kind}, got {tuple(tensor.shape)} {tensor.dtype}"
            )
    if len(spans) != len(boxes):
        raise ValueError(f"each box needs a span, got {len(boxes)} boxes and {len(spans)} spans")
    return fill(edges, spans, boxes, size)


@torch.library.custom_op("vitdet::rasterize", mutates_args=())
def fill(edges: Tensor, spans: Tensor, boxes: Tensor, size: int) -> Tensor:
    """`rasterize` by the Triton kernel."""
    from vitdet.kernels.rasterize_kernels import launch

    with torch.cuda.device_of(boxes):
        return launch(edges.contiguous(), spans.contiguous(), boxes.contiguous(), size)


@fill.register_fake
def _(edges: Tensor, spans: Tensor, boxes: Tensor, size: int) -> Tensor:
    return boxes.new_empty(boxes.shape[0], size, size, dtype=torch.bool)
