"""Arithmetic on half-open boxes (..., 4), xyxy in float pixels.

The box transform is that of R-CNN (arXiv:1311.2524), with the clamps of Detectron2 and mmdet. The
weights of the transform are numbers, not a tensor, to avoid a copy to the GPU in every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000 / 16)  # `decode` enlarges a side by a factor of at most 62.5
PAIRS = 2**22  # maximum number of box pairs per block of IoUs (takes 130 MB)


def encode(boxes: Tensor, targets: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the deltas (..., 4) that transform boxes to targets.

    Deltas are center offset / box side, and log(target side / box side), times `weights`.
    """
    size, target_size = boxes[..., 2:] - boxes[..., :2], targets[..., 2:] - targets[..., :2]
    center, target_center = boxes[..., :2] + 0.5 * size, targets[..., :2] + 0.5 * target_size
    deltas = torch.cat([(target_center - center) / size, torch.log(target_size / size)], dim=-1)
    columns = zip(deltas.unbind(-1), weights, strict=True)
    return torch.stack([column * weight for column, weight in columns], dim=-1)


def decode(boxes: Tensor, deltas: Tensor, weights: Sequence[float], min_log_scale: float) -> Tensor:
    """Invert `encode`: apply deltas (..., 4) or (..., K, 4) to boxes (..., 4) in at least float32.

    log(target side / box side) is clamped to min_log_scale..MAX_LOG_SCALE.
    """
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    columns = zip(deltas.to(boxes.dtype).unbind(-1), weights, strict=True)
    deltas = torch.stack([column / weight for column, weight in columns], dim=-1)
    if deltas.dim() > boxes.dim():
        boxes = boxes.unsqueeze(-2)
    size = boxes[..., 2:] - boxes[..., :2]
    center = deltas[..., :2] * size + (boxes[..., :2] + 0.5 * size)
    half = 0.5 * (torch.exp(deltas[..., 2:].clamp(min_log_scale, MAX_LOG_SCALE)) * size)
    return torch.cat([center - half, center + half], dim=-1)


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip boxes (B, ..., 4) to images of the given sizes (B, 2), which are (height, width)."""
    limit = sizes.to(boxes.dtype).flip(-1).repeat(1, 2)
    return torch.minimum(boxes.clamp(min=0), limit.view(-1, *[1] * (boxes.dim() - 2), 4))


def nonempty(boxes: Tensor) -> Tensor:
    """Return whether boxes (..., 4) have a positive width and height: (...) bool."""
    return (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)


def area(boxes: Tensor) -> Tensor:
    """Return the areas (...) of boxes (..., 4)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_iou(first: Tensor, second: Tensor) -> Tensor:
    """Return the IoU (..., G, N) of boxes (..., G, 4) and (..., N, 4); 0 if they do not overlap."""
    x0, y0, x1, y1 = first.unsqueeze(-2).unbind(-1)
    u0, v0, u1, v1 = second.unsqueeze(-3).unbind(-1)
    width = (torch.minimum(x1, u1) - torch.maximum(x0, u0)).clamp(min=0)
    height = (torch.minimum(y1, v1) - torch.maximum(y0, v0)).clamp(min=0)
    intersection = width * height
    union = area(first).unsqueeze(-1) + area(second).unsqueeze(-2) - intersection
    return torch.where(intersection > 0, intersection / union, torch.zeros_like(intersection))


def iou_blocks(first: Tensor, second: Tensor) -> Iterator[Tensor]:
    """Yield `pairwise_iou` in blocks of rows: at most PAIRS pairs, but at least one row each."""
    images = first.shape[:-2].numel()
    for rows in first.split(max(1, PAIRS // max(images * second.shape[-2], 1)), dim=-2):
        yield pairwise_iou(rows, second)


def pick(rows: Tensor, index: Tensor) -> Tensor:
    """Gather the rows (B, S, ...) with the indices (B, S) from a tensor (B, N, ...)."""
    index = index.view(*index.shape, *[1] * (rows.dim() - 2))
    return rows.gather(1, index.expand(-1, -1, *rows.shape[2:]))


def largest(scores: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Return the `num` largest of scores (B, N), sorted, and their indices, (B, num) each.

    Equal scores are ordered by index. Ties for the last place are broken arbitrarily.
    """
    index = scores.topk(num, dim=1, sorted=False).indices.sort(dim=1).values
    best, order = scores.gather(1, index).sort(dim=1, descending=True, stable=True)
    return best, index.gather(1, order)
