"""Assignment of ground truths to boxes by IoU, and sampling of a fixed number of boxes.

`matched` (B, N) contains for every box the index of its ground truth, or BACKGROUND or IGNORE. All
sizes depend only on settings, so that the host does not synchronize with the GPU; slots without a
box are empty.
Notation: B images, G ground truths, N boxes, S slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BACKGROUND, IGNORE = -1, -2

Match = Callable[[Iterable[Tensor], float, float], Tensor]
# candidates (B, N) bool, number to select (B,) -> keys (B, N) >= 0; the largest are selected
Choose = Callable[[Tensor, Tensor], Tensor]


class _Overlaps(NamedTuple):
    """Reductions of the IoUs, (..., N) each."""

    best: Tensor  # the largest IoU of each box
    truth: Tensor  # the first ground truth with this IoU
    # the last ground truth for which the box has the largest IoU (ties included); negative: none
    favorite: Tensor


@torch.no_grad()
def match(iou: Iterable[Tensor], low: float, high: float) -> Tensor:
    """Match boxes: iou (..., G, N) -> matched (..., N): the best ground truth if its IoU is at
    least `high`, BACKGROUND below `low`, else IGNORE.

    iou: at least one block of rows, as from `boxes.iou_blocks`; one block at a time is in memory.
    """
    return _by_threshold(_overlaps(iou, math.inf), low, high)


@torch.no_grad()
def match_keeping_own(iou: Iterable[Tensor], low: float, high: float) -> Tensor:
    """Like `match`, but a box that has the largest IoU with some ground truth is always foreground,
    matched to its own best ground truth, as in Detectron2's RPN (where a ground truth that overlaps
    no box would turn all boxes with IoU 0 into foreground).
    """
    found = _overlaps(iou, 0.0)
    return torch.where(found.favorite >= 0, found.truth, _by_threshold(found, low, high))


@torch.no_grad()
def match_keeping_best(iou: Iterable[Tensor], low: float, high: float) -> Tensor:
    """Like `match`, but a box that has the largest IoU with some ground truth, at least `low`, is
    matched to that ground truth (the last one if there are several), as in mmdet.
    """
    found = _overlaps(iou, low)
    return torch.where(found.favorite >= 0, found.favorite, _by_threshold(found, low, high))


def _by_threshold(found: _Overlaps, low: float, high: float) -> Tensor:
    matched = torch.where(found.best >= high, found.truth, IGNORE)
    return torch.where(found.best < low, BACKGROUND, matched)


def _overlaps(iou: Iterable[Tensor], least: float) -> _Overlaps:
    """Reduce all blocks (..., G, N); only IoUs of at least `least` count for `favorite`."""
    found, start = None, 0
    for block in iou:
        # without ground truths: a dummy that overlaps no box
        rows = block if block.shape[-2] else F.pad(block, (0, 0, 0, 1))
        best, index = rows.max(dim=-2)
        one = _Overlaps(best, index + start, _favorites(rows, start, least))
        found = one if found is None else _larger(found, one)
        start += block.shape[-2]
    assert found is not None, "no block of IoUs"
    return found


def _larger(found: _Overlaps, later: _Overlaps) -> _Overlaps:
    better = later.best > found.best
    truth = torch.where(better, later.truth, found.truth)
    best = torch.where(better, later.best, found.best)
    return _Overlaps(best, truth, torch.maximum(found.favorite, later.favorite))


def _favorites(iou: Tensor, start: int, least: float) -> Tensor:
    """Return (..., N): the last ground truth with its largest IoU in this box, >= `least`."""
    if least == math.inf or iou.shape[-1] == 0:
        return torch.full_like(iou[..., 0, :], BACKGROUND, dtype=torch.int64)
    top = iou.amax(dim=-1, keepdim=True)
    kept = (iou == top) & (top > 0) & (iou >= least)
    rows = torch.arange(start, start + iou.shape[-2], device=iou.device)[:, None]
    return rows.where(kept, BACKGROUND).amax(dim=-2)


class Sampled(NamedTuple):
    """Sampled boxes in slots, foreground first, then background."""

    chosen: Tensor  # (B, S), indices of boxes
    foreground: Tensor  # (B, S) bool
    filled: Tensor  # (B, S) bool
    most: int  # foreground is in the first `most` slots


@torch.no_grad()
def sample(matched: Tensor, num: int, positive_fraction: float, choose: Choose) -> Sampled:
    """Sample up to num * positive_fraction foreground boxes of matched (B, N), then background."""
    most, slots = (min(size, matched.shape[1]) for size in (int(num * positive_fraction), num))
    positive, negative = matched > BACKGROUND, matched == BACKGROUND
    num_positive = positive.sum(dim=1).clamp(max=most)
    num_negative = torch.minimum(negative.sum(dim=1), num - num_positive)
    slot = torch.arange(slots, device=matched.device).expand(len(matched), -1)
    first, last = num_positive[:, None], (num_positive + num_negative)[:, None]
    foreground, filled = slot < first, slot < last
    index = _largest(choose(negative, num_negative), negative, slots)
    index = index.gather(1, (slot - first).clamp(min=0))
    if most:
        best = _largest(choose(positive, num_positive), positive, most)
        index = torch.where(foreground, best.gather(1, slot.clamp(max=most - 1)), index)
    return Sampled(index, foreground, filled, most)


def _largest(keys: Tensor, candidates: Tensor, num: int) -> Tensor:
    """Return the indices (B, num) of the candidates with the largest keys (B, N), largest first."""
    return torch.where(candidates, keys, -1.0).topk(num, dim=1).indices


def choose_randomly(candidates: Tensor, num: Tensor) -> Tensor:
    """Return random keys: every subset of the candidates is equally likely."""
    return torch.rand(candidates.shape, device=candidates.device)
