"""Exact greedy NMS for many groups of boxes at once, without synchronizing with the host.

torchvision processes one image after the other and selects the kept boxes in a single thread block,
which took 31 of the 312 ms of a ViT-B training step (batch size 8, H100). The kernels repeat the
arithmetic of torchvision's CPU version, operation by operation (IEEE division, no fused
multiply-add, float32 compared with a float64 threshold), so that the kept boxes are the same.

Notation: G groups, N boxes of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms as torchvision_nms

from vitdet.kernels import enabled

TOGETHER = 46_000  # number of boxes (265 MB of bits) above which a group is split by label


def nms(boxes: Tensor, labels: Tensor | None, iou: float, limit: int) -> Tensor:
    """Return which boxes (G, N, 4) are kept: (G, N) bool.

    A box is suppressed by an earlier kept box if their IoU is above `iou` and, with labels, their
    labels are equal. Boxes with x1 <= x0 or y1 <= y0, or with NaN, are never kept.

    Args:
        boxes: (G, N, 4) xyxy float32, in descending order of score within each group.
        labels: (G, N) int64, or None. With labels, groups of more than TOGETHER boxes require a
            synchronization.
        iou: threshold of the IoU.
        limit: only the first `limit` kept boxes of each group are certain to be marked as kept.
    """
    if boxes.dtype != torch.float32 or not enabled(boxes):
        return reference(boxes, labels, iou)
    if labels is not None and boxes.shape[1] > TOGETHER:
        return suppress_by_label(boxes, labels, iou, limit)
    return suppress(boxes, labels, iou, limit)


@torch.library.custom_op("vitdet::nms", mutates_args=())
def suppress(boxes: Tensor, labels: Tensor | None, iou: float, limit: int) -> Tensor:
    """Run `nms` with the Triton kernels."""
    from vitdet.kernels.nms_kernels import launch

    with torch.cuda.device_of(boxes):
        return launch(boxes.contiguous(), labels, iou, limit)


@suppress.register_fake
def _(boxes: Tensor, labels: Tensor | None, iou: float, limit: int) -> Tensor:
    return boxes.new_empty(boxes.shape[:2], dtype=torch.bool)


def suppress_by_label(boxes: Tensor, labels: Tensor, iou: float, limit: int) -> Tensor:
    """Run `suppress` with one group per label, so that only boxes of equal labels are compared."""
    keep = torch.zeros(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    for group_boxes, group_labels, kept in zip(boxes, labels, keep, strict=True):
        found, order = group_labels.sort(stable=True)
        _, label, counts = found.unique_consecutive(return_inverse=True, return_counts=True)
        index = torch.arange(len(found), device=boxes.device) - (counts.cumsum(0) - counts)[label]
        rows = boxes.new_zeros(len(counts), int(counts.max()), 4)
        rows[label, index] = group_boxes[order]
        kept[order] = suppress(rows, None, iou, limit)[label, index]
    return keep


def reference(boxes: Tensor, labels: Tensor | None, iou: float) -> Tensor:
    """Run `nms` with torchvision, separately for each group and label, without a limit."""
    keep = torch.zeros(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    scores = -torch.arange(boxes.shape[1], dtype=boxes.dtype, device=boxes.device)
    usable = (boxes[..., 2:] > boxes[..., :2]).all(dim=2)
    for group, group_boxes in enumerate(boxes):
        chosen = usable[group].nonzero().flatten()
        parts = [chosen]
        # split by label, as offsetting the boxes by label would round their coordinates
        if labels is not None:
            found, order = labels[group, chosen].sort(stable=True)
            counts = found.unique_consecutive(return_counts=True)[1]
            parts = list(chosen[order].split(counts.tolist()))
        for part in parts:
            kept = torchvision_nms(group_boxes[part], scores[: len(part)], iou)
            keep[group, part[kept]] = True
    return keep
