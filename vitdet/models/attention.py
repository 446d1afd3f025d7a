"""Multi-head attention with decomposed relative positions, on a grid of tokens or in its windows.

Relative positions: Li et al., MViTv2 (arXiv:2112.01526); windows and padding: Detectron2's ViT.

With the bias q.Rh[qh - kh] + q.Rw[qw - kw], a logit is the inner product [q s, q Rh, q Rw] . [k,
onehot(kh), onehot(kw)]. One product of widened queries and keys thus computes all logits, without
an N x N bias. In ViTAE-Transformer/ViTDet, the bias has q s instead of q.

On a GPU, queries and keys are zero-padded to a width that is a multiple of 8, as fused kernels
require in half precision (PyTorch's sdp_utils.cpp). The half-precision kernels in `vitdet.kernels`
need neither widening nor copies of windows. Notation: B images (or windows), H x W tokens, N = H W,
C channels, h heads, d = C / h, s = d^-1/2, K tokens per side for which a table is stored.
"""

from __future__ import annotations

import torch
from einops import rearrange
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.nn import functional as F

from vitdet import kernels
from vitdet.kernels import attention as fused
from vitdet.models.layers import at_least_float32

# PyTorch's half-precision attention kernels require a head dimension that is a multiple of this
ALIGNMENT = 8


def split_windows(x: Tensor, size: int) -> Tensor:
    """Split (B, H, W, C) into (B * windows, size, size, C), zero-padded on the right and bottom."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
    return rearrange(x, "b (r h) (s w) c -> (b r s) h w c", h=size, w=size)


def join_windows(windows: Tensor, grid: tuple[int, int]) -> Tensor:
    """Invert `split_windows`: (B * windows, size, size, C) -> (B, H, W, C), grid = (H, W)."""
    size, (height, width) = windows.shape[1], grid
    rows, columns = -(-height // size), -(-width // size)
    x = rearrange(windows, "(b r s) h w c -> b (r h) (s w) c", r=rows, s=columns)
    return x[:, :height, :width]


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Split (B, H, W, 3 h d) into queries, keys and values (B, h, N, d)."""
    return rearrange(qkv, "b h w (three n d) -> three b n (h w) d", three=3, n=heads).unbind()


def join_heads(y: Tensor, height: int) -> Tensor:
    """Join the heads: (B, h, N, d) -> (B, H, W, h d)."""
    return rearrange(y, "b n (h w) d -> b h w (n d)", h=height)


def table_for(table: Tensor, size: int) -> Tensor:
    """Interpolate a table (2 K - 1, d) linearly to (2 size - 1, d) (Detectron2: get_rel_pos)."""
    if len(table) == 2 * size - 1:
        return table
    maps = at_least_float32(table).T[None]
    return F.interpolate(maps, size=2 * size - 1, mode="linear")[0].T


def relative_positions(table: Tensor, size: int) -> Tensor:
    """Return the table row of each query and key on an axis of `size` tokens: (size, size, d)."""
    # Query i uses rows i to i + size - 1, for the keys in reverse order. `unfold` is used because
    # the backward pass of indexing sorts the indices.
    return table_for(table, size).unfold(0, size, 1).flip(-1).transpose(1, 2)


