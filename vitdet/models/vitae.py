"""ViTAE as a detection backbone: a plain ViT with convolutions parallel to its attention.

Xu et al., ViTAE (arXiv:2106.03348), Zhang et al., ViTAEv2 (arXiv:2202.10108); hyperparameters as in
ViTAE-Transformer/ViTDet. ViTAE-B is a `ViT` with `wide_branch` in each block. ViTAE-S,
`ViTAESmall`, computes its tokens in three reduction cells of dilated convolutions, two of them with
linear attention (Performer: Choromanski et al., arXiv:2009.14794, as in T2T-ViT: Yuan et al.,
arXiv:2101.11986), and has no absolute positions.
Notation: B images, C channels, H x W tokens, N = H W, E channels of a cell's tokens, M = E / 2
random features.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Unpack

import torch
from einops import rearrange
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.nn import functional as F

from vitdet.models.layers import NORM_EPS, LayerNorm
from vitdet.models.vit import BlockOptions, Size, build_blocks, init_linears, layer_of_block


class SmallSize(NamedTuple):
    """Constructor arguments of `ViTAESmall` for a named backbone."""

    dim: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    mlp_ratio: float
    widths: tuple[int, int, int]
    cell_dims: tuple[int, int]
    groups: int


SIZES = {"vitae_b": Size(768, 12, 12, (2, 5, 8, 11), 4.0)}
SMALL_SIZES = {"vitae_s": SmallSize(384, 14, 6, (2, 5, 8, 13), 3.0, (64, 64, 192), (96, 192), 96)}
CELL_NORM_EPS = 1e-5  # epsilon of the LayerNorms in the reduction cells
DROPOUT = 0.1  # dropout rate in the reduction cells; also hard-coded in the published code
EPSILON = 1e-8  # epsilon in the denominator of the linear attention


def conv(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Create a 3 x 3 convolution that divides height and width by `stride`."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, groups=groups)


def wide_branch(dim: int, hidden: int) -> nn.Sequential:
    """Create ViTAE-B's two convolutions with C / 4 groups; they keep the shape (B, C, H, W)."""
    return nn.Sequential(*_two_convs(dim, hidden, dim // 4))


def deep_branch(dim: int, hidden: int, groups: int) -> nn.Sequential:
    """Create ViTAE-S's branch of three convolutions; it keeps the shape (B, C, H, W)."""
    layers = _two_convs(dim, hidden, groups)
    layers += [nn.BatchNorm2d(dim), nn.SiLU(), conv(dim, dim, groups=groups), nn.SiLU()]
    return nn.Sequential(*layers)


def _two_convs(dim: int, hidden: int, groups: int) -> list[nn.Module]:
    first, second = conv(dim, hidden, groups=groups), conv(hidden, dim, groups=groups)
    return [first, nn.BatchNorm2d(hidden), nn.SiLU(), second]


def dilated_convs(
    inputs: int, width: int, kernel: int, stride: int, dilations: Sequence[int]
) -> nn.ModuleList:
    """Create one convolution per dilation: (B, C, H, W) -> (B, width, H / stride, W / stride)."""
    paddings = [math.ceil(((kernel - 1) * dilation + 1 - stride) / 2) for dilation in dilations]
    return nn.ModuleList(
        nn.Conv2d(inputs, width, kernel, stride=stride, dilation=dilation, padding=padding)
        for dilation, padding in zip(dilations, paddings, strict=True)
    )


class Performer(nn.Module):
    """Linear attention, addition of convolution outputs, and an MLP: (B, N, C) -> (B, N, E).

    phi(q) . phi(k) approximates exp(q . k), where phi(u) = exp(W u - |u|^2 / 2) / sqrt(M) with a
    fixed random matrix W (M, E). The rows of W are orthogonal and have the norm sqrt(M), as
    published (an unbiased estimate would need the norm sqrt(E)).
    """

    w: Tensor

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        features = dim // 2
        self.norm1 = LayerNorm(inputs, eps=CELL_NORM_EPS)
        self.kqv = nn.Linear(inputs, 3 * dim)
        w = nn.init.orthogonal_(torch.empty(features, dim)) * math.sqrt(features)
        self.register_buffer("w", w)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(DROPOUT)
        self.norm2 = LayerNorm(dim, eps=CELL_NORM_EPS)
        layers = nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.Dropout(DROPOUT)
        self.mlp = nn.Sequential(*layers)

    def forward(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Map tokens (B, N, C) and the convolutions' output (B, N, E) to (B, N, E)."""
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        y = v + self.dropout(self.proj(self.linear_attention(q, k, v))) + mixed
        return y + self.mlp(self.norm2(y))

    def linear_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention (B, N, E) of q, k and v (B, N, E), computed in float64.

        Autocast would convert float32 to float16 (range too small) or bfloat16 (too imprecise).
        """
        query, key = self.features(q), self.features(k)
        share = (query * key.sum(dim=1, keepdim=True)).sum(dim=-1, keepdim=True)
        return (query @ (key.transpose(1, 2) @ v.double()) / (share + EPSILON)).to(v.dtype)

    def features(self, u: Tensor) -> Tensor:
        """Return phi(u): (B, N, E) -> (B, N, M) in float64."""
        u, w = u.double(), self.w.double()
        return torch.exp(u @ w.T - u.square().sum(dim=-1, keepdim=True) / 2) / math.sqrt(len(w))


class ReductionCell(nn.Module):
    """Dilated convolutions, concatenated: (B, C, H, W) -> (B, E, H / stride, W / stride).

    If `dim` is 0, E is the number of concatenated channels. Otherwise, E is `dim`: a Performer maps
    the concatenated channels to E and adds the cell's input, convolved with `strides`.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        kernel: int,
        stride: int,
        dilations: Sequence[int],
        dim: int = 0,
        strides: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.prm = dilated_convs(inputs, width, kernel, stride, dilations)
        self.attn = self.pcm = None
        if dim:
            self.attn = Performer(width * len(dilations), dim)
            self.pcm = nn.Sequential(
                conv(inputs, width, strides[0]),
                nn.SiLU(),
                conv(width, width, strides[1]),
                nn.BatchNorm2d(width),
                nn.SiLU(),
                conv(width, dim, strides[2]),
                nn.SiLU(),
            )

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.cat([F.gelu(branch(x)) for branch in self.prm], dim=1)
        if self.attn is None or self.pcm is None:
            return maps
        tokens, mixed = (rearrange(y, "b c h w -> b (h w) c") for y in (maps, self.pcm(x)))
        return rearrange(self.attn(tokens, mixed), "b (h w) c -> b c h w", h=maps.shape[2])


class ViTAESmall(nn.Module):
    """ViTAE-S: images (B, 3, H, W) -> one map (B, C, H / 16, W / 16).

    Arguments that are not listed are those of `ViT`.

    Args:
        widths: channels per dilated convolution in each of the three cells; C is twice widths[2].
        cell_dims: output channels of the first two cells.
        groups: groups of the convolutions in the blocks.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        widths: Sequence[int],
        cell_dims: Sequence[int],
        groups: int,
        rel_pos_size: int | tuple[int, int],
        final_norm: bool,
        **options: Unpack[BlockOptions],
    ) -> None:
        super().__init__()
        self.out_channels, self.stride = dim, 16
        height, width = to_2tuple(rel_pos_size)
        grid = (height // self.stride, width // self.stride)
        cells = [
            ReductionCell(3, widths[0], 7, 4, (1, 2, 3, 4), cell_dims[0], (2, 2, 1)),
            ReductionCell(cell_dims[0], widths[1], 3, 2, (1, 2, 3), cell_dims[1], (2, 1, 1)),
            ReductionCell(cell_dims[1], widths[2], 3, 2, (1, 2)),
        ]
        self.reductions = nn.ModuleList(cells)
        self.num_layers = len(cells) + depth
        branch = partial(deep_branch, dim, int(options["mlp_ratio"] * dim), groups)
        self.blocks = build_blocks(dim, depth, grid, branch, **options)
        self.norm = LayerNorm(dim, eps=NORM_EPS) if final_norm else nn.Identity()
        init_linears(self)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for cell in self.reductions:
            x = cell(x)
        x = self.blocks(rearrange(x, "b c h w -> b h w c"))
        return rearrange(self.norm(x), "b h w c -> b c h w")

    def layer_of(self, name: str) -> int:
        """Return a parameter's layer for layer-wise learning-rate decay, as in the published run.

        The layer is s in reduction cell s, 3 + j in block j, and 18 otherwise. The log of the
        published run shows 17 layers, although the published config has 12.
        """
        if cell := re.match(r"reductions\.(\d+)\.", name):
            return int(cell.group(1))
        return layer_of_block(name, len(self.reductions), self.num_layers + 1)
