"""The two Triton kernels of `vitdet.kernels.nms`, and their launch.

A program of `compare_boxes` compares 32 boxes with 64 boxes, and stores a word of 64 bits for each
of the 32 boxes. A program of `suppress_boxes` iterates over the blocks of 64 boxes of a group. In
each block, 64 words determine which boxes are kept; the OR of the kept boxes' rows of words
determines which later boxes are suppressed.

Notation: G groups, N boxes of a group, W words of a row.
"""

# ruff: noqa: ANN001, ANN201 (what Triton passes to a kernel has no Python type)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BITS = tl.constexpr(64)  # bits of a word
MEMORY = 2**28  # maximum bytes of words per launch; 40 groups of 2,000 boxes need 20 MB
TILE = 2**11  # words per read in `suppress_boxes`, e.g. 64 rows for 2,048 boxes


def launch(boxes: Tensor, labels: Tensor | None, iou: float, limit: int) -> Tensor:
    """Return which boxes are kept, like `vitdet.kernels.nms.nms`; `boxes` must be contiguous."""
    groups, count, _ = boxes.shape
    keep = torch.zeros(groups, count, dtype=torch.bool, device=boxes.device)
    if not groups * count:
        return keep
    words = triton.cdiv(count, BITS.value)
    padded = triton.next_power_of_2(words)
    classes = boxes if labels is None else labels.contiguous()
    step = max(1, MEMORY // (8 * BITS.value * words**2))
    for start in range(0, groups, step):
        some = slice(start, min(start + step, groups))
        size = (some.stop - start, BITS.value * words, words)
        bits = torch.empty(size, dtype=torch.int64, device=boxes.device)
        given = boxes[some], classes[some], bits, count, words, below(iou)
        sizes = {"LABELS": labels is not None, "ROWS": BITS.value // 2, "num_warps": 4}
        # a fused a * b - c would round differently from torchvision on the CPU
        compare_boxes[(words, 2 * words, len(bits))](*given, **sizes, enable_fp_fusion=False)
        rows = max(1, min(BITS.value, TILE // padded))
        sizes = {"ROWS": rows, "WORDS": padded, "num_warps": 4}
        suppress_boxes[(len(bits),)](bits, keep[some], count, words, limit, **sizes)
    return keep


def below(number: float) -> float:
    """Return the largest float32 <= `number`: every float32 above it is also above `number`."""
    single = torch.tensor(number, dtype=torch.float32)
    if single.item() > number:
        single = single.nextafter(torch.tensor(-math.inf))
    return single.item()


@triton.jit
def corners(boxes, index, inside):
    """Load x0, y0, x1, y1 of boxes (N, 4), or zeros where `inside` is False."""
    x0 = tl.load(boxes + index * 4, mask=inside, other=0.0)
    y0 = tl.load(boxes + index * 4 + 1, mask=inside, other=0.0)
    x1 = tl.load(boxes + index * 4 + 2, mask=inside, other=0.0)
    y1 = tl.load(boxes + index * 4 + 3, mask=inside, other=0.0)
    return x0, y0, x1, y1


@triton.jit(do_not_specialize=["count", "words"])
def compare_boxes(boxes, labels, bits, count, words, iou, LABELS: tl.constexpr, ROWS: tl.constexpr):
    """Write bits (G, 64 W, W): bit k of word w is set if the row's box suppresses box 64 w + k.

    Bits of earlier boxes are 0. A box's own bit is 1 if the box is empty or its index is at least
    N. Words that contain only earlier boxes are not written.
    """
    block, part, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if block * BITS + BITS <= part * ROWS:
        return
    boxes += group.to(tl.int64) * count * 4
    i = part * ROWS + tl.arange(0, ROWS)
    j = block * BITS + tl.arange(0, BITS)
    ax0, ay0, ax1, ay1 = corners(boxes, i, i < count)
    bx0, by0, bx1, by1 = corners(boxes, j, j < count)
    # The later boxes are on axis 0, so that most bits of a word are summed within one thread.
    width = tl.minimum(ax1[None, :], bx1[:, None]) - tl.maximum(ax0[None, :], bx0[:, None])
    height = tl.minimum(ay1[None, :], by1[:, None]) - tl.maximum(ay0[None, :], by0[:, None])
    intersection = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
    areas = ((ax1 - ax0) * (ay1 - ay0))[None, :] + ((bx1 - bx0) * (by1 - by0))[:, None]
    hit = tl.math.div_rn(intersection, areas - intersection) > iou
    if LABELS:
        labels += group.to(tl.int64) * count
        a = tl.load(labels + i, mask=i < count, other=0)
        b = tl.load(labels + j, mask=j < count, other=0)
        hit &= a[None, :] == b[:, None]
    # the sum of distinct bits is the same as their OR
    word = tl.sum(hit.to(tl.int64) << tl.arange(0, BITS).to(tl.int64)[:, None], axis=0)
    # In the word that contains bit i of row i, only higher bits are later boxes.
    own = i - block * BITS
    later = tl.where(own < 0, -1, tl.full((ROWS,), -2, tl.int64) << tl.maximum(own, 0))
    empty = (own >= 0) & ~((ax1 > ax0) & (ay1 > ay0))
    word = (word & later) | (empty.to(tl.int64) << tl.maximum(own, 0))
    tl.store(bits + (group.to(tl.int64) * words * BITS + i) * words + block, word)


@triton.jit
def either(a, b):
    """Return the OR of two words."""
    return a | b


@triton.jit(do_not_specialize=["count", "words", "limit"])
def suppress_boxes(bits, keep, count, words, limit, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Mark unsuppressed boxes in keep (G, N), up to the block in which `limit` is reached."""
    group = tl.program_id(0).to(tl.int64)
    bits += group * words * words * BITS
    keep += group * count
    bit = tl.arange(0, BITS)
    word = tl.arange(0, WORDS)
    # bits of the boxes suppressed by kept boxes
    gone = tl.zeros((WORDS,), tl.int64)
    kept_count = 0
    block = 0
    while (block < words) & (kept_count < limit):
        lines = bits + block * BITS * words
        here = tl.sum(tl.where(word == block, gone, 0), axis=0)
        for k in tl.static_range(BITS):
            # only `here` depends on the previous box, so the loads need not wait
            line = tl.load(lines + k * words + block)
            own = tl.full((), 1, tl.int64) << k
            here |= line & tl.where(((here | line) & own) == 0, -1, own)
        kept = ((here >> bit) & 1) == 0
        tl.store(keep + block * BITS + bit, kept, mask=block * BITS + bit < count)
        kept_count += tl.sum(kept.to(tl.int32), axis=0)
        for k in range(0, BITS, ROWS):
            row = k + tl.arange(0, ROWS)
            mask = (((here >> row) & 1) == 0)[:, None] & ((word > block) & (word < words))[None, :]
            at = lines + row[:, None] * words + word[None, :]
            suppressed = tl.load(at, mask=mask, other=0)
            gone |= tl.reduce(suppressed, 0, either)
        block += 1