def widen(
    q: Tensor, k: Tensor, rel_h: Tensor, rel_w: Tensor, height: int, width: int, scaled: bool
) -> tuple[Tensor, Tensor]:
    """Widen queries and keys (B, h, N, d) to (B, h, N, e), so that their products are the logits.

    e is d + H + W plus zero padding. With `scaled`, the tables rel_h and rel_w (2 K - 1, d) are
    applied to the scaled query.
    """
    scaled_q = q * q.shape[-1] ** -0.5
    grid = rearrange(scaled_q if scaled else q, "b n (h w) d -> b n h w d", h=height)
    rows = relative_positions(rel_h, height).to(q.dtype)
    columns = relative_positions(rel_w, width).to(q.dtype)
    along_h = torch.einsum("bnhwd,hkd->bnhwk", grid, rows).flatten(2, 3)
    along_w = torch.einsum("bnhwd,wkd->bnhwk", grid, columns).flatten(2, 3)
    eye_h, eye_w = (torch.eye(side, dtype=k.dtype, device=k.device) for side in (height, width))
    one_hot = torch.cat([eye_h.repeat_interleave(width, dim=0), eye_w.repeat(height, 1)], dim=1)
    padding = 0 if q.device.type == "cpu" else -(q.shape[-1] + height + width) % ALIGNMENT
    one_hot = F.pad(one_hot, (0, padding)).expand(*k.shape[:2], -1, -1)
    zeros = [q.new_zeros(1).expand(*q.shape[:3], padding)] if padding else []
    query = torch.cat([scaled_q, along_h.to(q.dtype), along_w.to(q.dtype), *zeros], dim=-1)
    return query, torch.cat([k, one_hot], dim=-1)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the attention (B, h, N, d) for queries and keys (B, h, N, e) and values (B, h, N, d).

    On a GPU, `scaled_dot_product_attention` is used; its fused kernels do not store the N x N
    logits. On a CPU, plain matrix products are used: with widened queries and N = 256, the backward
    pass of `scaled_dot_product_attention` took 1.8 times as long.
    """
    if query.device.type == "cpu":
        return (query @ key.transpose(-1, -2)).softmax(dim=-1, dtype=query.dtype) @ value
    return F.scaled_dot_product_attention(query, key, value, scale=1.0)


def in_half(x: Tensor) -> bool:
    """Return whether linear layers map x to half precision, e.g. with autocast on a GPU."""
    cast = x.is_cuda and x.dtype == torch.float32 and torch.is_autocast_enabled("cuda")
    return (torch.get_autocast_dtype("cuda") if cast else x.dtype).itemsize == 2


class Attention(nn.Module):
    """Multi-head attention with decomposed relative positions.

    The position tables are stored for `size` tokens per side, or (rows, columns), and interpolated
    for other grid sizes. With `scaled_rel_pos`, they are applied to the scaled query.
    """

    def __init__(
        self, *, dim: int, heads: int, size: int | tuple[int, int], scaled_rel_pos: bool
    ) -> None:
        super().__init__()
        rows, columns = to_2tuple(size)
        self.heads = heads
        self.scaled_rel_pos = scaled_rel_pos
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * rows - 1, dim // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * columns - 1, dim // heads))

    def forward(self, x: Tensor, window: int = 0) -> Tensor:
        """Attend over tokens (B, H, W, C) in windows of side `window` (0: over all tokens)."""
        height, width, channels = x.shape[1:]
        if kernels.enabled(x) and in_half(x) and fused.fits(width, window, channels // self.heads):
            return self.attend_fused(x, window)
        if window:
            return join_windows(self.attend_widened(split_windows(x, window)), (height, width))
        return self.attend_widened(x)

    def attend_fused(self, x: Tensor, window: int) -> Tensor:
        """Attend with the Triton kernels, on the unpadded grid."""
        height, width = x.shape[1:3]
        rel_h = table_for(self.rel_pos_h, window or height)
        rel_w = table_for(self.rel_pos_w, window or width)
        sizes = [height, width, self.heads, window, int(self.scaled_rel_pos)]
        y, _ = fused.attention(self.qkv(x).flatten(1, 2), self.qkv.bias, rel_h, rel_w, sizes)
        return self.proj(y.unflatten(1, (height, width)))

    def attend_widened(self, x: Tensor) -> Tensor:
        """Attend over all tokens, in plain torch."""
        height, width = x.shape[1:3]
        q, k, v = split_heads(self.qkv(x), self.heads)
        tables = self.rel_pos_h, self.rel_pos_w
        query, key = widen(q, k, *tables, height, width, self.scaled_rel_pos)
        return self.proj(join_heads(attend(query, key, v), height))
