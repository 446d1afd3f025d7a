"""Encode many masks as COCO's run lengths (RLE) at once; compute the areas of many RLE codes.

A code contains the lengths of runs of equal pixels, column by column; the runs alternate between
background and mask, background first. COCO's compressed text (maskApi.c) stores each number in
groups of 5 bits, lowest bits first, one character per group, offset by '0'. Bit 5 marks that the
number continues; bit 4 of the last group is the sign. From the fourth number on, each number is the
difference between the length of its run and that of the second run before it.

Notation: N masks, R runs inside masks, C counts, U numbers in all codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor

AT_ONCE = 512  # codes per group, so that intermediate arrays fit into the processor's cache


def encode_columns(pixels: Tensor, regions: Tensor, ends: Tensor, sizes: Tensor) -> list[dict]:
    """Return the compressed RLE of N pasted masks, equal to that of `vitdet.data.masks.encode`.

    The runs of all masks are counted at once, on the device of the tensors. pycocotools compresses
    the counts on the CPU.

    Args:
        pixels, regions, ends: (total,) uint8, (N, 4) and (N,) int64, see `vitdet.kernels.paste`.
        sizes: (N, 2) int64, (height, width) of the images.
    """
    counts, last = _counts(pixels, regions, ends, sizes)
    parts = np.split(counts.int().cpu().numpy(), (last[:-1] + 1).tolist())
    codes = []
    for size, runs in zip(sizes.tolist(), parts, strict=True):
        code = rle.frPyObjects({"size": size, "counts": runs}, *size)
        codes.append({"size": size, "counts": code["counts"].decode("ascii")})
    return codes


def _counts(pixels: Tensor, regions: Tensor, ends: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return all masks' counts (C,) in sequence, and the index (N,) of each mask's last count."""
    owner, bounds = _bounds(pixels, regions, ends, sizes)
    area = sizes.prod(dim=1)
    inner = bounds < area[owner]  # no count follows a run that ends at the last pixel
    owner, bounds = owner[inner], bounds[inner]
    last = (torch.bincount(owner, minlength=len(regions)) + 1).cumsum(0) - 1
    # a count ends at each start and end of a run, and at the end of the image
    marks = bounds.new_empty(len(bounds) + len(regions))
    marks[torch.arange(len(bounds), device=bounds.device) + owner] = bounds
    marks[last] = area
    counts = marks.diff(prepend=marks.new_zeros(1))
    counts[last[:-1] + 1] = marks[last[:-1] + 1]
    return counts, last


def _bounds(pixels: Tensor, regions: Tensor, ends: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mask index (2 R,) and the pixel index (2 R,) of each start and end of a run."""
    changes = (pixels != torch.cat([pixels.new_zeros(1), pixels[:-1]])).nonzero().view(-1, 2)
    start, end = changes.t().contiguous()
    owner = torch.searchsorted(ends, start, right=True)
    x, y, width, height = regions[owner].unbind(1)
    offset = start - (ends[owner] - width * (height + 1))  # in the region
    column = offset.div(height + 1, rounding_mode="floor")
    begin = (x + column) * sizes[owner, 0] + y + offset - column * (height + 1)
    bounds = torch.stack([begin, begin + end - start], dim=1).flatten()
    owner = owner.repeat_interleave(2)
    # a run at the bottom of a column and a run at the top of the next column are one run
    meets = (bounds[1:] == bounds[:-1]) & (owner[1:] == owner[:-1])
    apart = torch.ones_like(bounds, dtype=torch.bool)
    apart[1:] &= ~meets
    apart[:-1] &= ~meets
    return owner[apart], bounds[apart]


def areas(texts: Sequence[bytes], pixels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the areas (int64) of compressed codes, and whether each code is valid, i.e. its
    runs add up to the image's number of pixels.

    The check is necessary: pycocotools and faster-coco-eval can hang on invalid codes. If a code is
    malformed, all codes in its group of up to AT_ONCE codes are reported as invalid.
    """
    sizes, valid = np.zeros(len(texts), np.int64), np.zeros(len(texts), bool)
    for start in range(0, len(texts), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        if (sums := _sums(texts[part])) is not None:
            total, sizes[part] = sums
            valid[part] = total == np.asarray(pixels[part])
    return sizes, valid


def _sums(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the number of pixels and of mask pixels of each code; None if a code is malformed."""
    ends = np.cumsum([len(text) for text in texts])
    codes = np.frombuffer(b"".join(texts), np.uint8) - np.uint8(48)
    final = (codes & 32) == 0  # whether a character is the last of its number
    if min(map(len, texts)) == 0 or codes.max() > 63 or not final[ends - 1].all():
        return None
    stops = np.flatnonzero(final)
    lengths = np.diff(stops, prepend=-1)
    if (longest := int(lengths.max())) > 7:  # more than 35 bits
        return None
    numbers = ((codes[stops] & 31).astype(np.int64) ^ 16) - 16  # (U,)
    for back in range(1, longest):
        longer = np.flatnonzero(lengths > back)
        numbers[longer] = (numbers[longer] << 5) | (codes[stops[longer] - back] & 31)
    counts = np.add.reduceat(final, np.append(0, ends[:-1]), dtype=np.int64)  # numbers per code
    starts = np.cumsum(counts) - counts
    index = np.arange(len(numbers)) - np.repeat(starts, counts)
    # from the fourth run on, a length is its number plus the length of the second run before it; so
    # each number except the first contributes to its run and to every second run after it
    weights = (np.repeat(counts, counts) - 1 - index) // 2 + 1
    weights[starts] = 1
    numbers *= weights
    total = np.add.reduceat(numbers, starts)
    numbers *= index & 1
    return total, np.add.reduceat(numbers, starts)
