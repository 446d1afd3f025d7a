"""Box head of one stage: pooled features -> class logits and box deltas.

Detectron2's ViTDet configs use 4 convolutions with LN and one fully connected layer.
Notation: R RoIs, C channels, K classes.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from vitdet.models.layers import ConvNorm, init_conv, init_linear, init_predictor

BINS = 7


class BoxHead(nn.Module):
    """Logits over K classes and the background (last); box deltas per class, or class-agnostic."""

    def __init__(
        self,
        *,
        channels: int,
        num_convs: int,
        num_fcs: int,
        fc_dim: int,
        num_classes: int,
        class_agnostic: bool,
        norm: bool,
        eps: float,
    ) -> None:
        super().__init__()
        convs = [ConvNorm(channels, channels, 3, norm=norm, eps=eps) for _ in range(num_convs)]
        widths = [channels * BINS**2, *[fc_dim] * num_fcs]
        fcs = [nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths)]
        self.convs, self.fcs = nn.ModuleList(convs), nn.ModuleList(fcs)
        self.logits = nn.Linear(fc_dim, num_classes + 1)
        self.deltas = nn.Linear(fc_dim, 4 if class_agnostic else 4 * num_classes)
        for block in convs:
            init_conv(block.conv)
        for fc in fcs:
            init_linear(fc)
        init_predictor(self.logits, std=0.01)
        init_predictor(self.deltas, std=0.001)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Map (R, C, 7, 7) to logits (R, K + 1) and deltas (R, K, 4) or (R, 1, 4)."""
        for block in self.convs:
            pooled = F.relu(block(pooled))
        hidden = pooled.flatten(1)
        for fc in self.fcs:
            hidden = F.relu(fc(hidden))
        return self.logits(hidden), self.deltas(hidden).unflatten(1, (-1, 4))
