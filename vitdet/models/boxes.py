"""Box arithmetic: pure functions of boxes (..., 4) xyxy in float pixels, half-open.

The transform is that of R-CNN (1311.2524), with the clamps of detectron2 and mmdet. Its weights are numbers, not a
tensor, whose way to a GPU would make every step wait.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000 / 16)  # a side grows at most so much in one step
PAIRS = 2**22  # of boxes that are compared at a time: 130 MB

Weights = tuple[float, float, float, float]


def encode(boxes: Tensor, targets: Tensor, weights: Weights) -> Tensor:
    """Deltas (N, 4) that turn boxes into targets: centre shifts in box sides, logs of side ratios, times weights."""
    size, target_size = boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]
    centre, target_centre = boxes[:, :2] + 0.5 * size, targets[:, :2] + 0.5 * target_size
    deltas = torch.cat([(target_centre - centre) / size, torch.log(target_size / size)], dim=1)
    return torch.stack(
        [one * weight for one, weight in zip(deltas.unbind(1), weights, strict=True)], dim=1
    )


def decode(boxes: Tensor, deltas: Tensor, weights: Weights, min_log_scale: float) -> Tensor:
    """The inverse of `encode`, in float32: boxes (N, 4) and deltas (N, ..., 4) -> (N, ..., 4).

    A side's logarithm changes at most by MAX_LOG_SCALE and at least by `min_log_scale`.
    """
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    columns = deltas.to(boxes.dtype).unbind(-1)
    deltas = torch.stack(
        [one / weight for one, weight in zip(columns, weights, strict=True)], dim=-1
    )
    boxes = boxes.reshape(len(boxes), *[1] * (deltas.dim() - 2), 4)
    size = boxes[..., 2:] - boxes[..., :2]
    centre = boxes[..., :2] + 0.5 * size
    new_centre = deltas[..., :2] * size + centre
    new_size = torch.exp(deltas[..., 2:].clamp(min_log_scale, MAX_LOG_SCALE)) * size
    return torch.cat([new_centre - 0.5 * new_size, new_centre + 0.5 * new_size], dim=-1)


def clip(boxes: Tensor, size: Tensor) -> Tensor:
    """Boxes (..., 4) cut to an image of size (height, width)."""
    limit = size.to(boxes.dtype).flip(0).repeat(2)
    return torch.minimum(boxes.clamp(min=0), limit)


def nonempty(boxes: Tensor) -> Tensor:
    """(N,) bool: which boxes (N, 4) have width and height above 0."""
    return (boxes[:, 2:] > boxes[:, :2]).all(dim=1)


def area(boxes: Tensor) -> Tensor:
    """(N,) areas of boxes (N, 4)."""
    return (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)


def pairwise_iou(first: Tensor, second: Tensor) -> Tensor:
    """(G, N) intersection over union of boxes (G, 4) and (N, 4); 0 where they do not meet."""
    low = torch.maximum(first[:, None, :2], second[None, :, :2])
    high = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    intersection = (high - low).clamp(min=0).prod(dim=2)
    union = area(first)[:, None] + area(second)[None, :] - intersection
    return torch.where(intersection > 0, intersection / union, torch.zeros_like(intersection))


def iou_blocks(first: Tensor, second: Tensor) -> Iterator[Tensor]:
    """The rows of `pairwise_iou` in order, at least one block of them, each of PAIRS pairs at most (or of one row)."""
    for rows in first.split(max(1, PAIRS // max(len(second), 1))):
        yield pairwise_iou(rows, second)
