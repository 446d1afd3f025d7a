"""Plain Vision Transformer backbone: window attention, and global attention in a few blocks.

Li et al., Exploring Plain Vision Transformer Backbones for Object Detection (arXiv:2203.16527);
hyperparameters as in Detectron2, or, with `scaled_rel_pos` and `final_norm`, as in
ViTAE-Transformer/ViTDet.
Notation: B images, H x W tokens, C channels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict, Unpack

import torch
from einops import rearrange
from timm.layers import Mlp, to_2tuple, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from vitdet.models.attention import Attention
from vitdet.models.layers import NORM_EPS, Blocks, ConvNorm, DropPath, LayerNorm, init_conv


class Size(NamedTuple):
    """Constructor arguments of a named backbone."""

    dim: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]  # indices of the blocks with global attention
    mlp_ratio: float


SIZES = {
    "vit_tiny": Size(128, 4, 4, (1, 3), 4.0),
    "vit_b": Size(768, 12, 12, (2, 5, 8, 11), 4.0),
    "vit_l": Size(1024, 24, 16, (5, 11, 17, 23), 4.0),
    "vit_h": Size(1280, 32, 16, (7, 15, 23, 31), 4.0),
}


class PatchEmbed(nn.Module):
    """Patch embedding by a matrix product: (B, 3, H, W) -> (B, H / patch, W / patch, C)."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        patch = self.proj.kernel_size[0]
        patches = rearrange(images, "b c (h p) (w q) -> b h w (c p q)", p=patch, q=patch)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class ConvBottleneck(nn.Module):
    """Residual convolutions across windows, an alternative to global attention (Li et al.)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(dim, dim // 2, 1, norm=True, eps=NORM_EPS)
        self.conv2 = ConvNorm(dim // 2, dim // 2, 3, norm=True, eps=NORM_EPS)
        self.conv3 = ConvNorm(dim // 2, dim, 1, norm=True, eps=NORM_EPS)
        for block in (self.conv1, self.conv2, self.conv3):
            init_conv(block.conv)
        # The block starts as the identity.
        nn.init.zeros_(self.conv3.norm.get_parameter("weight"))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        y = F.gelu(self.conv1(x.permute(0, 3, 1, 2)))
        y = self.conv3(F.gelu(self.conv2(y)))
        return x + y.permute(0, 2, 3, 1)


class Block(nn.Module):
    """Pre-norm transformer block: (B, H, W, C) -> (B, H, W, C).

    `window` is the windows' side in tokens; 0: global attention, with position tables for `grid`.
    `branch` maps the block's input (B, C, H, W) to the same shape, in parallel with the attention.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        window: int,
        grid: int | tuple[int, int],
        drop_path: float,
        conv_after: bool,
        mlp_ratio: float,
        scaled_rel_pos: bool,
        branch: nn.Module | None,
    ) -> None:
        super().__init__()
        self.window = window
        self.norm1 = LayerNorm(dim, eps=NORM_EPS)
        size = window or grid
        self.attn = Attention(dim=dim, heads=heads, size=size, scaled_rel_pos=scaled_rel_pos)
        self.pcm = branch
        self.norm2 = LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)
        self.residual = ConvBottleneck(dim) if conv_after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.drop_path(self.attn(self.norm1(x), self.window))
        if self.pcm is not None:
            y = y + self.drop_path(self.pcm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        y = y + self.drop_path(self.mlp(self.norm2(y)))
        return self.residual(y)


class BlockOptions(TypedDict):
    """Arguments of a plain backbone that are passed to `build_blocks`."""

    heads: int
    global_blocks: Sequence[int]
    window_size: int
    drop_path: float
    mlp_ratio: float
    residual_blocks: Sequence[int]
    scaled_rel_pos: bool


def build_blocks(
    dim: int,
    depth: int,
    grid: tuple[int, int],
    branch: Callable[[], nn.Module] | None,
    *,
    heads: int,
    global_blocks: Sequence[int],
    window_size: int,
    drop_path: float,
    mlp_ratio: float,
    residual_blocks: Sequence[int],
    scaled_rel_pos: bool,
) -> Blocks:
    """Build blocks with linearly increasing drop path rates; `branch` is called once per block."""
    rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
    return Blocks(
        Block(
            dim=dim,
            heads=heads,
            window=0 if i in global_blocks else window_size,
            grid=grid,
            drop_path=rates[i],
            conv_after=i in residual_blocks,
            mlp_ratio=mlp_ratio,
            scaled_rel_pos=scaled_rel_pos,
            branch=branch() if branch else None,
        )
        for i in range(depth)
    )


def init_normal(weight: Tensor) -> None:
    """Initialize from a normal distribution with standard deviation 0.02, in place.

    Values are truncated to -0.12..0.12 (in the published code, to -2..2).
    """
    trunc_normal_(weight, std=0.02, a=-0.12, b=0.12)


def init_linears(module: nn.Module) -> None:
    """Initialize every linear layer: normal weights with standard deviation 0.02, biases 0."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            init_normal(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


class ViT(nn.Module):
    """Plain ViT: images (B, 3, H, W) -> one map (B, C, H / patch, W / patch).

    The stored position embedding has `pos_embed_grid` tokens per side. The relative positions of
    the global blocks are stored for images of `rel_pos_size` pixels per side. Both arguments may be
    pairs, height first; the positions are resized to an image's grid. `branch` creates the module
    that runs in parallel with a block's attention.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        patch_size: int,
        pos_embed_grid: int | tuple[int, int],
        rel_pos_size: int | tuple[int, int],
        final_norm: bool,
        branch: Callable[[], nn.Module] | None,
        **options: Unpack[BlockOptions],
    ) -> None:
        super().__init__()
        self.out_channels, self.stride, self.num_layers = dim, patch_size, depth
        height, width = to_2tuple(rel_pos_size)
        grid = (height // patch_size, width // patch_size)
        self.patch_embed = PatchEmbed(dim, patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, *to_2tuple(pos_embed_grid), dim))
        self.blocks = build_blocks(dim, depth, grid, branch, **options)
        self.norm = LayerNorm(dim, eps=NORM_EPS) if final_norm else nn.Identity()
        init_normal(self.pos_embed)
        init_linears(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.embed(images))
        return rearrange(self.norm(x), "b h w c -> b c h w")

    def embed(self, images: Tensor) -> Tensor:
        """Return the first block's input, including positions: (B, 3, H, W) -> (B, h, w, C)."""
        x = self.patch_embed(images)
        return x + resize_positions(self.pos_embed, (x.shape[1], x.shape[2]))

    def layer_of(self, name: str) -> int:
        """Return a parameter's layer for layer-wise decay (Detectron2: get_vit_lr_decay_rate).

        The layer is 0 before the blocks, i + 1 in block i, and depth + 1 after the blocks. Residual
        convolutions (`ConvBottleneck`) are in layer depth + 1.
        """
        if name.startswith(("pos_embed", "patch_embed.")):
            return 0
        return layer_of_block(name, 1, self.num_layers + 1)


