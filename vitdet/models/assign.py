"""Who learns from which ground truth: match boxes by IoU, then sample a fixed number of them.

`matched` (N,) holds for every box the index of its ground truth, or BACKGROUND or IGNORE. Those are -1 and -2, so a
table of ground truths with two rows appended is indexed by `matched` as it is.
Letters: G ground truths, N boxes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

BACKGROUND, IGNORE = -1, -2

Match = Callable[[Iterable[Tensor], float, float], Tensor]
Choose = Callable[[Tensor, int], Tensor]


class _Overlaps(NamedTuple):
    """What `match` and its like need of the IoUs, (N,) each.

    best: the largest IoU of each box. truth: the first ground truth that has it. favourite: the last ground truth that
    the box overlaps most, all boxes that share the largest IoU of a ground truth among them; below 0 for none.
    """

    best: Tensor
    truth: Tensor
    favourite: Tensor


@torch.no_grad()
def match(iou: Iterable[Tensor], low: float, high: float) -> Tensor:
    """iou (G, N) -> matched (N,): from `high` the best ground truth, below `low` BACKGROUND, between them IGNORE.

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
    """Over all blocks (G, N); only IoUs of at least `least` make a ground truth a favourite."""
    found, start = None, 0
    for block in iou:
        # an image without ground truths: one that overlaps nothing
        rows = block if len(block) else block.new_zeros(1, block.shape[1])
        best, index = rows.max(dim=0)
        one = _Overlaps(best, index + start, _favourites(rows, start, least))
        found = one if found is None else _larger(found, one)
        start += len(block)
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
    """(N,) the last ground truth, counted from `start`, that each box overlaps most, with an IoU of at least `least`."""
    none = torch.full((iou.shape[1],), BACKGROUND, device=iou.device)
    if least == math.inf or iou.shape[1] == 0:
        return none
    top = iou.amax(dim=1, keepdim=True)
    kept = (iou == top) & (top > 0) & (iou >= least)
    rows = torch.arange(start, start + len(iou), device=iou.device)[:, None]
    return rows.where(kept, BACKGROUND).amax(dim=0)


@torch.no_grad()
def sample(
    matched: Tensor, num: int, positive_fraction: float, choose: Choose
) -> tuple[Tensor, Tensor]:
    """Indices of at most num * positive_fraction foreground boxes, and of background boxes up to `num` in all."""
    positive = (matched >= 0).nonzero().flatten()
    negative = (matched == BACKGROUND).nonzero().flatten()
    num_positive = min(len(positive), int(num * positive_fraction))
    num_negative = min(len(negative), num - num_positive)
    return choose(positive, num_positive), choose(negative, num_negative)


def choose_randomly(candidates: Tensor, num: int) -> Tensor:
    """`num` of the candidates (M,) in random order."""
    return candidates[torch.randperm(len(candidates), device=candidates.device)[:num]]
