"""COCO's run lengths of masks that are stored as `vitdet.kernels.paste` stores them, without their full images.

The pixels of an image, column by column, are counted in runs alternately outside and inside of the mask, the first
outside. The counts of all masks are computed at once on the device of the pixels; only they are copied to the CPU,
where pycocotools writes them as text (6 us a mask). Letters: N masks, R runs inside masks, C counts.
"""

from __future__ import annotations

import torch
from pycocotools import mask as rle
from torch import Tensor


def encode_columns(pixels: Tensor, regions: Tensor, ends: Tensor, sizes: Tensor) -> list[dict]:
    """COCO's compressed RLE dicts, as `vitdet.data.masks.encode` gives them, of N masks.

    pixels (total,) uint8, regions (N, 4) and ends (N,) int64 of `vitdet.kernels.paste`, sizes (N, 2) int64 (height,
    width) of their images; all on one device.
    """
    counts, last = _counts(pixels, regions, ends, sizes)
    numbers, stops = counts.int().cpu().numpy(), (last + 1).tolist()
    runs = [
        {"size": size, "counts": numbers[start:stop]}
        for size, start, stop in zip(sizes.tolist(), [0, *stops[:-1]], stops, strict=True)
    ]
    return [
        {
            "size": one["size"],
            "counts": rle.frPyObjects(one, *one["size"])["counts"].decode("ascii"),
        }
        for one in runs
    ]


def _counts(pixels: Tensor, regions: Tensor, ends: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The counts (C,) of all masks one after the other, and which of them is each mask's last (N,)."""
    owner, bounds = _bounds(pixels, regions, ends, sizes)
    area = sizes.prod(dim=1)
    inner = bounds < area[owner]  # a mask that reaches the last pixel has no count after it
    owner, bounds = owner[inner], bounds[inner]
    each = torch.bincount(owner, minlength=len(regions)) + 1
    last = each.cumsum(0) - 1
    # A count ends where a run begins or ends, and at the end of the image.
    marks = bounds.new_empty(len(bounds) + len(regions))
    marks[torch.arange(len(bounds), device=bounds.device) + owner] = bounds
    marks[last] = area
    counts = marks.diff(prepend=marks.new_zeros(1))
    counts[last[:-1] + 1] = marks[last[:-1] + 1]
    return counts, last


def _bounds(pixels: Tensor, regions: Tensor, ends: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Where runs begin and end, in order, and whose they are, both (2 R,): pixels of the image column by column."""
    changes = (pixels != torch.cat([pixels.new_zeros(1), pixels[:-1]])).nonzero().view(-1, 2)
    start, end = changes.t().contiguous()
    owner = torch.searchsorted(ends, start, right=True)
    x, y, width, height = regions[owner].unbind(1)
    place = start - (ends[owner] - width * (height + 1))
    column = place.div(height + 1, rounding_mode="floor")
    begin = (x + column) * sizes[owner, 0] + y + place - column * (height + 1)
    bounds = torch.stack([begin, begin + end - start], dim=1).flatten()
    owner = owner.repeat_interleave(2)
    # A run goes on in the next column where a mask reaches from the top to the bottom of its image.
    meets = (bounds[1:] == bounds[:-1]) & (owner[1:] == owner[:-1])
    apart = torch.ones_like(bounds, dtype=torch.bool)
    apart[1:] &= ~meets
    apart[:-1] &= ~meets
    return owner[apart], bounds[apart]
