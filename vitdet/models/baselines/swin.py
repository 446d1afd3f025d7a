"""Swin Transformer: attention in windows that are shifted by half a window in every other block.

Liu et al. (arXiv:2103.14030); hyperparameters as in mmdet. timm's block is not used: it rolls a map
before padding it to multiples of the window, while the published detectors pad first. Padding is
needed: at 1024 pixels, maps have 256, 128, 64 and 32 cells per side, which are not multiples of 7.
Notation: B images, C channels, H x W tokens, K windows of N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from timm.layers import Mlp, PatchEmbed
from timm.models.swin_transformer import PatchMerging, WindowAttention
from torch import Tensor, nn
from torch.nn import functional as F

from vitdet.models.attention import join_windows, split_windows
from vitdet.models.layers import Blocks, DropPath, LayerNorm
from vitdet.models.vit import init_linears

BLOCKED = -100.0  # added to the logit of two tokens that share a window only because of the roll


class Size(NamedTuple):
    """Constructor arguments of a named backbone; channels double from stage to stage."""

    dim: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]


SIZES = {"swin_t": Size(96, (2, 2, 6, 2), (3, 6, 12, 24))}


def shift_mask(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Return the mask (K, N, N) that is added to the attention logits of a map rolled by `shift`.

    The mask is BLOCKED for two tokens that share a window only because of the roll, otherwise 0.
    Height and width are multiples of the window.
    """

    def parts(size: int) -> Tensor:
        # only the last window along an axis contains tokens from both ends of the map
        steps = torch.arange(size, device=device)
        return (steps >= size - window).long() + (steps >= size - shift).long()

    regions = parts(height)[:, None] * 3 + parts(width)
    windows = rearrange(regions, "(r h) (s w) -> (r s) (h w)", h=window, w=window)
    return BLOCKED * (windows[:, :, None] != windows[:, None, :]).float()


class Block(nn.Module):
    """Pre-norm block with window attention on a map rolled by `shift` cells up and left."""

    def __init__(self, *, dim: int, heads: int, window: int, shift: int, drop_path: float) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window_size=window)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = x + self.drop_path(self.attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend(self, x: Tensor) -> Tensor:
        """Attend in windows; zero padding on the right and bottom takes part in the attention."""
        height, width = x.shape[1:3]
        size, shift, mask = self.window, self.shift, None
        x = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
        padded = (x.shape[1], x.shape[2])
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
            mask = shift_mask(*padded, size, shift, x.device).to(x.dtype)
        windows = rearrange(split_windows(x, size), "b h w c -> b (h w) c")
        windows = rearrange(self.attn(windows, mask), "b (h w) c -> b h w c", h=size)
        return join_windows(windows, padded).roll((shift, shift), (1, 2))[:, :height, :width]


class Stage(nn.Module):
    """Patch merging (except in stage 0), then blocks: (B, H, W, C) -> (B, H / 2, W / 2, 2 C)."""

    def __init__(
        self, *, dim: int, heads: int, window: int, rates: Sequence[float], downsample: bool
    ) -> None:
        super().__init__()
        self.downsample = (
            PatchMerging(dim // 2, norm_layer=LayerNorm) if downsample else nn.Identity()
        )
        shifts = (0, window // 2)  # alternating
        self.blocks = Blocks(
            Block(dim=dim, heads=heads, window=window, shift=shifts[i % 2], drop_path=rate)
            for i, rate in enumerate(rates)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class Swin(nn.Module):
    """Swin Transformer: images (B, 3, H, W) -> maps of strides 4, 8, 16, 32, after LayerNorms.

    H and W must be multiples of 32. Drop path rates increase linearly from 0 to `drop_path`.
    """

    def __init__(
        self,
        *,
        dim: int,
        depths: Sequence[int],
        heads: Sequence[int],
        window_size: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.out_channels = tuple(dim * 2**i for i in range(len(depths)))
        self.strides = tuple(4 * 2**i for i in range(len(depths)))
        self.num_layers = 0  # no layer-wise learning-rate decay, see `layer_of`
        layout: dict[str, Any] = {"output_fmt": "NHWC", "strict_img_size": False}
        self.patch_embed = PatchEmbed(None, 4, embed_dim=dim, norm_layer=LayerNorm, **layout)
        rates = torch.linspace(0, drop_path, sum(depths), device="cpu").split(list(depths))
        stages = zip(self.out_channels, heads, (part.tolist() for part in rates), strict=True)
        self.layers = nn.ModuleList(
            Stage(dim=dim, heads=num, window=window_size, rates=part, downsample=i > 0)
            for i, (dim, num, part) in enumerate(stages)
        )
        self.norms = nn.ModuleList(LayerNorm(channels) for channels in self.out_channels)
        init_linears(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) to one map (B, C, ., .) per stage, finest first."""
        x, maps = self.patch_embed(images), []
        for stage, norm in zip(self.layers, self.norms, strict=True):
            x = stage(x)
            maps.append(rearrange(norm(x), "b h w c -> b c h w"))
        return maps

    def layer_of(self, name: str) -> int:
        """Return the last layer for every parameter: no layer-wise learning-rate decay."""
        return self.num_layers + 1
