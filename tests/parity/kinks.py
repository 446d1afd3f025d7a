"""ReLUs whose input is 0 within the noise: their gradient is 0 or 1, and rounding decides which.

A network of this size has about 10^6 ReLU inputs of magnitude 1, so on some processors one of them
changes its sign between float32 and float64; that single unit moves gradient norms by 2e-3, twice the
tolerance. The rule: an input within TIE of 0 in both runs takes the side that it has in float64. The
values that the ReLU returns stay its own; only the gradient is decided. The float64 gradients are
compared with the reference's own float64 gradients at 1e-4, without this rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

TIE = 1e-4  # as the tolerance of features

Sides = list[tuple[Tensor, Tensor]]  # of every ReLU in order: input > 0, input within TIE of 0


@contextmanager
def recorded() -> Iterator[Sides]:
    """Collects the sides of all ReLUs that run meanwhile."""
    sides: Sides = []
    plain = F.relu

    def relu(x: Tensor, inplace: bool = False) -> Tensor:
        values = x.detach()
        sides.append((values > 0, values.abs() <= TIE))
        return plain(x)

    F.relu = relu
    try:
        yield sides
    finally:
        F.relu = plain


@contextmanager
def replayed(sides: Sides) -> Iterator[list[int]]:
    """Lets the ReLUs that run meanwhile break ties as recorded; collects how many each one changed.

    A ReLU of another shape than the recorded one is left alone, as it sees other boxes.
    """
    changed: list[int] = []
    waiting = list(sides)
    plain = F.relu

    def relu(x: Tensor, inplace: bool = False) -> Tensor:
        values = x.detach()
        positive, tied = waiting.pop(0) if waiting else (values > 0, values > 0)
        if positive.shape != x.shape:
            return plain(x)
        tied = tied & (values.abs() <= TIE)
        changed.append(int((tied & (positive != (values > 0))).sum()))
        kept = torch.where(torch.where(tied, positive, values > 0), x, 0)
        return kept + (plain(values) - kept.detach())

    F.relu = relu
    try:
        yield changed
    finally:
        F.relu = plain
