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

Choose = Callable[[Tensor, int], Tensor]


@torch.no_grad()
def match(iou: Tensor, low: float, high: float, keep_best: bool) -> Tensor:
    """iou (G, N) -> matched (N,): from `high` the best ground truth, below `low` BACKGROUND, between them IGNORE.

    With `keep_best` every box that is some ground truth's best also learns from the ground truth it overlaps most.
    (A ground truth that no box meets keeps none; in detectron2 it would turn all boxes of IoU 0 into foreground.)
    """
    padded = torch.cat([iou, iou.new_zeros(1, iou.shape[1])])  # so that no ground truth is nothing special
    best, index = padded.max(dim=0)
    matched = torch.where(best >= high, index, IGNORE)
    matched = torch.where(best < low, BACKGROUND, matched)
    if keep_best:
        top = padded.max(dim=1, keepdim=True).values
        is_best = ((padded == top) & (top > 0)).any(dim=0)
        matched = torch.where(is_best, index, matched)
    return matched


@torch.no_grad()
def sample(matched: Tensor, num: int, positive_fraction: float, choose: Choose) -> tuple[Tensor, Tensor]:
    """Indices of at most num * positive_fraction foreground boxes, and of background boxes up to `num` in all."""
    positive = (matched >= 0).nonzero().flatten()
    negative = (matched == BACKGROUND).nonzero().flatten()
    num_positive = min(len(positive), int(num * positive_fraction))
    num_negative = min(len(negative), num - num_positive)
    return choose(positive, num_positive), choose(negative, num_negative)


def choose_randomly(candidates: Tensor, num: int) -> Tensor:
    """`num` of the candidates (M,) in random order."""
    return candidates[torch.randperm(len(candidates), device=candidates.device)[:num]]
