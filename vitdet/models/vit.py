"""The plain Vision Transformer as a detection backbone: windowed attention, global in a few evenly spread blocks.

Li et al., Exploring Plain Vision Transformer Backbones for Object Detection (2203.16527); numbers as in detectron2.
Letters: B images, H x W tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from vitdet.models.attention import Attention, join_windows, split_windows
from vitdet.models.layers import NORM_EPS, ConvNorm


class Size(NamedTuple):
    """What the name of a backbone stands for; the blocks in `global_blocks` see the whole image."""

    dim: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]


SIZES = {
    "vit_tiny": Size(128, 4, 4, (1, 3)),
    "vit_b": Size(768, 12, 12, (2, 5, 8, 11)),
    "vit_l": Size(1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": Size(1280, 32, 16, (7, 15, 23, 31)),
}


class PatchEmbed(nn.Module):
    """Images (B, 3, H, W) -> tokens (B, H / patch, W / patch, C)."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, H / patch, W / patch, C); a matrix product of patches, as they do not overlap."""
        patch = self.proj.kernel_size[0]
        patches = rearrange(images, "b c (h p) (w q) -> b h w (c p q)", p=patch, q=patch)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class ConvBottleneck(nn.Module):
    """Residual convolutions that pass information between windows: the paper's alternative to global attention."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(dim, dim // 2, 1)
        self.conv2 = ConvNorm(dim // 2, dim // 2, 3)
        self.conv3 = ConvNorm(dim // 2, dim, 1)
        nn.init.zeros_(self.conv3.norm.weight)  # the block starts as the identity

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        y = F.gelu(self.conv1(x.permute(0, 3, 1, 2)))
        y = self.conv3(F.gelu(self.conv2(y)))
        return x + y.permute(0, 2, 3, 1)


class Block(nn.Module):
    """Pre-norm transformer block; `window` is the side of its windows in tokens, 0 for global attention."""

    def __init__(self, dim: int, heads: int, window: int, grid: int, drop_path: float, conv_after: bool) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, heads, window or grid)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)
        self.residual = ConvBottleneck(dim) if conv_after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = x + self.drop_path(self.attend(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return self.residual(x)

    def attend(self, x: Tensor) -> Tensor:
        """Attention over the windows, or over the whole grid."""
        if self.window == 0:
            return self.attn(x)
        return join_windows(self.attn(split_windows(x, self.window)), (x.shape[1], x.shape[2]))


class ViT(nn.Module):
    """Images (B, 3, H, W) -> one map (B, C, H / patch, W / patch).

    `pos_embed_grid`: tokens a side of the stored position embedding; `rel_pos_size`: pixels a side for which the
    global blocks' relative positions are stored. Both are resized to the image's grid.
    """

    def __init__(
        self, *, dim: int, depth: int, heads: int, global_blocks: Sequence[int], patch_size: int = 16,
        window_size: int = 14, drop_path: float = 0.0, pos_embed_grid: int = 14, rel_pos_size: int = 1024,
        residual_blocks: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.out_channels = dim
        self.stride = patch_size
        self.patch_embed = PatchEmbed(dim, patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, pos_embed_grid, pos_embed_grid, dim))
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(dim, heads, 0 if i in global_blocks else window_size, rel_pos_size // patch_size, rates[i],
                  i in residual_blocks)
            for i in range(depth)
        )
        trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H / patch, W / patch)."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return rearrange(x, "b h w c -> b c h w")

    def embed(self, images: Tensor) -> Tensor:
        """Tokens with their absolute positions, before the first block: (B, 3, H, W) -> (B, h, w, C)."""
        x = self.patch_embed(images)
        return x + resize_positions(self.pos_embed, (x.shape[1], x.shape[2]))


def resize_positions(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """(1, h, w, C) -> (1, *grid, C), bicubic without antialiasing (detectron2: get_abs_pos)."""
    if tuple(pos_embed.shape[1:3]) == grid:
        return pos_embed
    resized = F.interpolate(pos_embed.permute(0, 3, 1, 2), size=grid, mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1)