def layer_of_block(name: str, first: int, rest: int) -> int:
    """Return first + i in block i; `rest` in residual convolutions and outside the blocks."""
    block = re.match(r"blocks\.(\d+)\.", name)
    return first + int(block.group(1)) if block and ".residual." not in name else rest


def resize_positions(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize (1, h, w, C) to (1, *grid, C), bicubic without antialiasing (Detectron2: get_abs_pos).

    As the result is linear in `pos_embed`, two small matrix products compute it; F.interpolate took
    6 ms per step of ViT-B on an H100. The products are in float64, unaffected by autocast and TF32.
    """
    if tuple(pos_embed.shape[1:3]) == grid:
        return pos_embed
    _, height, width, channels = pos_embed.shape
    rows = bicubic_matrix(height, grid[0], pos_embed.device)
    columns = bicubic_matrix(width, grid[1], pos_embed.device)
    tall = rows @ pos_embed.double().view(height, width * channels)
    return (columns @ tall.view(-1, width, channels)).to(pos_embed.dtype)[None]


def bicubic_matrix(size: int, wanted: int, device: torch.device) -> Tensor:
    """Return the matrix (wanted, size) float64 that interpolates `size` values to `wanted` ones."""
    # computed on the device, without synchronization
    one_hot = torch.eye(size, dtype=torch.float64, device=device)[None, :, :, None]
    resized = F.interpolate(one_hot, size=(wanted, 1), mode="bicubic", align_corners=False)
    return resized[0, :, :, 0].T
