"""The Triton kernel of `vitdet.kernels.paste`, and its launch."""
# ruff: noqa: ANN001, ANN201 (what Triton passes to a kernel has no Python type)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

THRESHOLD = tl.constexpr(0.5)
BLOCK = tl.constexpr(1024)  # bytes that a program writes per iteration
PROGRAMS = 16  # programs per mask


def launch(masks: Tensor, boxes: Tensor, regions: Tensor, ends: Tensor, total: int) -> Tensor:
    """Launch the kernel; arguments and result as in `vitdet.kernels.paste.paste`."""
    pixels = torch.empty(total, dtype=torch.uint8, device=masks.device)
    if total:
        tensors = [tensor.contiguous() for tensor in (masks, boxes, regions, ends)]
        grid = (len(masks), PROGRAMS)
        # fuse multiply-adds only where `tl.fma` is called
        paste_kernel[grid](*tensors, pixels, M=masks.shape[-1], enable_fp_fusion=False)
    return pixels


@triton.jit
def cell_of(first, step, low, side, M: tl.constexpr):
    """Return a pixel center's cell index and fraction on an axis, computed as in `grid_sample`."""
    center = tl.div_rn((first + step).to(tl.float32) + 0.5 - low, side) * 2.0 - 1.0
    center = tl.fma(center + 1.0, M / 2, -0.5)
    cell = tl.floor(center)
    return cell, center - cell


@triton.jit
def paste_kernel(MASKS, BOXES, REGIONS, ENDS, PIXELS, M: tl.constexpr):
    """Write every tl.num_programs(1)-th block of a mask's bytes."""
    index = tl.program_id(0)
    x = tl.load(REGIONS + index * 4).to(tl.int32)
    y = tl.load(REGIONS + index * 4 + 1).to(tl.int32)
    width = tl.load(REGIONS + index * 4 + 2).to(tl.int32)
    height = tl.load(REGIONS + index * 4 + 3).to(tl.int32)
    left = tl.load(BOXES + index * 4)
    top = tl.load(BOXES + index * 4 + 1)
    wide = tl.maximum(tl.load(BOXES + index * 4 + 2) - left, 1e-9)
    high = tl.maximum(tl.load(BOXES + index * 4 + 3) - top, 1e-9)
    rows = height + 1
    count = width * rows
    begin = tl.load(ENDS + index) - count
    mask = MASKS + index.to(tl.int64) * M * M
    for start in range(tl.program_id(1) * BLOCK, count, tl.num_programs(1) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        column = at // rows
        row = at - column * rows
        a, w = cell_of(x, column, left, wide, M)
        b, n = cell_of(y, row, top, high, M)
        e = 1.0 - w
        s = 1.0 - n
        inside = (at < count) & (row < height)
        west = (a >= 0) & (a < M) & inside
        east = (a >= -1) & (a < M - 1) & inside
        north = (b >= 0) & (b < M)
        south = (b >= -1) & (b < M - 1)
        # the index of a cell far outside the mask may exceed int32
        a = tl.where(west | east, a, 0.0).to(tl.int32)
        b = tl.where(north | south, b, 0.0).to(tl.int32)
        cell = mask + b * M + a
        value = tl.load(cell, mask=north & west, other=0.0) * (s * e)
        value = tl.fma(tl.load(cell + 1, mask=north & east, other=0.0), s * w, value)
        value = tl.fma(tl.load(cell + M, mask=south & west, other=0.0), n * e, value)
        value = tl.fma(tl.load(cell + M + 1, mask=south & east, other=0.0), n * w, value)
        tl.store(PIXELS + begin + at, (value >= THRESHOLD).to(tl.uint8), mask=at < count)
