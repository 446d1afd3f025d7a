"""The Triton kernel of `vitdet.kernels.rasterize`, and its launch."""

# ruff: noqa: ANN001, ANN201 (what Triton passes to a kernel has no Python type)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

EDGES = 128  # edges that a program processes per iteration


def launch(edges: Tensor, spans: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Launch the kernel; arguments and result as in `vitdet.kernels.rasterize.rasterize`."""
    inside = torch.empty(len(boxes), size, size, dtype=torch.bool, device=boxes.device)
    if inside.numel():
        sizes = {"SIZE": size, "COLUMNS": triton.next_power_of_2(size), "EDGES": EDGES}
        # a fused a * b + c would round differently from torch
        options = {"num_warps": 4, "enable_fp_fusion": False}
        rasterize_kernel[(len(boxes), size)](edges, spans, boxes, inside, **sizes, **options)
    return inside


@triton.jit
def in_cells(edges, index, exists, low, span, SIZE: tl.constexpr):
    """Load one coordinate of each edge, in cells of the RoI."""
    return tl.math.div_rn(tl.load(edges + index, mask=exists, other=0.0) - low, span) * SIZE


@triton.jit
def rasterize_kernel(
    edges, spans, boxes, inside, SIZE: tl.constexpr, COLUMNS: tl.constexpr, EDGES: tl.constexpr
):
    """For each cell of a row, sum the directions of edges that cross the row left of its center."""
    roi = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    first, last = tl.load(spans + roi * 2), tl.load(spans + roi * 2 + 1)
    left, top = tl.load(boxes + roi * 4), tl.load(boxes + roi * 4 + 1)
    # as in Detectron2, a box side is at least 0.1 pixels
    width = tl.maximum(tl.load(boxes + roi * 4 + 2) - left, 0.1)
    height = tl.maximum(tl.load(boxes + roi * 4 + 3) - top, 0.1)
    center = row.to(tl.float32) + 0.5
    column = tl.arange(0, COLUMNS)
    winding = tl.zeros((EDGES, COLUMNS), tl.int32)
    for start in range(first, last, EDGES):
        edge = start + tl.arange(0, EDGES)
        exists = edge < last
        x0 = in_cells(edges, edge * 4, exists, left, width, SIZE)
        y0 = in_cells(edges, edge * 4 + 1, exists, top, height, SIZE)
        x1 = in_cells(edges, edge * 4 + 2, exists, left, width, SIZE)
        y1 = in_cells(edges, edge * 4 + 3, exists, top, height, SIZE)
        down, up = (y0 <= center) & (y1 > center), (y1 <= center) & (y0 > center)
        direction = down.to(tl.int32) - up.to(tl.int32)
        rise = tl.where(y1 == y0, 1.0, y1 - y0)
        crossing = x0 + tl.math.div_rn((center - y0) * (x1 - x0), rise)
        # first cell whose center is at or to the right of the crossing
        cell = tl.ceil(crossing - 0.5)
        winding += tl.where(cell[:, None] <= column[None, :].to(tl.float32), direction[:, None], 0)
    mask = column < SIZE
    tl.store(inside + (roi * SIZE + row) * SIZE + column, tl.sum(winding, axis=0) != 0, mask=mask)
