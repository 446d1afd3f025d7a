"""Multi-head attention on a grid of tokens with decomposed relative positions, and windowing.

Relative positions: Li et al., MViTv2 (2112.01526); windows and padding: Detectron2's ViT.

The bias q.Rh[qh - kh] + q.Rw[qw - kw] is an inner product, [q s, q Rh, q Rw] . [k, onehot(kh),
onehot(kw)], so the logits are one product of widened queries and keys, without an N x N bias.
ViTAE-Transformer/ViTDet uses q s in the bias too: the same functions, with tables that are 1 / s
times as large, which learn more slowly.

On a GPU zeros widen queries and keys to a multiple of 8, which fused kernels require in half
precision (PyTorch's sdp_utils.cpp). In half precision on a GPU with `vitdet.kernels`, neither
widening nor copies of windows are needed.
Letters: B images (or windows), H x W tokens, N = H W, C channels, h heads, d = C / h, s = d^-1/2.
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

WIDTH = 8  # required multiple of the width of queries, keys and values in half precision: 16 bytes


def split_windows(x: Tensor, size: int) -> Tensor:
    """Split (B, H, W, C) into (B * windows, size, size, C), zero-padded on the right and bottom."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
    return rearrange(x, "b (r h) (s w) c -> (b r s) h w c", h=size, w=size)


def join_windows(windows: Tensor, grid: tuple[int, int]) -> Tensor:
    """Inverse of `split_windows`: (B * windows, size, size, C) -> (B, H, W, C), grid = (H, W)."""
    size, (height, width) = windows.shape[1], grid
    rows, columns = -(-height // size), -(-width // size)
    x = rearrange(windows, "(b r s) h w c -> b (r h) (s w) c", r=rows, s=columns)
    return x[:, :height, :width]


def table_for(table: Tensor, size: int) -> Tensor:
    """Return the table of relative positions (2 K - 1, d) for an axis of `size` tokens: (2 size -
    1, d).

    A table of another size is interpolated linearly (Detectron2: get_rel_pos).
    """
    if len(table) == 2 * size - 1:
        return table
    maps = at_least_float32(table).T[None]
    return F.interpolate(maps, size=2 * size - 1, mode="linear")[0].T


def relative_positions(table: Tensor, size: int) -> Tensor:
    """Return the table's rows for every query and key of an axis of `size` tokens: (size, size,
    d).
    """
    # Query i sees the rows from i on, the last of them for key 0. Windows of the table's rows have
    # a backward pass that sorts no indices.
    return table_for(table, size).unfold(0, size, 1).flip(-1).transpose(1, 2)


def in_half(x: Tensor) -> bool:
    """Return whether a linear layer computes this tensor in half precision on a GPU, directly or by
    autocast.
    """
    cast = x.is_cuda and x.dtype == torch.float32 and torch.is_autocast_enabled("cuda")
    return (torch.get_autocast_dtype("cuda") if cast else x.dtype).itemsize == 2


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention: queries (B, h, N, e), keys (B, h, N, e), values (B, h, N, d) -> (B, h, N, d).

    On a GPU by a fused kernel, which does not store the N x N logits: the memory-efficient one if e
    is not d, if both are multiples of 8. On a CPU by plain products: the fused fallback for widened
    queries is slower (its backward took 1.8 times as long at N = 256).
    """
    if query.device.type == "cpu":
        return (query @ key.transpose(-1, -2)).softmax(dim=-1, dtype=query.dtype) @ value
    return F.scaled_dot_product_attention(query, key, value, scale=1.0)


class Attention(nn.Module):
    """Attention among all tokens of a grid of `size` tokens per side, or (rows, columns).

    For another grid the tables are interpolated. `scaled_rel_pos`: apply relative positions to the
    scaled query.
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
        """(B, H, W, C) -> (B, H, W, C), within windows of `window` tokens per side, or (0) among
        all tokens.
        """
        height, width, channels = x.shape[1:]
        if kernels.enabled(x) and in_half(x) and fused.fits(width, window, channels // self.heads):
            return self.attend_fused(x, window)
        if window:
            return join_windows(self.attend_widened(split_windows(x, window)), (height, width))
        return self.attend_widened(x)

    def attend_fused(self, x: Tensor, window: int) -> Tensor:
        """Attention by the Triton kernels, on the unpadded grid."""
        height, width = x.shape[1:3]
        y = fused.attention(
            self.qkv(x).flatten(1, 2),
            self.qkv.bias,
            table_for(self.rel_pos_h, window or height),
            table_for(self.rel_pos_w, window or width),
            height=height,
            width=width,
            heads=self.heads,
            window=window,
            scaled=self.scaled_rel_pos,
        )
        return self.proj(y.unflatten(1, (height, width)))

    def attend_widened(self, x: Tensor) -> Tensor:
        """Attention in plain torch, among all tokens."""
        height, width = x.shape[1:3]
        q, k, v = rearrange(
            self.qkv(x), "b h w (three n d) -> three b n (h w) d", three=3, n=self.heads
        )
        query, key = self.with_positions(q, k, height, width)
        y = attend(query, key, v)
        return self.proj(rearrange(y, "b n (h w) d -> b h w (n d)", h=height))

    def with_positions(
        self, q: Tensor, k: Tensor, height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """Widen queries and keys (B, h, N, d) to (B, h, N, d + H + W, zero-padded), whose inner
        products are the logits.
        """
        scaled = q * q.shape[-1] ** -0.5
        grid = rearrange(scaled if self.scaled_rel_pos else q, "b n (h w) d -> b n h w d", h=height)
        rows = relative_positions(self.rel_pos_h, height).to(q.dtype)
        columns = relative_positions(self.rel_pos_w, width).to(q.dtype)
        rel_h = torch.einsum("bnhwd,hkd->bnhwk", grid, rows).flatten(2, 3)
        rel_w = torch.einsum("bnhwd,wkd->bnhwk", grid, columns).flatten(2, 3)
        one_hot_h = torch.eye(height, dtype=k.dtype, device=k.device).repeat_interleave(
            width, dim=0
        )
        one_hot_w = torch.eye(width, dtype=k.dtype, device=k.device).repeat(height, 1)
        spare = 0 if q.device.type == "cpu" else -(q.shape[-1] + height + width) % WIDTH
        zeros = [q.new_zeros(1).expand(*q.shape[:3], spare)] if spare else []
        one_hot = F.pad(torch.cat([one_hot_h, one_hot_w], dim=1), (0, spare)).expand(
            *k.shape[:2], -1, -1
        )
        query = torch.cat([scaled, rel_h.to(q.dtype), rel_w.to(q.dtype), *zeros], dim=-1)
        return query, torch.cat([k, one_hot], dim=-1)
