"""The two Triton kernels of `vitdet.kernels.nms`, and their launch.

`compare` has a program for a tile of 64 x 64 pairs and stores a word of 64 bits for each of its rows. `walk` has a
program for a group, which goes through the boxes 64 at a time: whether each of them is kept follows from 64 words in
registers, a few instructions a box, and what the kept ones suppress among the later boxes is the OR of their rows.
Letters: G groups, N boxes of a group, W words of a row.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BITS = tl.constexpr(64)  # of a word
# Bytes of bits that exist at a time; 40 groups of 2,000 boxes take 20 MB.
MEMORY = 2**28
# Words that `walk` reads at a time: 64 rows of 2,048 boxes.
TILE = 2**11


def launch(boxes: Tensor, labels: Tensor | None, iou: float, limit: int) -> Tensor:
    """Contiguous boxes (G, N, 4) float32, labels (G, N) int64 or None -> which are kept, (G, N) bool."""
    groups, count, _ = boxes.shape
    keep = torch.zeros(groups, count, dtype=torch.bool, device=boxes.device)
    words = triton.cdiv(count, BITS.value)
    each = 8 * count * words
    if not groups * count or limit <= 0:
        return keep
    labelled = labels is not None
    labels = boxes if labels is None else labels.contiguous()
    rows = max(1, min(BITS.value, TILE // triton.next_power_of_2(words)))
    step = max(1, MEMORY // each)
    for start in range(0, groups, step):
        some = slice(start, min(start + step, groups))
        bits = torch.empty(some.stop - start, count, words, dtype=torch.int64, device=boxes.device)
        compare[(words, words, len(bits))](
            boxes[some],
            labels[some],
            bits,
            count,
            words,
            below(iou),
            LABELS=labelled,
            num_warps=4,
            # a fused a * b - c would round otherwise than torchvision on the CPU
            enable_fp_fusion=False,
        )
        walk[(len(bits),)](
            bits,
            keep[some],
            count,
            words,
            limit,
            ROWS=rows,
            WORDS=triton.next_power_of_2(words),
            num_warps=4,
        )
    return keep


def below(number: float) -> float:
    """The largest float32 that is no larger: a float32 is above it just where it is above the float64 `number`."""
    single = torch.tensor(number, dtype=torch.float32)
    if single.item() > number:
        single = single.nextafter(torch.tensor(-math.inf))
    return single.item()


@triton.jit
def corners(boxes, index, inside):  # noqa: ANN001, ANN201
    """x0, y0, x1, y1 of boxes (N, 4); empty boxes where not inside."""
    x0 = tl.load(boxes + index * 4, mask=inside, other=0.0)
    y0 = tl.load(boxes + index * 4 + 1, mask=inside, other=0.0)
    x1 = tl.load(boxes + index * 4 + 2, mask=inside, other=0.0)
    y1 = tl.load(boxes + index * 4 + 3, mask=inside, other=0.0)
    return x0, y0, x1, y1


@triton.jit(do_not_specialize=["count", "words"])
def compare(boxes, labels, bits, count, words, iou, LABELS: tl.constexpr):  # noqa: ANN001, ANN201
    """bits (G, N, W): bit j of a box's word w says that it would suppress box 64 w + j, which comes after it.

    A box's own bit says that it is empty. Words of earlier boxes only stay unwritten.
    """
    row_block, column_block, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if row_block > column_block:
        return
    first = group.to(tl.int64) * count
    i = row_block * BITS + tl.arange(0, BITS)
    j = column_block * BITS + tl.arange(0, BITS)
    ax0, ay0, ax1, ay1 = corners(boxes + first * 4, i, i < count)
    bx0, by0, bx1, by1 = corners(boxes + first * 4, j, j < count)
    width = tl.minimum(ax1[:, None], bx1[None, :]) - tl.maximum(ax0[:, None], bx0[None, :])
    height = tl.minimum(ay1[:, None], by1[None, :]) - tl.maximum(ay0[:, None], by0[None, :])
    intersection = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
    areas = ((ax1 - ax0) * (ay1 - ay0))[:, None] + ((bx1 - bx0) * (by1 - by0))[None, :]
    hit = tl.math.div_rn(intersection, areas - intersection) > iou
    if LABELS:
        a = tl.load(labels + first + i, mask=i < count, other=0)
        b = tl.load(labels + first + j, mask=j < count, other=0)
        hit &= a[:, None] == b[None, :]
    filled = (ax1 > ax0) & (ay1 > ay0)
    hit = (hit & (i[:, None] < j[None, :])) | ((i[:, None] == j[None, :]) & ~filled[:, None])
    places = tl.arange(0, BITS).to(tl.int64)
    # distinct bits: their sum is their OR
    word = tl.sum(hit.to(tl.int64) << places[None, :], axis=1)
    tl.store(bits + (first + i) * words + column_block, word, mask=i < count)


@triton.jit
def either(a, b):  # noqa: ANN001, ANN201
    """The OR of two words."""
    return a | b


@triton.jit(do_not_specialize=["count", "words", "limit"])
def walk(bits, keep, count, words, limit, ROWS: tl.constexpr, WORDS: tl.constexpr):  # noqa: ANN001, ANN201
    """keep (G, N): the boxes that no kept one suppresses, up to the block of 64 in which `limit` is reached."""
    first = tl.program_id(0).to(tl.int64) * count
    bits += first * words
    place = tl.arange(0, BITS)
    word = tl.arange(0, WORDS)
    # bits of the boxes that kept ones suppress
    gone = tl.zeros((WORDS,), tl.int64)
    kept_count = 0
    block = 0
    while (block < words) & (kept_count < limit):
        start = block * BITS
        here = tl.sum(tl.where(word == block, gone, 0), axis=0)
        kept = here ^ here
        for k in tl.static_range(BITS):
            # one chain through the 64 boxes; the loads do not wait for it
            row = tl.load(bits + (start + k).to(tl.int64) * words + block, mask=start + k < count, other=-1)
            free = (((here | row) >> k) & 1) == 0
            here |= tl.where(free, row, 0)
            kept |= tl.where(free, tl.full((), 1, tl.int64) << k, 0)
        is_kept = ((kept >> place) & 1) != 0
        tl.store(keep + first + start + place, is_kept, mask=start + place < count)
        kept_count += tl.sum(is_kept.to(tl.int32), axis=0)
        for k in range(0, BITS, ROWS):
            index = k + tl.arange(0, ROWS)
            chosen = ((kept >> index) & 1) != 0
            rows = tl.load(
                bits + (start + index).to(tl.int64)[:, None] * words + word[None, :],
                mask=chosen[:, None] & (word > block)[None, :] & (word < words)[None, :],
                other=0,
            )
            gone |= tl.reduce(rows, 0, either)
        block += 1
