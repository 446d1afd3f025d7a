"""Assignment of ground truths to boxes by IoU, and sampling of a fixed number of boxes.

`matched` (B, N) contains the index of each box's ground truth, or BACKGROUND, or IGNORE. Tensor
shapes do not depend on tensor values, so that the host need not synchronize with the GPU. For this
reason, slots may be empty.
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
# (candidates (B, N) bool, number to select (B,)) -> keys (B, N) >= 0; the largest are selected
Choose = Callable[[Tensor, Tensor], Tensor]


class _Overlaps(NamedTuple):
    """For each box, reductions of its IoUs with all ground truths: (..., N) each."""

    best: Tensor  # the box's largest IoU
    truth: Tensor  # the first ground truth with the IoU `best`
    # the last ground truth whose largest IoU is with this box (ties included); negative if none
    favorite: Tensor


@torch.no_grad()
def match(iou: Iterable[Tensor], low: float, high: float) -> Tensor:
    """Match each box to the ground truth with the largest IoU: (..., G, N) -> matched (..., N).

    Boxes whose largest IoU is below `low` are BACKGROUND. Boxes whose largest IoU is at least
    `low` and below `high` are IGNORE. `iou` yields blocks of rows, see `boxes.iou_blocks`.
    """
    return _by_threshold(_overlaps(iou, math.inf), low, high)


@torch.no_grad()
def match_keeping_own(iou: Iterable[Tensor], low: float, high: float) -> Tensor:
    """Match like `match`, but keep each ground truth's best box as foreground for any IoU above 0.

    The best box is matched to the ground truth that it overlaps most, as in Detectron2's RPN. In
    Detectron2, a ground truth that overlaps no box makes every box foreground.
    """
    found = _overlaps(iou, 0.0)
    return torch.where(found.favorite >= 0, found.truth, _by_threshold(found, low, high))


@torch.no_grad()
def match_keeping_best(iou: Iterable[Tensor], low: float, high: float) -> Tensor:
    """Match like `match`, but match each ground truth's best box to that ground truth, as in mmdet.

    The best box must have an IoU of at least `low`. If it is the best box of several ground truths,
    it is matched to the last one.
    """
    found = _overlaps(iou, low)
    return torch.where(found.favorite >= 0, found.favorite, _by_threshold(found, low, high))


def _by_threshold(found: _Overlaps, low: float, high: float) -> Tensor:
    matched = torch.where(found.best >= high, found.truth, IGNORE)
    return torch.where(found.best < low, BACKGROUND, matched)


def _overlaps(iou: Iterable[Tensor], least: float) -> _Overlaps:
    """Reduce all blocks of IoUs (..., G, N) over G; `favorite` ignores IoUs below `least`."""
    found, start = None, 0
    for block in iou:
        # without ground truths, add a dummy ground truth with an IoU of 0
        rows = block if block.shape[-2] else F.pad(block, (0, 0, 0, 1))
        best, index = rows.max(dim=-2)
        overlaps = _Overlaps(best, index + start, _favorites(rows, start, least))
        found = overlaps if found is None else _larger(found, overlaps)
        start += block.shape[-2]
    assert found is not None, "no block of IoUs"
    return found


def _larger(found: _Overlaps, later: _Overlaps) -> _Overlaps:
    better = later.best > found.best
    truth = torch.where(better, later.truth, found.truth)
    best = torch.where(better, later.best, found.best)
    return _Overlaps(best, truth, torch.maximum(found.favorite, later.favorite))


def _favorites(iou: Tensor, start: int, least: float) -> Tensor:
    """Return `_Overlaps.favorite` (..., N) of IoUs whose first row is ground truth `start`."""
    if least == math.inf or iou.shape[-1] == 0:
        return torch.full_like(iou[..., 0, :], BACKGROUND, dtype=torch.int64)
    top = iou.amax(dim=-1, keepdim=True)
    kept = (iou == top) & (top > 0) & (iou >= least)
    rows = torch.arange(start, start + iou.shape[-2], device=iou.device)[:, None]
    return rows.where(kept, BACKGROUND).amax(dim=-2)


class Sampled(NamedTuple):
    """Slots of sampled boxes: foreground first, then background, then empty slots."""

    chosen: Tensor  # (B, S), indices of the boxes
    foreground: Tensor  # (B, S) bool
    filled: Tensor  # (B, S) bool
    most: int  # foreground boxes are in the first `most` slots


@torch.no_grad()
def sample(matched: Tensor, num: int, positive_fraction: float, choose: Choose) -> Sampled:
    """Sample up to `num` boxes per image, at most num * positive_fraction of them foreground."""
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
    """Return random keys (B, N): all subsets of `num` candidates are equally likely."""
    return torch.rand(candidates.shape, device=candidates.device)
