"""Pasting of predicted masks into images, stored by column as in COCO's run-length encoding.

Only the region of each mask's box is stored, column by column, with a zero after each column. A run
of the mask begins or ends where adjacent bytes differ (`vitdet.evaluation.run_lengths` computes
COCO's strings from the bytes).

`grid_sample` needs one launch per mask, writes a grid of 8 bytes per pixel first, and rounds
differently on a GPU. The kernel needs one launch for all masks of a batch and writes one byte per
pixel. It performs the same operations in the same order as `grid_sample` on an x86 CPU (including
fused multiply-adds and correctly rounded division), so that the bytes, and thus AP, are
identical.

Notation: N masks of M x M cells.
"""

from __future__ import annotations

import torch
from torch import Tensor

THRESHOLD = 0.5  # minimum probability of a mask pixel; repeated in paste_kernels.py
OUTSIDE = 3.0  # coordinate outside a mask, which extends from -1 to 1
PIXELS = 2**18  # pixels per call of grid_sample on the CPU (3 MB)


def regions_of(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Return the regions (N, 4) int64 xywh outside which masks in boxes (N, 4) xyxy are zero.

    `sizes` (N, 2) int64: the images' (height, width). Regions are clipped to the images.
    """
    low = (boxes[:, :2].floor() - 1).clamp(min=0).long()
    high = torch.minimum(boxes[:, 2:].ceil().long() + 1, sizes.flip(1))
    sides = (high - low).clamp(min=0)
    return torch.cat([low, sides * (sides > 0).all(dim=1, keepdim=True)], dim=1)


def bytes_of(regions: Tensor) -> Tensor:
    """Return each region's number of bytes (N,) int64, including the zero after each column."""
    return regions[:, 2] * (regions[:, 3] + 1)


@torch.library.custom_op("vitdet::paste", mutates_args=(), device_types="cuda")
def paste(masks: Tensor, boxes: Tensor, regions: Tensor, ends: Tensor, total: int) -> Tensor:
    """Return the pixels (total,) uint8, 0 or 1, of masks (N, M, M) in boxes (N, 4) xyxy.

    `masks` are float32 probabilities, `boxes` float32, and `regions` (N, 4) the result of
    `regions_of`. `ends` (N,) int64 is the cumulative sum of `bytes_of(regions)`; its last element
    is `total`. All tensors are on one device.
    """
    from vitdet.kernels.paste_kernels import launch

    with torch.cuda.device_of(masks):
        return launch(masks, boxes, regions, ends, total)


@paste.register_kernel("cpu")
def reference(masks: Tensor, boxes: Tensor, regions: Tensor, ends: Tensor, total: int) -> Tensor:
    """Run `paste` with `grid_sample`; this is the implementation for CPUs."""
    pixels = torch.empty(total, dtype=torch.uint8, device=masks.device)
    columns = _centers(regions[:, 0], regions[:, 2], boxes[:, 0], boxes[:, 2])
    rows = _centers(regions[:, 1], regions[:, 3], boxes[:, 1], boxes[:, 3])
    starts = (ends - bytes_of(regions)).tolist()
    for index, (_, _, width, height) in enumerate(regions.tolist()):
        down, start = rows[index, : height + 1], starts[index]
        for across in columns[index, :width].split(max(1, PIXELS // (height + 1))):
            grid = across.new_empty(1, len(across), height + 1, 2)
            grid[..., 0], grid[..., 1] = across[:, None], down
            values = torch.grid_sampler(masks[index][None, None], grid, 0, 0, False).view(-1)
            after = start + len(values)
            torch.ge(values, THRESHOLD, out=pixels[start:after].view(torch.bool))
            start = after
    return pixels


@paste.register_fake
def _(masks: Tensor, boxes: Tensor, regions: Tensor, ends: Tensor, total: int) -> Tensor:
    return masks.new_empty(total, dtype=torch.uint8)


def _centers(first: Tensor, counts: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return grid coordinates (N, largest count + 1) of pixel centers on one axis.

    Row n contains the centers of counts[n] pixels from first[n] on, then OUTSIDE. The box's ends
    low (N,) and high (N,) have the coordinates -1 and 1.
    """
    steps = torch.arange(int(counts.max()) + 1, device=low.device)
    sides = (high - low).clamp(min=1e-9)  # avoid division by 0 for empty boxes
    centers = ((first[:, None] + steps).float() + 0.5 - low[:, None]) / sides[:, None] * 2 - 1
    return centers.where(steps < counts[:, None], OUTSIDE)
