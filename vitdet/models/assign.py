"""Who learns from which ground truth: match boxes by IoU, then sample a fixed number of them.

`matched` (N,) holds for every box the index of its ground truth, or BACKGROUND or IGNORE. Those are -1 and -2, so a
table of ground truths with two rows appended is indexed by `matched` as it is.
Letters: G ground truths, N boxes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BACKGROUND, IGNORE = -1, -2

Match = Callable[[Tensor, float, float], Tensor]
Choose = Callable[[Tensor, int], Tensor]


@torch.no_grad()
def match(iou: Tensor, low: float, high: float) -> Tensor:
    """iou (G, N) -> matched (N,): from `high` the best ground truth, below `low` BACKGROUND, between them IGNORE."""
    best, index = _with_none(iou).max(dim=0)
    matched = torch.where(best >= high, index, IGNORE)
    return torch.where(best < low, BACKGROUND, matched)


@torch.no_grad()
def match_keeping_own(iou: Tensor, low: float, high: float) -> Tensor:
    """As `match`, but every box that is some ground truth's best learns from the ground truth it overlaps most itself.

    Detectron2's RPN. (A ground truth that no box meets keeps none; there it would turn all boxes of IoU 0 into
    foreground.)
    """
    padded = _with_none(iou)
    return torch.where(
        _is_best(padded).any(dim=0), padded.max(dim=0).indices, match(iou, low, high)
    )


@torch.no_grad()
def match_keeping_best(iou: Tensor, low: float, high: float) -> Tensor:
    """As `match`, but every box that is some ground truth's best, with at least `low`, learns from that ground truth,
    the last one if there are several. mmdet, in RPN and RoI heads.
    """
    padded = _with_none(iou)
    kept = _is_best(padded) & (padded >= low)
    last = torch.arange(len(padded), device=iou.device)[:, None].where(kept, BACKGROUND).amax(dim=0)
    return torch.where(last >= 0, last, match(iou, low, high))


def _with_none(iou: Tensor) -> Tensor:
    """(G + 1, N): with a ground truth that overlaps nothing, so that an image without any is nothing special."""
    return torch.cat([iou, iou.new_zeros(1, iou.shape[1])])


def _is_best(iou: Tensor) -> Tensor:
    """(G, N) bool: which boxes overlap the ground truth most, all that share its largest IoU."""
    if iou.shape[1] == 0:
        return iou > 0
    top = iou.amax(dim=1, keepdim=True)
    return (iou == top) & (top > 0)


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
