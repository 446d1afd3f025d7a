"""Feature pyramid network.

Lin et al. (arXiv:1612.03144); layers and initialization as in mmdet's FPN: no norm, no
activation, nearest-neighbor upsampling; the fifth level is the fourth level, subsampled by 2.
Notation: B images, C channels of a backbone's map, D channels of the pyramid.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class FPN(nn.Module):
    """Four maps (B, C_i, h_i, w_i) of the given strides -> p2..p5, and p6 at half the scale of p5.

    `self.strides` are the strides of the five levels: 4..64 for maps of strides 4, 8, 16, 32.
    """

    def __init__(
        self, *, in_channels: Sequence[int], out_channels: int, strides: Sequence[int]
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.strides = [*strides, 2 * strides[-1]]
        lateral = [nn.Conv2d(channels, out_channels, 1) for channels in in_channels]
        output = [nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in in_channels]
        self.lateral, self.output = nn.ModuleList(lateral), nn.ModuleList(output)
        for conv in [*self.lateral, *self.output]:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map backbone maps (B, C_i, ., .) to levels (B, D, ., .), both finest first."""
        inner = [conv(x) for conv, x in zip(self.lateral, maps, strict=True)]
        for i in reversed(range(len(inner) - 1)):
            size = inner[i].shape[2:]
            inner[i] = inner[i] + F.interpolate(inner[i + 1], size=size, mode="nearest")
        levels = [conv(x) for conv, x in zip(self.output, inner, strict=True)]
        return [*levels, levels[-1][:, :, ::2, ::2]]
