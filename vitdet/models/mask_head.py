"""The mask head and its training targets.

He et al. (1703.06870); 4 convolutions with LN and one deconvolution, as in detectron2's ViTDet configs.
Letters: R RoIs, G ground truths, E edges, K classes, s x s cells of a mask (28).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitdet.models.layers import ConvNorm, Deconv2x2, init_conv, init_predictor
from vitdet.types import Polygons

BINS = 14
SIZE = 2 * BINS


class MaskHead(nn.Module):
    """One mask per RoI and class, each an independent binary problem."""

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
        """Pooled features (R, C, 14, 14) and labels (R,) in 0..K-1 -> logits (R, 28, 28) of each RoI's own class."""
        for block in self.convs:
            pooled = F.relu(block(pooled))
        logits = self.logits(F.relu(self.deconv(pooled)))
        return logits[torch.arange(len(labels), device=labels.device), labels]


@torch.no_grad()
def mask_targets(masks: Polygons, boxes: Tensor) -> Tensor:
    """The target of the mask head: R masks, each inside its box of (R, 4) -> (R, 28, 28) bool."""
    return rasterize(masks.edges, boxes, SIZE)


def rasterize(edges: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Edges (R, E, 4) of outlines and boxes (R, 4) -> (R, size, size) bool: which cells' centres lie inside.

    A cell is inside where the winding number is not zero: where the edges that cross its row on its left do not
    cancel. Each edge adds its direction at the first cell right of its crossing, and a running sum spreads it.
    """
    low = boxes[:, None, :2]
    # detectron2: a box is at least a tenth of a pixel wide
    span = (boxes[:, None, 2:] - low).clamp(min=0.1)
    start, end = (edges[..., :2] - low) / span * size, (edges[..., 2:] - low) / span * size
    rows = torch.arange(size, device=edges.device, dtype=edges.dtype) + 0.5
    # each (R, E, 1)
    (x0, y0), (x1, y1) = (start.unsqueeze(2).unbind(-1), end.unsqueeze(2).unbind(-1))
    down, up = (y0 <= rows) & (y1 > rows), (y1 <= rows) & (y0 > rows)
    # (R, E, size): 0 where the edge misses the row
    direction = down.to(edges.dtype) - up.to(edges.dtype)
    crossing = x0 + (rows - y0) * (x1 - x0) / torch.where(y1 == y0, torch.ones_like(y0), y1 - y0)
    column = (crossing - 0.5).ceil().clamp(0, size).long()
    steps = edges.new_zeros(len(edges), size, size + 1)
    steps.scatter_add_(2, column.transpose(1, 2), direction.transpose(1, 2))
    return steps[..., :size].cumsum(dim=2).round() != 0
