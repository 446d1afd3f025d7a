"""ReLUs whose input is 0 within the noise: rounding decides whether their gradient is 0 or 1.

A network of this size has about 10^6 ReLU inputs of magnitude 1, so on some processors one of them has
different signs in float32 and float64; that single unit moves gradient norms by 2e-3, twice the
tolerance. Therefore an input within TIE of 0 in both runs has the float32 gradient of the sign that it
has in float64. The ReLU's output does not change. The float64 gradients are compared with the
reference's float64 gradients at 1e-4, without this rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

TIE = 1e-4  # the tolerance of features

Sides = list[tuple[Tensor, Tensor]]  # per ReLU in order: input > 0, input within TIE of 0


@contextmanager
def recorded() -> Iterator[Sides]:
    """Record the signs of all ReLU inputs within the context."""
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
    """Break the ties of ReLUs within the context as recorded; yield the number of changes per ReLU.

    A ReLU with another shape than the recorded one has other boxes, so it is not changed.
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
