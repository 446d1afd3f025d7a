"""Exact greedy NMS of many groups of boxes at once.

torchvision suppresses one image after the other, each in a single block of threads that walks through all of its
boxes: of a training step of ViT-B at batch 8 that took 31 of 312 ms on an H100. Here one launch compares all pairs of
a group's boxes, 64 to a word of bits, and a second one walks through each group 64 boxes at a time, all groups side by
side. Nothing waits for the GPU, and no number of rounds limits how long a chain of suppressions may be.
The arithmetic is that of torchvision on the CPU, operation by operation (IEEE division, no fused multiply-add, float32
against a float64 threshold), so both paths keep the same boxes.
Letters: G groups, N boxes of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms as torchvision_nms

from vitdet.kernels import enabled

TOGETHER = 46_000  # boxes of a group that are compared, in 256 MB of bits; of more, those of one label at a time


def nms(boxes: Tensor, labels: Tensor | None, iou: float, limit: int) -> Tensor:
    """Which boxes (G, N, 4) are kept: (G, N) bool. Boxes are xyxy float32, each group's in descending order of score.

    A box is suppressed by a kept one before it whose IoU with it is above `iou`; with labels (G, N) int64 only if both
    have the same label. Boxes with x1 <= x0 or y1 <= y0, or with NaN, are never kept. At least the first `limit` kept
    boxes of a group are marked; later ones may be left out. With labels, groups of more than TOGETHER boxes make the host
    wait. Raises ValueError for tensors of other shapes.
    """
    if boxes.dim() != 3 or boxes.shape[2] != 4:
        raise ValueError(f"boxes must be (G, N, 4), got {tuple(boxes.shape)}")
    if labels is not None and labels.shape != boxes.shape[:2]:
        raise ValueError(f"labels must be {tuple(boxes.shape[:2])}, got {tuple(labels.shape)}")
    if boxes.dtype == torch.float32 and enabled(boxes):
        if labels is not None and boxes.shape[1] > TOGETHER:
            return suppress_by_label(boxes, labels, iou, limit)
        return suppress(boxes, labels, iou, limit)
    return reference(boxes, labels, iou)


@torch.library.custom_op("vitdet::nms", mutates_args=())
def suppress(boxes: Tensor, labels: Tensor | None, iou: float, limit: int) -> Tensor:
    """As `nms`, by the Triton kernels."""
    from vitdet.kernels.nms_kernels import launch

    with torch.cuda.device_of(boxes):
        return launch(boxes.contiguous(), labels, iou, limit)


@suppress.register_fake
def _(boxes: Tensor, labels: Tensor | None, iou: float, limit: int) -> Tensor:
    return boxes.new_empty(boxes.shape[:2], dtype=torch.bool)


def suppress_by_label(boxes: Tensor, labels: Tensor, iou: float, limit: int) -> Tensor:
    """As `suppress`, with a group for each label of a group: pairs of other labels take no memory."""
    keep = torch.zeros(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    for group_boxes, group_labels, kept in zip(boxes, labels, keep, strict=True):
        found, order = group_labels.sort(stable=True)
        _, label, counts = found.unique_consecutive(return_inverse=True, return_counts=True)
        place = torch.arange(len(found), device=boxes.device) - (counts.cumsum(0) - counts)[label]
        rows = boxes.new_zeros(len(counts), int(counts.max()), 4)
        rows[label, place] = group_boxes[order]
        kept[order] = suppress(rows, None, iou, limit)[label, place]
    return keep


def reference(boxes: Tensor, labels: Tensor | None, iou: float) -> Tensor:
    """As `nms` without a limit, by torchvision: group after group, and label after label within each."""
    keep = torch.zeros(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    scores = -torch.arange(boxes.shape[1], dtype=boxes.dtype, device=boxes.device)
    usable = (boxes[..., 2:] > boxes[..., :2]).all(dim=2)
    for group, group_boxes in enumerate(boxes):
        chosen = usable[group].nonzero().flatten()
        parts = [chosen]
        # Boxes of one label stay where they are: moved apart by label, as is usual, they would be rounded.
        if labels is not None:
            found, order = labels[group, chosen].sort(stable=True)
            counts = found.unique_consecutive(return_counts=True)[1]
            parts = list(chosen[order].split(counts.tolist()))
        for part in parts:
            kept = torchvision_nms(group_boxes[part], scores[: len(part)], iou)
            keep[group, part[kept]] = True
    return keep
