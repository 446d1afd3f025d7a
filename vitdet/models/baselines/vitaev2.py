"""ViTAEv2, a hierarchical backbone: four stages of a reduction cell and normal cells.

Zhang et al., ViTAEv2 (arXiv:2202.10108); hyperparameters as in ViTAE-Transformer/ViTAE-Transformer
(Object-Detection). The first two stages use window attention without shifts or relative positions;
the last two use global attention. In each cell, convolutions run in parallel with the attention.
Notation: B images, C channels, H x W tokens, E output channels of a cell, s index of a stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from vitdet.models.attention import attend, join_heads, join_windows, split_heads, split_windows
from vitdet.models.layers import NORM_EPS, Blocks, DropPath, LayerNorm
from vitdet.models.vit import init_linears
from vitdet.models.vitae import CELL_NORM_EPS, conv, dilated_convs


class Size(NamedTuple):
    """Constructor arguments of a named backbone, with one entry per stage."""

    widths: tuple[int, ...]  # channels of each dilated convolution
    dims: tuple[int, ...]  # output channels
    depths: tuple[int, ...]  # number of normal cells
    reduction_heads: tuple[int, ...]  # attention heads of the reduction cell
    heads: tuple[int, ...]  # attention heads of the normal cells
    reduction_groups: tuple[int, ...]  # groups of the reduction cell's parallel convolutions
    groups: tuple[int, ...]  # groups of the normal cells' parallel convolutions


SIZES = {
    "vitaev2_s": Size(
        (64, 64, 128, 256),
        (64, 128, 256, 512),
        (2, 2, 8, 2),
        (1, 1, 2, 4),
        (1, 2, 4, 8),
        (1, 16, 32, 64),
        (1, 32, 64, 128),
    )
}
KERNELS, STRIDES = (7, 3, 3, 3), (4, 2, 2, 2)
DILATIONS = ((1, 2, 3, 4), (1, 2, 3), (1, 2), (1, 2))
WINDOWED = (True, True, False, False)


def branch(
    channels: Sequence[int], groups: int, strides: Sequence[int] = (1, 1, 1)
) -> nn.Sequential:
    """Create three convolutions; `channels` lists the channels of the input and of each output."""
    return nn.Sequential(
        conv(channels[0], channels[1], strides[0], groups),
        nn.BatchNorm2d(channels[1]),
        nn.SiLU(),
        conv(channels[1], channels[2], strides[1], groups),
        nn.BatchNorm2d(channels[2]),
        nn.SiLU(),
        conv(channels[2], channels[3], strides[2], groups),
    )


class Attention(nn.Module):
    """Attention without positions, in windows of side `window` (0: over all tokens).

    E may differ from C. With `keep_values`, the values are added to the result.
    """

    def __init__(
        self, *, inputs: int, dim: int, heads: int, window: int, bias: bool, keep_values: bool
    ) -> None:
        super().__init__()
        self.heads, self.window, self.keep_values = heads, window, keep_values
        self.qkv = nn.Linear(inputs, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, E)."""
        if self.window == 0:
            return self.mix(x)
        (height, width), size = x.shape[1:3], self.window
        # zero padding on all sides takes part in the attention
        top, left = (-height % size // 2, -width % size // 2)
        x = F.pad(x, (0, 0, left, -width % size - left, top, -height % size - top))
        x = join_windows(self.mix(split_windows(x, size)), (x.shape[1], x.shape[2]))
        return x[:, top : top + height, left : left + width]

    def mix(self, x: Tensor) -> Tensor:
        """Attend over all tokens of a map or window."""
        q, k, v = split_heads(self.qkv(x), self.heads)
        y = attend(q * q.shape[-1] ** -0.5, k, v)
        y, v = (join_heads(tokens, x.shape[1]) for tokens in (y, v))
        return self.proj(y) + v if self.keep_values else self.proj(y)


class ReductionCell(nn.Module):
    """Dilated convolutions, then attention, in parallel with convolutions of the cell's input.

    Maps (B, C, H, W) to (B, H / stride, W / stride, E).
    """

    def __init__(
        self,
        *,
        inputs: int,
        width: int,
        dim: int,
        kernel: int,
        stride: int,
        dilations: Sequence[int],
        heads: int,
        groups: int,
        window: int,
    ) -> None:
        super().__init__()
        self.prm = dilated_convs(inputs, width, kernel, stride, dilations)
        self.pcm = branch((inputs, width, width, dim), groups, (2, stride // 2, 1))
        channels = width * len(dilations)
        self.norm1 = LayerNorm(channels, eps=CELL_NORM_EPS)
        kind = {"bias": window > 0, "keep_values": window == 0}
        self.attn = Attention(inputs=channels, dim=dim, heads=heads, window=window, **kind)
        self.norm2 = LayerNorm(dim, eps=CELL_NORM_EPS)
        self.mlp = Mlp(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.cat([F.gelu(dilated(x)) for dilated in self.prm], dim=1)
        y = self.attn(self.norm1(maps.permute(0, 2, 3, 1))) + self.pcm(x).permute(0, 2, 3, 1)
        return y + self.mlp(self.norm2(y))


class NormalCell(nn.Module):
    """Pre-norm transformer block with convolutions parallel to the attention."""

    def __init__(self, *, dim: int, heads: int, groups: int, window: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=NORM_EPS)
        kind = {"bias": True, "keep_values": False}
        self.attn = Attention(inputs=dim, dim=dim, heads=heads, window=window, **kind)
        self.pcm = branch((dim, 4 * dim, dim, dim), groups)
        self.norm2 = LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        mixed = self.pcm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x))) + self.drop_path(mixed)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """A reduction cell, then normal cells: (B, C, H, W) -> (B, E, H / stride, W / stride)."""

    def __init__(self, reduction: ReductionCell, cells: Sequence[NormalCell]) -> None:
        super().__init__()
        self.reduction = reduction
        self.cells = Blocks(cells)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(self.reduction(x)).permute(0, 3, 1, 2)


class ViTAEv2(nn.Module):
    """ViTAEv2: images (B, 3, H, W) -> four maps of strides 4, 8, 16, 32, without a final norm.

    H and W must be multiples of 32. For `drop_path`, see `largest` in `drop_rates`.
    """

    def __init__(
        self,
        *,
        widths: Sequence[int],
        dims: Sequence[int],
        depths: Sequence[int],
        reduction_heads: Sequence[int],
        heads: Sequence[int],
        reduction_groups: Sequence[int],
        groups: Sequence[int],
        window_size: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.out_channels = tuple(dims)
        self.strides = tuple(math.prod(STRIDES[: s + 1]) for s in range(len(dims)))
        self.num_layers = 0  # no layer-wise learning-rate decay, see `layer_of`
        self.stages = nn.ModuleList()
        for s, rates in enumerate(drop_rates(depths, drop_path)):
            shared = {"dim": dims[s], "window": window_size if WINDOWED[s] else 0}
            reduction = ReductionCell(
                inputs=dims[s - 1] if s else 3,
                width=widths[s],
                kernel=KERNELS[s],
                stride=STRIDES[s],
                dilations=DILATIONS[s],
                heads=reduction_heads[s],
                groups=reduction_groups[s],
                **shared,
            )
            cells = [
                NormalCell(heads=heads[s], groups=groups[s], drop_path=rate, **shared)
                for rate in rates
            ]
            self.stages.append(Stage(reduction, cells))
        init_linears(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) to one map (B, C, ., .) per stage, finest first."""
        x, maps = images, []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def layer_of(self, name: str) -> int:
        """Return the last layer for every parameter: no layer-wise learning-rate decay."""
        return self.num_layers + 1


def drop_rates(depths: Sequence[int], largest: float) -> list[list[float]]:
    """Return each stage's drop path rates, one per normal cell, as in the published run.

    The sum(depths) rates increase in equal steps from 0 to `largest`. Stage s > 0 starts at the
    rate with index depths[s - 1], not at the sum of all previous depths. With depths (2, 2, 8, 2),
    the last stage has the rates with indices 8 and 9, and no cell has the rate `largest`.
    """
    rates = torch.linspace(0, largest, sum(depths), device="cpu").tolist()
    starts = [0, *depths[:-1]]
    return [rates[start : start + depth] for start, depth in zip(starts, depths, strict=True)]
