"""The mask head and its training targets.

He et al. (arXiv:1703.06870); convolutions with LN and one deconvolution, as in Detectron2's ViTDet.
Notation: R RoIs, C channels, P pairs (RoI, edge of its outline), K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitdet.kernels import enabled
from vitdet.kernels.rasterize import rasterize as rasterize_on_gpu
from vitdet.models.layers import ConvNorm, Deconv2x2, init_conv, init_predictor
from vitdet.types import Polygons

BINS = 14
SIZE = 2 * BINS
PAIRS = 2**16  # maximum number of (RoI, edge) pairs per iteration (takes 150 MB)


class MaskHead(nn.Module):
    """Mask logits per RoI and class, with an independent binary classification of each cell."""

    def __init__(
        self, *, channels: int, num_convs: int, num_classes: int, norm: bool, eps: float
    ) -> None:
        super().__init__()
        blocks = [ConvNorm(channels, channels, 3, norm=norm, eps=eps) for _ in range(num_convs)]
        self.convs = nn.ModuleList(blocks)
        self.deconv = Deconv2x2(channels, channels)
        self.logits = nn.Conv2d(channels, num_classes, 1)
        for block in blocks:
            init_conv(block.conv)
        init_conv(self.deconv)
        init_predictor(self.logits, std=0.001)

    def forward(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """Return the logits (R, 28, 28) of labels (R,) in 0..K-1, given features (R, C, 14, 14)."""
        for block in self.convs:
            pooled = F.relu(block(pooled))
        pixels = F.relu(self.deconv(pooled)).permute(0, 2, 3, 1)
        # compute only the mask of each RoI's class, not all K masks
        weight = self.logits.weight.flatten(1).index_select(0, labels)
        logits = torch.bmm(pixels.flatten(1, 2), weight[:, :, None].to(pixels.dtype))
        bias = self.logits.get_parameter("bias").index_select(0, labels)
        return logits.view(pixels.shape[:3]) + bias[:, None, None]


@torch.no_grad()
def mask_targets(masks: Polygons, boxes: Tensor) -> Tensor:
    """Return the training targets (R, 28, 28) bool of R masks in boxes (R, 4)."""
    if enabled(boxes):
        return rasterize_on_gpu(masks.edges, masks.spans, boxes, SIZE)
    return rasterize(masks, boxes, SIZE)


def rasterize(masks: Polygons, boxes: Tensor, size: int) -> Tensor:
    """Return which cells (R, size, size) of boxes (R, 4) have their center inside the mask.

    A cell is inside if its winding number is not 0. The winding number is the sum of the directions
    (down 1, up -1) of the edges that cross the cell's row to the left of its center.
    """
    first, last = masks.spans.unbind(1)
    ends = (last - first).cumsum(0)
    pairs = int(ends[-1]) if len(ends) else 0
    steps = masks.edges.new_zeros(len(boxes), size, size + 1)
    for start in range(0, pairs, PAIRS):
        pair = torch.arange(start, min(start + PAIRS, pairs), device=boxes.device)
        roi = torch.searchsorted(ends, pair, right=True)
        _add_steps(steps, masks.edges[last[roi] - ends[roi] + pair], boxes, roi)
    return steps[..., :size].cumsum(dim=2).round() != 0


def _add_steps(steps: Tensor, edges: Tensor, boxes: Tensor, roi: Tensor) -> None:
    """Add the directions of edges (P, 4) to steps (R, size, size + 1); roi (P,): RoI per edge."""
    size = steps.shape[1]
    low = boxes[:, :2]
    # as in Detectron2, a box side is at least 0.1 pixels
    span, low = (boxes[:, 2:] - low).clamp(min=0.1)[roi], low[roi]
    start, end = (edges[:, :2] - low) / span * size, (edges[:, 2:] - low) / span * size
    rows = torch.arange(size, device=edges.device, dtype=edges.dtype) + 0.5
    # (P, 1) each
    (x0, y0), (x1, y1) = start[:, None].unbind(-1), end[:, None].unbind(-1)
    down, up = (y0 <= rows) & (y1 > rows), (y1 <= rows) & (y0 > rows)
    # (P, size): 1 or -1 where the edge crosses the row, else 0
    direction = down.to(edges.dtype) - up.to(edges.dtype)
    crossing = x0 + (rows - y0) * (x1 - x0) / torch.where(y1 == y0, torch.ones_like(y0), y1 - y0)
    column = (crossing - 0.5).ceil().clamp(0, size).long()
    line = roi[:, None] * size + torch.arange(size, device=roi.device)
    index = line * (size + 1) + column
    steps.view(-1).scatter_add_(0, index.flatten(), direction.flatten())
