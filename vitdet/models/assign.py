"""Who learns from which ground truth: match boxes by IoU, then sample a fixed number of them.

`matched` (B, N) holds for every box the index of its ground truth, or BACKGROUND or IGNORE. Sizes depend on settings
alone, never on what is found, so a GPU's host waits for nothing: what is missing leaves a slot empty.
Letters: B images, G ground truths, N boxes, S slots.
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
# candidates (B, N) bool and how many of each image are wanted (B,) -> keys (B, N) of at least 0, of which the largest win
Choose = Callable[[Tensor, Tensor], Tensor]


class _Overlaps(NamedTuple):
    """What `match` and its like need of the IoUs, (..., N) each.

    best: the largest IoU of each box. truth: the first ground truth that has it. favourite: the last ground truth that
    the box overlaps most, all boxes that share the largest IoU of a ground truth among them; below 0 for none.
    """

    best: Tensor
    truth: Tensor
    favourite: Tensor


@torch.no_grad()
def match(iou: Iterable[Tensor], low: float, high: float) -> Tensor:
    """iou (..., G, N) -> matched (..., N): from `high` the best ground truth, below `low` BACKGROUND, else IGNORE.

    iou: in blocks of rows, at least one, as `boxes.iou_blocks` gives them: one block at a time is in memory.
    """
    return _by_threshold(_overlaps(iou, math.inf), low, high)


@torch.no_grad()
def match_keeping_own(iou: Iterable[Tensor], low: float, high: float) -> Tensor:
    """As `match`, but every box that is some ground truth's best learns from the ground truth it overlaps most itself.

    Detectron2's RPN. (A ground truth that no box meets keeps none; there it would turn all boxes of IoU 0 into
    foreground.)
    """
    found = _overlaps(iou, 0.0)
    return torch.where(found.favourite >= 0, found.truth, _by_threshold(found, low, high))


@torch.no_grad()
def match_keeping_best(iou: Iterable[Tensor], low: float, high: float) -> Tensor:
    """As `match`, but every box that is some ground truth's best, with at least `low`, learns from that ground truth,
    the last one if there are several. mmdet, in RPN and RoI heads.
    """
    found = _overlaps(iou, low)
    return torch.where(found.favourite >= 0, found.favourite, _by_threshold(found, low, high))


def _by_threshold(found: _Overlaps, low: float, high: float) -> Tensor:
    matched = torch.where(found.best >= high, found.truth, IGNORE)
    return torch.where(found.best < low, BACKGROUND, matched)


def _overlaps(iou: Iterable[Tensor], least: float) -> _Overlaps:
    """Over all blocks (..., G, N); only IoUs of at least `least` make a ground truth a favourite."""
    found, start = None, 0
    for block in iou:
        # an image without ground truths: one that overlaps nothing
        rows = block if block.shape[-2] else F.pad(block, (0, 0, 0, 1))
        best, index = rows.max(dim=-2)
        one = _Overlaps(best, index + start, _favourites(rows, start, least))
        found = one if found is None else _larger(found, one)
        start += block.shape[-2]
    assert found is not None, "no block of IoUs"
    return found


def _larger(found: _Overlaps, later: _Overlaps) -> _Overlaps:
    better = later.best > found.best
    return _Overlaps(
        torch.where(better, later.best, found.best),
        torch.where(better, later.truth, found.truth),
        torch.maximum(found.favourite, later.favourite),
    )


def _favourites(iou: Tensor, start: int, least: float) -> Tensor:
    """(..., N) the last ground truth, counted from `start`, that each box overlaps most, with an IoU of at least `least`."""
    if least == math.inf or iou.shape[-1] == 0:
        return torch.full_like(iou[..., 0, :], BACKGROUND, dtype=torch.int64)
    top = iou.amax(dim=-1, keepdim=True)
    kept = (iou == top) & (top > 0) & (iou >= least)
    rows = torch.arange(start, start + iou.shape[-2], device=iou.device)[:, None]
    return rows.where(kept, BACKGROUND).amax(dim=-2)


class Sampled(NamedTuple):
    """Slots of an image, foreground first, then background: indices of the `chosen` boxes (B, S); which slots hold a box of the
    foreground, and of either kind, (B, S) bool. Foreground lies in the first `most` slots.
    """

    chosen: Tensor
    foreground: Tensor
    filled: Tensor
    most: int


@torch.no_grad()
def sample(matched: Tensor, num: int, positive_fraction: float, choose: Choose) -> Sampled:
    """At most num * positive_fraction foreground boxes of matched (B, N), and background boxes up to `num` in all."""
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
    """The indices (B, num) of the candidates with the largest keys (B, N), largest first."""
    return torch.where(candidates, keys, -1.0).topk(num, dim=1).indices


def choose_randomly(candidates: Tensor, num: Tensor) -> Tensor:
    """Random keys: every selection of the candidates is equally likely."""
    return torch.rand(candidates.shape, device=candidates.device)
